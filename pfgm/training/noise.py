"""Distributions from which training draws noise levels, and the range of noise levels recommended for sampling."""

import math
from abc import ABC, abstractmethod

from torch import Tensor, float64

from pfgm.core import rng
from pfgm.core.configurable import Configurable
from pfgm.core.rng import Generators
from pfgm.core.tensors import check_positive, expand


def recommended_sigma_max(sigma_data: float) -> float:
    """Return 80 sigma_data. The error of the prior falls as 1/sigma_max²; EDM's 80 is 160 sigma_data."""
    return 80 * sigma_data


def recommended_sigma_min(sigma_data: float) -> float:
    """Return sigma_data / 50, below which the final denoising step removes the remaining noise."""
    return sigma_data / 50


class NoiseLaw(Configurable, ABC):
    """Base class for distributions of the noise level in training.

    Pass an instance as `DenoisingLoss(noise=...)`, or name the class by `class_path` in a configuration. Checkpoints record the
    constructor arguments. Loading the module of a checkpoint needs `trust` for the module that defines a custom class.

    Example:
        A density that rises linearly from 0 to `top` sigma_data::

            class Triangular(NoiseLaw):
                def __init__(self, top: float = 4.0):
                    self.top = top

                def sample(self, y, sigma_data, generator=None):
                    return self.top * sigma_data * (1 - rng.uniform(len(y), generator, device=y.device)).sqrt()
    """

    @abstractmethod
    def sample(self, y: Tensor, sigma_data: float, generator: Generators = None) -> Tensor:
        """Draw one noise level for each clean sample.

        Args:
            y: Clean samples [B, ...] in model units.
            sigma_data: RMS of the centred data in model units.
            generator: Source of randomness for `pfgm.core.rng.normal` and `uniform`, which keep results independent of how a
                batch is split.

        Returns:
            Noise levels sigma [B], positive, float64, in model units, on the device of `y`.
        """


class LogNormal(NoiseLaw):
    """Draw ln(sigma) ~ N(P_mean, P_std²), the training distribution of EDM (arXiv 2206.00364, table 1).

    Args:
        P_mean: Mean of ln(sigma), sigma in model units. EDM's -1.2 is meant for sigma_data = 0.5.
        P_std: Standard deviation of ln(sigma).
    """

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2):
        _check_finite("P_mean", P_mean)
        check_positive("P_std", P_std)
        self.P_mean, self.P_std = P_mean, P_std

    def sample(self, y: Tensor, sigma_data: float, generator: Generators = None) -> Tensor:
        return (self.P_mean + self.P_std * _normal(y, generator)).exp()


class ScaledLogNormal(NoiseLaw):
    """Draw ln(sigma / sigma_data) ~ N(mean, std²): `LogNormal` with P_mean = mean + ln(sigma_data) and P_std = std.

    The defaults suit data of any scale. EDM's P_mean = -1.2 at sigma_data = 0.5 corresponds to mean = -0.507.

    Args:
        mean: Mean of ln(sigma / sigma_data).
        std: Standard deviation of ln(sigma / sigma_data).
    """

    def __init__(self, mean: float = -0.5, std: float = 1.2):
        _check_finite("mean", mean)
        check_positive("std", std)
        self.mean, self.std = mean, std

    def sample(self, y: Tensor, sigma_data: float, generator: Generators = None) -> Tensor:
        return sigma_data * (self.mean + self.std * _normal(y, generator)).exp()


class LogUniform(NoiseLaw):
    """Draw ln(sigma / sigma_data) uniformly between ln(low) and ln(high).

    Args:
        low: Lowest noise level in units of sigma_data.
        high: Highest noise level in units of sigma_data.
    """

    def __init__(self, low: float = 0.002, high: float = 100.0):
        check_positive("low", low)
        check_positive("high", high)
        if low >= high:
            raise ValueError(f"low = {low}, high = {high}: low must be below high.")
        self.low, self.high = low, high

    def sample(self, y: Tensor, sigma_data: float, generator: Generators = None) -> Tensor:
        u = rng.uniform(len(y), generator, device=y.device)
        return sigma_data * self.low * (self.high / self.low) ** u


class PoissonFlowNoise(Configurable):
    """Perturb samples along rays into the upper half space, as PFGM does (arXiv 2209.11178, section 3.2 and appendix B).

    x = y + |eps_x| (1+tau)^m u and z = |eps_z| (1+tau)^m, with eps ~ N(0, sigma_end² I_{N+1}), u uniform on the unit sphere and
    m ~ U[0, M].

    Args:
        sigma_end: Standard deviation of the smallest perturbation, in model units.
        tau: Growth rate; the perturbation grows by (1 + tau) for each unit of m.
        M: Largest exponent. By default, the published rule derives it from the data; see `exponent`.
    """

    def __init__(self, sigma_end: float = 0.01, tau: float = 0.03, M: float | None = None):
        check_positive("sigma_end", sigma_end)
        check_positive("tau", tau)
        if M is not None:
            check_positive("M", M)
        self.sigma_end, self.tau, self.M = sigma_end, tau, M

    def exponent(self, data_norm: float, N: int) -> float:
        """Return M, or by default the published 0.75 ln(norm² / (2 sqrt(N) sigma_end²)) / ln(1+tau).

        Args:
            data_norm: Mean Euclidean norm of the centred data in model units.
            N: Number of dimensions of a sample.

        Raises:
            ValueError: If (1+tau)^M is not between 1 and e^100.
        """
        M = self.M
        if M is None:
            M = 0.75 * math.log(data_norm**2 / (2 * math.sqrt(N) * self.sigma_end**2)) / math.log1p(self.tau)
        if not 0 < M * math.log1p(self.tau) < 100:
            raise ValueError(
                f"M = {M:g}, sigma_end = {self.sigma_end}, tau = {self.tau}, data norm = {data_norm:g}: (1 + tau)^M must be "
                "between 1 and e^100. Set M, or change sigma_end or tau."
            )
        return M

    def z_max(self, data_norm: float, N: int) -> float:
        """Return sqrt(2/pi) sigma_end (1+tau)^M, the mean of z at m = M, where PFGM starts sampling; see `exponent`."""
        return math.sqrt(2 / math.pi) * self.sigma_end * (1 + self.tau) ** self.exponent(data_norm, N)

    def perturb(self, y: Tensor, data_norm: float, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Perturb clean samples.

        Args:
            y: Clean samples [B, ...] in model units.
            data_norm: Mean Euclidean norm of the centred data in model units.
            generator: Source of randomness; see `NoiseLaw.sample`.

        Returns:
            Perturbed samples x [B, ...] in the dtype of `y`, and heights z [B] in float64.
        """
        m = rng.uniform(len(y), generator, device=y.device) * self.exponent(data_norm, y[0].numel())
        growth = self.sigma_end * (1 + self.tau) ** m
        # |eps_x| u is itself N(0, sigma_end² I): a Gaussian vector is its norm times an independent uniform direction.
        x = y + expand(growth, y) * rng.normal(y.shape, generator, like=y)
        return x, growth * _normal(y, generator).abs()


def _normal(y: Tensor, generator: Generators) -> Tensor:
    """Draw one standard normal number [B] in float64 for each sample of `y` [B, ...]."""
    return rng.normal((len(y),), generator, like=y.new_empty(0, dtype=float64))


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} = {value} must be a finite number.")
