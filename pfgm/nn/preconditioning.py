"""Make denoisers of networks that learn the denoised point (EDM, PFGM++) or PFGM's normalised field.

The network runs in the dtype of its parameters, all else in float32 at least. All quantities are in centred model space.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pfgm.core.configurable import Configurable
from pfgm.core.tensors import expand, norm, per_sample
from pfgm.theory.field import denoised_from_field
from pfgm.theory.kernel import StudentTKernel

Statistics = tuple[float, float]  # sigma_data and power_std of `DataSummary`


class _NetworkDenoiser(Configurable, nn.Module):
    """Hold the network, the kernel and the statistics of the data, for both denoisers."""

    def __init__(self, net: nn.Module, D: float | str, sigma_data: float, power_std: float):
        super().__init__()
        self.net, self.kernel = net, StudentTKernel(D)
        self.sigma_data, self.statistics = sigma_data, (sigma_data, power_std)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which samples should come: that of the parameters, but at least float32."""
        return torch.promote_types(_parameter_dtype(self.net), torch.float32)

    def _coefficients(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the noise level of x, and c_skip and c_out at that level, [B] each."""
        level = noise_level(x, sigma, self.kernel, self.statistics)
        return level, *preconditioning(level, self.sigma_data)

    def _network(self, x: Tensor, level: Tensor, conditions: Mapping[str, Tensor | None], extra_channels: int) -> Tensor:
        """Call the network at c_in x and c_noise = log(level)/4 in the dtype of its parameters; return that of x."""
        dtype, c_in = _parameter_dtype(self.net), (level.square() + self.sigma_data**2).rsqrt()
        present = {key: value for key, value in conditions.items() if value is not None}
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in present.items()}
        F = self.net((expand(c_in, x) * x).to(dtype), (level.log() / 4).to(torch.float32), **cast)
        expected = (len(x), x.shape[1] + extra_channels, *x.shape[2:])
        if F.shape != expected:
            raise ValueError(
                f"net returned shape {tuple(F.shape)}, not {expected}. Check its shape and extra_channels = {extra_channels}"
            )
        return F.to(x.dtype)


class PreconditionedDenoiser(_NetworkDenoiser):
    """Compute denoised = c_skip x + c_out net(c_in x, log(level)/4), EDM's preconditioning for every D.

    The coefficients are those of EDM (arXiv 2206.00364, table 1) with `noise_level` in place of sigma, since for small D the
    noise in x can be hundreds of times sigma.

    Args:
        net: Network that meets the contract of `Network`.
        D: Number of augmented dimensions, > 0 or inf.
        sigma_data: Standard deviation of the data, see `DataSummary`.
        power_std: Standard deviation of the mean square of a sample, see `DataSummary`.
    """

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor | None) -> Tensor:
        return self.denoise(x, sigma, **conditions)[0]

    def denoise(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the denoised point, like x, and c_out [B], the expected size of y - c_skip x, which weighs its error.

        Args:
            x: Noisy samples [B, ...].
            sigma: Noise level, a float or [B].
            **conditions: Tensors [B, ...] for the network, or None. Floating-point ones are cast to its dtype.
        """
        level, c_skip, c_out = self._coefficients(x, per_sample(sigma, x))
        F = self._network(x, level, conditions, extra_channels=0)
        return expand(c_skip, x) * x + expand(c_out, x) * F, c_out


class FieldDenoiser(_NetworkDenoiser):
    """Predict PFGM's normalised field (D = 1, arXiv 2209.11178) and denoise by inverting it.

    The network's output is preconditioned so that zero means the field of Gaussian data. With R = sqrt(N+1) level, the expected
    distance in the augmented space,

        v_x = -sqrt(N) (x - (c_skip x + c_out F_x)) / (R + gamma),    v_z = -sqrt(N) z (1 + c_out/level F_z) / (R + gamma),

    where F_z is the mean of the network's extra channel.

    Args:
        net: Network that meets the contract of `Network`, with extra_channels = 1.
        gamma: Regulariser of the field, > 0, in model units.
        sigma_data, power_std: See `PreconditionedDenoiser`.
    """

    def __init__(self, net: nn.Module, gamma: float, sigma_data: float, power_std: float):
        super().__init__(net, 1.0, sigma_data, power_std)
        self.gamma = gamma

    def field(self, x: Tensor, z: float | Tensor, **conditions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the predicted field, v_x like x and v_z [B].

        Args:
            x: Noisy samples [B, C, ...].
            z: Augmented coordinate, > 0, a float or [B].
            **conditions: See `PreconditionedDenoiser.denoise`.
        """
        height, N, C = per_sample(z, x, "z"), x[0].numel(), x.shape[1]
        level, c_skip, c_out = self._coefficients(x, height)
        factor = -math.sqrt(N) / (math.sqrt(N + 1) * level + self.gamma)
        F = self._network(x, level, conditions, extra_channels=1)
        v_x = expand(factor * (1 - c_skip), x) * x - expand(factor * c_out, x) * F[:, :C]
        return v_x, (factor * height * (1 + c_out / level * F[:, C:].flatten(1).mean(1))).to(x.dtype)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor | None) -> Tensor:
        v_x, v_z = self.field(x, sigma, **conditions)
        return denoised_from_field(x, sigma, v_x, v_z, self.gamma)


def noise_level(x: Tensor, sigma: Tensor, kernel: StudentTKernel, statistics: Statistics) -> Tensor:
    """Estimate the size of the noise in x, E[varsigma² | |x|, sigma]^½, which its heavy tails leave in doubt.

    varsigma² = a sigma² + (1-a) v, v = |x-y|²/N. The kernel gives the prior of v: v/sigma² is F-distributed with (N, D) degrees
    of freedom. The sample gives its likelihood: |x|²/N - v is |y|²/N plus the cross term 2 (x-y)·y/N, about normal with mean
    sigma_data² and variance power_std² + 4 sigma_data² v/N. So the level [B] is sigma at D = inf, and far away that of the
    hemisphere of x; it vanishes with sigma for every x that the data explain. `benchmarks/heavy_tails.py` compares others.
    """
    sigma_data, power_std = statistics
    N = x[0].numel()
    a = kernel.level_weight(N)
    if a == 1:
        return sigma
    power, prior = norm(x).square()[:, None] / N, sigma.square()[:, None]
    excess = power - sigma_data**2
    width = (power_std**2 + 4 * sigma_data**2 * excess.clamp(min=0) / N).sqrt().clamp(min=1e-6 * sigma_data**2)
    spread = 8 * math.sqrt(2 / N) + math.log1p(8 * math.sqrt(2 / kernel.D) + 60 / kernel.D)
    largest = prior + power + 5 * width + 60 * sigma_data**2 / N
    low, high = prior.log() - spread, torch.minimum(prior.log() + spread + 100 / kernel.D, largest.log())
    # Nodes over log v cover the range of the prior, more densely where the likelihood peaks.
    coarse = low + (high - low) * torch.linspace(0, 1, 64, dtype=torch.float64, device=x.device)
    fine = (excess + width * torch.linspace(-5, 5, 33, dtype=torch.float64, device=x.device)).clamp(min=1e-300).log()
    u = torch.cat([coarse, fine.clamp(low, high)], dim=1).sort(dim=1).values
    v, ratio = u.exp(), u - prior.log() + math.log(N / kernel.D)
    variance = power_std**2 + 4 * sigma_data**2 * v / N
    log_density = N / 2 * ratio - (N + kernel.D) / 2 * nn.functional.softplus(ratio)
    log_density = log_density - (excess - v).square() / (2 * variance) - variance.log() / 2
    step = torch.cat([u[:, 1:2] - u[:, :1], u[:, 2:] - u[:, :-2], u[:, -1:] - u[:, -2:-1]], dim=1)
    weights = step * (log_density - log_density.amax(1, keepdim=True)).exp()
    mean = (weights * v).sum(1) / weights.sum(1)
    return (a * sigma.square() + (1 - a) * mean).sqrt()


def preconditioning(level: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Return EDM's c_skip = s²/(level² + s²) and c_out = level s/sqrt(level² + s²), [B] each, s = `sigma_data`."""
    total = level.square() + sigma_data**2
    return sigma_data**2 / total, level * sigma_data * total.rsqrt()


def _parameter_dtype(net: nn.Module) -> torch.dtype:
    """Return the dtype of the first parameter, float32 if there is none."""
    return next((p.dtype for p in net.parameters()), torch.float32)
