"""What a cold start imports: help next to nothing, `train` little that a plain script does not."""

import json
import subprocess
import sys

import pytest
from cli_calls import call, folders

STOP = """
import os, sys
from lightning.pytorch import Callback

class Stop(Callback):
    def on_train_batch_start(self, *_):
        print("imported", *sorted({name.partition(".")[0] for name in sys.modules}), flush=True)
        os._exit(0)
"""
PLAIN = """
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning_accel.zoo import MLP, Digits
from stop import Stop

seed_everything(1, workers=True)
callbacks = [RichProgressBar(), ModelCheckpoint("plain", save_last=True), Stop()]
Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, logger=CSVLogger("plain")).fit(MLP(), Digits())
"""


def imported(*words):
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("imported"))
    return set(line.split()[1:]) - set(sys.stdlib_module_names)


@pytest.mark.slow
def test_up_to_its_first_step_train_imports_what_a_plain_script_does_and_hydra(tmp_path):
    (tmp_path / "stop.py").write_text(STOP)
    (tmp_path / "plain.py").write_text(PLAIN)
    plain = imported("plain.py")
    train = imported("-m", "lightning_accel", "train", "+callbacks.stop._target_=stop.Stop", "trainer.accelerator=cpu")
    mine = {name for name in train - plain if not name.startswith("__editable__")}
    assert mine <= {"hydra", "hydra_plugins", "omegaconf", "antlr4", "yaml", "lightning_accel"}


def test_help_imports_neither_torch_nor_hydra():
    show = "import sys; from lightning_accel.cli import main; main(['--help'])"
    heavy = imported("-c", f"{show}; print('imported', *{{name.partition('.')[0] for name in sys.modules}})")
    assert not heavy & {"torch", "lightning", "hydra", "omegaconf", "numpy", "matplotlib"}


@pytest.mark.slow
def test_the_bench_of_cold_starts_holds_them_against_their_limits():
    assert call("bench", "cli", "quick=true") == 0
    (folder,) = folders("bench")
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == [
        "lightning-accel --help",
        "lightning-accel train --help",
        "lightning-accel train",
        "lightning-accel train callbacks=[rank_quantization,l1inf_projection]",
    ]
    for row in rows[:2]:
        assert row["seconds"]["0.5 s"] == 0.5
        assert row["ratio"]["median"] == pytest.approx(0.5 / row["seconds"][row["variant"]])
    for row in rows[2:]:
        script = row["seconds"]["a plain script and 1 s"] - 1.0
        assert f"a plain script takes {script:.2f} s" in row["note"]
        assert row["reached"] == (row["seconds"][row["variant"]] <= script + 1.0)
