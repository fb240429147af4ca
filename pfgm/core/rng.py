"""Random numbers as functions of counters.

The noise of training step k and the latent of sample i of seed s are functions of (seed, k) and (s, i), not of how many
numbers were drawn before, nor of the parts in which a batch is worked off. Resuming, the number of devices and gradient
accumulation then cannot change a result, and no generator state has to be saved.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PERMUTATION, REFERENCE, TRAINING, VALIDATION, DROPOUT, PREPARATION, HELD_OUT, WHOLE, UNITS, AUGMENTATION, FEATURES = range(11)
"""Second counters, after a run's seed: order of the data, choice of charges, noise of training and of validation, dropped
labels, preparation of batches of training, of validation, and of all data at once, dropped units, augmentation, classifiers."""
RENOISING, PROBES, DEQUANTIZATION = 1, 2, 3
"""Last of five counters, after a sample's seed and index: noise added on its way, probes of its likelihood, noise that fills
the gaps between levels."""


@dataclass(frozen=True)
class Rows:
    """A part of a batch: of the numbers that `generator` draws for `total` samples, those from row `first` on."""

    generator: torch.Generator
    first: int
    total: int


Generators = torch.Generator | Sequence[torch.Generator] | Rows | None
"""One generator for a whole batch or for a part of it, one for each sample, or None for torch's global one."""


def natural(name: str, value: Any) -> int:
    """`value` as an int; ValueError, which calls it `name`, unless it is a whole number from 0 to 2^32 - 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} has the value {value!r}; give whole numbers") from None
    if not 0 <= number < 2**32:  # above, numpy's SeedSequence would take it for two counters
        raise ValueError(f"{name} has the value {number}; it must not be negative, and below 2^32")
    return number


def seed(first: int, *counters: int) -> int:
    """An integer that is a function of the natural numbers `first`, a seed, and `counters` alone. ValueError for no seed."""
    words = np.random.SeedSequence([natural("seed", first), *counters]).generate_state(2, np.uint32)
    high, low = map(int, words)
    return (high << 31) ^ low


def generator(*counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` whose stream is a function of the non-negative integers `counters` alone."""
    return torch.Generator(device).manual_seed(seed(*counters))


def normal(shape: Sequence[int], generator: Generators = None, *, like: Tensor) -> Tensor:
    """Standard normal numbers of `shape` [B, ...], with the dtype and the device of `like`."""

    def draw(rows: slice, g: torch.Generator | None) -> Tensor:
        size = (rows.stop - rows.start, *shape[1:])
        return torch.randn(size, generator=g, dtype=like.dtype, device=like.device if g is None else g.device)

    return _by_sample(draw, shape[0], generator).to(like.device)


def uniform(
    shape: int | Sequence[int],
    generator: Generators = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Numbers of `shape`, B or [B, ...], uniform on [0, 1)."""
    count, *event = (shape,) if isinstance(shape, int) else shape

    def draw(rows: slice, g: torch.Generator | None) -> Tensor:
        place = device if g is None else g.device
        return torch.rand((rows.stop - rows.start, *event), generator=g, dtype=dtype, device=place)

    return _by_sample(draw, count, generator).to(device)


def gamma(alpha: float, count: int, generator: Generators = None, *, device: torch.device | str = "cpu") -> Tensor:
    """`count` gamma-distributed float64 numbers [B] of rate 1 and shape parameter `alpha` > 0."""

    def draw(rows: slice, g: torch.Generator | None) -> Tensor:
        place = device if g is None else g.device
        # torch.distributions takes no generator; this is the function it calls.
        shape = torch.full((rows.stop - rows.start,), alpha, dtype=torch.float64, device=place)
        return torch._standard_gamma(shape, generator=g)

    return _by_sample(draw, count, generator).to(device)


def _by_sample(draw: Callable[[slice, torch.Generator | None], Tensor], count: int, generator: Generators) -> Tensor:
    """All rows from one generator at once, the rows of a part, or each row from its own."""
    if isinstance(generator, Rows):
        if generator.first + count > generator.total:
            raise ValueError(f"{generator}: has no rows for {count} samples")
        return draw(slice(0, generator.total), generator.generator)[generator.first : generator.first + count]
    if not isinstance(generator, Sequence):
        return draw(slice(0, count), generator)
    if len(generator) != count:
        raise ValueError(f"generator: {len(generator)} generators for {count} samples; give one, or one for each sample")
    return torch.cat([draw(slice(i, i + 1), g) for i, g in enumerate(generator)] or [draw(slice(0, 0), None)])
