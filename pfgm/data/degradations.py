"""Degradations of images, which make the conditions of models that undo them.

They map clean samples [B, C, H, W] to conditions in the same units. `Downsample` and `Grey` are linear, so they also serve as
measurements in `pfgm.sampling.inverse`.
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
    """Base class of degradations, which make the condition of a sample from the sample itself."""

    @abstractmethod
    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one condition.

        Args:
            shape: The shape of one sample.

        Raises:
            ValueError: If such samples cannot be degraded.
        """

    @abstractmethod
    def __call__(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Degrade samples.

        Args:
            x: Samples [B, ...] in the user's units.
            generator: Source of noise, for degradations with noise.

        Returns:
            The conditions [B, ...], in the same units.
        """


class Downsample(Degradation):
    """Average blocks of pixels, for super-resolution.

    Args:
        factor: Side of a block in pixels, at least 2.

    Raises:
        ValueError: If `factor` is not a whole number of at least 2.
    """

    def __init__(self, factor: int = 2):
        if factor < 2:
            raise ValueError(f"factor = {factor} must be a whole number of at least 2")
        self.factor = factor

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels, height, width = _image_shape(shape)
        if height % self.factor or width % self.factor:
            raise ValueError(f"factor = {self.factor} does not divide {height} x {width} pixels. Choose a common divisor")
        return channels, height // self.factor, width // self.factor

    def __call__(self, x: Tensor, generator: Generators = None) -> Tensor:
        self.shape(x.shape[1:])
        return F.avg_pool2d(_floating(x), self.factor)


class Grey(Degradation):
    """Reduce colour images to one channel, their luma (ITU-R BT.601), for colourisation."""

    WEIGHTS = (0.299, 0.587, 0.114)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels, height, width = _image_shape(shape)
        if channels != 3:
            raise ValueError(f"channels = {channels}: Grey needs images with 3 channels")
        return 1, height, width

    def __call__(self, x: Tensor, generator: Generators = None) -> Tensor:
        self.shape(x.shape[1:])
        x = _floating(x)
        weights = torch.tensor(self.WEIGHTS, dtype=x.dtype, device=x.device)
        return (weights[:, None, None] * x).sum(1, keepdim=True)


class AddNoise(Degradation):
    """Add Gaussian noise, new each time, for denoising.

    Args:
        std: Standard deviation in the units of the data.

    Raises:
        ValueError: If `std` is not positive and finite.
    """

    def __init__(self, std: float):
        check_positive("std", std)
        self.std = std

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def __call__(self, x: Tensor, generator: Generators = None) -> Tensor:
        return x + self.std * rng.normal(x.shape, generator, like=x)


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


def _image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"shape = {tuple(shape)}: this degradation needs images, (channels, height, width)")
    channels, height, width = shape
    return channels, height, width
