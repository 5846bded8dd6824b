"""What the words on the command line become, and what is shown of them."""

import errno
import json
import os
import re

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from lightning_accel.cli import COMMANDS, main
from lightning_accel.cli.compose import compose, instantiate, targets
from lightning_accel.cli.errors import UsageError, did_you_mean, explain
from lightning_accel.cli.launch import split_flags
from lightning_accel.cli.results import cleaned, cleaned_override
from lightning_accel.cli.words import OWN_COMMAND_VARIABLE, NotAnOverrideError, hydra_overrides


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command_with_an_example(words, capsys):
    main(words)
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"lightning-accel {command.example}" in out
        assert command.example.startswith(name)


def test_misspelt_command_is_corrected(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "Did you mean `lightning-accel train`?" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    import lightning_accel

    main(["--version"])
    assert capsys.readouterr().out.strip() == f"lightning-accel {lightning_accel.__version__}"


def test_own_words_become_overrides(monkeypatch):
    monkeypatch.delenv(OWN_COMMAND_VARIABLE, raising=False)
    assert hydra_overrides("compare", ["--aa", "seed=2"]) == ["compare.aa=true", "seed=2"]
    assert hydra_overrides("bench", ["low_rank", "quick=true"]) == ["suite=low_rank", "quick=true"]
    assert hydra_overrides("bench", ["quick=true"]) == ["quick=true"]
    assert hydra_overrides("train", ["-h"]) == ["--help"]
    assert OWN_COMMAND_VARIABLE not in os.environ


def test_a_command_behind_dashes_is_kept_word_for_word(monkeypatch):
    monkeypatch.setenv(OWN_COMMAND_VARIABLE, "")
    command = ["python", "-c", "print('${x}', [1])", "--", "a=b"]
    assert hydra_overrides("run", ["callbacks=[x]", "--", *command]) == ["callbacks=[x]"]
    assert json.loads(os.environ[OWN_COMMAND_VARIABLE]) == command


def test_flags_may_stand_anywhere():
    flags, plain = split_flags(["seed=1", "--config-dir", "conf", "-m", "model=mlp", "--cfg", "job"])
    assert flags == ["--config-dir", "conf", "-m", "--cfg", "job"]
    assert plain == ["seed=1", "model=mlp"]


def test_secrets_and_machine_folders_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shown = cleaned(
        {
            "logger": {"api_key": "abc", "tracking_uri": "https://me:abc@host/x", "max_tokens": 3},
            "paths": [f"{tmp_path}/data", f"{tmp_path}/home/cache", "/elsewhere"],
            "token": None,
        }
    )
    assert shown == {
        "logger": {"api_key": "***", "tracking_uri": "https://***@host/x", "max_tokens": 3},
        "paths": ["./data", "./home/cache", "/elsewhere"],
        "token": None,
    }
    monkeypatch.chdir("/")
    assert cleaned(f"{tmp_path}/home/cache") == "~/cache"
    assert cleaned_override("logger.wandb.api_key=abc") == "logger.wandb.api_key=***"
    assert cleaned_override("~callbacks.x") == "~callbacks.x"


def test_close_names_come_first_and_long_lists_are_cut():
    assert did_you_mean("ratoi", ["ratio", "energy"]) == "Did you mean `ratio`? There are: energy, ratio."
    assert did_you_mean("ratoi", ["ratio", *(f"other_{i}" for i in range(20))]) == "Did you mean `ratio`?"
    assert did_you_mean("x", []) == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("so not"), 2, "so not"),
        (OSError(errno.ENOSPC, "No space left on device", "x.ckpt"), 1, "Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "choose a folder you may write"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "No such file: x"),
        (RuntimeError("the net is torn"), 1, "RuntimeError: the net is torn"),
    ],
)
def test_every_failure_has_a_message_and_a_code(error, code, words):
    message, actual = explain(error)
    assert actual == code
    assert words in message


def test_a_value_that_is_needed_is_asked_for():
    cfg = OmegaConf.create({"ckpt": "???"})
    with pytest.raises(Exception, match="ckpt") as caught:
        _ = cfg.ckpt
    message, code = explain(caught.value)
    assert (message, code) == ("`ckpt` is needed and has no default: add ckpt=VALUE.", 2)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "nowhere.Thing"}, r"`part._target_` names nowhere.Thing, which can not be imported"),
        ({"_target_": "torch.nn.Linear", "in_features": 2, "out_featurs": 2}, r"Did you mean `out_features`"),
        ({"_target_": "lightning.pytorch.callbacks.Timer", "interval": "never"}, r"`part` \(.*Timer\): .*never"),
        ({"_target_": "torch.nn.Linear", "in_features": "two", "out_features": 2}, r"must be int, got 'two'"),
        ({"_target_": "torch.nn.Linear", "in_features": 2.5, "out_features": 2}, r"must be int, got 2.5"),
        ({"_target_": "lightning.pytorch.Trainer", "max_epochs": 0.5}, r"must be .*int.*, got 0.5"),
        ({"_target_": "lightning.pytorch.loggers.CometLogger"}, r"needs something that is not installed: .*comet"),
    ],
)
def test_what_can_not_be_built_is_a_usage_error(node, message):
    with pytest.raises(UsageError, match=message):
        instantiate(OmegaConf.create(node), name="part")


def test_a_number_without_a_fraction_is_an_integer_however_it_is_written():
    layer = instantiate(OmegaConf.create({"_target_": "lightning.pytorch.Trainer", "max_steps": 1e3}), name="trainer")
    assert layer.max_steps == 1000


def test_an_error_without_words_shows_the_line_that_failed():
    with pytest.raises(AssertionError) as caught:
        assert [] == [1], ""
    caught.value.args = ()
    assert explain(caught.value)[0].startswith("AssertionError: `assert [] == [1]")


def test_a_nested_mistake_is_named_where_it_stands():
    node = OmegaConf.create(
        {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Flatten", "start": 1}]}
    )
    with pytest.raises(UsageError, match=r"takes no `start`"):
        instantiate(node, name="model")


def test_failures_that_are_no_mistake_come_out_as_they_are(tmp_path):
    node = OmegaConf.create({"_target_": "os.listdir", "path": str(tmp_path / "none")})
    with pytest.raises(FileNotFoundError):
        instantiate(node, name="part")


def test_targets_are_found_at_any_depth():
    assert list(targets({"_target_": "a.B", "x": [{"y": {"_target_": "c.D"}}], "z": None})) == ["a.B", "c.D"]


def test_compose_works_inside_a_program():
    cfg = compose("train", ["seed=7", "callbacks=[rank_quantization]"])
    assert cfg.seed == 7
    assert list(cfg.callbacks) == ["rank_quantization"]


def test_compose_works_inside_a_hydra_application():
    with initialize_config_module("lightning_accel.conf", version_base="1.3"):
        application = GlobalHydra.instance().hydra
        assert compose("compare", ["experiment=mlp_digits", "seed=7"]).seed == 7
        assert GlobalHydra.instance().hydra is application
        with pytest.raises(ConfigCompositionException):
            compose("compare", ["no_such_key=1"])
        assert GlobalHydra.instance().hydra is application
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["--epochs", "3"], "write trainer.max_epochs=3"),
        (["--max_epochs=3"], "write trainer.max_epochs=3"),
        (["--max-epoch", "3"], "write trainer.max_epochs=3"),
        (["--learning-rate", "0.1", "seed=1"], "write model.lr=0.1"),
        (["--gpus"], "write trainer.devices=VALUE"),
        (["--frobnicate", "seed=1"], "write frobnicate=VALUE (lightning-accel train --help lists the keys)"),
    ],
)
def test_a_flag_is_answered_with_the_override_to_write(words, written, capsys):
    with pytest.raises(NotAnOverrideError, match=re.escape(written)):
        hydra_overrides("train", words)
    with pytest.raises(SystemExit) as end:
        main(["train", *words])
    assert end.value.code == 2
    assert written in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["-m", "seed=1,2"], ["--cfg", "job"], ["--config-dir", "here", "seed=1"], ["~callbacks"], ["a=-1", "-1"]]
)
def test_flags_of_hydra_and_overrides_pass(words):
    assert hydra_overrides("train", words) == words


@pytest.mark.parametrize(
    "words",
    [
        ["callbacks=[x]", "--", "python", "train.py", "--epochs", "3", "a=1"],
        ["callbacks=[x]", "python", "train.py", "--epochs", "3", "a=1"],
    ],
)
def test_run_parts_the_users_command_with_and_without_dashes(words, monkeypatch):
    monkeypatch.delenv(OWN_COMMAND_VARIABLE, raising=False)
    assert hydra_overrides("run", words) == ["callbacks=[x]"]
    assert json.loads(os.environ.pop(OWN_COMMAND_VARIABLE)) == ["python", "train.py", "--epochs", "3", "a=1"]


def test_results_folders_become_a_list():
    assert hydra_overrides("evidence", ["a b", "c", "seed=1"]) == ["seed=1", "folders=['a b','c']"]
