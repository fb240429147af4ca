"""Degradations of images: what a model is conditioned on to undo them.

Each maps clean samples [B, C, H, W] to their conditions, in the same units. `Downsample` and `Grey` are linear, so that they
also serve as measurements (`pfgm.sampling.inverse`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pfgm.core import rng
from pfgm.core.configurable import Configurable
from pfgm.core.rng import Generators
from pfgm.core.tensors import check_positive


class Degradation(Configurable, ABC):
    """Makes the condition of a sample from the sample itself."""

    @abstractmethod
    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of one condition, for samples of `shape`. ValueError if they cannot be degraded so."""

    @abstractmethod
    def __call__(self, x: Tensor, generator: Generators = None) -> Tensor:
        """The conditions [B, ...] of `x` [B, ...]."""


class Downsample(Degradation):
    """The means of blocks of `factor` x `factor` pixels: for super-resolution."""

    def __init__(self, factor: int = 2):
        if not isinstance(factor, int) or factor < 2:
            raise ValueError(f"factor = {factor} must be a whole number of at least 2")
        self.factor = factor

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels, height, width = _image(shape)
        if height % self.factor or width % self.factor:
            raise ValueError(f"factor = {self.factor} does not divide images of {height} x {width} pixels; give one that does")
        return channels, height // self.factor, width // self.factor

    def __call__(self, x: Tensor, generator: Generators = None) -> Tensor:
        self.shape(x.shape[1:])
        return F.avg_pool2d(x if x.is_floating_point() else x.float(), self.factor)


class Grey(Degradation):
    """The luma of colour images (ITU-R BT.601), one channel: for colourisation."""

    WEIGHTS = (0.299, 0.587, 0.114)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels, height, width = _image(shape)
        if channels != 3:
            raise ValueError(f"images of {channels} channels have no colour to lose; Grey takes 3")
        return 1, height, width

    def __call__(self, x: Tensor, generator: Generators = None) -> Tensor:
        self.shape(x.shape[1:])
        x = x if x.is_floating_point() else x.float()
        weights = torch.tensor(self.WEIGHTS, dtype=x.dtype, device=x.device)
        return (weights[:, None, None] * x).sum(1, keepdim=True)


class AddNoise(Degradation):
    """Gaussian noise of standard deviation `std` in the units of the data, new each time: for denoising."""

    def __init__(self, std: float):
        check_positive("std", std)
        self.std = std

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def __call__(self, x: Tensor, generator: Generators = None) -> Tensor:
        return x + self.std * rng.normal(x.shape, generator, like=x)


def _image(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(
            f"samples of shape {tuple(shape)} are no images (channels, height, width), which this degradation takes"
        )
    channels, height, width = shape
    return channels, height, width
