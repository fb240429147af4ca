"""Batches of samples in memory.

The stream of training samples is a function of the seed: each pass over the data is a permutation drawn from the seed and the
number of the pass, and an optimizer step takes the next samples of it. Devices and accumulated batches share out the samples of
a step and have its charges in common, so that the gradient is the one of a single large batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pfgm import rng
from pfgm.degrade import Degradation

Batch = dict[str, Any]
""""x" [B, *shape]; "label" [B] and "condition" [B, ...] if there are any; "step", the number of the optimizer step or of the
first held-out sample, and "rows" (first, total), the place of the batch among all samples of that step; and "reference"
[L, *shape], with "reference_label" [L] if there are labels, if the objective asks for charges."""


@dataclass(frozen=True)
class Part:
    """Samples `x` [n, *shape] in the user's units with the `label` [n] and `condition` [n, ...] of each, if there are any."""

    x: Tensor
    label: Tensor | None = None
    condition: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> "Part":
        label, condition = (None if value is None else value[rows] for value in (self.label, self.condition))
        return Part(self.x[rows], label, condition)

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

    def __call__(self, part: Part, generator: torch.Generator) -> Part:
        """`part` mirrored, with condition and noise."""
        if self.flip:
            mirrored = torch.rand(len(part), generator=generator) < 0.5
            part = replace(part, x=torch.where(mirrored.reshape(-1, *[1] * (part.x.ndim - 1)), part.x.flip(-1), part.x))
        if not (self.degrade or self.width):
            return part
        x = part.x if part.x.is_floating_point() else part.x.float()
        condition = part.condition if self.degrade is None else self.degrade(x, generator)
        if self.width:
            x = x + self.width * (torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5)
        return Part(x, part.label, condition)


class Stream(IterableDataset):
    """The training batches from optimizer step `start` on, without end: `accumulate` a step on each of `world` ranks."""

    def __init__(
        self,
        part: Part,
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
        step = self.start
        while True:
            for i in range(self.accumulate):
                yield self.batch(step, i)
            step += 1

    def batch(self, step: int, i: int = 0) -> Batch:
        """Batch `i` of optimizer step `step` on this rank."""
        index = stream_indices(step * self.total, self.total, len(self.part), self.seed)
        charges, position = self._charges(index, step)
        prepared = self.preparation(self.part[charges], rng.generator(self.seed, rng.PREPARATION, step))
        first = (i * self.world + self.rank) * self.batch_size
        mine = prepared[position[first : first + self.batch_size]]
        batch = mine.batch() | {"step": step, "rows": (first, self.total)}
        return batch | _reference(prepared) if self.reference_size else batch

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


def _reference(part: Part) -> Batch:
    """`part` as charges."""
    labels = {} if part.label is None else {"reference_label": part.label}
    return {"reference": part.x} | labels


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


class HeldOut(Dataset):
    """Held-out batches; the index of the first sample fixes the noise."""

    def __init__(
        self,
        part: Part,
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
