"""Compute Poisson field, posterior mean and PFGM's normalised field of point charges exactly.

Data points y_i with probabilities p_i are charges on the plane r = 0 of augmented space, r = sigma sqrt(D). The posterior of
the source of a point (x, r) is a softmax over the charges, and its mean is the denoised point:

    w_i ∝ p_i (|x - y_i|² + r²)^(-(N+D)/2),    denoised = E[y | x, sigma] = Σ w_i y_i.

The Poisson field points away from it: E_x / E_r = (x - denoised) / r. So a denoiser and a field are the same thing. Sources:
PFGM (arXiv 2209.11178) section 3, PFGM++ (arXiv 2302.04265) section 3.1.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pfgm.core.tensors import check_shapes, expand, norm, per_sample
from pfgm.theory.kernel import check_dimensions, power_law

BLOCK_BYTES = 2**25  # size of the float64 copy of one block of charges
TINY = 1e-30  # keeps logarithms and quotients of norms finite in float64


def posterior_mean(
    x: Tensor, sigma: float | Tensor, charges: Tensor, D: float, weights: Tensor | None = None, *, check: bool = True
) -> Tensor:
    """Compute E[y | x, sigma], the exact denoiser of a finite data set. Differentiable in x and sigma.

    Args:
        x: perturbed data [B, ...].
        sigma: noise level > 0, a float or [B].
        charges: data points [L, ...].
        D: augmented dimensions, from .5 to inf.
        weights: probabilities p_i up to a factor, [L], or [B, L] for a row per sample (default: equal).
        check: whether to check the values of sigma and weights; on an accelerator the host has to wait for them.

    Returns:
        The denoised x in the dtype of x, computed in float64.

    Raises:
        ValueError: if shapes do not match, D is out of range, sigma <= 0, or weights are negative or all zero.
    """
    return _posterior_mean(x, per_sample(sigma, x), charges, check_dimensions(D), weights, "sigma", check).to(x.dtype)


def poisson_field(
    x: Tensor, r: float | Tensor, charges: Tensor, D: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the Poisson field (E_x, E_r) = Σ p_i (x - y_i, r) / |(x - y_i, r)|^(N+D). Differentiable in x and r.

    The factor 1/(area of the unit sphere) is left out. For N above about a hundred the strength leaves the range of its dtype
    and becomes 0 or inf; use `normalized_field` or `posterior_mean` there.

    Args:
        x, charges, weights: as for `posterior_mean`; weights are normalised to sum 1.
        r: augmented radius > 0, a float or [B].
        D: augmented dimensions, from .5, finite: at D = inf only the direction of the field has a limit.

    Returns:
        E_x like x and E_r [B], in the dtype of x.

    Raises:
        ValueError: as for `posterior_mean`, and if D = inf.
    """
    if math.isinf(check_dimensions(D)):
        raise ValueError("D = inf: the Poisson field needs a finite D. Use posterior_mean instead.")
    radius, N = per_sample(r, x, "r"), x[0].numel()
    log_weights = _log_weights(weights, x, radius, charges, "r", True)
    log_w = _log_posterior(x, radius / math.sqrt(D), charges, D, log_weights)
    strength = torch.exp(torch.logsumexp(log_w, 1) - torch.logsumexp(log_weights, -1) - (N + D) * radius.log())
    displacement = x.double() - _mean(torch.softmax(log_w, dim=1), charges)
    return (expand(strength, displacement) * displacement).to(x.dtype), (strength * radius).to(x.dtype)


def normalized_field(
    x: Tensor, z: float | Tensor, charges: Tensor, gamma: float = 0.0, weights: Tensor | None = None, *, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute PFGM's training target, the normalised field at D = 1 (section 3.2, with the sign of its official code).

        v = -sqrt(N) (x - denoised, z) / (|(x - denoised, z)| + gamma),    z = r = sigma

    Args:
        x, charges, weights, check: as for `posterior_mean`.
        z: augmented coordinate > 0, a float or [B].
        gamma: softening >= 0, in the units of the data.

    Returns:
        v_x like x and v_z [B], in the dtype of x.

    Raises:
        ValueError: as for `posterior_mean`, and if gamma is negative or not finite.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma = {gamma}: must be a finite number >= 0, in the units of the data.")
    height = per_sample(z, x, "z")
    displacement = x.double() - _posterior_mean(x, height, charges, 1.0, weights, "z", check)
    v_x, v_z = field_from_displacement(displacement, height, gamma)
    return v_x.to(x.dtype), v_z.to(x.dtype)


def field_from_displacement(displacement: Tensor, z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Compute the normalised field, v_x [B, ...] and v_z [B], from `displacement` = x - denoised [B, ...] and `z` [B]."""
    R = torch.hypot(norm(displacement), z.double())
    factor = -math.sqrt(displacement[0].numel()) / (R + gamma)
    return expand(factor, displacement) * displacement, (factor * z).to(displacement.dtype)


def denoised_from_field(x: Tensor, z: float | Tensor, v_x: Tensor, v_z: Tensor, gamma: float) -> Tensor:
    """Invert the normalised field: compute the denoised point from v.

    The denoised point lies in the direction of v_x from x. Its distance rho = |x - denoised|, with R² = rho² + z², has two
    estimates. Each is accurate where the other is not:

        (a) from n = |v_x|/sqrt(N): solve n (R + gamma) = rho;        (b) from v_z: R + gamma = sqrt(N) z / |v_z|.

    With s = rho²/(R (R + gamma)), (a) amplifies a relative error of n by 1/(1-s), and (b) amplifies one of v_z by 1/s. Errors
    of the N components of v_x average out to 1/sqrt(N) in n, but they also lengthen v_x by half their mean square. The error
    variance of n is therefore taken to be 1/M of that of v_z, with 1/M = 1/N + 1/400. The result averages (a) and (b) in
    log rho with inverse-variance weights (1-s)² M : s². If n >= 1, which no distance gives, (b) is used alone unless it is 0.
    The value of s comes from (b), which gives 1-s = (z² + gamma R)/(R (R + gamma)) without cancellation.

    Args:
        x, z, gamma: as for `normalized_field`.
        v_x, v_z: field components, like x and [B].

    Returns:
        The denoised x, in the dtype of x; finite for every finite v.

    Raises:
        ValueError: if the shapes do not match.
    """
    height, N = per_sample(z, x, "z"), x[0].numel()
    check_shapes(x, v_x, "v_x")
    v_z = per_sample(v_z, x, "v_z")
    v_norm = norm(v_x)
    n_raw = v_norm / math.sqrt(N)
    n, M = n_raw.clamp(max=1 - 1e-6), 1 / (1 / N + 1 / 400)
    rho_a = n * (gamma + torch.sqrt((n * gamma).square() + (1 - n.square()) * height.square())) / (1 - n.square())
    R = torch.maximum(math.sqrt(N) * height / v_z.double().abs().clamp(min=1e-12) - gamma, height)
    rho_b = (R.square() - height.square()).sqrt()
    s, rest = rho_b.square(), height.square() + gamma * R  # s and 1-s, both times R (R + gamma)
    share_b = torch.where((n_raw < 1) | (s == 0), s.square() / (s.square() + M * rest.square()), 1.0)
    rho = torch.exp((1 - share_b) * rho_a.clamp(min=TINY).log() + share_b * rho_b.clamp(min=TINY).log())
    return (x.double() + expand(rho / v_norm.clamp(min=TINY), x.double()) * v_x.double()).to(x.dtype)


def _posterior_mean(
    x: Tensor, sigma: Tensor, charges: Tensor, D: float, weights: Tensor | None, name: str, check: bool
) -> Tensor:
    """Compute `posterior_mean` in float64 for `sigma` [B], called `name`."""
    log_weights = _log_weights(weights, x, sigma, charges, name, check)
    return _mean(torch.softmax(_log_posterior(x, sigma, charges, D, log_weights), dim=1), charges)


def _log_posterior(x: Tensor, sigma: Tensor, charges: Tensor, D: float, log_weights: Tensor) -> Tensor:
    """Compute log p_i - (N+D)/2 log(1 + |x-y_i|²/(D sigma²)), [B, L] in float64."""
    points = x.flatten(1).double()
    squares = points.square().sum(1, keepdim=True)
    columns = []
    for block in _blocks(charges):
        # |x|² + |y|² - 2 x·y in float64, since float32 loses all digits of |x - y| between near-duplicates
        distance2 = (squares + block.square().sum(1) - 2 * points @ block.T).clamp(min=0)
        columns.append(power_law(distance2 / sigma.square()[:, None], D, points.shape[1]))
    return log_weights - 0.5 * torch.cat(columns, dim=1)


def _mean(w: Tensor, charges: Tensor) -> Tensor:
    """Compute Σ w_i y_i: [B, L] x [L, ...] -> [B, ...]."""
    total = w.new_zeros(len(w), charges[0].numel())
    start = 0
    for block in _blocks(charges):
        total = total + w[:, start : start + len(block)] @ block
        start += len(block)
    return total.reshape(len(w), *charges.shape[1:])


def _blocks(charges: Tensor) -> Iterator[Tensor]:
    """Split the charges [L, ...] into flat float64 blocks, so that no tensor is larger than B x L or BLOCK_BYTES."""
    flat = charges.flatten(1)
    for block in flat.split(max(1, BLOCK_BYTES // (8 * flat.shape[1]))):
        yield block.double()


def _log_weights(weights: Tensor | None, x: Tensor, scale: Tensor, charges: Tensor, name: str, check: bool) -> Tensor:
    """Compute log p_i up to a constant, [L] or [B, L] in float64, after all checks; `scale` [B] is called `name`."""
    if len(charges) == 0:
        raise ValueError("charges is empty. Pass at least one data point [1, ...].")
    if x.shape[1:] != charges.shape[1:]:
        raise ValueError(f"x, charges: sample shapes {tuple(x.shape[1:])} and {tuple(charges.shape[1:])} must agree.")
    if check and not bool((scale > 0).all()):
        raise ValueError(f"{name} = {float(scale.min())}: must be > 0.")
    if weights is None:
        return torch.zeros(len(charges), dtype=torch.float64, device=charges.device)
    w = torch.as_tensor(weights, dtype=torch.float64, device=charges.device)
    if w.shape not in ((len(charges),), (len(x), len(charges))):
        raise ValueError(
            f"weights has the shape {tuple(w.shape)}, but there are {len(charges)} charges and {len(x)} samples. "
            "Pass one weight per charge [L], or one row per sample [B, L]."
        )
    if check and not bool((w >= 0).all() & (w.sum(-1) > 0).all() & torch.isfinite(w).all()):
        raise ValueError("weights must be finite, not negative and not all zero.")
    return w.log()
