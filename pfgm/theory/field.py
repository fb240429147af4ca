"""Field and denoiser are the same thing.

For charges y_i of weights p_i on the plane r = 0, the posterior of the source of a point (x, r) is a softmax,

    w_i ∝ p_i (|x - y_i|² + r²)^(-(N+D)/2),    denoised = E[y | x, sigma] = Σ w_i y_i,    r = sigma sqrt(D),

and the Poisson field points away from it: E_x / E_r = (x - denoised) / r. PFGM's normalised field is
v = -sqrt(N) (x - denoised, z) / (|(x - denoised, z)| + gamma), with z = r = sigma at D = 1.

Distances come from a matrix product in float64, charges in blocks: a product in float32 would lose every digit of |x - y|
between near-duplicates, and a B x L x N tensor would not fit. Nothing here is larger than B x L.

Sources: PFGM (arXiv 2209.11178) section 3, PFGM++ (arXiv 2302.04265) section 3.1.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pfgm.core.arguments import checked
from pfgm.core.tensors import check_shapes, expand, norm, per_sample
from pfgm.theory.kernel import check_dimensions, power_law

BLOCK_BYTES = 2**25
"""Size of the float64 copy of a block of charges."""
TINY = 1e-30
"""Keeps logarithms and quotients of norms finite in float64."""


@checked
def posterior_mean(
    x: Tensor, sigma: float | Tensor, charges: Tensor, D: float, weights: Tensor | None = None, *, check: bool = True
) -> Tensor:
    """The exact denoiser of a finite data set: E[y | x, sigma], like `x` [B, ...].

    `charges` [L, ...] are the data, `weights` >= 0 their probabilities up to a factor, [L] or for each x its own [B, L]
    (default: equal), `sigma` > 0 a float or [B]. Computed in float64, returned in the dtype of x. Differentiable in x and
    sigma. ValueError for shapes that do not fit, D out of range and, unless `check` is False, sigma <= 0 or weights that are
    negative or all zero: on an accelerator the host has to wait for these values.
    """
    s = per_sample(sigma, x)
    _check(x, s, charges, "sigma", check)
    points, log_weights = x.flatten(1).double(), _log_weights(weights, x, charges, check)
    w = torch.softmax(_log_posterior(points, s, charges, check_dimensions(D), log_weights), dim=1)
    return _mean(w, charges).to(x.dtype).reshape(x.shape)


@checked
def poisson_field(
    x: Tensor, r: float | Tensor, charges: Tensor, D: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The field Σ p_i (x - y_i, r) / |(x - y_i, r)|^(N+D) of charges on the plane r = 0.

    `x` [B, ...], `r` > 0 a float or [B], `charges` [L, ...], `weights` [L] or [B, L] normalised to 1 (default: 1/L). Returns
    E_x like x and E_r [B], without the factor 1/(area of the unit sphere), in the dtype of x. Differentiable in x and r.
    Its strength is a power N + D - 1 of a distance: from N of about a hundred on it leaves the range of its dtype, and is 0 or
    inf there; use `normalized_field` or `posterior_mean`.
    ValueError as for `posterior_mean`, and for D = inf, where the field has no limit (its direction has: `posterior_mean`).
    """
    if math.isinf(check_dimensions(D)):
        raise ValueError("D = inf: the Poisson field needs a finite D; for D = inf use posterior_mean")
    radius = per_sample(r, x, "r")
    _check(x, radius, charges, "r", True)
    points, N = x.flatten(1).double(), x[0].numel()
    log_weights = _log_weights(weights, x, charges, True)
    log_w = _log_posterior(points, radius / math.sqrt(D), charges, D, log_weights)
    strength = torch.exp(torch.logsumexp(log_w, 1) - torch.logsumexp(log_weights, -1) - (N + D) * radius.log())
    away = points - _mean(torch.softmax(log_w, dim=1), charges)
    return (strength[:, None] * away).to(x.dtype).reshape(x.shape), (strength * radius).to(x.dtype)


@checked
def normalized_field(
    x: Tensor, z: float | Tensor, charges: Tensor, gamma: float = 0.0, weights: Tensor | None = None, *, check: bool = True
) -> tuple[Tensor, Tensor]:
    """PFGM's training target: v = -sqrt(N) (x - denoised, z) / (|(x - denoised, z)| + gamma), D = 1.

    `x` [B, ...], `z` > 0 a float or [B], `charges` [L, ...]; `gamma` >= 0 in the units of the data. Returns v_x like x and
    v_z [B]. Source: PFGM section 3.2 and its official target, sign included. `weights`, `check` and ValueError as for
    `posterior_mean`.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma = {gamma} must be a finite number >= 0, in the units of the data")
    height = per_sample(z, x, "z")
    _check(x, height, charges, "z", check)
    away = x.double() - posterior_mean(x.double(), height, charges, 1.0, weights, check=check)
    v_x, v_z = field_from_displacement(away, height, gamma)
    return v_x.to(x.dtype), v_z.to(x.dtype)


def field_from_displacement(away: Tensor, z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The normalised field at `away` = x - denoised [B, ...], `z` [B]: v_x like away, v_z [B]."""
    R = torch.hypot(norm(away), z.double())
    factor = -math.sqrt(away[0].numel()) / (R + gamma)
    return expand(factor, away) * away, (factor * z).to(away.dtype)


@checked
def denoised_from_field(x: Tensor, z: float | Tensor, v_x: Tensor, v_z: Tensor, gamma: float) -> Tensor:
    """Invert the normalised field: the denoised point behind v, like `x` [B, ...].

    `v_x` is like x, `v_z` [B], `z` > 0 a float or [B]; finite for every finite v. The direction is that of v_x. The distance
    rho = |x - denoised|, with R² = rho² + z², follows from v in two ways, each of which fails where the other is good:

        (a) n = |v_x|/sqrt(N): solve n (R + gamma) = rho;        (b) R + gamma = sqrt(N) z / |v_z|.

    With s = rho²/(R (R + gamma)) a relative error of n is amplified by 1/(1-s) in (a), one of v_z by 1/s in (b). Independent
    errors of the N components of v_x average out to 1/sqrt(N) in n, but they also lengthen it, by half their mean square: in
    all n is better known than v_z by a factor of at most 400 in the variance. The inverse-variance weights are (1-s)² M : s²
    with 1/M = 1/N + 1/400, and where n >= 1, which no distance has, (b) answers alone if it can. s is taken from (b), which
    knows 1-s = (z² + gamma R)/(R (R + gamma)) without cancellation.
    """
    gamma, height, N = float(gamma), per_sample(z, x, "z"), x[0].numel()
    check_shapes(x, v_x, "v_x")
    v_z = per_sample(v_z, x, "v_z")
    v_norm = norm(v_x)
    n_raw = v_norm / math.sqrt(N)
    n, M = n_raw.clamp(max=1 - 1e-6), 1 / (1 / N + 1 / 400)
    rho_a = n * (gamma + torch.sqrt((n * gamma).square() + (1 - n.square()) * height.square())) / (1 - n.square())
    R = torch.maximum(math.sqrt(N) * height / v_z.double().abs().clamp(min=1e-12) - gamma, height)
    rho_b = (R.square() - height.square()).sqrt()
    s, rest = rho_b.square(), height.square() + gamma * R
    share_b = torch.where((n_raw < 1) | (s == 0), s.square() / (s.square() + M * rest.square()), 1.0)
    rho = torch.exp((1 - share_b) * rho_a.clamp(min=TINY).log() + share_b * rho_b.clamp(min=TINY).log())
    return (x.double() + expand(rho / v_norm.clamp(min=TINY), x.double()) * v_x.double()).to(x.dtype)


def _log_posterior(points: Tensor, sigma: Tensor, charges: Tensor, D: float, log_weights: Tensor) -> Tensor:
    """log p_i - (N+D)/2 log(1 + |x-y_i|²/(D sigma²)), [B, L] in float64, for flat float64 `points` [B, N]."""
    squares = points.square().sum(1, keepdim=True)
    columns = []
    for block in _blocks(charges):
        distance2 = (squares + block.square().sum(1) - 2 * points @ block.T).clamp(min=0)
        columns.append(power_law(distance2 / sigma.square()[:, None], D, points.shape[1]))
    return log_weights - 0.5 * torch.cat(columns, dim=1)


def _mean(w: Tensor, charges: Tensor) -> Tensor:
    """Σ w_i y_i: [B, L] x [L, ...] -> [B, N]."""
    total = w.new_zeros(len(w), charges[0].numel())
    start = 0
    for block in _blocks(charges):
        total = total + w[:, start : start + len(block)] @ block
        start += len(block)
    return total


def _blocks(charges: Tensor) -> Iterator[Tensor]:
    """The charges [L, ...] as flat float64 blocks of at most BLOCK_BYTES."""
    flat = charges.flatten(1)
    for block in flat.split(max(1, BLOCK_BYTES // (8 * flat.shape[1]))):
        yield block.double()


def _log_weights(weights: Tensor | None, x: Tensor, charges: Tensor, check: bool) -> Tensor:
    if weights is None:
        return torch.zeros(len(charges), dtype=torch.float64, device=charges.device)
    w = torch.as_tensor(weights, dtype=torch.float64, device=charges.device)
    if w.shape not in ((len(charges),), (len(x), len(charges))):
        raise ValueError(
            f"weights has shape {tuple(w.shape)}; give one weight for each of the {len(charges)} charges, or a row of them for "
            f"each of the {len(x)} samples"
        )
    if check and not bool((w >= 0).all() & (w.sum(-1) > 0).all() & torch.isfinite(w).all()):
        raise ValueError("weights must be finite, not negative and not all zero")
    return w.log()


def _check(x: Tensor, level: Tensor, charges: Tensor, name: str, values: bool) -> None:
    if len(charges) == 0:
        raise ValueError("charges is empty; give at least one charge [1, ...]")
    if x.shape[1:] != charges.shape[1:]:
        raise ValueError(f"x has samples of shape {tuple(x.shape[1:])}, charges of {tuple(charges.shape[1:])}; they must agree")
    if values and not bool((level > 0).all()):
        raise ValueError(f"{name} must be > 0, got a smallest value of {float(level.min())}")
