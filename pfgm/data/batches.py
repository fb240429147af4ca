"""Batches of samples.

The stream of training samples is a function of the seed: each pass over the data is a permutation drawn from the seed and the
number of the pass, and an optimizer step takes the next samples of it. Devices and accumulated batches share out the samples of
a step and have its charges in common, so that the gradient is the one of a single large batch.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pfgm.core import rng
from pfgm.core.rng import Generators, Rows
from pfgm.data.degradations import Degradation

Batch = dict[str, Any]
""""x" [B, *shape]; "label" [B] and "condition" [B, ...] if there are any; "step", the number of the optimizer step or of the
first held-out sample, and "rows" (first, total), the place of the batch among all samples of that step; in training "index"
[B], the numbers of the samples in the data; and "reference" [L, *shape], with "reference_label" [L] if there are labels, if
the objective asks for charges."""


@dataclass(frozen=True)
class SampleSet:
    """Samples `x` [n, *shape] in the user's units with the `label` [n] and `condition` [n, ...] of each, if there are any.

    `x` is a tensor, or an ImageSet, whose images are read when they are asked for by an index.
    """

    x: Any  # Tensor or ImageSet
    label: Tensor | None = None
    condition: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> "SampleSet":
        label, condition = (None if value is None else value[rows] for value in (self.label, self.condition))
        return SampleSet(self.x[rows], label, condition)

    def batch(self) -> Batch:
        """What there is, by name."""
        named = {"x": self.x, "label": self.label, "condition": self.condition}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Preparation:
    """What is done to clean samples before the network sees them.

    With `flip` each image is mirrored left to right with probability 1/2. The condition is made by `degrade`, if given; uniform
    noise of `width` in all fills the gaps between the levels of discrete data (dequantisation, arXiv 1511.01844).
    """

    degrade: Degradation | None = None
    width: float = 0.0
    flip: bool = False

    def __call__(self, part: SampleSet, generator: Generators) -> SampleSet:
        """`part`, in memory, mirrored, with condition and noise."""
        x, condition = part[:].x, part.condition
        if self.flip:
            mirrored = (rng.uniform(len(x), generator) < 0.5).nonzero()[:, 0]
            x = x.index_copy(0, mirrored, x[mirrored].flip(-1))
        if self.degrade or self.width:
            x = x if x.is_floating_point() else x.float()
        if self.degrade is not None:
            condition = self.degrade(x, generator)
        if self.width:
            x = x + self.width * (rng.uniform(x.shape, generator, dtype=x.dtype) - 0.5)
        return SampleSet(x, part.label, condition)


class TrainingStream(IterableDataset):
    """The training batches from optimizer step `start` on, without end: `accumulate` a step on each of `world` ranks."""

    def __init__(
        self,
        part: SampleSet,
        preparation: Preparation = Preparation(),
        *,
        batch_size: int,
        seed: int,
        start: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        reference_size: int,
    ):
        self.part, self.preparation, self.batch_size, self.seed = part, preparation, batch_size, seed
        self.start, self.rank, self.world, self.reference_size = start, rank, world, reference_size
        self.accumulate, self.total = accumulate, batch_size * world * accumulate

    def __iter__(self) -> Iterator[Batch]:
        """Of several workers, whose batches are taken in turn, each makes its own."""
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for k in itertools.count(first, every):
            step, i = divmod(k, self.accumulate)
            yield self.batch(self.start + step, i)

    def batch(self, step: int, i: int = 0) -> Batch:
        """Batch `i` of optimizer step `step` on this rank."""
        index = stream_indices(step * self.total, self.total, len(self.part), self.seed)
        first = (i * self.world + self.rank) * self.batch_size
        mine, generator = slice(first, first + self.batch_size), rng.generator(self.seed, rng.PREPARATION, step)
        place = {"step": step, "rows": (first, self.total), "index": index[mine]}
        if not self.reference_size:
            return self.preparation(self.part[index[mine]], Rows(generator, first, self.total)).batch() | place
        charges, position = self._charges(index, step)
        prepared = self.preparation(self.part[charges], generator)
        return prepared[position[mine]].batch() | place | _reference(prepared)

    def _charges(self, index: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Rows of the charges, and where among them the samples `index` are.

        All data if reference_size covers it, else these samples and enough others, none twice.
        """
        n = len(self.part)
        if self.reference_size >= n:
            return torch.arange(n), index
        own, position = index.unique(return_inverse=True)
        if self.reference_size <= len(own):
            return own, position
        order = torch.randperm(n, generator=rng.generator(self.seed, rng.REFERENCE, step))
        return torch.cat([own, order[~torch.isin(order, own)]])[: self.reference_size], position


def _reference(part: SampleSet) -> Batch:
    """`part` as charges."""
    labels = {} if part.label is None else {"reference_label": part.label}
    return {"reference": part.x} | labels


def one_of(batch: Batch, i: int) -> Batch:
    """Sample `i` of a training batch as a batch, with the noise that it has there."""
    own = {name: batch[name][i : i + 1] for name in ("x", "label", "condition", "index") if name in batch}
    first, total = batch["rows"]
    return batch | own | {"rows": (first + i, total)}


def stream_indices(first: int, count: int, n: int, seed: int) -> Tensor:
    """Positions first, ..., first+count-1 of the endless sequence of permutations of 0..n-1 made from `seed`."""
    parts, position = [], first
    while position < first + count:
        epoch, offset = divmod(position, n)
        parts.append(_permutation(n, seed, epoch)[offset : offset + first + count - position])
        position += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=rng.generator(seed, rng.PERMUTATION, epoch))


class HeldOutBatches(Dataset):
    """Held-out batches; the index of the first sample fixes the noise."""

    def __init__(
        self,
        part: SampleSet,
        preparation: Preparation = Preparation(),
        *,
        batch_size: int,
        seed: int,
        reference_size: int,
    ):
        self.part, self.preparation, self.batch_size = part, preparation, batch_size
        self.seed, self.reference_size = seed, reference_size

    def __len__(self) -> int:
        return -(-len(self.part) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        first, n = i * self.batch_size, len(self.part)
        order = torch.arange(n).roll(-first)  # the batch, then the others
        size = min(self.batch_size, n - first)
        rows = order[: max(size, min(n, self.reference_size))]
        prepared = self.preparation(self.part[rows], rng.generator(self.seed, rng.HELD_OUT, first))
        batch = prepared[slice(size)].batch() | {"step": first, "rows": (0, size)}
        return batch | _reference(prepared) if self.reference_size else batch


def split(part: SampleSet, held_out: float, seed: int) -> tuple[SampleSet, SampleSet]:
    """Training and held-out samples at random, see `split_rows`."""
    train, rest = (part[torch.from_numpy(rows)] for rows in split_rows(len(part), part.label, held_out, seed))
    return train, rest


def split_rows(n: int, label: Tensor | None, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of training and held-out samples, at random. ValueError unless 0 < held_out < 1.

    Each class in proportion, if both parts have room for all classes and each class has two samples.
    """
    from sklearn.model_selection import train_test_split

    if not 0 < held_out < 1:
        raise ValueError(f"held_out = {held_out} must lie between 0 and 1: the part of the data kept for validation")
    count = math.ceil(held_out * n)
    if not 0 < count < n:
        raise ValueError(f"held_out = {held_out}: of {n} samples none would be left for one of the parts; give more data")
    sizes = np.unique(np.zeros(n) if label is None else label, return_counts=True)[1]
    classes = label if sizes.min() > 1 and len(sizes) <= min(count, n - count) else None
    train, rest = train_test_split(np.arange(n), test_size=held_out, random_state=rng.natural("seed", seed), stratify=classes)
    return train, rest
