"""Inverse problems without retraining: samples that agree with linear measurements b = A y + noise.

The denoiser of the posterior follows from that of the prior (MMPS, arXiv 2405.13712, there for D = inf):

    E[y | x, b] = denoised + V Aᵀ (A V Aᵀ + s_b² I)⁻¹ (b - A denoised),    V = sigma² ∂denoised/∂x,

exact for Gaussian data at D = inf, where V is the covariance of y given x, an approximation elsewhere. All in centred model
space.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pfgm.guidance import cost
from pfgm.kernel import check_positive, expand, per_sample


@dataclass(frozen=True)
class Measurement:
    """What was measured of each sample, in the user's units.

    `values` [B, ...] = `operator`(samples [B, *shape]) + Gaussian noise of standard deviation `noise` > 0; the operator is
    linear, or affine, and torch can differentiate it, like `pfgm.degrade.Downsample(2)` or `Mask`. The equations are solved by
    at most `iterations` of conjugate gradients, each a vector-Jacobian product of the network.
    """

    operator: Callable[[Tensor], Tensor]
    values: Tensor
    noise: float
    iterations: int = 16

    def __post_init__(self) -> None:
        check_positive("noise", self.noise)
        if self.iterations < 1:
            raise ValueError(f"iterations = {self.iterations} must be at least 1")
        if not bool(torch.isfinite(self.values).all()):
            raise ValueError("values: some measurements are NaN or infinite")


class Mask(nn.Module):
    """Keeps the elements of samples where `mask` [*shape] is True, [B, n]: the rest is to be filled in."""

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        if mask.dtype != torch.bool or not bool(mask.any()):
            raise ValueError("mask: give booleans, True where the sample is known, and at least one")
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """The known elements of `x` [B, *shape]."""
        if x.shape[1:] != self.mask.shape:
            raise ValueError(
                f"mask has shape {tuple(self.mask.shape)}, samples {tuple(x.shape[1:])}; give a mask of that shape"
            )
        return x[:, self.mask.to(x.device)]


class MeasuredDenoiser(nn.Module):
    """E[y | x, sigma, b] for measurements b = `values` [B, ...] of `operator`, both in model space, with `noise` s_b."""

    def __init__(
        self,
        denoiser: nn.Module,
        operator: Callable[[Tensor], Tensor],
        values: Tensor,
        noise: float,
        iterations: int = 16,
    ):
        super().__init__()
        self.denoiser, self.operator, self.values = denoiser, operator, values
        self.noise, self.iterations = noise, iterations
        self.dtype = getattr(denoiser, "dtype", None)

    def cost(self, sigma: Tensor | None = None) -> int:
        """That of the denoiser; its vector-Jacobian products are not counted."""
        return cost(self.denoiser, sigma)

    def forward(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """The denoised point given the measurements, like `x` [B, ...]."""
        variance = expand(per_sample(sigma, x).square(), x)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            denoised = self.denoiser(point, sigma, label)
            measured = self.operator(denoised)
        offset = self.operator(torch.zeros_like(x))

        def back(u: Tensor) -> Tensor:
            """V Aᵀ u, for symmetric V."""
            (product,) = torch.autograd.grad(measured, point, u, retain_graph=True)
            return (variance * product).to(x.dtype)

        def matrix(u: Tensor) -> Tensor:
            return self.operator(back(u)) - offset + self.noise**2 * u

        residual = self.values.to(measured) - measured.detach()
        return denoised.detach() + back(conjugate_gradients(matrix, residual, self.iterations))


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], right: Tensor, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """u with matrix(u) = `right` [B, ...], for a symmetric positive definite matrix of each sample.

    A sample stays where it is when its residual falls below `tolerance` of the right side, or when the matrix turns out not to
    be positive along the next direction, as the Jacobian of a network may.
    """
    u, residual = torch.zeros_like(right), right
    direction, size = residual, _dot(residual, residual)
    enough = tolerance**2 * size
    for _ in range(iterations):
        if not bool((size > enough).any()):
            break
        image = matrix(direction)
        curvature = _dot(direction, image)
        go = (size > enough) & (curvature > 0)
        step = torch.where(go, size / torch.where(go, curvature, 1.0), 0.0)
        u, residual = u + expand(step, u) * direction, residual - expand(step, u) * image
        old, size = size, torch.where(go, _dot(residual, residual), 0.0)
        direction = residual + expand(size / torch.where(go, old, 1.0), u) * direction
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
