"""Inverse problems without retraining: samples that agree with linear measurements b = A y + noise.

The denoiser of the posterior follows from that of the prior (MMPS, arXiv 2405.13712, there for D = inf):

    E[y | x, b] = denoised + V Aᵀ (A V Aᵀ + s_b² I)⁻¹ (b - A denoised),    V = sigma² ∂denoised/∂x,

exact for Gaussian data at D = inf, where V is the covariance of y given x, an approximation elsewhere. The equations are solved
by a few conjugate residuals: exactly for as many different eigenvalues of A V Aᵀ, nearly otherwise. All in centred model space.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pfgm.core.tensors import check_positive, expand, per_sample
from pfgm.sampling.guidance import cost


@dataclass(frozen=True)
class Measurement:
    """What was measured of each sample, in the user's units.

    `values` [B, ...] = `operator`(samples [B, *shape]) + Gaussian noise of standard deviation `noise` > 0; the operator is
    linear, or affine, and torch can differentiate it, like `pfgm.data.Downsample(2)` or `Mask`. The equations are solved by
    at most `iterations` of conjugate residuals, each a vector-Jacobian product of the network.
    """

    operator: Callable[[Tensor], Tensor]
    values: Tensor
    noise: float
    iterations: int = 4

    def __post_init__(self) -> None:
        check_positive("noise", self.noise)
        object.__setattr__(self, "values", torch.as_tensor(self.values))
        if self.iterations < 1:
            raise ValueError(f"iterations = {self.iterations} must be at least 1")
        if not bool(torch.isfinite(self.values).all()):
            raise ValueError("values: some measurements are NaN or infinite")


class Mask(nn.Module):
    """Keeps the elements of samples where `known` [*shape] is True, [B, n]: the rest is to be filled in."""

    known: Tensor

    def __init__(self, known: Tensor):
        super().__init__()
        known = torch.as_tensor(known)
        if known.dtype != torch.bool or not bool(known.any()):
            raise ValueError("known: give booleans, True where the sample is known, and at least one")
        self.register_buffer("known", known)

    def forward(self, x: Tensor) -> Tensor:
        """The known elements of `x` [B, *shape]."""
        if x.shape[1:] != self.known.shape:
            raise ValueError(
                f"known has shape {tuple(self.known.shape)}, samples {tuple(x.shape[1:])}; give a mask of that shape"
            )
        return x[:, self.known.to(x.device)]


class MeasuredDenoiser(nn.Module):
    """E[y | x, sigma, b] for measurements b = `values` [B, ...] of `operator`, both in model space, with `noise` s_b."""

    def __init__(
        self,
        denoiser: nn.Module,
        operator: Callable[[Tensor], Tensor],
        values: Tensor,
        noise: float,
        iterations: int = 4,
    ):
        super().__init__()
        self.denoiser, self.operator, self.values = denoiser, operator, values
        self.noise, self.iterations = noise, iterations
        self.dtype = getattr(denoiser, "dtype", None)

    def cost(self, sigma: Tensor | None = None) -> int:
        """That of the denoiser; its vector-Jacobian products are not counted."""
        return cost(self.denoiser, sigma)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor:
        """The denoised point given the measurements, like `x` [B, ...]."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("measurement: the denoiser under it has no derivative here, and so no likelihood; leave it out")
        variance = expand(per_sample(sigma, x).square(), x)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            denoised = self.denoiser(point, sigma, **conditions)
            measured = self.operator(denoised)
        if not measured.requires_grad or not bool(torch.isfinite(measured).all()):
            raise ValueError("operator: it gives NaN or infinity, or torch cannot differentiate it")
        offset = self.operator(torch.zeros_like(x))

        def back(u: Tensor) -> Tensor:
            """V Aᵀ u, for symmetric V."""
            (product,) = torch.autograd.grad(measured, point, u, retain_graph=True)
            return (variance * product).to(x.dtype)

        def matrix(u: Tensor) -> Tensor:
            return self.operator(back(u)) - offset + self.noise**2 * u

        residual = self.values.to(measured) - measured.detach()
        return denoised.detach() + back(conjugate_residuals(matrix, residual, self.iterations, self.noise**2))


def conjugate_residuals(
    matrix: Callable[[Tensor], Tensor], right: Tensor, iterations: int, floor: float = 0.0, tolerance: float = 1e-10
) -> Tensor:
    """u with matrix(u) = `right` [B, ...], for a symmetric matrix of each sample with eigenvalues >= `floor`.

    What comes from a network may be neither symmetric nor bounded so, and the exact solution may then be anything. A sample
    therefore stays where it is when the matrix turns out to be below the floor along its residual, and of course when that
    falls below `tolerance` of the right side.
    """
    u, residual = torch.zeros_like(right), right
    direction, image = residual, torch.zeros_like(right)  # image = matrix(direction)
    size, curvature = _dot(right, right), torch.ones(len(right), dtype=right.dtype, device=right.device)
    enough, going = tolerance**2 * size, size > 0
    for k in range(iterations):
        if not bool(going.any()):
            break
        product, before = matrix(residual), curvature
        curvature = _dot(residual, product)
        going = going & (curvature > floor * (1 - 1e-6) * size)
        old = torch.where(going, curvature / before, 0.0) if k else torch.zeros_like(curvature)
        direction, image = residual + expand(old, u) * direction, product + expand(old, u) * image
        step = torch.where(going, curvature / _dot(image, image).clamp(min=1e-300), 0.0)
        u, residual = u + expand(step, u) * direction, residual - expand(step, u) * image
        size = _dot(residual, residual)
        going = going & (size > enough)
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1).sum(1)
