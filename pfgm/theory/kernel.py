"""Sample and evaluate the perturbation kernel of Poisson flows, a multivariate Student-t.

PFGM++ perturbs data y with density p_r(x|y) ∝ (|x - y|² + r²)^(-(N+D)/2), where N is the dimension of the data and D >= .5 the
number of augmented dimensions. With sigma = r / sqrt(D) this is Student's t with D degrees of freedom, location y and scale
matrix sigma² I. A sample is

    x = y + sigma n / sqrt(kappa),    n ~ N(0, I_N),    kappa ~ chi²_D / D   (one kappa per sample).

D = 1 gives the Poisson kernel of PFGM (multivariate Cauchy). D = inf gives kappa = 1, the Gaussian kernel of diffusion models.
Sources: PFGM++ (arXiv 2302.04265) section 3.2; t-EDM (arXiv 2410.14171) for the Student-t form.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pfgm.core import rng
from pfgm.core.rng import Generators
from pfgm.core.tensors import check_shapes, expand, norm, per_sample

MIN_D = 0.5  # for smaller D, sigma n / sqrt(kappa) overflows float32 in more than 1 % of the samples


def check_dimensions(D: float | str) -> float:
    """Convert `D` (a number or its text) to a float and raise ValueError unless .5 <= D <= inf."""
    try:
        value = float(D)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not value >= MIN_D:
        raise ValueError(
            f"D = {D}: out of range. Choose a real number from {MIN_D} to inf; below, the noise overflows float32."
        )
    return value


class StudentTKernel:
    """Sample and evaluate the perturbation kernel p(x | y, sigma) of PFGM++, for perturbed data x and clean data y [B, ...].

    Args:
        D: number of augmented dimensions, a real number from .5 to inf.

    Raises:
        ValueError: if D is out of range.
    """

    def __init__(self, D: float | str):
        self.D = check_dimensions(D)

    def __repr__(self) -> str:
        return f"StudentTKernel(D={self.D:g})"

    def direction(self, shape: Sequence[int], generator: Generators = None, *, like: Tensor) -> Tensor:
        """Sample the noise direction t = n / sqrt(kappa), which is the noise at sigma = 1.

        Args:
            shape: [B, ...] of the samples.
            generator: one for the batch, one per sample, or None for torch's global generator.
            like: tensor that sets dtype and device.
        """
        n = rng.normal(shape, generator, like=like)
        if math.isinf(self.D):
            return n
        kappa = rng.gamma(self.D / 2, shape[0], generator, device=n.device) * (2 / self.D)
        return n * expand(kappa.rsqrt(), n)

    def sample(self, y: Tensor, sigma: float | Tensor, generator: Generators = None) -> Tensor:
        """Sample perturbed data x ~ p(x | y, sigma), like `y`.

        Args:
            y: clean data [B, ...].
            sigma: noise level in the units of y, a float or [B].
            generator: as for `direction`.
        """
        return y + expand(per_sample(sigma, y), y) * self.direction(y.shape, generator, like=y)

    def log_prob(self, x: Tensor, y: Tensor, sigma: float | Tensor) -> Tensor:
        """Compute log p(x | y, sigma) in nats, [B] in float64.

            log Γ((N+D)/2) - log Γ(D/2) - N/2 log(pi D) - N log sigma - (N+D)/2 log(1 + |x-y|²/(D sigma²))

        Args:
            x: perturbed data [B, ...].
            y: clean data, like x or a single sample.
            sigma: noise level > 0, a float or [B].

        Raises:
            ValueError: if sigma <= 0 or the shapes do not match.
        """
        s = per_sample(sigma, x)
        check_shapes(x, y, "y")
        difference = x.double() - y.double()
        N = difference[0].numel()
        if not bool((s > 0).all()):
            raise ValueError(f"sigma = {sigma}: the kernel has a density only for sigma > 0.")
        q = (norm(difference) / s).square()
        constant = _log_gamma_ratio(self.D / 2, N / 2) - N / 2 * math.log(2 * math.pi)
        return constant - N * s.log() - 0.5 * power_law(q, self.D, N)

    def renoise(
        self, x: Tensor, source: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, generator: Generators = None
    ) -> Tensor:
        """Raise the noise level of `x` from `sigma` to `sigma_next`, as churn and restarts do.

        Given the source y, kappa | x ~ Gamma(shape (N+D)/2, rate (D + |x-y|²/sigma²)/2). The added noise is
        sqrt(sigma_next² - sigma²) n / sqrt(kappa) with this kappa.

        Args:
            x: perturbed data [B, ...].
            source: clean data, for which the law is exact, or the denoised x as an approximation.
            sigma: present noise level, a float or [B].
            sigma_next: noise level to reach, a float or [B].
            generator: as for `direction`.

        Raises:
            ValueError: unless 0 < sigma <= sigma_next, or if the shapes do not match.
        """
        low, high = per_sample(sigma, x), per_sample(sigma_next, x, "sigma_next")
        check_shapes(x, source, "source")
        if not bool(((low > 0) & (low <= high)).all()):
            raise ValueError(f"sigma = {sigma}, sigma_next = {sigma_next}: re-noising needs 0 < sigma <= sigma_next.")
        scale = (high.square() - low.square()).sqrt()
        n = rng.normal(x.shape, generator, like=x)
        if not math.isinf(self.D):
            N = x[0].numel()
            rate = (self.D + (norm(x - source) / low).square()) / 2
            scale = scale * (rate / rng.gamma((N + self.D) / 2, len(x), generator, device=x.device)).sqrt()
        return x + expand(scale, x) * n

    def effective_level(self, distance: Tensor, sigma: Tensor, N: int) -> Tensor:
        """Compute the effective noise level, the scale of the Gaussian noise that a point carries relative to its source.

            level² = sigma² / E[kappa | x, y] = a sigma² + (1 - a) distance²/N,    a = D/(N+D)

        Surfaces of constant level are hemispheres around the source in augmented space. At D = inf, level = sigma.

        Args:
            distance: |x - y| per sample, [B].
            sigma: noise level [B].
            N: dimension of the data.
        """
        a = self.level_weight(N)
        return (a * sigma.square() + (1 - a) * distance.square() / N).sqrt()

    def level_weight(self, N: int) -> float:
        """Return a = D/(N+D), the weight of sigma² in the squared effective noise level."""
        return 1 / (1 + N / self.D)


def power_law(q: Tensor, D: float, N: int) -> Tensor:
    """Compute (N+D) log(1 + q/D), -2 times the log-density of the kernel up to a constant, at |x-y|² = q sigma².

    The limit at D = inf is q.
    """
    return q if math.isinf(D) else (N + D) * torch.log1p(q / D)


def _log_gamma_ratio(a: float, b: float) -> float:
    """Compute log Γ(a+b) - log Γ(a) - b log a, for large `a` by Stirling's series: the lgamma difference loses digits."""
    if math.isinf(a):
        return 0.0
    if a < 100:
        return math.lgamma(a + b) - math.lgamma(a) - b * math.log(a)

    def tail(x: float) -> float:
        return 1 / (12 * x) - 1 / (360 * x**3) + 1 / (1260 * x**5)

    return (a + b - 0.5) * math.log1p(b / a) - b + tail(a + b) - tail(a)
