"""Sweeps: the search by Optuna, stopping bad trials, and the report at the end of any multirun."""

from lightning_accel.cli.sweep.report import SweepReport, report_unfinished

__all__ = ["SweepReport", "report_unfinished"]
