"""Denoise known distributions exactly: ground truth for solvers, likelihoods and networks.

`denoiser(x, sigma, **conditions)` returns E[y | x, sigma], like `x` [B, ...], for `sigma` a float or [B]. It is exact for its
`kernel`, of `D` augmented dimensions, and ignores all conditions.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core.tensors import check_positive, expand, norm, per_sample
from pfgm.theory.field import posterior_mean
from pfgm.theory.kernel import StudentTKernel


class EmpiricalDenoiser(nn.Module):
    """Denoise a finite data set, see `pfgm.theory.field.posterior_mean`.

    Args:
        charges: data points [L, ...].
        D: augmented dimensions.
        weights: probabilities up to a factor, [L] (default: equal).
    """

    charges: Tensor
    weights: Tensor | None

    def __init__(self, charges: Tensor, D: float, weights: Tensor | None = None):
        super().__init__()
        self.kernel = StudentTKernel(D)
        self.register_buffer("charges", charges)
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Any) -> Tensor:
        return posterior_mean(x, sigma, self.charges, self.kernel.D, self.weights)


class PointCharge(nn.Module):
    """Denoise data at a single point y: denoised = y for every D, and the flow lines are straight.

    Args:
        y: the point [...].
        D: augmented dimensions.
    """

    y: Tensor

    def __init__(self, y: Tensor, D: float = math.inf):
        super().__init__()
        self.kernel = StudentTKernel(D)
        self.register_buffer("y", y)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Any) -> Tensor:
        return self.y.to(x.dtype).expand_as(x)


class CauchyBlob(nn.Module):
    """Denoise multivariate Cauchy data of scale s at D = 1: E[y | x, r] = x s/(s + r).

    The field of this data is that of a point charge at depth s below the plane r = 0 (image charge). So p_r is the Cauchy
    density of scale s + r, and the flow is x(r) = x_0 (s + r)/(s + r_0).

    Args:
        scale: s > 0.
    """

    def __init__(self, scale: float):
        super().__init__()
        check_positive("scale", scale)
        self.scale, self.kernel = scale, StudentTKernel(1.0)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Any) -> Tensor:
        return expand(self.scale / (self.scale + per_sample(sigma, x)), x) * x


class GaussianBlob(nn.Module):
    """Denoise Gaussian data N(0, s² I): E[y | x, sigma] = x s²/(s² + sigma²) at D = inf.

    At finite D the noise is Gaussian of scale sigma/sqrt(kappa), and the factor s²/(s² + sigma²/kappa) is averaged over
    kappa | x, by a trapezoidal rule over log kappa whose grid is narrowed around the posterior of each sample.

    Args:
        scale: s > 0.
        D: augmented dimensions.
    """

    NODES = 400  # of the quadrature
    ROUNDS = 3  # of narrowing the grid
    DEPTH = 45.0  # log-density below its maximum at which the grid ends

    def __init__(self, scale: float, D: float = math.inf):
        super().__init__()
        check_positive("scale", scale)
        self.scale, self.kernel = scale, StudentTKernel(D)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Any) -> Tensor:
        s = per_sample(sigma, x)
        shrink = self._shrink(s, torch.ones_like(s)) if math.isinf(self.kernel.D) else self._average(x, s)
        return expand(shrink, x) * x

    def _shrink(self, sigma: Tensor, kappa: Tensor) -> Tensor:
        """Compute the factor of x, given kappa."""
        return self.scale**2 / (self.scale**2 + sigma.square() / kappa)

    def _average(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Average `_shrink` over kappa | x, [B]."""
        q, N, s, D = norm(x).square()[:, None], x[0].numel(), sigma[:, None], self.kernel.D
        width = 10 * math.sqrt(2 / D) + 2 * self.DEPTH / D
        low = torch.log((N + D) / (D + q / s.square())).clamp(max=0) - width
        high = torch.full_like(low, math.log1p(N / D) + math.log1p(width))
        unit = torch.linspace(0, 1, self.NODES, dtype=torch.float64, device=x.device)
        for _ in range(self.ROUNDS):
            u = low + (high - low) * unit
            variance = self.scale**2 + s.square() * (-u).exp()
            log_density = D / 2 * (u - u.exp()) - N / 2 * variance.log() - q / (2 * variance)
            heavy = log_density > log_density.amax(1, keepdim=True) - self.DEPTH
            first, last = heavy.int().argmax(1, keepdim=True), self.NODES - 1 - heavy.flip(1).int().argmax(1, keepdim=True)
            low, high = u.gather(1, (first - 1).clamp(min=0)), u.gather(1, (last + 1).clamp(max=self.NODES - 1))
        weights = torch.softmax(log_density, dim=1)
        return (weights * self._shrink(s, u.exp())).sum(1)


class UniformSegment(nn.Module):
    """Denoise data uniform on [-1, 1] at N = D = 1: denoised = x - z E_x/E_z, with x [B, 1].

    The field of a uniformly charged segment has the closed form

        E_x = [log((x+1)² + z²) - log((x-1)² + z²)]/4,    E_z = [atan((x+1)/z) - atan((x-1)/z)]/2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernel = StudentTKernel(1.0)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Any) -> Tensor:
        z = expand(per_sample(sigma, x), x.double())
        right, left = x.double() + 1, x.double() - 1
        # log1p and a single atan2 avoid the cancellation of the differences far from the segment.
        E_x = torch.log1p(4 * x.double() / (left.square() + z.square())) / 4
        E_z = torch.atan2(2 * z, right * left + z.square()) / 2
        return (x - z * E_x / E_z).to(x.dtype)
