import dataclasses
import getpass
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import compare_fits as fits
import pytest
from rich.console import Console

from lightning_accel.cli.compare.arms import ConfiguredFit, arms, fingerprint
from lightning_accel.cli.compare.command import check, compare, shown_messages, usage_errors
from lightning_accel.cli.compare.peers import FreezeBottomHalf
from lightning_accel.cli.compare.progress import RunProgress
from lightning_accel.cli.compose import compose
from lightning_accel.cli.errors import UsageError, parameters
from lightning_accel.evidence.measured_runs.ledger import RunLedger
from lightning_accel.evidence.measured_runs.pairs import Step
from lightning_accel.evidence.measured_runs.runs import Run
from lightning_accel.evidence.measured_runs.workers import WorkerError

PLANTED = ["callbacks=[]", "+callbacks.freeze._target_=lightning_accel.cli.compare.peers.FreezeBottomHalf"]
SMALL = ["model.width=64", "model.depth=3", "trainer.max_epochs=2", "trainer.accelerator=cpu"]


def _config(folder, *overrides):
    return compose("compare", [*SMALL, *PLANTED, f"paths.output_dir={folder}", *overrides])


def _command(folder, *overrides):
    words = [sys.executable, "-m", "lightning_accel.cli", "compare", *SMALL, *PLANTED, f"hydra.run.dir={folder}"]
    return [*words, *overrides]


def _rows(folder):
    return json.loads((folder / "rows.json").read_text())


@pytest.mark.slow
def test_compare_measures_reports_and_resumes(tmp_path, capsys):
    folder = tmp_path / "out"
    ratio = compare(_config(folder, "compare.pairs=1", "compare.price_per_hour=2"))
    assert ratio > 0
    shown = capsys.readouterr().out
    assert "Undecided: 1 pair is too few" in shown
    assert "pair 1 of 1" in shown
    for name in ("runs.jsonl", "rows.json", "rows.csv", "accuracy_against_time.png", "report.html", "config.yaml"):
        assert (folder / name).stat().st_size > 0
        assert name in shown or name == "config.yaml"
    rows = _rows(folder)
    assert [(r["arm"], r["pair"]) for r in rows[:2]] == [("plain", -1), ("accelerated", -1)]
    assert {r["arm"] for r in rows[2:]} == {"plain", "accelerated"}
    by_arm = {r["arm"]: r for r in rows[2:]}
    assert by_arm["plain"]["seed"] == by_arm["accelerated"]["seed"] == 1
    assert by_arm["accelerated"]["flops"] < by_arm["plain"]["flops"]  # the frozen half needs no weight gradients
    assert by_arm["plain"]["fit_seconds"] / by_arm["accelerated"]["fit_seconds"] == pytest.approx(ratio)

    page = (folder / "report.html").read_text()
    assert all(f"{r['fit_seconds']:.3f} s" in page for r in rows)
    body = re.sub(r"base64,[^\"]+", "", page.partition("</style>")[2])
    for text in (body, (folder / "rows.json").read_text(), (folder / "rows.csv").read_text()):
        assert str(tmp_path) not in text
        assert not re.search(rf"\b({re.escape(platform.node())}|{re.escape(getpass.getuser())})\b", text)

    with pytest.raises(UsageError, match="holds the rows of a former comparison"):
        compare(_config(folder))
    with pytest.raises(UsageError, match="holds rows of other settings"):
        compare(_config(folder, "compare.resume=true", "model.width=16"))
    assert _rows(folder) == rows
    compare(_config(folder, "compare.resume=true", "compare.pairs=2"))
    more = _rows(folder)
    assert more[: len(rows)] == rows
    assert sorted((r["arm"], r["pair"]) for r in more[len(rows) + 2 :]) == [("accelerated", 1), ("plain", 1)]


@pytest.mark.slow
def test_plain_arm_against_itself_and_missing_packages(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    compare(_config(tmp_path / "out", "compare.aa=true", "compare.pairs=1", "callbacks={}"))
    shown = capsys.readouterr().out
    assert "plain again against plain" in shown
    assert "Both arms are the same: whatever differs is chance." in shown
    assert "pip install 'lightning-accel[examples]'" in shown
    assert not (tmp_path / "out" / "report.html").exists()
    first, second = (r for r in _rows(tmp_path / "out") if r["pair"] == 0)
    assert first["metrics"] == second["metrics"]  # one seed


@pytest.mark.slow
def test_interrupted_comparison_reports_and_keeps_what_was_measured(tmp_path):
    """Ctrl-C of a terminal reaches the whole process group; workers leave the decision to the parent."""
    folder = tmp_path / "out"
    with subprocess.Popen(
        _command(folder, "compare.pairs=1000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "120"},
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("pair 2 of 1000") and len([li for li in lines if li.startswith("pair 2 ")]) == 2:
                os.killpg(process.pid, signal.SIGINT)
                break
        lines += process.stdout.readlines()
        assert process.wait(60) == 130
    shown = "".join(lines)
    found = re.search(r"Interrupted after (\d+) of 1000 pairs\. Rows are kept in (\S+); go on with:\n(.*)", shown)
    assert found, shown
    assert "Traceback" not in shown
    assert int(found[1]) >= 2
    assert "Undecided" in shown
    rows = _rows(folder)
    assert len(rows) >= 2 + 2 * int(found[1])
    assert [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()] == rows
    assert f"Interrupted after {found[1]} of 1000 pairs." in (folder / "report.html").read_text()


@pytest.mark.slow
def test_failing_run_is_told_with_its_message_and_exit_code_one(tmp_path):
    crash = ["+callbacks.crash._target_=compare_fits.Crash"]
    done = subprocess.run(
        _command(tmp_path / "out", *crash),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(fits.__file__).parent)},
    )
    assert done.returncode == 1, done.stderr
    assert "the arm `accelerated` failed: RuntimeError: the loss went for a walk" in done.stderr
    assert "Traceback" not in done.stderr
    assert "on_train_batch_end" in done.stdout  # where it happened
    assert [r["arm"] for r in _rows(tmp_path / "out")] == ["plain"]


def test_what_a_worker_calls_the_users_mistake_is_one_here():
    with pytest.raises(UsageError, match="rank"), usage_errors():
        raise WorkerError("`rank` is wrong", "traceback", "UsageError")
    with pytest.raises(WorkerError, match="died"), usage_errors():
        raise WorkerError("died")


def test_messages_that_differ_in_numbers_only_are_counted():
    blank = {f.name: 0 for f in dataclasses.fields(Run)}
    said = ["stays dense", *(f"epoch {e}: group {e % 2} rests" for e in range(9)), "stays dense", "done in 3 s"]
    assert shown_messages(Run(**{**blank, "messages": said})) == [
        "stays dense",
        "epoch 0: group 0 rests",
        "epoch 1: group 1 rests (and 7 more like this)",
        "done in 3 s",
    ]


def test_estimate_comes_from_measured_runs_only(tmp_path):
    ledger = RunLedger(tmp_path, fingerprint="")
    out = io.StringIO()
    progress = RunProgress(Console(file=out), ["a", "b"], 3, ledger)
    blank = {f.name: 0 for f in dataclasses.fields(Run)}
    with progress:
        for arm, pair, order, seconds in (("a", -1, 0, 1.0), ("b", -1, 1, 1.0), ("b", 0, 0, 60.0), ("a", 0, 1, 20.0)):
            progress.before_run(Step(arm, pair, order))
            progress.after_run(Run(**{**blank, "arm": arm, "pair": pair, "fit_seconds": seconds}))
    assert out.getvalue().splitlines() == [
        "warm-up, a: 1.00 s.",
        "warm-up, b: 1.00 s.",
        "pair 1 of 3, b: 60.00 s.",
        "pair 1 of 3, a: 20.00 s. about 2:40 left",
    ]


@pytest.mark.slow
def test_folder_that_cannot_be_written_is_told_with_exit_code_one(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(_command(tmp_path / "file" / "out"), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.pairs=0", "`compare.pairs` must be an integer >= 1, got 0"),
        ("compare.pairs=many", "`compare.pairs` must be an integer >= 1, got many"),
        ("compare.threads=0", "`compare.threads` must be an integer >= 1, got 0"),
        ("compare.mode=up", "`compare.mode` must be max, min or null, got up"),
        ("compare.target=high", r"`compare.target` must be a number, or plain_best or pair_best .*, got 'high'"),
        (
            "compare.target=true",
            r"`compare.target` must be a number, a rule such as plain_best-0\.005, or null, got True",
        ),
        ("compare.target=[1]", r"`compare.target` must be a number, a rule such as .* got \[1\]"),
        ("compare.price_per_hour=-1", "`compare.price_per_hour` must be >= 0, got -1"),
        ("compare.price_per_hour=cheap", "`compare.price_per_hour` must be a number or null, got cheap"),
        ("seed=-1", "`seed` must be an integer >= 0, got -1"),
        ("seed=null", "`seed` must be an integer >= 0, got None"),
    ],
)
def test_impossible_settings_are_usage_errors(tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        compare(_config(tmp_path / "out", override))
    assert not (tmp_path / "out").exists()


def test_nothing_to_compare_is_said(tmp_path):
    config = compose("compare", ["callbacks=[]", f"paths.output_dir={tmp_path}"])
    with pytest.raises(UsageError, match="there is nothing to compare: choose accelerators"):
        arms(config)


def test_unknown_baseline_lists_the_known(tmp_path):
    with pytest.raises(UsageError, match=r"among fused_optimizer, torch_compile, .*, got freeze"):
        arms(_config(tmp_path, "compare.baselines=[freeze]"))


def test_default_configuration_compares_the_first_two_accelerators():
    config = compose("compare", ["paths.output_dir=x"])
    check(config)
    plain, accelerated = arms(config)
    assert (plain.name, accelerated.name) == ("plain", "accelerated")
    assert list(config.callbacks) == ["rank_quantization", "sequential_freezing"]
    assert plain.threads == accelerated.threads == 1
    assert (plain.make.accelerators, accelerated.make.accelerators) == (False, True)


def test_arms_differ_in_callbacks_and_strategy_only(tmp_path):
    config = _config(tmp_path, "trainer.strategy=ddp", "compare.baselines=[freeze_bottom_half]")
    made = {arm.name: arm.make for arm in arms(config)}
    assert list(made) == ["plain", "accelerated", "half frozen"]
    trainer, model, data = made["plain"](3, tmp_path)
    assert type(trainer.strategy).__name__ == "SingleDeviceStrategy"
    assert not any(isinstance(c, FreezeBottomHalf) for c in trainer.callbacks)
    peer_trainer, peer_model, _ = made["half frozen"](3, tmp_path)
    assert any(isinstance(c, FreezeBottomHalf) for c in peer_trainer.callbacks)
    for one, other in zip(model.parameters(), peer_model.parameters(), strict=True):
        assert (one == other).all()
    assert trainer.max_epochs == peer_trainer.max_epochs == 2
    assert data is not None


def test_accelerated_arm_keeps_the_composed_callbacks(tmp_path):
    trainer, _, _ = arms(_config(tmp_path))[1].make(0, tmp_path)
    assert any(isinstance(c, FreezeBottomHalf) for c in trainer.callbacks)
    assert not trainer.loggers
    assert trainer.checkpoint_callback is None
    assert trainer.progress_bar_callback is None


def test_warm_ups_are_short_where_caches_start_empty(tmp_path):
    plain = arms(_config(tmp_path, "trainer.max_epochs=9"))[0]
    assert plain.make_warmup(0, tmp_path)[0].max_epochs == 2
    assert plain.make(0, tmp_path)[0].max_epochs == 9
    assert arms(_config(tmp_path, "compare.cold=false"))[0].make_warmup is None


@pytest.mark.parametrize(("cold", "cache"), [("true", "cache"), ("false", None)])
def test_cold_runs_get_caches_of_their_own(tmp_path, monkeypatch, cold, cache):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    config = _config(tmp_path, "+callbacks.cached._target_=compare_fits.Cached", f"compare.cold={cold}")
    trainer, _, _ = arms(config)[1].make(0, tmp_path)
    cached = next(c for c in trainer.callbacks if isinstance(c, fits.Cached))
    assert cached.cache_dir == (cache and str(tmp_path / cache))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == (str(tmp_path / "inductor") if cache else "before")


def test_a_cache_that_the_user_chose_is_used(tmp_path):
    chosen = ["+callbacks.cached._target_=compare_fits.Cached", "+callbacks.cached.cache_dir=mine"]
    trainer, _, _ = arms(_config(tmp_path, *chosen))[1].make(0, tmp_path)
    assert next(c for c in trainer.callbacks if isinstance(c, fits.Cached)).cache_dir == "mine"


def test_rank_quantization_has_a_cache_to_empty():
    assert "cache_dir" in parameters("lightning_accel.callbacks.RankQuantization")


def test_freezing_the_bottom_half_leaves_the_top_half(tmp_path):
    trainer, model, data = ConfiguredFit(_resolved(_config(tmp_path)), accelerators=True)(0, tmp_path)
    before = [p.detach().clone() for p in model.parameters()]
    trainer.fit(model, datamodule=data)
    moved = [not bool((a == b).all()) for a, b in zip(before, model.parameters(), strict=True)]
    total = sum(p.numel() for p in before)
    expected, seen = [], 0
    for parameter in before:
        seen += parameter.numel()
        expected.append(seen > total // 2)
    assert moved == expected


def test_torch_compile_is_a_peer_that_is_not_counted(tmp_path):
    peer = arms(_config(tmp_path, "compare.baselines=[torch_compile]"))[2]
    assert not peer.count_flops
    _, model, _ = peer.make(0, tmp_path)
    assert [name for name, module in model.named_modules() if module._compiled_call_impl] == [""]


def test_submodules_are_compiled_where_the_module_has_no_forward(tmp_path):
    config = _config(tmp_path, "compare.baselines=[torch_compile]")
    config.model = {"_target_": "compare_fits.Line"}
    _, model, _ = arms(config)[2].make(0, tmp_path)
    assert [name for name, module in model.named_modules() if module._compiled_call_impl] == ["layer"]


@pytest.mark.slow
def test_compiled_peer_trains(tmp_path):
    peer = arms(_config(tmp_path, "compare.baselines=[torch_compile]"))[2]
    trainer, model, data = peer.make(0, tmp_path)
    plain_trainer, plain_model, plain_data = arms(_config(tmp_path))[0].make(0, tmp_path)
    trainer.fit(model, datamodule=data)
    plain_trainer.fit(plain_model, datamodule=plain_data)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(
        float(plain_trainer.callback_metrics["val/loss"]), rel=1e-3
    )


def test_fingerprint_follows_what_makes_rows_comparable(tmp_path):
    one = fingerprint(_config(tmp_path))
    for same in ("compare.pairs=9", "compare.price_per_hour=3", "compare.resume=true", "compare.metric=val/loss"):
        assert fingerprint(_config(tmp_path / "elsewhere", same)) == one, same
    for other in ("model.width=16", "seed=2", "compare.threads=2", "compare.aa=true", "trainer.max_epochs=3"):
        assert fingerprint(_config(tmp_path, other)) != one, other


def _resolved(config):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def test_every_pair_has_the_split_and_the_order_of_its_own_seed(tmp_path):
    plain, fast = arms(_config(tmp_path, "seed=5"))
    assert plain.make.seeded == fast.make.seeded == ("data.seed",)
    data = {(arm.name, seed): arm.make(seed, tmp_path)[2] for arm in (plain, fast) for seed in (5, 6)}
    assert {key: module.seed for key, module in data.items()} == {key: key[1] for key in data}
    fixed = arms(_config(tmp_path, "seed=5", "data.seed=5"))[0].make
    assert fixed.seeded == ()  # it only happens to be equal
    assert fixed(6, tmp_path)[2].seed == 5
