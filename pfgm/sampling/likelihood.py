"""The density of a flow, by the change of variables along its lines.

With u = x/q, q² = level² + s², theta = arctan(level/s) (`pfgm.sampling.Angle`) on the plane sigma = level,

    log p(x at sigma_min) = log p(x at sigma_max) + N log(q_max/q_min) + ∫ div_u(du/dtheta) dtheta,
    div_u(du/dtheta) = (N s²/q² - tr ∂denoise/∂x) q²/(level s),

from theta_min to theta_max, where the density is the kernel's own. It is that of data perturbed at sigma_min, not of clean
data. The trace is exact for few dimensions, otherwise Hutchinson's estimate: the mean of e·(∂denoise/∂x)ᵀe over probes e.

Sources: FFJORD (arXiv 1810.01367) for the estimate; PFGM (arXiv 2209.11178) section 3.4 for the likelihood.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfgm.core import rng
from pfgm.core.arguments import checked
from pfgm.core.tensors import check_levels, check_positive
from pfgm.sampling.coordinates import Angle
from pfgm.sampling.ode import CountedDenoiser, solve
from pfgm.sampling.solvers import ADAPTIVE, SolverConfig
from pfgm.theory.kernel import StudentTKernel

EXACT_UP_TO = 32
"""Dimensions up to which the trace is exact if nothing is said."""
PROBES: dict[str, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    "rademacher": lambda shape, generator: torch.randint(2, shape, generator=generator) * 2.0 - 1,
    "gaussian": lambda shape, generator: torch.randn(shape, generator=generator, dtype=torch.float64),
}
"""Laws of mean 0 and covariance I."""


@dataclass
class LogProb:
    """`value` [B] in nats, the standard `error` [B] of Hutchinson's estimate over its probes (0 if the trace is exact, nan for
    a single probe), and the network `calls`, each with one vector-Jacobian product for each probe or dimension."""

    value: Tensor
    error: Tensor
    calls: int


@checked
def log_prob(denoiser: Callable[..., Tensor], kernel: StudentTKernel, x: Tensor, **options: Any) -> Tensor:
    """The value of `estimate_log_prob`: [B] nats."""
    return estimate_log_prob(denoiser, kernel, x, **options).value


@checked
def estimate_log_prob(
    denoiser: Callable[..., Tensor],
    kernel: StudentTKernel,
    x: Tensor,
    *,
    sigma_min: float,
    sigma_max: float,
    sigma_data: float = 0.5,
    exact: bool | None = None,
    probes: int = 1,
    probe: str = "rademacher",
    seed: int = 0,
    label: Tensor | None = None,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    differentiable: bool = False,
) -> LogProb:
    """The log-density at sigma_min of `x` [B, ...], in nats, in the units of x.

    `exact` traces cost N vector-Jacobian products a call (default up to 32 dimensions), Hutchinson's estimate `probes`. Each
    `probe` is "rademacher", random signs, or "gaussian", of more variance; those of sample i are a function of (`seed`, i).
    `method`, `rtol` and `atol` are those of an adaptive method of
    `solvers.SolverConfig`. `differentiable` keeps the graph through the solver, for gradients with respect to x; the memory
    grows with the calls. ValueError for arguments out of range, SolverError if solving fails.
    """
    if x.ndim < 2 or not len(x):
        raise ValueError(f"x has the shape {tuple(x.shape)}; give samples [B, ...], one at least, single numbers as [B, 1]")
    check_levels(sigma_min, sigma_max)
    check_positive("sigma_data", sigma_data)
    if probes < 1:
        raise ValueError(f"probes = {probes} must be at least 1")
    if probe not in PROBES:
        raise ValueError(f"probe = {probe!r} is unknown; choose one of {', '.join(PROBES)}")
    if method not in ADAPTIVE:
        raise ValueError(f"method = {method!r}: give an adaptive method, one of {', '.join(ADAPTIVE)}")
    solver, path, N = SolverConfig(method=method, rtol=rtol, atol=atol).solver, Angle(sigma_data), x[0].numel()
    exact = N <= EXACT_UP_TO if exact is None else exact
    vectors = _basis(x) if exact else _random(x, probes, seed, PROBES[probe])
    ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
    denoise = CountedDenoiser(denoiser, {} if label is None else {"label": label}, dtype=x.dtype)

    def slope(time: float, state: Tensor) -> Tensor:
        """Of u and of one integral for each probe, or one in all: [B, N + P]."""
        level = path.level(time)
        q = path.radius(level)
        point = (q * state[:, :N]).reshape(x.shape)
        denoised, products = _products(lambda p: denoise(p, level, ones), point, vectors, differentiable)
        trace = products.sum(0, keepdim=True) if exact else products
        divergence = (N * (sigma_data / q) ** 2 - trace) * (q**2 / (level * sigma_data))
        return torch.cat([path.slope(point, denoised, level).flatten(1), divergence.T], 1)

    integrals = 1 if exact else probes
    times = torch.tensor([path.time(sigma_min), path.time(sigma_max)], dtype=torch.float64, device=x.device)
    state = torch.cat([x.double().flatten(1) / path.radius(sigma_min), x.new_zeros(len(x), integrals, dtype=torch.float64)], 1)
    with torch.set_grad_enabled(differentiable):
        end = solve(denoise, slope, state, [sigma_min, sigma_max], solver, path, times, lambda t, state: None)[0][-1]
        top = (path.radius(sigma_max) * end[:, :N]).reshape(x.shape)
        prior = kernel.log_prob(top, torch.zeros_like(top), sigma_max)
        growth = N * math.log(path.radius(sigma_max) / path.radius(sigma_min))
        values = prior[:, None] + growth + end[:, N:]
    return LogProb(values.mean(1), _standard_error(values) if not exact else torch.zeros_like(prior), denoise.calls)


def _standard_error(values: Tensor) -> Tensor:
    """Of the mean over the last dimension; nan for one value."""
    n = values.shape[-1]
    return values.std(-1) / math.sqrt(n) if n > 1 else torch.full_like(values[..., 0], math.nan)


def _products(
    denoise: Callable[[Tensor], Tensor], point: Tensor, vectors: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor]:
    """denoise(point) [B, ...] and e·Jᵀe [P, B] for its Jacobian J and `vectors` e [P, B, N]."""
    with torch.enable_grad():
        point = point if differentiable and point.requires_grad else point.detach().requires_grad_()
        denoised = denoise(point) + 0 * point  # so that a denoiser that ignores its input has a derivative
        rows = []
        for k, e in enumerate(vectors):
            last = k == len(vectors) - 1
            (row,) = torch.autograd.grad(
                denoised, point, e.reshape(point.shape), retain_graph=differentiable or not last, create_graph=differentiable
            )
            rows.append((row.flatten(1) * e).sum(1))
    products = torch.stack(rows)
    return (denoised, products) if differentiable else (denoised.detach(), products)


def _basis(x: Tensor) -> Tensor:
    """All unit vectors [N, B, N]."""
    N = x[0].numel()
    return torch.eye(N, dtype=torch.float64, device=x.device)[:, None].expand(N, len(x), N)


def _random(x: Tensor, probes: int, seed: int, draw: Callable[[tuple[int, int], torch.Generator], Tensor]) -> Tensor:
    """Probes [P, B, N], those of sample i a function of (seed, i)."""
    shape = (probes, x[0].numel())
    each = [draw(shape, rng.generator(seed, i, 0, 0, rng.PROBES)) for i in range(len(x))]
    return torch.stack(each, 1).to(x.device, torch.float64)
