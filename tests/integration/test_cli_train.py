"""``lightning-accel train`` from the words to the files it leaves."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from cli_calls import SMALL, call, folders
from omegaconf import OmegaConf

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:When using the `ThroughputMonitor`")


def write_callbacks(folder: Path) -> list[str]:
    """Write two options of the group ``callbacks``; return the flag that makes them known."""
    (folder / "callbacks").mkdir(parents=True)
    for name, duration in (("first", "00:01:00:00"), ("second", "00:02:00:00")):
        block = {name: {"_target_": "lightning.pytorch.callbacks.LambdaCallback"}}
        if name == "second":
            block = {name: {"_target_": "lightning.pytorch.callbacks.Timer", "duration": duration}}
        (folder / "callbacks" / f"{name}.yaml").write_text(yaml.safe_dump(block))
    return ["--config-dir", str(folder)]


def test_two_runs_leave_two_folders_with_equal_numbers(capsys):
    assert call("train", *SMALL) == 0
    assert call("train", *SMALL) == 0
    assert "test/accuracy" in capsys.readouterr().out
    first, second = (json.loads((f / "metrics.json").read_text())["metrics"] for f in folders("train"))
    for name in ("train/loss", "val/loss", "val/accuracy", "test/loss", "test/accuracy"):
        assert first[name] == second[name], name
    assert first["samples_per_second"] > 0.0


def test_saved_files_name_neither_secrets_nor_folders_of_this_machine(tmp_path):
    words = ["+secrets.api_key=hunter2", f"+where={tmp_path}/data"]
    assert call("train", *SMALL, "logger=[]", "test=false", *words) == 0
    (folder,) = folders("train")
    saved = OmegaConf.load(folder / "config.yaml")
    assert (saved.secrets.api_key, saved.where) == ("***", "./data")
    for path in folder.glob("*.*"):
        text = path.read_text()
        assert str(tmp_path) not in text, path
        assert "hunter2" not in text, path


def test_a_resumed_run_ends_where_an_uninterrupted_one_does():
    words = [*SMALL, "logger=[]", "test=false"]
    assert call("train", *words, "trainer.max_epochs=1") == 0
    last = folders("train")[0] / "checkpoints" / "last.ckpt"
    assert call("train", *words, f"ckpt_path={last}") == 0
    assert call("train", *words) == 0
    resumed, whole = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False) for folder in folders("train")[1:]
    )
    assert resumed["epoch"] == whole["epoch"] == 1
    for name, expected in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], expected), name


def test_a_sweep_ends_with_a_table_and_its_trade_off(tmp_path, capsys):
    assert call("train", "-m", "seed=1,2", *SMALL, "logger=[]", "test=false", "optimized_metric=val/accuracy") == 0
    out = capsys.readouterr().out
    (folder,) = folders("train-sweep")
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["overrides"].split()[0]) for row in rows] == [("0", "seed=1"), ("1", "seed=2")]
    assert rows[0]["val/loss"] != rows[1]["val/loss"]
    assert (folder / "trade_off.png").exists()
    assert "Pareto" in out
    assert str(tmp_path) not in (folder / "multirun.yaml").read_text()


def test_a_failing_job_does_not_take_the_table_of_the_others(tmp_path, capsys):
    others = [word for word in SMALL if not word.startswith("model.width")]
    assert call("train", "-m", "model.width=0,16", *others, "logger=[]", "test=false") == 2
    shown = capsys.readouterr()
    assert "model.width=16" in shown.out[shown.out.index("Pareto") :]
    assert "`width` must be an integer >= 1, got 0." in shown.err
    assert str(tmp_path) not in (folders("train-sweep")[0] / "multirun.yaml").read_text()


def test_callbacks_keep_the_order_of_the_list_and_can_be_taken_out(tmp_path, capsys):
    flag = write_callbacks(tmp_path / "own")
    assert call("train", *flag, "--cfg", "job", "callbacks=[second,first]") == 0
    assert list(yaml.safe_load(capsys.readouterr().out)["callbacks"]) == ["second", "first"]
    assert call("train", *flag, "--cfg", "job", "callbacks=[second,first]", "~callbacks.second") == 0
    assert list(yaml.safe_load(capsys.readouterr().out)["callbacks"]) == ["first"]
    assert call("train", *flag, *SMALL, "logger=[]", "test=false", "callbacks=[second,first]") == 0
    assert "Timer, LambdaCallback" in capsys.readouterr().out


def test_help_of_a_command_shows_its_groups_and_options(capsys):
    assert call("train", "--help") == 0
    out = capsys.readouterr().out
    assert "lightning-accel train [overrides]" in out
    assert "max_epochs: 5" in out
    assert "monitoring: checkpoint, device_stats" in out


def test_quick_help_says_what_hydras_own_does(tmp_path, capsys):
    texts = []
    for own in ([], ["--config-dir", str(tmp_path)]):  # configurations of the user's are listed by Hydra
        assert call("compare", *own, "--help", "trainer.max_epochs=7") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "max_epochs: 7" in texts[0]


def test_everything_that_watches_a_run_works_together(capsys):
    watching = "monitoring=[progress_bar,checkpoint,throughput,device_stats]"
    small = [word for word in SMALL if not word.startswith("monitoring")]
    assert call("train", *small, watching, "logger=[csv,tensorboard]", "+trainer.log_every_n_steps=1") == 0
    (folder,) = folders("train")
    with (folder / "csv" / "metrics.csv").open() as file:
        assert "val/accuracy" in next(csv.reader(file))
    assert list((folder / "tensorboard").glob("events*"))


MISTAKES = [
    (["callbacks=[rank_quantisation]"], "`rank_quantisation` is no option of the group `callbacks`. Did you mean"),
    (["model=mpl"], "`mpl` is no option of the group `model`. Did you mean `mlp`?"),
    (["experiment=nope"], "`nope` is no option of the group `experiment`."),
    (["calbacks=[rank_quantization]"], "there is no `calbacks`. Did you mean `callbacks`?"),
    (["callbacks=[rank_quantization]", "callbacks.rank_quantization.ratoi=3"], "Did you mean `ratio`?"),
    (["callbacks.rank_quantization.ratio=3"], "Choose it first: callbacks=[rank_quantization]"),
    (["callbacks.rank_quantisation.ratio=3"], "`rank_quantisation` is no option of the group `callbacks`"),
    (["monitoring.throughput.window_size=3"], "monitoring=[progress_bar,checkpoint,throughput]"),
    (["trainer.max_epoch=3"], "`trainer` has no `max_epoch`. Did you mean `max_epochs`"),
    (["trainer.precision=bf16-mixed"], "add it with +trainer.precision=bf16-mixed"),
    (["trainer.max_epochs=many"], "`trainer.max_epochs` must be Optional[int], got 'many'."),
    (["trainer.accelerator=nothing"], "`trainer` (lightning.pytorch.Trainer): "),
    (["model.width=0"], "`model` (lightning_accel.zoo.MLP): `width` must be an integer >= 1, got 0."),
    (["+model.widht=3"], "`model.widht`: lightning_accel.zoo.MLP takes no `widht`. Did you mean `width`"),
    (["model._target_=nowhere.Model"], "`model._target_` names nowhere.Model, which can not be imported"),
    (["model._target_=fractions.Fraction", "~model.width"], "`model"),
    (["callbacks=[a"], "`callbacks=[a` can not be read"),
    (["ckpt_path=none.ckpt"], "`ckpt_path` must be a checkpoint file, got none.ckpt"),
    (["optimized_metric=val/acuracy", *SMALL, "monitoring=[]", "test=false"], "Did you mean `val/accuracy`"),
    (["hydra/sweeper=opptuna"], "`opptuna` is no option of the group `hydra/sweeper`"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_mistake_is_explained_in_one_message(words, message, capsys):
    assert call("train", "logger=[]", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("lightning-accel train: ")
    assert message in err
    assert "Traceback" not in err


def test_an_unwritable_folder_is_a_failure_with_a_way_out(capsys):
    Path("file").write_text("")
    assert call("train", "paths.root_dir=file") == 1
    assert "choose a folder you may write, paths.root_dir=FOLDER" in capsys.readouterr().err


def test_a_failing_model_is_a_failure_and_shows_its_traceback_on_demand(monkeypatch, capsys):
    words = [*SMALL, "logger=[]", "model.in_features=3"]
    assert call("train", *words) == 1
    err = capsys.readouterr().err
    assert "lightning-accel train: ValueError: `x` must hold 3" in err
    assert "Traceback" not in err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="must hold 3"):
        call("train", *words)
