"""What only shows in processes of their own: signals, exit codes, light start-up, unchanged scripts."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from cli_calls import SMALL, folders

CLI = [sys.executable, "-m", "lightning_accel.cli"]
DEADLINE = 120  # seconds; a hang fails, a slow machine does not

SCRIPT = """
import importlib, logging, sys
pl = importlib.import_module(sys.argv[1])
from lightning_accel.zoo import Digits, MLP

class Note(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        logging.getLogger("lightning_accel.callbacks").info("heard")
        print("has", *[type(c).__name__ for c in trainer.callbacks])

quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
own = [pl.callbacks.Timer()] if sys.argv[2] == "own" else []
trainer = pl.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, callbacks=[*own, Note()], **quiet)
if sys.argv[1] == "lightning.pytorch":
    trainer.fit(MLP(width=16, depth=1), datamodule=Digits())
else:
    print("has", *[type(c).__name__ for c in trainer.callbacks])
sys.exit(7)
"""


@pytest.fixture
def timer_option():
    Path("own/callbacks").mkdir(parents=True)
    Path("own/callbacks/timer.yaml").write_text("timer:\n  _target_: lightning.pytorch.callbacks.Timer\n")
    return ["--config-dir", "own", "callbacks=[timer]"]


def start(*words, **settings):
    return subprocess.run([*CLI, *words], capture_output=True, text=True, timeout=DEADLINE, check=False, **settings)


@pytest.mark.parametrize(("distribution", "own"), [("lightning.pytorch", "none"), ("pytorch_lightning", "own")])
def test_run_adds_callbacks_to_an_unchanged_script_once(timer_option, distribution, own):
    Path("script.py").write_text(SCRIPT)
    done = start("run", *timer_option, "--", sys.executable, "script.py", distribution, own)
    assert done.returncode == 7, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("has")]
    assert line.split().count("Timer") == 1
    assert ("heard" in done.stderr) == (distribution == "lightning.pytorch")  # the other makes no fit
    assert ("already has its own Timer" in done.stderr) == (own == "own")


def test_the_same_script_alone_gets_nothing():
    Path("script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "lightning.pytorch", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 7, done.stderr
    assert "Timer" not in done.stdout
    assert "heard" not in done.stderr


def test_run_passes_signals_on_and_says_when_no_trainer_was_made(timer_option):
    waits = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("up", flush=True)
signal.pause()
"""
    command = [*CLI, "run", *timer_option, "--", sys.executable, "-c", waits]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 5
    assert "no Trainer took the callbacks" in err


@pytest.mark.parametrize(
    ("ci", "option", "code"),
    [("", [], 0), ("true", [], 1), ("true", ["run.require=false"], 0), ("", ["run.require=true"], 1)],
)
def test_run_fails_where_nothing_took_its_callbacks_and_that_is_required(timer_option, ci, option, code):
    folder = ["paths.output_dir=new/folder"]
    words = ["run", *timer_option, *folder, *option, sys.executable, "-c", "pass"]  # without dashes
    done = start(*words, env=os.environ | {"CI": ci})
    assert done.returncode == code, done.stderr
    assert "no Trainer took the callbacks" in done.stderr
    assert Path("new/folder/config.yaml").exists()


def test_run_says_that_nothing_took_its_callbacks_also_where_a_run_before_it_was_luckier(timer_option):
    Path("again").mkdir()
    Path("again/trainers.txt").write_text("timer\n")
    done = start("run", *timer_option, "paths.output_dir=again", "run.require=true", sys.executable, "-c", "pass")
    assert done.returncode == 1, done.stderr
    assert "no Trainer took the callbacks" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["callbacks=[timer]"], "There is no command."),
        (["callbacks=[timer]", "--", "no-such-program"], "`no-such-program` was not found"),
        (["callbacks=[timer]", "--", "own/callbacks/timer.yaml"], "Name the program that runs it: -- python FILE"),
        (["--", "true"], "No callback is chosen"),
        (["callbacks=[timer]", "+callbacks.timer.durration=1", "--", "true"], "Did you mean `duration`"),
    ],
)
@pytest.mark.usefixtures("timer_option")
def test_run_explains_what_is_missing(words, message, capsys, monkeypatch):
    from cli_calls import call

    monkeypatch.delenv("LIGHTNING_ACCEL_RUN_COMMAND", raising=False)
    assert call("run", "--config-dir", "own", *words) == 2
    os.environ.pop("LIGHTNING_ACCEL_RUN_COMMAND", None)
    assert message in capsys.readouterr().err


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on():
    small = [word for word in SMALL if not word.startswith("debug")]
    words = [*small, "logger=[]", "trainer.max_epochs=100000", "monitoring=[checkpoint,progress_bar]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    first_epochs = textwrap.dedent("""
        import os, sys
        import lightning.pytorch as pl
        class Tell(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch == 1:
                    print("training", flush=True)
    """)
    Path("tell.py").write_text(first_epochs)
    environment["PYTHONPATH"] = os.getcwd()
    words.append("+callbacks.tell._target_=tell.Tell")
    with subprocess.Popen(
        [*CLI, "train", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if "training" in line:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, err
    (kept,) = re.findall(r"Interrupted\. Kept (\S+): go on with ckpt_path=", err)
    assert Path(kept).is_file()
    assert "Traceback" not in err


def test_help_and_mistakes_do_not_wait_for_torch():
    for words, code in ((["--help"], 0), (["trian"], 2), (["train", "--help"], 0), (["train", "callbacks=[x]"], 2)):
        command = [sys.executable, "-X", "importtime", "-m", "lightning_accel.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert done.returncode == code, done.stderr
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
        assert not imported & {"torch", "lightning", "matplotlib", "numpy"}, words


@pytest.mark.slow
def test_each_job_of_a_sweep_can_be_distributed():
    words = [*SMALL, "logger=[]", "test=false", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    done = start("train", "-m", "seed=1,2", *words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(list(folders("train-sweep")[0].glob("*/metrics.json"))) == 2
