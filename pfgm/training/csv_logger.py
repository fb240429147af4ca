"""The log of a run: one CSV file that a resumed run continues."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from pfgm.files.atomic import atomic_write

COLUMNS = ("step", "train_loss", "val_loss", "lr", "grad_norm", "skipped")
LONGEST = 10_000
"""Characters of a row; a power cut may leave a block of zeros."""


class MetricsLogger(Logger):
    """Appends a row to `folder`/metrics.csv for each set of metrics; blanks where a row has no value.

    Lightning's CSVLogger deletes an earlier file. Here rows at or after the first step logged by this process, left by a run
    that went on past its last checkpoint, are dropped, and earlier ones kept. Rows that are not whole are dropped, with a
    warning; a file without a column "step" becomes metrics.damaged.csv. OSError if the disk is full; the rows of before are
    then as they were.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path, self.columns = Path(folder) / "metrics.csv", list(COLUMNS)
        self.started = False

    @property
    def name(self) -> str:
        """Of the run: that of its folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """None of its own."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row."""
        row = {"step": step or 0} | {name: float(value) for name, value in metrics.items() if name != "epoch"}
        new = [name for name in row if name not in self.columns]
        if not self.started or new:
            self.columns += new
            self._rewrite(int(row["step"]) if not self.started else None)
            self.started = True
        self._append(row)

    def _append(self, row: dict[str, float]) -> None:
        whole = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:
            os.truncate(self.path, whole)
            raise OSError(f"{self.path} cannot be written: {error.strerror}; make room, and repeat the command") from error

    def _rewrite(self, before: int | None) -> None:
        """Write the rows again with the present columns, only those of steps < `before` if it is given."""
        rows = []
        if self.path.exists():
            names, found = read_rows(self.path)
            if "step" not in names:
                other = self.path.with_suffix(".damaged.csv")
                os.replace(self.path, other)
                rank_zero_warn(f"{self.path} has no column step, so it is damaged: kept as {other}, and begun anew")
                names, found = (), []
            self.columns += [name for name in names if name not in self.columns]
            rows = [row for row in found if before is None or int(row["step"]) < before]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def read_rows(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    """Columns and rows of a log. Rows that are not whole are left out, with a warning."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(line[:LONGEST].replace("\0", "?") for line in file)
        rows = list(reader)
    whole = [row for row in rows if (row.get("step") or "").isdigit() and all(map(_is_value, row.values()))]
    if len(whole) < len(rows):
        rank_zero_warn(f"{path}: {len(rows) - len(whole)} of {len(rows)} rows are damaged and left out")
    return reader.fieldnames or [], whole


def _is_value(text: Any) -> bool:
    """A number or nothing; None stands for what a row lacks, a list for what it has too much."""
    try:
        return text == "" or isinstance(float(text), float)
    except (TypeError, ValueError):
        return False
