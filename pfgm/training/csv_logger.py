"""Logger that writes the metrics of a run to one CSV file, which a resumed run continues."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from pfgm.files.atomic import atomic_write

COLUMNS = ("step", "train_loss", "val_loss", "lr", "grad_norm", "skipped")
MAX_ROW_LENGTH = 10_000  # characters read of a row; after a power cut, a file may contain a block of zeros


class MetricsLogger(Logger):
    """Append a row to metrics.csv for each set of metrics, with blanks where a row has no value.

    Lightning's CSVLogger deletes an existing file. This logger keeps its rows up to the first step that this process logs;
    later rows come from a run that went on past its last checkpoint, and are removed. Incomplete rows are removed with a
    warning. A file without a column "step" is renamed to metrics.damaged.csv. If the disk is full, OSError is raised and the
    file stays as it was.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path, self.columns = Path(folder) / "metrics.csv", list(COLUMNS)
        self.started = False

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row for `step`; new names in `metrics` add columns, and "epoch" is left out."""
        row = {"step": step or 0} | {name: float(value) for name, value in metrics.items() if name != "epoch"}
        new = [name for name in row if name not in self.columns]
        if not self.started or new:
            self.columns += new
            self._rewrite(None if self.started else int(row["step"]))
            self.started = True
        self._append(row)

    def _append(self, row: dict[str, float]) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:
            os.truncate(self.path, size)
            raise OSError(
                f"{self.path} cannot be written: {error.strerror}. Free disk space and repeat the command."
            ) from error

    def _rewrite(self, before: int | None) -> None:
        """Rewrite the rows of steps < `before`, or all, with the present columns."""
        rows = []
        if self.path.exists():
            names, found = read_rows(self.path)
            if "step" not in names:
                damaged = self.path.with_suffix(".damaged.csv")
                os.replace(self.path, damaged)
                rank_zero_warn(
                    f"{self.path} is damaged: it has no column step. It is renamed to {damaged}, and a new log begins."
                )
                names, found = (), []
            self.columns += [name for name in names if name not in self.columns]
            rows = [row for row in found if before is None or int(row["step"]) < before]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def read_rows(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    """Read the columns and the complete rows of a log; warn about other rows and leave them out."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(line[:MAX_ROW_LENGTH].replace("\0", "?") for line in file)
        rows = list(reader)
    complete = [row for row in rows if (row.get("step") or "").isdigit() and all(map(_is_value, row.values()))]
    if len(complete) < len(rows):
        rank_zero_warn(f"{path}: {len(rows) - len(complete)} of {len(rows)} rows are damaged and left out.")
    return reader.fieldnames or [], complete


def _is_value(text: Any) -> bool:
    """Tell numbers and blanks from None, which csv gives for missing cells, and a list, which it gives for excess cells."""
    try:
        return text == "" or isinstance(float(text), float)
    except (TypeError, ValueError):
        return False
