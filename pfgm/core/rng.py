"""Random numbers as functions of counters.

The noise of training step k and the latent of sample i of seed s are functions of (seed, k) and (s, i). They depend neither on
how many numbers were drawn before nor on the parts in which a batch is processed. Resuming, the number of devices and gradient
accumulation therefore cannot change a result, and no generator state has to be saved.
"""

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
    """A part of a batch: rows `first` and following of the numbers that `generator` draws for `total` samples."""

    generator: torch.Generator
    first: int
    total: int


# One generator for a whole batch, one for a part of it, one for each sample, or None for torch's global generator.
Generators = torch.Generator | Sequence[torch.Generator] | Rows | None


def natural(name: str, value: Any) -> int:
    """Return the counter `value` as an int.

    Args:
        name: The argument's name, for the error message.
        value: An integer from 0 to 2^32 - 1. NumPy's SeedSequence would read a larger one as two counters.

    Raises:
        ValueError: If `value` is not such an integer.
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
    words = np.random.SeedSequence([natural("seed", first), *counters]).generate_state(2, np.uint32)
    high, low = map(int, words)
    return (high << 31) ^ low


def generator(*counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator on `device` whose stream is a function of the non-negative integers `counters` alone."""
    return torch.Generator(device).manual_seed(seed(*counters))


def normal(shape: Sequence[int], generator: Generators = None, *, like: Tensor) -> Tensor:
    """Draw standard normal numbers of `shape` [B, ...], with the dtype and on the device of `like`."""

    def draw(count: int, g: torch.Generator | None) -> Tensor:
        return torch.randn((count, *shape[1:]), generator=g, dtype=like.dtype, device=_device(g, like.device))

    return _draw_rows(draw, shape[0], generator).to(like.device)


def uniform(
    shape: int | Sequence[int],
    generator: Generators = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Draw numbers of `shape`, B or [B, ...], uniformly from [0, 1)."""
    total, *event = (shape,) if isinstance(shape, int) else shape

    def draw(count: int, g: torch.Generator | None) -> Tensor:
        return torch.rand((count, *event), generator=g, dtype=dtype, device=_device(g, device))

    return _draw_rows(draw, total, generator).to(device)


def gamma(alpha: float, count: int, generator: Generators = None, *, device: torch.device | str = "cpu") -> Tensor:
    """Draw float64 numbers [count] from the gamma distribution with shape parameter `alpha` > 0 and rate 1."""

    def draw(count: int, g: torch.Generator | None) -> Tensor:
        # torch.distributions takes no generator; this is the function it calls.
        return torch._standard_gamma(torch.full((count,), alpha, dtype=torch.float64, device=_device(g, device)), generator=g)

    return _draw_rows(draw, count, generator).to(device)


def _device(generator: torch.Generator | None, default: torch.device | str) -> torch.device | str:
    return default if generator is None else generator.device


def _draw_rows(draw: Callable[[int, torch.Generator | None], Tensor], count: int, generator: Generators) -> Tensor:
    """Draw `count` rows: all from one generator, as part of a larger batch, or each from its own generator."""
    if isinstance(generator, Rows):
        if generator.first + count > generator.total:
            raise ValueError(f"generator = {generator}: has no rows for {count} samples")
        return draw(generator.total, generator.generator)[generator.first : generator.first + count]
    if not isinstance(generator, Sequence):
        return draw(count, generator)
    if len(generator) != count:
        raise ValueError(f"generator: {len(generator)} generators for {count} samples. Pass one, or one for each sample.")
    return torch.cat([draw(1, g) for g in generator] or [draw(0, None)])
