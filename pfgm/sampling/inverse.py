"""Inverse problems without retraining: samples that agree with linear measurements b = A y + noise, in model space.

The denoiser of the posterior follows from that of the prior (MMPS, arXiv 2405.13712, derived there for D = inf):

    E[y | x, b] = denoised + V Aᵀ (A V Aᵀ + s_b² I)⁻¹ (b - A denoised),    V = sigma² ∂denoised/∂x,

exact for Gaussian data at D = inf, where V is the covariance of y given x, an approximation elsewhere. The equations are solved
by a few conjugate residuals: exactly for as many different eigenvalues of A V Aᵀ, nearly otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pfgm.core.tensors import check_positive, expand, per_sample
from pfgm.sampling.guidance import DenoiserWrapper

TOLERANCE = 1e-10  # residual, relative to the right side, at which the equations count as solved


@dataclass(frozen=True)
class Measurement:
    """Linear measurements of each sample: values = operator(samples) + Gaussian noise, in the user's units.

    Args:
        operator: A linear or affine map of samples [B, *shape] that torch can differentiate, such as `pfgm.data.Downsample(2)`
            or `Mask`.
        values: The measured values, [B, ...].
        noise: Standard deviation of the noise, > 0.
        iterations: Largest number of conjugate residuals, each a vector-Jacobian product of the network.
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
    """Keep the known elements of samples, for inpainting.

    Args:
        known: Booleans [*shape], True where samples are known.
    """

    known: Tensor

    def __init__(self, known: Tensor):
        super().__init__()
        known = torch.as_tensor(known)
        if known.dtype != torch.bool or not bool(known.any()):
            raise ValueError("known: give booleans, True where the sample is known, and at least one")
        self.register_buffer("known", known)

    def forward(self, x: Tensor) -> Tensor:
        """Return the known elements [B, n] of `x` [B, *shape]."""
        if x.shape[1:] != self.known.shape:
            raise ValueError(
                f"known has shape {tuple(self.known.shape)}, samples {tuple(x.shape[1:])}; give a mask of that shape"
            )
        return x[:, self.known.to(x.device)]


class MeasuredDenoiser(DenoiserWrapper):
    """Denoise given measurements: E[y | x, sigma, b]. Its vector-Jacobian products do not count as network calls.

    Args:
        denoiser: The denoiser of the prior.
        operator: The map of the measurements, from model space.
        values: b, [B, ...].
        noise: s_b, the standard deviation of their noise.
        iterations: Largest number of conjugate residuals.
    """

    def __init__(
        self, denoiser: nn.Module, operator: Callable[[Tensor], Tensor], values: Tensor, noise: float, iterations: int = 4
    ):
        super().__init__(denoiser)
        self.operator, self.values, self.noise, self.iterations = operator, values, noise, iterations

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor:
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
            """Return V Aᵀ u, for symmetric V."""
            (product,) = torch.autograd.grad(measured, point, u, retain_graph=True)
            return (variance * product).to(x.dtype)

        def matrix(u: Tensor) -> Tensor:
            return self.operator(back(u)) - offset + self.noise**2 * u

        residual = self.values.to(measured) - measured.detach()
        return denoised.detach() + back(conjugate_residuals(matrix, residual, self.iterations, self.noise**2))


def conjugate_residuals(matrix: Callable[[Tensor], Tensor], right: Tensor, iterations: int, floor: float = 0.0) -> Tensor:
    """Solve matrix(u) = `right` [B, ...] for a symmetric matrix of each sample with eigenvalues >= `floor`.

    The Jacobian of a network may be neither symmetric nor bounded below. A sample therefore stays where it is once the matrix
    is below the floor along its residual, or the residual below TOLERANCE times the right side.
    """
    u, direction, image = torch.zeros_like(right), torch.zeros_like(right), torch.zeros_like(right)  # image = matrix(direction)
    residual, size = right, _dot(right, right)
    curvature = torch.full_like(size, torch.inf)  # so that the first direction is the residual
    enough, going = TOLERANCE**2 * size, size > 0
    for _ in range(iterations):
        if not bool(going.any()):
            break
        product, before = matrix(residual), curvature
        curvature = _dot(residual, product)
        going = going & (curvature > floor * (1 - 1e-6) * size)
        old = torch.where(going, curvature / before, 0.0)
        direction, image = residual + expand(old, u) * direction, product + expand(old, u) * image
        step = torch.where(going, curvature / _dot(image, image).clamp(min=1e-300), 0.0)
        u, residual = u + expand(step, u) * direction, residual - expand(step, u) * image
        size = _dot(residual, residual)
        going = going & (size > enough)
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1).sum(1)
