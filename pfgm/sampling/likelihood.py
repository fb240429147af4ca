"""Compute log-densities by the change of variables along the flow.

In `Angle` coordinates (u = x/q, q² = level² + s², theta = arctan(level/s), s = sigma_data), on the hyperplane sigma = level,

    log p(x at sigma_min) = log p(x at sigma_max) + N log(q_max/q_min) + ∫ div_u(du/dtheta) dtheta,
    div_u(du/dtheta) = (N s²/q² - tr ∂denoised/∂x) q²/(level s),

with the integral from theta_min to theta_max and the density of the kernel around 0 at sigma_max (PFGM, arXiv 2209.11178,
section 3.4). It is the density of data perturbed at sigma_min, not of clean data. The trace is exact, or Hutchinson's estimate
(FFJORD, arXiv 1810.01367): the mean of e·(∂denoised/∂x)ᵀe over random probes e of mean 0 and covariance I.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfgm.core import rng
from pfgm.core.arguments import checked
from pfgm.core.tensors import check_levels, check_positive, per_sample
from pfgm.sampling.coordinates import Angle
from pfgm.sampling.methods import Problem
from pfgm.sampling.ode import CountedDenoiser, solve
from pfgm.sampling.solvers import ADAPTIVE, SolverConfig, check_choice
from pfgm.theory.kernel import StudentTKernel

MAX_EXACT = 32  # dimensions up to which the trace is exact by default
Draw = Callable[[tuple[int, int], torch.Generator], Tensor]
PROBES: dict[str, Draw] = {
    "rademacher": lambda shape, generator: torch.randint(2, shape, generator=generator) * 2.0 - 1,
    "gaussian": lambda shape, generator: torch.randn(shape, generator=generator, dtype=torch.float64),
}


@dataclass
class LogProb:
    """Hold log-densities and their cost.

    Args:
        value: nats per sample, [B].
        error: standard error of Hutchinson's estimate over its probes, [B]; 0 for an exact trace, nan for a single probe.
        calls: network calls, each with one vector-Jacobian product per probe (exact: per dimension).
    """

    value: Tensor
    error: Tensor
    calls: int


def log_prob(denoiser: Callable[..., Tensor], kernel: StudentTKernel, x: Tensor, **options: Any) -> Tensor:
    """Return only the value of `estimate_log_prob`, [B] nats."""
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
    conditions: Mapping[str, Tensor] | None = None,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    differentiable: bool = False,
) -> LogProb:
    """Estimate the log-density of `x` at noise level sigma_min.

    Args:
        denoiser: called as denoiser(x, sigma, **conditions).
        kernel: perturbation kernel of the denoiser.
        x: samples [B, ...] in model space.
        sigma_min: noise level of the density.
        sigma_max: noise level of the prior.
        sigma_data: RMS of the centred data, for the angle coordinates.
        exact: whether to compute the trace by N vector-Jacobian products per call (default: for N <= 32).
        probes: number of probes of Hutchinson's estimate.
        probe: "rademacher" (random signs) or "gaussian" (more variance).
        seed: the probes of sample i are a function of (seed, i).
        label: shorthand for conditions={"label": label}, [B].
        conditions: keyword tensors for the denoiser, [B, ...] each.
        method: adaptive solver.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver, for a state of unit variance.
        differentiable: whether to keep the graph for gradients with respect to x; memory grows with the number of calls.

    Raises:
        ValueError: if an argument is out of range.
        SolverError: if the denoiser returns NaN or infinity, or the tolerance cannot be met.
    """
    ratio = per_sample(1.0, x)  # level/sigma on the hyperplane
    if not len(x):
        raise ValueError(f"x has the shape {tuple(x.shape)}: no samples. Pass at least one.")
    check_levels(sigma_min, sigma_max)
    check_positive("sigma_data", sigma_data)
    if probes < 1:
        raise ValueError(f"probes = {probes}: must be at least 1.")
    check_choice("probe", probe, PROBES)
    if method not in ADAPTIVE:
        raise ValueError(f"method = {method!r} is not adaptive. Choose one of {', '.join(ADAPTIVE)}.")
    solver, coordinates, N = SolverConfig(method=method, rtol=rtol, atol=atol).solver, Angle(sigma_data), x[0].numel()
    exact = N <= MAX_EXACT if exact is None else exact
    if exact:  # the N unit vectors for each sample
        vectors = torch.eye(N, dtype=torch.float64, device=x.device)[:, None].expand(N, len(x), N)
    else:
        vectors = _random_probes(x, probes, seed, PROBES[probe])
    conditions = dict(conditions or {}) | ({} if label is None else {"label": label})
    denoise = CountedDenoiser(denoiser, conditions, dtype=x.dtype)

    def slope(time: float, state: Tensor) -> Tensor:
        """Compute the derivative of u [B, N] and of the integrals, [B, P], one per probe or a single exact one."""
        level = coordinates.level(time)
        q = coordinates.radius(level)
        point = (q * state[:, :N]).reshape(x.shape)
        denoised, products = _products(lambda p: denoise(p, level, ratio), point, vectors, differentiable)
        trace = products.sum(0, keepdim=True) if exact else products
        divergence = (N * (sigma_data / q) ** 2 - trace) * (q**2 / (level * sigma_data))
        return torch.cat([coordinates.slope(point, denoised, level).flatten(1), divergence.T], 1)

    q_min, q_max = coordinates.radius(sigma_min), coordinates.radius(sigma_max)
    times = [coordinates.time(sigma_min), coordinates.time(sigma_max)]
    integrals = torch.zeros(len(x), 1 if exact else probes, dtype=torch.float64, device=x.device)
    state = torch.cat([x.double().flatten(1) / q_min, integrals], 1)
    with torch.set_grad_enabled(differentiable):
        at = torch.tensor(times, dtype=torch.float64, device=x.device)
        end = solve(solver, denoise, Problem(slope, state, times, at))[0][-1]
        top = (q_max * end[:, :N]).reshape(x.shape)
        prior = kernel.log_prob(top, torch.zeros_like(top), sigma_max)
        values = prior[:, None] + N * math.log(q_max / q_min) + end[:, N:]
    error = torch.full_like(prior, 0.0 if exact else math.nan)  # a single probe has no spread
    if not exact and probes > 1:
        error = values.std(1) / math.sqrt(probes)
    return LogProb(values.mean(1), error, denoise.calls)


def _products(
    denoise: Callable[[Tensor], Tensor], point: Tensor, vectors: Tensor, differentiable: bool
) -> tuple[Tensor, Tensor]:
    """Compute denoise(point) [B, ...] and e·Jᵀe [P, B] for its Jacobian J and the `vectors` e [P, B, N]."""
    with torch.enable_grad():
        point = point if differentiable and point.requires_grad else point.detach().requires_grad_()
        denoised = denoise(point) + 0 * point  # gives a denoiser that ignores its input a derivative
        rows = []
        for k, e in enumerate(vectors):
            keep = differentiable or k < len(vectors) - 1
            probe = e.reshape(point.shape)
            (row,) = torch.autograd.grad(denoised, point, probe, retain_graph=keep, create_graph=differentiable)
            rows.append((row.flatten(1) * e).sum(1))
    return (denoised if differentiable else denoised.detach()), torch.stack(rows)


def _random_probes(x: Tensor, probes: int, seed: int, draw: Draw) -> Tensor:
    """Sample probes [P, B, N], those of sample i as a function of (seed, i)."""
    shape = (probes, x[0].numel())
    rows = [draw(shape, rng.generator(seed, i, 0, 0, rng.PROBES)) for i in range(len(x))]
    return torch.stack(rows, 1).to(x.device, torch.float64)
