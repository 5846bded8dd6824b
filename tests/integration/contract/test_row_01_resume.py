"""Row 1: interrupted and resumed equals uninterrupted, bit for bit, mid-epoch checkpoints included."""

import pytest
from accelerators import ACCELERATORS, cases
from contract_runs import assert_equal_modules, assert_equal_optimizers, fit
from lightning.pytorch.callbacks import ModelCheckpoint

BATCHES_PER_EPOCH = 6


@pytest.mark.parametrize("step", [6, 9, 12, 16], ids=lambda step: f"step{step}")
@pytest.mark.parametrize("entry", cases())
def test_resumed_run_equals_uninterrupted_run(entry, step, tmp_path):
    every_step = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, whole_trainer = fit(entry, tmp_path, callbacks=[*entry.callbacks(), every_step])
    assert entry.acted(whole)

    ckpt = tmp_path / "ckpt" / f"step={step}.ckpt"
    resumed, resumed_trainer = fit(entry, tmp_path / "resumed", ckpt_path=ckpt)

    assert resumed_trainer.global_step == whole_trainer.global_step == entry.epochs * BATCHES_PER_EPOCH
    assert_equal_modules(whole, resumed, tolerance=entry.resume_tolerance)
    assert_equal_optimizers(whole_trainer, resumed_trainer, tolerance=entry.resume_tolerance)


@pytest.mark.parametrize("step", [6, 9], ids=lambda step: f"step{step}")
def test_control_plain_trainer_resumes_exactly(step, tmp_path):
    entry = ACCELERATORS[0]
    every_step = ModelCheckpoint(dirpath=tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, whole_trainer = fit(entry, tmp_path, callbacks=[every_step], strategy="auto")
    ckpt = tmp_path / "ckpt" / f"step={step}.ckpt"
    resumed, resumed_trainer = fit(entry, tmp_path / "resumed", callbacks=[], ckpt_path=ckpt, strategy="auto")
    assert_equal_modules(whole, resumed)
    assert_equal_optimizers(whole_trainer, resumed_trainer)
