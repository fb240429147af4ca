"""Batches of samples as functions of seed and step.

The stream of training samples is a function of the seed: each pass over the data is a permutation drawn from the seed and the
number of the pass, and an optimizer step takes the next samples of it. Devices and accumulated batches divide the samples of a
step among them and share its charges, so that the gradient is the one of a single large batch.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pfgm.core import rng
from pfgm.core.rng import Generators, Rows
from pfgm.data.degradations import Degradation
from pfgm.theory.data_summary import condition_key


@dataclass
class SampleSet:
    """Samples with their conditions.

    Args:
        x: Samples [n, *shape] in the user's units: a tensor, or an `ImageSet`, which reads images when they are indexed.
        conditions: A tensor [n, ...] for each key; "label" holds classes, "image" and "vector" what their names say.
    """

    x: Any  # Tensor or ImageSet
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def label(self) -> Tensor | None:
        """The class of each sample, [n]; None without labels."""
        return self.conditions.get("label")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> "SampleSet":
        return SampleSet(self.x[rows], {key: value[rows] for key, value in self.conditions.items()})


@dataclass
class Batch:
    """Samples of one training or validation step on one device.

    Args:
        x: Samples [B, *shape] in the user's units.
        conditions: A tensor [B, ...] for each key.
        step: Number of the optimizer step; in validation, of the first sample.
        rows: (first, total): place of these samples among all of the step.
        index: Number of each sample in the training data, [B]; None in validation.
        charges: The samples whose field is the target, this batch among them; None if the objective needs none.
    """

    x: Tensor
    conditions: dict[str, Tensor]
    step: int
    rows: tuple[int, int]
    index: Tensor | None = None
    charges: SampleSet | None = None

    def __len__(self) -> int:
        return len(self.x)

    def single(self, i: int) -> "Batch":
        """Return sample `i` as a batch, with the noise that it has here."""
        one = slice(i, i + 1)
        index = None if self.index is None else self.index[one]
        conditions = {key: value[one] for key, value in self.conditions.items()}
        return replace(self, x=self.x[one], conditions=conditions, index=index, rows=(self.rows[0] + i, self.rows[1]))

    def to(self, *args: Any, **kwargs: Any) -> "Batch":
        """Move all tensors, as `Tensor.to` does."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> "Batch":
        """Copy all tensors to page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Any) -> "Batch":
        def mapped(samples: Any) -> dict[str, Any]:
            return {
                "x": function(samples.x),
                "conditions": {key: function(value) for key, value in samples.conditions.items()},
            }

        charges = None if self.charges is None else SampleSet(**mapped(self.charges))
        return replace(self, **mapped(self), index=None if self.index is None else function(self.index), charges=charges)


@dataclass(frozen=True)
class Preparation:
    """Prepare clean samples for the network.

    Args:
        degrade: Makes a condition of each sample.
        width: Width of the uniform noise that fills the gaps between levels (dequantisation, arXiv 1511.01844); 0 for none.
        flip: Whether images are mirrored left to right, each with probability 1/2.
    """

    degrade: Degradation | None = None
    width: float = 0.0
    flip: bool = False

    def __call__(self, samples: SampleSet, generator: Generators) -> SampleSet:
        """Return `samples`, in memory, mirrored, with condition and noise."""
        x, conditions = samples[:].x, samples.conditions
        if self.flip:
            mirrored = (rng.uniform(len(x), generator) < 0.5).nonzero()[:, 0]
            x = x.index_copy(0, mirrored, x[mirrored].flip(-1))
        if self.degrade or self.width:
            x = x if x.is_floating_point() else x.float()
        if self.degrade is not None:
            condition = self.degrade(x, generator)
            conditions = {**conditions, condition_key(condition.shape[1:]): condition}
        if self.width:
            x = x + self.width * (rng.uniform(x.shape, generator, dtype=x.dtype) - 0.5)
        return SampleSet(x, conditions)


class TrainingStream(IterableDataset):
    """Yield the training batches from an optimizer step on, without end.

    Args:
        samples: The training data.
        preparation: What is done to clean samples.
        batch_size: Samples of one batch.
        seed: Seed of order, noise and charges.
        start: The first optimizer step.
        rank: Number of this device.
        world: Number of devices.
        accumulate: Batches of a step on each device.
        reference_size: Charges that the objective asks for; 0 for none.
        repeat_batches: Number of batches whose samples are repeated with fresh noise, to overfit them; 0 for all data.
    """

    def __init__(
        self,
        samples: SampleSet,
        preparation: Preparation = Preparation(),
        *,
        batch_size: int,
        seed: int,
        start: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        reference_size: int,
        repeat_batches: int = 0,
    ):
        self.samples, self.preparation, self.batch_size, self.seed = samples, preparation, batch_size, seed
        self.period = repeat_batches * batch_size * world
        self.start, self.rank, self.world, self.reference_size = start, rank, world, reference_size
        self.accumulate, self.total = accumulate, batch_size * world * accumulate

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; of several workers, whose batches are taken in turn, each makes its own."""
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for k in itertools.count(first, every):
            step, i = divmod(k, self.accumulate)
            yield self.batch(self.start + step, i)

    def batch(self, step: int, i: int = 0) -> Batch:
        """Make batch `i` of optimizer step `step` on this device."""
        index = self._indices(step)
        first = (i * self.world + self.rank) * self.batch_size
        mine, generator = slice(first, first + self.batch_size), rng.generator(self.seed, rng.PREPARATION, step)
        if self.reference_size:
            rows, position = self._charges(index, step)
            charges = self.preparation(self.samples[rows], generator)
            own = charges[position[mine]]
        else:
            charges, own = None, self.preparation(self.samples[index[mine]], Rows(generator, first, self.total))
        return Batch(own.x, dict(own.conditions), step, (first, self.total), index[mine], charges)

    def _indices(self, step: int) -> Tensor:
        """Return the rows of all samples of a step, [total]."""
        n, first = len(self.samples), step * self.total
        if not self.period:
            return stream_indices(first, self.total, n, self.seed)
        return stream_indices(0, self.period, n, self.seed)[torch.arange(first, first + self.total) % self.period]

    def _charges(self, index: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Rows of the charges, and where among them the samples `index` are.

        All data if reference_size covers it, else these samples and enough others, none twice.
        """
        n = len(self.samples)
        if self.reference_size >= n:
            return torch.arange(n), index
        own, position = index.unique(return_inverse=True)
        if self.reference_size <= len(own):
            return own, position
        order = torch.randperm(n, generator=rng.generator(self.seed, rng.REFERENCE, step))
        return torch.cat([own, order[~torch.isin(order, own)]])[: self.reference_size], position


class HeldOutBatches(Dataset):
    """Hold the validation batches in order; the number of the first sample fixes the noise."""

    def __init__(
        self,
        samples: SampleSet,
        preparation: Preparation = Preparation(),
        *,
        batch_size: int,
        seed: int,
        reference_size: int,
    ):
        self.samples, self.preparation, self.batch_size = samples, preparation, batch_size
        self.seed, self.reference_size = seed, reference_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        first, n = i * self.batch_size, len(self.samples)
        order = torch.arange(n).roll(-first)  # the batch, then the others
        size = min(self.batch_size, n - first)
        rows = order[: max(size, min(n, self.reference_size))]
        prepared = self.preparation(self.samples[rows], rng.generator(self.seed, rng.HELD_OUT, first))
        own = prepared[slice(size)]
        return Batch(own.x, dict(own.conditions), first, (0, size), charges=prepared if self.reference_size else None)


def stream_indices(first: int, count: int, n: int, seed: int) -> Tensor:
    """Return positions first, ..., first+count-1 of the endless sequence of permutations of 0..n-1 made from `seed`."""
    parts, position = [], first
    while position < first + count:
        epoch, offset = divmod(position, n)
        parts.append(_permutation(n, seed, epoch)[offset : offset + first + count - position])
        position += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=rng.generator(seed, rng.PERMUTATION, epoch))


def split(samples: SampleSet, held_out: float, seed: int) -> tuple[SampleSet, SampleSet]:
    """Split `samples` into training and held-out ones at random, see `split_rows`."""
    train, rest = (samples[torch.from_numpy(rows)] for rows in split_rows(len(samples), samples.label, held_out, seed))
    return train, rest


def split_rows(n: int, label: Tensor | None, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of training and of held-out samples, at random.

    Classes are split in proportion if both parts have room for all classes and each class has two samples.

    Raises:
        ValueError: Unless 0 < held_out < 1 and both parts get a sample.
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
