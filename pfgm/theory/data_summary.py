"""Training laws of the noise level, and values recommended from the data.

sigma is in the units of model space. A law draws sigma for the denoising objective; `PoissonFlowNoise` is PFGM's own
perturbation, which draws x and z together.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from pfgm.core import rng
from pfgm.core.configurable import Recorded, public_path, to_json
from pfgm.core.rng import Generators
from pfgm.core.tensors import check_positive, expand, norm

BLOCK_BYTES = 2**25
"""Size of the float64 copy of a block of data."""


@dataclass(frozen=True)
class DataSummary(Recorded):
    """What a flow has to know of its data.

    The user's units are (model + mean) scale. In model units: `mean` [*shape] over samples (None: to be loaded with the
    weights) and, of the centred data, `sigma_data`, the RMS over samples and coordinates, `norm`, the mean Euclidean norm of a
    sample, and `power_std`, the standard deviation over samples of |y|²/N. `value_range`
    (low, high), in the user's units, is what pictures map to black and white; `num_classes` is 0 without labels. Discrete data
    has so many `levels` (0: continuous), and is `dequantized` if noise fills the gaps. Conditions have `condition_shape` and,
    for each index of its first dimension, the mean and standard deviation `condition_mean` and `condition_std` [C, 1, ...].
    """

    shape: tuple[int, ...]
    sigma_data: float
    norm: float
    power_std: float
    scale: float = 1.0
    value_range: tuple[float, float] | None = None
    num_classes: int = 0
    levels: int = 0
    dequantized: bool = False
    condition_shape: tuple[int, ...] | None = None
    mean: Tensor | None = None
    condition_mean: Tensor | None = None
    condition_std: Tensor | None = None

    TENSORS: ClassVar = ("mean", "condition_mean", "condition_std")

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "condition_shape", None if self.condition_shape is None else tuple(self.condition_shape))

    @classmethod
    def of(
        cls,
        data: Tensor,
        *,
        scale: float = 1.0,
        value_range: tuple[float, float] | None = None,
        num_classes: int = 0,
        mean: float | None = None,
        levels: int = 0,
        dequantized: bool = False,
        condition: Tensor | None = None,
    ) -> "DataSummary":
        """Summary of `data` [n, *shape] in the user's units, centred on its own mean or on a given number, and of the
        `condition` [n, ...] of each sample.

        ValueError if all samples are equal.
        """
        rows = data.split(max(1, BLOCK_BYTES // (8 * data[0].numel())))
        if all(bool((block == data[0]).all()) for block in rows):
            raise ValueError(f"data: all {len(data)} samples are equal; there is no distribution to learn")
        if mean is None:
            centre = torch.stack([block.double().sum(0) for block in rows]).sum(0) / (len(data) * scale)
        else:
            centre = torch.full_like(data[0], mean / scale, dtype=torch.float64)
        norms = torch.cat([norm(block.double() / scale - centre) for block in rows])
        power = norms.square() / centre.numel()
        c_mean, c_std = (None, None) if condition is None else _channel_statistics(condition)
        return cls(
            tuple(centre.shape),
            sigma_data=math.sqrt(power.mean()),
            norm=float(norms.mean()),
            power_std=float(power.std(correction=0)),
            scale=scale,
            value_range=value_range,
            num_classes=num_classes,
            levels=levels,
            dequantized=dequantized,
            condition_shape=None if condition is None else tuple(condition.shape[1:]),
            mean=centre.float(),
            condition_mean=c_mean,
            condition_std=c_std,
        )

    @property
    def spec(self) -> dict[str, Any]:
        """As for every Recorded, without the tensors, which are stored with the weights."""
        init_args = {field.name: to_json(getattr(self, field.name)) for field in fields(self) if field.name not in self.TENSORS}
        return {"class_path": public_path(type(self)), "init_args": init_args}


def _channel_statistics(condition: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1 where it vanishes) over samples and all but the first dimension, [C, 1, ...] each."""
    over = [i for i in range(condition.ndim) if i != 1]
    wide = condition.double()
    mean, std = wide.mean(over, keepdim=True)[0], wide.std(over, correction=0, keepdim=True)[0]
    return mean.float(), torch.where(std > 1e-6 * mean.abs(), std, 1.0).float()


def level_spacing(value_range: Sequence[float] | None, levels: int) -> float:
    """The distance of neighbours among `levels` values from the low to the high end of `value_range`.

    ValueError if there is no range or fewer than two levels.
    """
    if value_range is None or levels < 2:
        raise ValueError(f"value_range = {value_range}, levels = {levels}: discrete data needs a range and two levels or more")
    return (value_range[1] - value_range[0]) / (levels - 1)


def recommended_sigma_max(sigma_data: float) -> float:
    """80 sigma_data: the error of the prior falls as 1/sigma_max² (EDM's 80 at sigma_data = .5 is 160 sigma_data)."""
    return 80 * sigma_data


def recommended_sigma_min(sigma_data: float) -> float:
    """sigma_data / 50: below it the final denoising removes all that is left."""
    return sigma_data / 50


class NoiseLaw(Recorded, ABC):
    """Draw the noise levels of training: subclass it, and name the class in `DenoisingLoss(noise=...)` or as class_path.

    Constructor arguments are recorded, so that a checkpoint can make the law again; it then needs `trust` for its module.
    """

    @abstractmethod
    def sample(self, y: Tensor, sigma_data: float, generator: Generators = None) -> Tensor:
        """Draw one sigma for each clean sample of `y` [B, ...], in model units: [B] in float64."""


class LogNormal(NoiseLaw):
    """log(sigma / sigma_data) ~ N(mean, std²). EDM (arXiv 2206.00364) has -1.2 at sigma_data = .5, that is mean = -.5."""

    def __init__(self, mean: float = -0.5, std: float = 1.2):
        _check_finite("mean", mean)
        check_positive("std", std)
        self.mean, self.std = mean, std

    def sample(self, y: Tensor, sigma_data: float, generator: Generators = None) -> Tensor:
        """One sigma for each sample of `y` [B, ...]: [B] in float64."""
        like = torch.empty(0, dtype=torch.float64, device=y.device)
        return sigma_data * torch.exp(self.mean + self.std * rng.normal((len(y),), generator, like=like))


class LogUniform(NoiseLaw):
    """log(sigma / sigma_data) uniform between log(low) and log(high)."""

    def __init__(self, low: float = 0.002, high: float = 100.0):
        check_positive("low", low)
        check_positive("high", high)
        if low >= high:
            raise ValueError(f"low = {low} must be below high = {high}")
        self.low, self.high = low, high

    def sample(self, y: Tensor, sigma_data: float, generator: Generators = None) -> Tensor:
        """One sigma for each sample of `y` [B, ...]: [B] in float64."""
        u = rng.uniform(len(y), generator, device=y.device)
        return sigma_data * self.low * (self.high / self.low) ** u


class PoissonFlowNoise(Recorded):
    """PFGM's perturbation (arXiv 2209.11178, section 3.2 and appendix B): rays from the data into the upper half space.

    x = y + |eps_x| (1+tau)^m u, z = |eps_z| (1+tau)^m, eps ~ N(0, sigma_end² I_{N+1}), u uniform on the sphere, m ~ U[0, M].
    """

    def __init__(self, sigma_end: float = 0.01, tau: float = 0.03, M: float | None = None):
        check_positive("sigma_end", sigma_end)
        check_positive("tau", tau)
        if M is not None:
            check_positive("M", M)
        self.sigma_end, self.tau, self.M = sigma_end, tau, M

    def exponent(self, data_norm: float, N: int) -> float:
        """M, or the published rule .75 log(norm²/(2 sqrt(N) sigma_end²)) / log(1+tau) for a mean norm `data_norm`."""
        M = self.M
        if M is None:
            M = 0.75 * math.log(data_norm**2 / (2 * math.sqrt(N) * self.sigma_end**2)) / math.log1p(self.tau)
        if not 0 < M * math.log1p(self.tau) < 100:
            raise ValueError(
                f"M = {M:g} at data norm {data_norm:g}, sigma_end = {self.sigma_end}, tau = {self.tau}: give another M"
            )
        return M

    def z_max(self, data_norm: float, N: int) -> float:
        """The mean of z at m = M, sqrt(2/pi) sigma_end (1+tau)^M: where PFGM starts its flow."""
        return math.sqrt(2 / math.pi) * self.sigma_end * (1 + self.tau) ** self.exponent(data_norm, N)

    def perturb(self, y: Tensor, data_norm: float, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Perturbed `y` [B, ...] and heights z [B] in float64."""
        N, like = y[0].numel(), y.new_empty(0, dtype=torch.float64)
        m = rng.uniform(len(y), generator, device=y.device) * self.exponent(data_norm, N)
        growth = self.sigma_end * (1 + self.tau) ** m
        # |eps_x| u is itself N(0, sigma_end² I): a Gaussian vector is its norm times an independent uniform direction.
        x = y + expand(growth, y) * rng.normal(y.shape, generator, like=y)
        return x, growth * rng.normal((len(y),), generator, like=like).abs()


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} = {value} must be a finite number")
