"""Write samples to a folder, one file each, batch by batch, by one process or several, and continue where a run stopped.

Batches depend only on the position of the samples in the list. A batch is generated again if one of its files is missing, so
neither interruptions nor the number of processes change which samples share a batch.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor

from pfgm.evaluation import plots
from pfgm.files.atomic import PARTIAL, atomic_write
from pfgm.files.locking import lock_folder
from pfgm.files.untrusted import read_text

RECORD = "draw.json"  # file in the folder with the settings of its samples

# Variables in which torchrun and srun give a process its rank, the number of processes, and its rank on this machine. Batch
# scripts are not tasks but see SLURM_NTASKS too; only srun sets the number of tasks of a step.
RANKS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Share:
    """Describe the part of one process: batches `rank`, `rank + count`, ...

    Args:
        rank: Number of this process, from 0.
        count: Number of processes.
        local_rank: Number of this process on its machine, from 0.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Parse a share such as "2/4", the second of four processes; raise ValueError for other text."""
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(f"share = {text!r} is not a process number and a number of processes. Use 1/4, ..., 4/4 for four.")
        return cls(int(number) - 1, int(count))

    @classmethod
    def from_environment(cls) -> "Share":
        """Read the share that torchrun or srun set, or return the whole; raise ValueError if the variables are inconsistent."""
        for names in RANKS:
            values = [os.environ.get(name, "") for name in names]
            if all(value.isdecimal() for value in values):
                share = cls(*map(int, values))
                if share.rank >= share.count:
                    raise ValueError(f"{names[0]} = {values[0]} is not below {names[1]} = {values[1]}. Unset these variables.")
                return share
        return cls()

    def __str__(self) -> str:
        return f"{self.rank + 1}/{self.count}"


class SampleFolder:
    """Write samples as files of a folder: PNGs for images, .npy files for other samples, both in the user's units.

    Args:
        out: Folder; it is created if needed.
        pairs: Seed and index of each sample, which name its file.
        shape: Shape of one sample.
        value_range: Black and white of images.
        settings: Settings that determine the samples, as JSON data. They are kept in draw.json, so that a folder holds samples
            of one kind.
        batch_size: Samples per batch.
        share: Part of this process.
    """

    def __init__(
        self,
        out: Path,
        pairs: Sequence[tuple[int, int]],
        shape: Sequence[int],
        value_range: plots.ValueRange,
        settings: Mapping[str, Any],
        *,
        batch_size: int,
        share: Share = Share(),
    ):
        self.out, self.value_range, self.settings = out, value_range, json.loads(json.dumps(settings))
        self.batch_size, self.share = batch_size, share
        self.image = plots.is_image(shape) and value_range is not None
        self.names = [f"{seed:06d}-{index:06d}" for seed, index in pairs]

    def path(self, i: int) -> Path:
        """Return the file of sample `i`."""
        return self.out / (self.names[i] + (".png" if self.image else ".npy"))

    @property
    def batches(self) -> range:
        """Numbers of the batches of this process."""
        return range(self.share.rank, -(-len(self.names) // self.batch_size), self.share.count)

    def rows(self, batch: int) -> range:
        """Return the numbers of the samples in a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.names)))

    def missing(self) -> list[int]:
        """Return the batches of this process of which a file is missing."""
        present = set(os.listdir(self.out)) if self.out.exists() else set()
        return [batch for batch in self.batches if not all(self.path(i).name in present for i in self.rows(batch))]

    @contextmanager
    def lock(self) -> Iterator[list[int]]:
        """Lock this share of the folder and yield the batches that are missing.

        Raises:
            ValueError: If the folder holds samples of other settings.
            FileExistsError: If the folder holds some of these samples but no draw.json.
            BlockingIOError: If another process has this share, or if processes of another number of shares are writing.
        """
        with lock_folder(self.out, "out", f"-{self.share.rank + 1}-of-{self.share.count}"):
            with FileLock(self.out / ".lock-record"):
                self._check_other_shares()
                self._check_record()
                self._clear_partial()
            yield self.missing()

    def write(self, rows: range, x: Tensor) -> None:
        """Write samples `x` [n, *shape] with these numbers, each file atomically."""
        for i, sample in zip(rows, plots.to_bytes(x, self.value_range) if self.image else x.float().cpu(), strict=True):
            if self.image:
                plots.save_image(self.path(i), sample)
            else:
                with atomic_write(self.path(i)) as temporary:
                    np.save(temporary, sample.numpy())

    def _check_other_shares(self) -> None:
        for path in self.out.glob(".lock-*-of-*"):
            count = path.name.rpartition("-")[2]
            try:
                if count != str(self.share.count):
                    FileLock(path).acquire(timeout=0).lock.release()
            except Timeout:
                raise BlockingIOError(
                    f"out = {self.out} is being written by {count} processes, each its share. Wait for them, or use a share of "
                    f"{count}."
                ) from None

    def _check_record(self) -> None:
        """Compare the settings with draw.json, or write it for a new folder."""
        record = self.out / RECORD
        if not record.exists():
            existing = sum(self.path(i).exists() for i in range(len(self.names)))
            if existing:
                raise FileExistsError(
                    f"out = {self.out} holds {existing} of these samples but no {RECORD} with their settings. Use a new folder."
                )
            with atomic_write(record) as temporary:
                temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
            return
        try:
            old, new = dict(json.loads(read_text(record, record))), self.settings
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"out = {self.out}: {RECORD} cannot be read ({type(error).__name__}). Use a new folder."
            ) from error
        changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if changed:
            changes = "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in changed)
            raise ValueError(f"out = {self.out} holds samples of other settings ({changes}). Use a new folder.")

    def _clear_partial(self) -> None:
        """Remove unfinished files that a killed process of this share left."""
        names = [Path(RECORD).stem, *(self.names[i] for batch in self.batches for i in self.rows(batch))]
        prefixes = tuple(f"{PARTIAL}{name}-" for name in names)
        for path in self.out.glob(f"{PARTIAL}*"):
            if path.name.startswith(prefixes):
                path.unlink(missing_ok=True)
