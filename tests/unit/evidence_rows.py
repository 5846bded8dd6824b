"""Rows for the tests of evidence, made up and easy to calculate with."""

from lightning_accel.evidence.measured_runs.runs import Run


def run(arm="plain", pair=0, **changes):
    seconds = changes.pop("fit_seconds", 10.0)
    values = {
        "seed": pair,
        "order": 0,
        "fit_seconds": seconds,
        "cpu_seconds": seconds,
        "setup_seconds": 1.0,
        "callback_seconds": 0.5,
        "steps": 100,
        "step_seconds": seconds / 100,
        "phase_seconds": {"forward": seconds / 300, "backward": seconds / 150, "optimizer": 0.0},
        "samples_per_second": 1000 / seconds,
        "parameters": 1000,
        "flops": None,
        "peak_memory_bytes": 10**9,
        "checkpoint_bytes": 12_000,
        "devices": 1,
        "metrics": {"val/accuracy": 0.9, "val/loss": 0.1},
        "curve": [
            {"seconds": seconds / 2, "epoch": 0, "step": 50, "metrics": {"val/accuracy": 0.7, "val/loss": 0.4}},
            {"seconds": seconds, "epoch": 1, "step": 100, "metrics": {"val/accuracy": 0.9, "val/loss": 0.1}},
        ],
        "fingerprint": "f",
    }
    return Run(arm=arm, pair=pair, **{**values, **changes})


def two_arms(plain_seconds, other_seconds, **changes):
    return {
        "plain": [run("plain", i, fit_seconds=s) for i, s in enumerate(plain_seconds)],
        "accelerated": [run("accelerated", i, fit_seconds=s, **changes) for i, s in enumerate(other_seconds)],
    }
