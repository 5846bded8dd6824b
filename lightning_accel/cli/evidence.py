"""``lightning-accel evidence DIR...``: one page of any number of comparisons, sweeps and benchmarks."""

import os
from pathlib import Path

from omegaconf import DictConfig

from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.terminal import open_console
from lightning_accel.evidence.dossier.gather import gather
from lightning_accel.evidence.dossier.page import headline, write_dossier


def evidence(cfg: DictConfig) -> None:
    """Gather the results in ``cfg.folders`` and write ``evidence.html``.

    Raises:
        UsageError: If no folder is given, or one holds no result.
    """
    if not cfg.folders:
        raise UsageError("name the folders of results: lightning-accel evidence outputs/compare outputs/bench")
    try:
        findings = gather([Path(folder) for folder in cfg.folders])
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    path = Path(cfg.paths.output_dir) / "evidence.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dossier(findings, path)
    console = open_console()
    for finding in findings:
        console.print(finding.title, markup=False, style="bold", soft_wrap=True)
        console.print(f"  {finding.verdict}\n  {finding.next_step}", markup=False, soft_wrap=True)
    console.print(headline(findings), markup=False, style="bold", soft_wrap=True)
    console.print(os.path.relpath(path), markup=False, style="dim", soft_wrap=True)
