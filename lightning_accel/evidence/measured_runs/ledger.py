"""The rows of a comparison on disk: appended after every run, so that nothing measured is ever lost."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lightning_accel.evidence.measured_runs.runs import Run

_LINES = "runs.jsonl"


class RunLedger:
    """Rows of one comparison in one folder.

    Args:
        folder: Made if missing. A folder with rows of a former comparison is refused unless ``resume``.
        fingerprint: Of the settings that make runs comparable.
        resume: Go on with the rows that are there; they must have the same fingerprint. A last line that was cut
            off while it was written is dropped, it is no row.

    Raises:
        FileExistsError: If rows of a former comparison are there.
        ValueError: If they are of other settings, or cannot be read.
        OSError: If the folder cannot be written.
    """

    def __init__(self, folder: Path, *, fingerprint: str, resume: bool = False) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.path = folder / _LINES
        folder.mkdir(parents=True, exist_ok=True)
        self.runs: list[Run] = []
        if not resume:
            try:
                self.path.open("x", encoding="utf-8").close()
            except FileExistsError:
                raise FileExistsError(
                    f"`{folder}` holds the rows of a former comparison; choose another folder "
                    "(`hydra.run.dir=...`) or go on with it (`compare.resume=true`)."
                ) from None
            return
        self.runs = self._read()
        strangers = {run.fingerprint for run in self.runs} - {fingerprint}
        if strangers:
            raise ValueError(
                f"`{folder}` holds rows of other settings (another configuration, version or machine); "
                "they cannot be mixed: choose another folder (`hydra.run.dir=...`)."
            )
        with self.path.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(run.to_dict()) + "\n" for run in self.runs)

    def append(self, run: Run) -> None:
        """Write one row through to the disk."""
        self.runs.append(run)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(run.to_dict()) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

    def complete_pairs(self, arms: Sequence[str]) -> dict[str, list[Run]]:
        """Return the measured runs by arm, those pairs only in which every arm ran, in one order."""
        by_pair: dict[int, dict[str, Run]] = {}
        for run in self.runs:
            if not run.is_warmup:
                by_pair.setdefault(run.pair, {})[run.arm] = run
        whole = [by_pair[pair] for pair in sorted(by_pair) if set(arms) <= set(by_pair[pair])]
        return {arm: [runs[arm] for runs in whole] for arm in arms}

    def next_pair(self) -> int:
        """Return a pair number that no row has; a pair that was interrupted is not patched up later."""
        return max((run.pair for run in self.runs), default=-1) + 1

    def export(self) -> list[Path]:
        """Write ``rows.json`` (everything) and ``rows.csv`` (one line a run, no curves); return their paths."""
        as_json, as_csv = self.folder / "rows.json", self.folder / "rows.csv"
        as_json.write_text(json.dumps([run.to_dict() for run in self.runs], indent=1) + "\n", encoding="utf-8")
        rows = [_flat(run) for run in self.runs]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with as_csv.open("w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)
        return [as_json, as_csv]

    def _read(self) -> list[Run]:
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        runs = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                runs.append(Run.from_dict(json.loads(line)))
            except ValueError as error:
                if number == len(lines) and isinstance(error, json.JSONDecodeError):
                    break  # no newline at its end: the writer was killed in the middle of it
                raise ValueError(f"line {number} of `{self.path}` is not a row: {error}") from None
        return runs


def _flat(run: Run) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, value in run.to_dict().items():
        if isinstance(value, dict):
            row.update({f"{name}/{key}": entry for key, entry in value.items()})
        elif not isinstance(value, list):
            row[name] = value
    return row
