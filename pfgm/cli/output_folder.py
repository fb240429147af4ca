"""Drawing to a folder: every sample in a file of its own, written batch by batch, by one process or several, and continued.

The samples are cut into batches by their place in the list alone. A batch is drawn if one of its files is missing, so that
neither an interruption nor the number of processes changes what a sample's batch mates are.
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

RECORD = "draw.json"
"""The file in the folder that says how its samples were drawn."""
RANKS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
"""Where torchrun and srun tell a process its number, how many there are, and its number on this machine. A batch script is not
one of the tasks of its job, SLURM_NTASKS, but srun alone counts those of a step."""


@dataclass(frozen=True)
class Share:
    """The part of one process: batches `number`, number + `of`, ..., from 0; `local` is its number on its machine."""

    number: int = 0
    of: int = 1
    local: int = 0

    @classmethod
    def parse(cls, text: str) -> "Share":
        """ "2/4", the second of four. ValueError for anything else."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ValueError(f"share = {text!r}: give the number of this process and how many there are, such as 1/4 to 4/4")
        return cls(int(number) - 1, int(of))

    @classmethod
    def found(cls) -> "Share":
        """As torchrun or srun say, else all."""
        for names in RANKS:
            told = [os.environ.get(name, "") for name in names]
            if all(value.isdecimal() for value in told):
                share = cls(*map(int, told))
                if share.number >= share.of:
                    raise ValueError(f"{names[0]} = {told[0]}, {names[1]} = {told[1]}: no number of a process; unset them")
                return share
        return cls()

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.of}"


class SampleFolder:
    """Samples of (seed, index) `pairs` of event `shape` as files of the folder `out`.

    Images are PNGs, of which `value_range` is black and white, other samples .npy files, both in the user's units. `made` is
    what makes the samples, as plain data; it is kept in draw.json, so that a folder holds samples of one kind.
    """

    def __init__(
        self,
        out: Path,
        pairs: Sequence[tuple[int, int]],
        shape: Sequence[int],
        value_range: plots.ValueRange,
        made: Mapping[str, Any],
        *,
        batch_size: int,
        share: Share = Share(),
    ):
        self.out, self.value_range, self.made = out, value_range, json.loads(json.dumps(made))
        self.batch_size, self.share = batch_size, share
        self.image = plots.is_image(shape) and value_range is not None
        self.names = [f"{seed:06d}-{index:06d}" for seed, index in pairs]

    def path(self, i: int) -> Path:
        """Of sample `i`."""
        return self.out / (self.names[i] + (".png" if self.image else ".npy"))

    @property
    def mine(self) -> range:
        """The batches of this process."""
        return range(self.share.number, -(-len(self.names) // self.batch_size), self.share.of)

    def rows(self, batch: int) -> range:
        """Its samples."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.names)))

    def missing(self) -> list[int]:
        """The batches of this process that are not all there."""
        there = {name for name in os.listdir(self.out)} if self.out.exists() else set()
        return [batch for batch in self.mine if not all(self.path(i).name in there for i in self.rows(batch))]

    @contextmanager
    def opened(self) -> Iterator[list[int]]:
        """The missing batches, while no other process has this share.

        ValueError if the folder holds samples that were made otherwise, FileExistsError if nothing says how they were made,
        BlockingIOError if the share is being drawn, or others of another number of processes.
        """
        with lock_folder(self.out, "out", f"-{self.share.number + 1}-of-{self.share.of}"):
            with FileLock(self.out / ".lock-record"):
                self._check_others()
                self._check()
                self._clear()
            yield self.missing()

    def write(self, rows: range, x: Tensor) -> None:
        """The files of samples `x` [n, *shape], each as a whole."""
        for i, sample in zip(rows, plots.to_bytes(x, self.value_range) if self.image else x.float().cpu(), strict=True):
            if self.image:
                plots.save_image(self.path(i), sample)
            else:
                with atomic_write(self.path(i)) as temporary:
                    np.save(temporary, sample.numpy())

    def _check_others(self) -> None:
        for path in self.out.glob(".lock-*-of-*"):
            of = path.name.rpartition("-")[2]
            try:
                if of != str(self.share.of):
                    FileLock(path).acquire(timeout=0).lock.release()
            except Timeout:
                raise BlockingIOError(
                    f"out = {self.out} is being drawn by {of} processes, each its share; wait for them, or be one of {of}"
                ) from None

    def _check(self) -> None:
        record = self.out / RECORD
        if not record.exists():
            taken = sum(self.path(i).exists() for i in range(len(self.names)))
            if taken:
                raise FileExistsError(
                    f"out = {self.out} holds {taken} of these samples, and no {RECORD} that says how they were made; give a "
                    "new folder"
                )
            with atomic_write(record) as temporary:
                temporary.write_text(json.dumps(self.made, indent=2) + "\n")
            return
        try:
            before = dict(json.loads(read_text(record, record)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{record} cannot be read ({type(error).__name__}); give a new folder") from error
        changed = [name for name in sorted(before.keys() | self.made.keys()) if before.get(name) != self.made.get(name)]
        if changed:
            told = "; ".join(f"{name}: {before.get(name)} -> {self.made.get(name)}" for name in changed)
            raise ValueError(f"out = {self.out} holds samples that were made otherwise ({told}); give a new folder")

    def _clear(self) -> None:
        """What a killed process of this share left unfinished."""
        record = Path(RECORD).stem
        own = (f"{PARTIAL}{record}-", *(f"{PARTIAL}{self.names[i]}-" for batch in self.mine for i in self.rows(batch)))
        for path in self.out.glob(f"{PARTIAL}*"):
            if path.name.startswith(own):
                path.unlink(missing_ok=True)
