"""From a network to `denoise(x, sigma, label=None) -> denoised`.

Everything below the networks speaks this one language. `PreconditionedDenoiser` learns the denoised point itself (EDM,
PFGM++); `FieldDenoiser` learns PFGM's normalised field and inverts it. Both keep the arithmetic around the network in float32
at least, and run the network in the dtype of its parameters. All in centred model space.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pfgm.core.configurable import Configurable
from pfgm.core.tensors import expand, norm, per_sample
from pfgm.theory.field import denoised_from_field
from pfgm.theory.kernel import StudentTKernel

Statistics = tuple[float, float]
"""sigma_data and power_std of `DataSummary`."""


class PreconditionedDenoiser(Configurable, nn.Module):
    """denoised = c_skip x + c_out net(c_in x, log(level)/4), EDM's preconditioning (arXiv 2206.00364, table 1) for every D.

    `noise_level` takes the place of sigma, since for small D the noise in x can be hundreds of times sigma. `sigma_data` and
    `power_std` are those of `DataSummary`; see `Network` for `net`.
    """

    def __init__(self, net: nn.Module, D: float | str, sigma_data: float, power_std: float):
        super().__init__()
        self.net, self.kernel = net, StudentTKernel(D)
        self.sigma_data, self.statistics = sigma_data, (sigma_data, power_std)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which samples should come: that of the parameters, float32 at least."""
        return torch.promote_types(_parameter_dtype(self.net), torch.float32)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor | None) -> Tensor:
        return self.denoise(x, sigma, **conditions)[0]

    def denoise(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor | None) -> tuple[Tensor, Tensor]:
        """The denoised point and c_out [B], which is the size of y - c_skip x to expect, for the loss."""
        level = noise_level(x, per_sample(sigma, x), self.kernel, self.statistics)
        skip, out = preconditioning(level, self.sigma_data)
        F = _call(self.net, x, level, self.sigma_data, 0, conditions)
        return expand(skip, x) * x + expand(out, x) * F, out


class FieldDenoiser(Configurable, nn.Module):
    """A network that predicts PFGM's normalised field (D = 1), read as a denoiser through the field's inverse.

    The network's output is preconditioned so that zero means the field of Gaussian data: with R = sqrt(N+1) level the distance
    to expect in the augmented space, v_x = -sqrt(N) (x - (c_skip x + c_out F_x)) / (R + gamma) and
    v_z = -sqrt(N) z (1 + c_out/level F_z) / (R + gamma), where F_z is the mean of the network's extra channel. `gamma` > 0 is
    the field's regulariser in model units; the other arguments are those of `PreconditionedDenoiser`.
    """

    def __init__(self, net: nn.Module, gamma: float, sigma_data: float, power_std: float):
        super().__init__()
        self.net, self.kernel, self.gamma = net, StudentTKernel(1.0), gamma
        self.sigma_data, self.statistics = sigma_data, (sigma_data, power_std)

    dtype = PreconditionedDenoiser.dtype

    def field(self, x: Tensor, z: float | Tensor, **conditions: Tensor | None) -> tuple[Tensor, Tensor]:
        """The predicted v_x, like `x` [B, C, ...], and v_z [B]."""
        height, N, C = per_sample(z, x, "z"), x[0].numel(), x.shape[1]
        level = noise_level(x, height, self.kernel, self.statistics)
        skip, out = preconditioning(level, self.sigma_data)
        factor = -math.sqrt(N) / (math.sqrt(N + 1) * level + self.gamma)
        F = _call(self.net, x, level, self.sigma_data, 1, conditions)
        v_x = expand(factor * (1 - skip), x) * x - expand(factor * out, x) * F[:, :C]
        return v_x, (factor * height * (1 + out / level * F[:, C:].flatten(1).mean(1))).to(x.dtype)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor | None) -> Tensor:
        v_x, v_z = self.field(x, sigma, **conditions)
        return denoised_from_field(x, sigma, v_x, v_z, self.gamma)


def noise_level(x: Tensor, sigma: Tensor, kernel: StudentTKernel, statistics: Statistics) -> Tensor:
    """E[varsigma² | |x|, sigma]^½: the size of the noise in x when its tails leave it in doubt, [B] in float64.

    varsigma² = a sigma² + (1-a) v, v = |x-y|²/N. The kernel gives the prior of v: v/sigma² is F-distributed with (N, D) degrees
    of freedom. The sample gives its likelihood: |x|²/N - v is |y|²/N and the cross term 2 (x-y)·y/N, about normal with mean
    sigma_data² and variance power_std² + 4 sigma_data² v/N. So level = sigma at D = inf, far away it is that of the hemisphere
    on which x lies, it vanishes with sigma for every x that the data explains, and (y - c_skip x)/c_out has about unit mean
    square at every sigma for every D (within 7 % at N = 64, D >= 1; up to 1.9 at N = 2).

    Chosen by experiment (`benchmarks/heavy_tails.py`: the same small networks on digits and on heavy-tailed vectors, means of
    three training seeds): at D = 1 on digits the Fréchet distance is .365, where EDM's sigma fails (816), the excess of |x|
    over all data gives .568 and a median-like estimate .559; D = inf has .329. At D >= 64 nothing matters on digits. It loses
    on vectors that are themselves Student-t with 3 degrees of freedom at D = 4, where no estimate is better than sigma itself:
    a far x is then as likely to be data as noise.
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
    # Nodes over log v: the prior's range, and more of them where the likelihood peaks.
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
    """EDM's c_skip = s²/(level² + s²) and c_out = level s/sqrt(level² + s²), [B] each."""
    total = level.square() + sigma_data**2
    return sigma_data**2 / total, level * sigma_data * total.rsqrt()


def _call(
    net: nn.Module,
    x: Tensor,
    level: Tensor,
    sigma_data: float,
    extra: int,
    conditions: Mapping[str, Tensor | None],
) -> Tensor:
    """The raw network at c_in x and c_noise = log(level)/4, in the dtype of its parameters; returned in that of x."""
    dtype = _parameter_dtype(net)
    c_in = (level.square() + sigma_data**2).rsqrt()
    given = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in conditions.items() if value is not None
    }
    F = net((expand(c_in, x) * x).to(dtype), (level.log() / 4).to(torch.float32), **given)
    expected = (len(x), x.shape[1] + extra, *x.shape[2:])
    if F.shape != expected:
        raise ValueError(
            f"net returned shape {tuple(F.shape)} where {expected} is needed; check its shape and extra_channels = {extra}"
        )
    return F.to(x.dtype)


def _parameter_dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters()), torch.float32)
