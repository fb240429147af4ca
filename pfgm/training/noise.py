"""Training laws of the noise level, and values recommended from the data."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pfgm.core import rng
from pfgm.core.configurable import Configurable
from pfgm.core.rng import Generators
from pfgm.core.tensors import check_positive, expand


def recommended_sigma_max(sigma_data: float) -> float:
    """80 sigma_data: the error of the prior falls as 1/sigma_max² (EDM's 80 at sigma_data = .5 is 160 sigma_data)."""
    return 80 * sigma_data


def recommended_sigma_min(sigma_data: float) -> float:
    """sigma_data / 50: below it the final denoising removes all that is left."""
    return sigma_data / 50


class NoiseLaw(Configurable, ABC):
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


class PoissonFlowNoise(Configurable):
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
