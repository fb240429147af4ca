"""Exact denoisers of known distributions, as modules that fit wherever a trained network does.

They are the independent truths of this project: solvers, likelihoods and networks are tested against them. All in centred
model space; sigma is a float or [B]; labels are accepted and ignored.
"""

import math

import torch
from torch import Tensor, nn

from pfgm.core.tensors import expand, norm, per_sample
from pfgm.theory.field import posterior_mean
from pfgm.theory.kernel import StudentTKernel


class EmpiricalDenoiser(nn.Module):
    """The denoiser of a finite data set: charges [L, ...] with `weights` [L] (default equal). See `field.posterior_mean`."""

    charges: Tensor
    weights: Tensor | None

    def __init__(self, charges: Tensor, D: float, weights: Tensor | None = None):
        super().__init__()
        self.kernel = StudentTKernel(D)
        self.register_buffer("charges", charges)
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[y | x, sigma], like `x` [B, ...]."""
        return posterior_mean(x, sigma, self.charges, self.kernel.D, self.weights)


class PointCharge(nn.Module):
    """All data at one point `y` [...]: denoised = y for every D, and the flow lines are straight."""

    y: Tensor

    def __init__(self, y: Tensor, D: float = math.inf):
        super().__init__()
        self.kernel = StudentTKernel(D)
        self.register_buffer("y", y)

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """y, like `x` [B, ...]."""
        return self.y.to(x.dtype).expand_as(x)


class CauchyBlob(nn.Module):
    """Multivariate Cauchy data of scale s at D = 1: E[y | x, r] = x s/(s + r).

    The field of the blob on the plane is that of a point charge at depth s below it (image charge), so p_r is the Cauchy
    density of scale s + r, and the flow is x(r) = x_0 (s + r)/(s + r_0).
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale, self.kernel = _positive(scale), StudentTKernel(1.0)

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[y | x, sigma], like `x` [B, ...]."""
        return expand(self.scale / (self.scale + per_sample(sigma, x)), x) * x


class GaussianBlob(nn.Module):
    """Data ~ N(0, s² I): E[y | x, sigma] = x s²/(s² + sigma²) at D = inf.

    At finite D the noise is Gaussian of scale sigma/sqrt(kappa), so the factor is averaged over kappa | x, by the trapezoidal
    rule over log kappa on a grid that closes in on the mass of each sample's posterior.
    """

    NODES, ROUNDS, DEPTH = 400, 3, 45.0

    def __init__(self, scale: float, D: float = math.inf):
        super().__init__()
        self.scale, self.kernel = _positive(scale), StudentTKernel(D)
        self.D = self.kernel.D

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[y | x, sigma], like `x` [B, ...]."""
        s = per_sample(sigma, x)
        shrink = self._shrink(s, torch.ones_like(s)) if math.isinf(self.D) else self._average(x, s)
        return expand(shrink, x) * x

    def _shrink(self, sigma: Tensor, kappa: Tensor) -> Tensor:
        return self.scale**2 / (self.scale**2 + sigma.square() / kappa)

    def _average(self, x: Tensor, sigma: Tensor) -> Tensor:
        q, N, s = norm(x).square()[:, None], x[0].numel(), sigma[:, None]
        span = 10 * math.sqrt(2 / self.D) + 2 * self.DEPTH / self.D
        low = torch.log((N + self.D) / (self.D + q / s.square())).clamp(max=0) - span
        high = torch.full_like(low, math.log1p(N / self.D) + math.log1p(10 * math.sqrt(2 / self.D) + 2 * self.DEPTH / self.D))
        unit = torch.linspace(0, 1, self.NODES, dtype=torch.float64, device=x.device)
        for _ in range(self.ROUNDS):
            u = low + (high - low) * unit
            variance = self.scale**2 + s.square() * (-u).exp()
            log_density = self.D / 2 * (u - u.exp()) - N / 2 * variance.log() - q / (2 * variance)
            heavy = log_density > log_density.amax(1, keepdim=True) - self.DEPTH
            first, last = heavy.int().argmax(1, keepdim=True), self.NODES - 1 - heavy.flip(1).int().argmax(1, keepdim=True)
            low, high = u.gather(1, (first - 1).clamp(min=0)), u.gather(1, (last + 1).clamp(max=self.NODES - 1))
        weights = torch.softmax(log_density, dim=1)
        return (weights * self._shrink(s, u.exp())).sum(1)


class UniformSegment(nn.Module):
    """Data uniform on [-1, 1], N = D = 1: E_z and E_x of a charged segment in closed form, denoised = x - z E_x/E_z."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = StudentTKernel(1.0)

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[y | x, sigma], like `x` [B, 1]."""
        z = expand(per_sample(sigma, x), x.double())
        right, left = x.double() + 1, x.double() - 1
        # Without the cancellation of log(right² + z²) - log(left² + z²) and atan(right/z) - atan(left/z) far away.
        E_x = torch.log1p(4 * x.double() / (left.square() + z.square())) / 4
        E_z = torch.atan2(2 * z, right * left + z.square()) / 2
        return (x - z * E_x / E_z).to(x.dtype)


def _positive(scale: float) -> float:
    if not 0 < scale < math.inf:
        raise ValueError(f"scale = {scale} must be a positive finite number")
    return scale
