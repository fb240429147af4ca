"""The one kernel of Poisson flows: the multivariate Student-t.

PFGM++ perturbs data y to x with density p_r(x|y) ∝ (|x - y|² + r²)^(-(N+D)/2), r = sigma sqrt(D). That is Student's t with
D degrees of freedom, location y and scale sigma² I, so a draw is

    x = y + sigma n / sqrt(kappa),    n ~ N(0, I_N),    kappa ~ chi²_D / D   (one number for each sample)

for every real D: D = 1 is the Poisson kernel of PFGM (multivariate Cauchy), D = inf has kappa = 1 and is the Gaussian of
diffusion models. All of D's influence on training noise, prior and re-noising is in `StudentTKernel`.

Sources: PFGM++ (arXiv 2302.04265) section 3.2; t-EDM (arXiv 2410.14171) for the Student-t reading.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pfgm.core import rng
from pfgm.core.arguments import checked
from pfgm.core.rng import Generators
from pfgm.core.tensors import check_shapes, expand, norm, per_sample

MIN_D = 0.5


def check_dimensions(D: float | str) -> float:
    """`D`, or its text, as a float; ValueError unless .5 <= D <= inf."""
    try:
        value = float(D)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"D = {D!r} is not a number; give a real number from {MIN_D} to inf") from None
    if not value >= MIN_D:
        raise ValueError(
            f"D = {D} is out of range: give a real number from {MIN_D} to inf "
            f"(below, the square of the noise overflows float32 more and more often)"
        )
    return value


class StudentTKernel:
    """The perturbation kernel of PFGM++ for a real `D` in [.5, inf]; ValueError for any other D."""

    def __init__(self, D: float | str):
        self.D = check_dimensions(D)

    def __repr__(self) -> str:
        return f"StudentTKernel(D={self.D:g})"

    def direction(self, shape: Sequence[int], generator: Generators = None, *, like: Tensor) -> Tensor:
        """t = n / sqrt(kappa): noise at sigma = 1, of `shape` [B, ...], with the dtype and device of `like`."""
        n = rng.normal(shape, generator, like=like)
        if math.isinf(self.D):
            return n
        kappa = rng.gamma(self.D / 2, shape[0], generator, device=n.device) * (2 / self.D)
        return n * expand(kappa.rsqrt(), n)

    @checked
    def sample(self, y: Tensor, sigma: float | Tensor, generator: Generators = None) -> Tensor:
        """Perturbed data x ~ p(. | y, sigma), like `y` [B, ...]; `sigma` is a float or [B], in the units of y."""
        return y + expand(per_sample(sigma, y), y) * self.direction(y.shape, generator, like=y)

    @checked
    def log_prob(self, x: Tensor, y: Tensor, sigma: float | Tensor) -> Tensor:
        """log p(x | y, sigma) in nats, [B] in float64, for `x`, `y` [B, ...] and `sigma` float or [B].

        ValueError unless sigma > 0.
        """
        s = per_sample(sigma, x)
        check_shapes(x, y, "y")
        difference = x.double() - y.double()
        N = difference[0].numel()
        if not bool((s > 0).all()):
            raise ValueError(f"sigma = {sigma}: the kernel has a density for positive numbers only")
        q = (norm(difference) / s).square()
        return _log_normalizer(self.D, N) - N * s.log() - 0.5 * power_law(q, self.D, N)

    @checked
    def renoise(
        self, x: Tensor, source: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, generator: Generators = None
    ) -> Tensor:
        """Raise the noise of `x` [B, ...] from `sigma` to `sigma_next`, exactly if `source` is the clean data of x.

        Given its source, kappa | x ~ Gamma((N+D)/2, rate (D + |x-y|²/sigma²)/2): the added Gaussian noise has the scale that
        the sample already carries. With a denoised estimate for `source` it is an approximation.
        ValueError unless 0 < sigma <= sigma_next.
        """
        low, high = per_sample(sigma, x), per_sample(sigma_next, x, "sigma_next")
        check_shapes(x, source, "source")
        if not bool(((low > 0) & (low <= high)).all()):
            raise ValueError(f"renoise needs 0 < sigma <= sigma_next, got sigma = {sigma}, sigma_next = {sigma_next}")
        scale = (high.square() - low.square()).sqrt()
        n = rng.normal(x.shape, generator, like=x)
        if not math.isinf(self.D):
            N = x[0].numel()
            rate = (self.D + (norm(x - source) / low).square()) / 2
            scale = scale * (rate / rng.gamma((N + self.D) / 2, len(x), generator, device=x.device)).sqrt()
        return x + expand(scale, x) * n

    def effective_level(self, distance: Tensor, sigma: Tensor, N: int) -> Tensor:
        """Level of the Gaussian noise that a point carries, seen from its source at `distance` [B]: [B].

        varsigma² = sigma² / E[kappa | x, y] = a sigma² + (1 - a) distance²/N with a = D/(N+D). Surfaces of constant varsigma
        are hemispheres around the source in the augmented space; for D = inf varsigma = sigma.
        """
        a = self.level_weight(N)
        return (a * sigma.square() + (1 - a) * distance.square() / N).sqrt()

    def level_weight(self, N: int) -> float:
        """a = D/(N+D): the share of sigma² in the squared effective noise level."""
        return 1 / (1 + N / self.D)


def power_law(q: Tensor, D: float, N: int) -> Tensor:
    """(N+D) log(1 + q/D), which is q for D = inf: minus twice the log-density of the kernel at |x-y|² = q sigma²."""
    return q if math.isinf(D) else (N + D) * torch.log1p(q / D)


def _log_normalizer(D: float, N: int) -> float:
    """log of Γ((N+D)/2) / (Γ(D/2) (πD)^(N/2)), accurate for any D up to inf, where it is -N/2 log 2π."""
    b = N / 2
    return _log_gamma_ratio(D / 2, b) - b * math.log(2 * math.pi)


def _log_gamma_ratio(a: float, b: float) -> float:
    """log Γ(a+b) - log Γ(a) - b log a, by Stirling's series where the difference of lgamma would lose digits."""
    if math.isinf(a):
        return 0.0
    if a < 100:
        return math.lgamma(a + b) - math.lgamma(a) - b * math.log(a)

    def tail(x: float) -> float:
        return 1 / (12 * x) - 1 / (360 * x**3) + 1 / (1260 * x**5)

    return (a + b - 0.5) * math.log1p(b / a) - b + tail(a + b) - tail(a)
