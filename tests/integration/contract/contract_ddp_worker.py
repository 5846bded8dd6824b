"""One of two processes of a DDP run, with torchrun's environment."""

import os
from pathlib import Path

import torch


def fit_as_a_rank(name: str, folder: Path) -> None:
    """Fit an entry; write ``rank0.pt`` or ``rank1.pt`` with the parameters, or the error that refused the run."""
    from accelerators import by_name
    from contract_models import ContractModule
    from contract_runs import trainer
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    entry = by_name(name)
    rank = int(os.environ["LOCAL_RANK"])
    module = ContractModule(entry.name)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * rank)  # each process starts elsewhere: DDP must send rank 0's values
    result: dict[str, object] = {}
    try:
        strategy = DDPStrategy(process_group_backend="gloo")
        runner = trainer(folder, entry.callbacks(), devices=2, strategy=strategy, max_epochs=entry.epochs)
        data = entry.data()
        runner.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
        result["state"] = module.state_dict()
        result["acted"] = entry.acted(module)
        result["in optimizer"] = {id(p) for o in runner.optimizers for g in o.param_groups for p in g["params"]} == {
            id(p) for p in module.parameters()
        }
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    torch.save(result, folder / f"rank{rank}.pt")
