"""The log of a run: one CSV file that a resumed run continues."""

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from pfgm.storage import replacing

COLUMNS = ("step", "train_loss", "val_loss", "lr", "grad_norm")


class RunLog(Logger):
    """Appends a row to `folder`/metrics.csv for each set of metrics; blanks where a row has no value.

    Lightning's CSVLogger deletes an earlier file. Here rows at or after the first step logged by this process, left by a run
    that went on past its last checkpoint, are dropped, and earlier ones kept.
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
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self, before: int | None) -> None:
        """Write the rows again with the present columns, only those of steps < `before` if it is given."""
        rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns += [name for name in reader.fieldnames or [] if name not in self.columns]
                rows = [row for row in reader if before is None or int(row["step"]) < before]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
