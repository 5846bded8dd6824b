"""Row 8: modules and Trainers of ``pytorch_lightning`` work as those of ``lightning.pytorch``."""

import pytest
import pytorch_lightning
import torch
from accelerators import cases
from contract_models import ContractModule, OtherContractModule, loader
from contract_runs import QUIET, Witness, assert_equal_modules, fit


@pytest.mark.parametrize("entry", cases())
def test_pytorch_lightning_trains_to_the_same_weights(entry, tmp_path):
    expected, _ = fit(entry, tmp_path, module=ContractModule(entry.name))
    module = OtherContractModule(entry.name)
    runner = pytorch_lightning.Trainer(
        **QUIET,
        default_root_dir=tmp_path / "other",
        enable_checkpointing=False,
        callbacks=[*entry.callbacks(), Witness()],
        strategy=entry.other_strategy(),
        max_epochs=entry.epochs,
    )
    torch.manual_seed(1)
    runner.fit(module, loader(entry.data()), loader(entry.data()))
    assert entry.acted(module)
    assert_equal_modules(expected, module, tolerance=entry.resume_tolerance)
