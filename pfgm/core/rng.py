"""Random numbers as functions of counters.

The noise of training step k and the latent of sample i of seed s are functions of (seed, k) and (s, i), whatever was drawn
before and however a batch is split. Resuming, devices and gradient accumulation cannot change a result, and no state is saved.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Streams of a run: the second counter, after the run's seed.
PERMUTATION = 0  # order of the data
REFERENCE = 1  # choice of charges
TRAINING = 2  # training noise
VALIDATION = 3  # validation noise
DROPOUT = 4  # dropped labels
PREPARATION = 5  # preparation of training batches
HELD_OUT = 6  # preparation of validation batches
WHOLE = 7  # preparation of all data at once
UNITS = 8  # dropped units of the network
AUGMENTATION = 9
FEATURES = 10  # training of feature classifiers

# Streams of a sample: the last of five counters, after the sample's seed and index.
RENOISING = 1  # noise added by stochastic solvers
PROBES = 2  # probes of the likelihood's trace estimate
DEQUANTIZATION = 3  # noise that fills the gaps between discrete levels


@dataclass(frozen=True)
class Rows:
    """Select a part of a batch: rows `first` and following of the numbers that `generator` draws for `total` samples."""

    generator: torch.Generator
    first: int
    total: int


Device = torch.device | str
# One generator for a whole batch, one for a part of it, one for each sample, or None for torch's global generator.
Generators = torch.Generator | Sequence[torch.Generator] | Rows | None


def natural(name: str, value: Any) -> int:
    """Return the counter `value`, called `name`, as an int.

    Raises:
        ValueError: Unless it is an integer from 0 to 2^32 - 1. NumPy's SeedSequence reads a larger one as two counters.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise ValueError(f"{name} = {value!r}: expected an integer from 0 to 2^32 - 1")
    return number


def seed(first: int, *counters: int) -> int:
    """Return a 63-bit integer that is a function of the seed `first` and of `counters` alone, trailing zeros aside."""
    high, low = np.random.SeedSequence([natural("seed", first), *counters]).generate_state(2, np.uint32).tolist()
    return (high << 31) ^ low


def generator(*counters: int, device: Device = "cpu") -> torch.Generator:
    """Return a torch generator on `device` whose stream is a function of the non-negative integers `counters` alone."""
    return torch.Generator(device).manual_seed(seed(*counters))


def normal(shape: Sequence[int], generator: Generators = None, *, like: Tensor) -> Tensor:
    """Draw standard normal numbers of `shape` [B, ...], with the dtype and on the device of `like`."""
    return _draw_rows(functools.partial(torch.randn, dtype=like.dtype), shape, generator, like.device)


def uniform(
    shape: int | Sequence[int],
    generator: Generators = None,
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Draw numbers of `shape`, B or [B, ...], uniformly from [0, 1)."""
    shape = (shape,) if isinstance(shape, int) else shape
    return _draw_rows(functools.partial(torch.rand, dtype=dtype), shape, generator, device)


def gamma(alpha: float, count: int, generator: Generators = None, *, device: Device = "cpu") -> Tensor:
    """Draw float64 numbers [count] from the gamma distribution with shape parameter `alpha` > 0 and rate 1."""

    def draw(shape: Sequence[int], generator: torch.Generator | None, device: Device) -> Tensor:
        # torch.distributions takes no generator; this is the function it calls.
        return torch._standard_gamma(torch.full(shape, alpha, dtype=torch.float64, device=device), generator=generator)

    return _draw_rows(draw, (count,), generator, device)


def _draw_rows(draw: Callable[..., Tensor], shape: Sequence[int], generator: Generators, device: Device) -> Tensor:
    """Draw `shape` [B, ...] on `device`: from one generator, as part of a larger batch, or each row from its own generator."""
    count = shape[0]

    def rows(n: int, g: torch.Generator | None) -> Tensor:
        return draw((n, *shape[1:]), generator=g, device=device if g is None else g.device)

    if isinstance(generator, Rows):
        if generator.first + count > generator.total:
            raise ValueError(f"generator = {generator}: has no rows for {count} samples")
        drawn = rows(generator.total, generator.generator)[generator.first : generator.first + count]
    elif isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"generator: {len(generator)} generators for {count} samples. Pass one, or one for each sample.")
        drawn = torch.cat([rows(1, g) for g in generator] or [rows(0, None)])
    else:
        drawn = rows(count, generator)
    return drawn.to(device)
