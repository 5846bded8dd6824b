"""One of two DDP processes: the rank in the arguments measures low rank as faster, the other one as slower."""

import os
from pathlib import Path

import torch


def fit_with_a_clock(says_faster: str, folder: Path) -> None:
    """Fit; write ``rank0.pt`` or ``rank1.pt`` with the ranks and the parameters."""
    from contract_models import ContractModule, classification_data
    from contract_runs import trainer
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    from lightning_accel.callbacks import RankQuantization, SequentialFreezing
    from lightning_accel.callbacks.rank_quantization import step_times
    from lightning_accel.low_rank import low_rank_layers

    rank = os.environ["LOCAL_RANK"]
    low_rank_seconds = 1.0 if rank == says_faster else 10.0

    def clock(candidates, *, rounds, **_):
        for step in candidates.values():
            step()
        return {name: [5.0 if name == "dense" else low_rank_seconds] * rounds for name in candidates}

    step_times.time_interleaved = clock
    result: dict[str, object] = {}
    try:
        module = ContractModule("rank_quantization")
        callbacks = [RankQuantization(method="fixed", when=1, max_overhead=100.0), SequentialFreezing()]
        runner = trainer(folder, callbacks, devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=4)
        data = classification_data()
        runner.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
        result["ranks"] = {name: layer.ranks for name, layer in low_rank_layers(module).items()}
        result["state"] = module.state_dict()
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    torch.save(result, folder / f"rank{rank}.pt")
