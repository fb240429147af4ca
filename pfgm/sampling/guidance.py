"""Combinations of denoisers: bound to conditions, guided by another denoiser or by a classifier.

Each is a denoiser again, for every solver and for the likelihood. All in centred model space. `cost(sigma)` says how many
network calls one call makes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core.tensors import expand, norm, per_sample
from pfgm.theory.kernel import check_dimensions

Interval = tuple[float, float]


def cost(denoiser: Any, sigma: Tensor | None = None) -> int:
    """Network calls that `denoiser` makes when asked for levels `sigma` [B]; without levels the most it can make."""
    return denoiser.cost(sigma) if hasattr(denoiser, "cost") else 1


class ConditionedDenoiser(nn.Module):
    """Call `denoiser` with fixed `conditions` besides those of the call; without `takes_label` it gets no label."""

    def __init__(self, denoiser: nn.Module, conditions: Mapping[str, Tensor] | None = None, takes_label: bool = True):
        super().__init__()
        self.denoiser, self.conditions, self.takes_label = denoiser, conditions or {}, takes_label
        self.dtype = getattr(denoiser, "dtype", None)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor:
        """Return E[y | x, sigma, conditions], like `x` [B, ...]."""
        asked = {name: value for name, value in conditions.items() if self.takes_label or name != "label"}
        fixed = {name: value.to(x.dtype) for name, value in self.conditions.items()}
        return self.denoiser(x, sigma, **asked, **fixed)


class GuidedDenoiser(nn.Module):
    """reference + w (denoised - reference), w = `strength` (float or [B]), at levels from interval[0] to interval[1].

    With the same network without a label as `reference` this is classifier-free guidance (arXiv 2207.12598, where the scale is
    w - 1), with a weaker one autoguidance (arXiv 2406.02507). Elsewhere than in `interval`, in model units (arXiv 2404.07724),
    or for w = 1, it is the denoiser itself, and the reference is not asked.
    """

    def __init__(
        self, denoiser: nn.Module, reference: nn.Module, strength: float | Tensor, interval: Interval = (0.0, math.inf)
    ):
        super().__init__()
        self.denoiser, self.reference = denoiser, reference
        self.strength, self.interval = torch.as_tensor(strength, dtype=torch.float64), check_interval(interval)
        self.dtype = getattr(denoiser, "dtype", None)

    def cost(self, sigma: Tensor | None = None) -> int:
        """Those of the denoiser, and those of the reference if any sample is guided at levels `sigma` [B]."""
        own = cost(self.denoiser, sigma)
        return own + cost(self.reference, sigma) if sigma is None or bool(self._guided(sigma).any()) else own

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor:
        """The guided denoised point, like `x` [B, ...]."""
        level = per_sample(sigma, x)
        denoised, guided = self.denoiser(x, sigma, **conditions), self._guided(level)
        if not bool(guided.any()):
            return denoised
        reference = self.reference(x, sigma, **conditions)
        weight = torch.where(guided, self.strength.to(x.device), 1.0)
        return reference + expand(weight, denoised) * (denoised - reference)

    def _guided(self, sigma: Tensor) -> Tensor:
        low, high = self.interval
        return (sigma >= low) & (sigma <= high) & (self.strength.to(sigma.device) != 1)


class ClassifierGuidedDenoiser(nn.Module):
    """The denoiser pulled towards a class by a classifier of noisy samples, for every D:

        denoised + w (|x - denoised|² + D sigma²)/(N + D - 2) ∇_x log P(label | x, sigma),

    which at D = inf is the familiar sigma² ∇ log P (arXiv 2105.05233). `classifier(x, sigma)` gives logits [B, K] for the law
    of x at this D; `label` [B] is what to pull towards, `strength` w (float or [B]), `interval` as in `GuidedDenoiser`. It
    takes P under D - 2 augmented dimensions for that under D, and the mean of the squared distance for its value at the
    denoised point; the identity without these is exact. ValueError unless N + D > 2.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        classifier: Callable[[Tensor, Tensor], Tensor],
        label: Tensor,
        D: float,
        strength: float | Tensor = 1.0,
        interval: Interval = (0.0, math.inf),
    ):
        super().__init__()
        self.denoiser, self.classifier, self.label = denoiser, classifier, label
        self.D, self.interval = check_dimensions(D), check_interval(interval)
        self.strength = torch.as_tensor(strength, dtype=torch.float64)
        self.dtype = getattr(denoiser, "dtype", None)

    def cost(self, sigma: Tensor | None = None) -> int:
        """That of the denoiser; the classifier is not counted."""
        return cost(self.denoiser, sigma)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor:
        """The guided denoised point, like `x` [B, ...]; `conditions` go to the denoiser."""
        level, N = per_sample(sigma, x), x[0].numel()
        denoised = self.denoiser(x, sigma, **conditions)
        variance = _variance(x, denoised, level, N, self.D)
        low, high = self.interval
        weight = torch.where((level >= low) & (level <= high), self.strength.to(x.device), 0.0) * variance
        return denoised + expand(weight, x) * self._pull(x, level)

    def _pull(self, x: Tensor, sigma: Tensor) -> Tensor:
        """∇_x log P(label | x, sigma)."""
        through = torch.is_grad_enabled() and x.requires_grad  # for likelihoods
        with torch.enable_grad():
            point = x if through else x.detach().requires_grad_()
            logits = self.classifier(point, sigma)
            if logits.ndim != 2 or len(logits) != len(x):
                raise ValueError(f"classifier returned shape {tuple(logits.shape)}; it has to give logits [{len(x)}, classes]")
            if int(self.label.max()) >= logits.shape[1]:
                raise ValueError(f"labels go up to {int(self.label.max())}, the classifier has {logits.shape[1]} classes")
            own = logits.log_softmax(1).gather(1, self.label[:, None]) + 0 * point.sum()  # it may ignore x
            (gradient,) = torch.autograd.grad(own.sum(), point, create_graph=through)
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError("classifier: the gradient of its log-probabilities is NaN or infinite")
        return gradient


def _variance(x: Tensor, denoised: Tensor, sigma: Tensor, N: int, D: float) -> Tensor:
    """(|x - denoised|² + D sigma²)/(N + D - 2) [B], sigma² at D = inf."""
    if math.isinf(D):
        return sigma.square()
    if N + D <= 2:
        raise ValueError(f"N = {N}, D = {D}: classifier guidance needs N + D > 2")
    return (norm(x - denoised).square() + D * sigma.square()) / (N + D - 2)


def check_interval(interval: Interval) -> Interval:
    """`interval` as a pair. ValueError unless 0 <= low < high."""
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError) as error:
        raise ValueError(f"guidance_interval = {interval!r}: give two noise levels, 0 <= low < high") from error
    if not 0 <= low < high:
        raise ValueError(f"guidance_interval = {interval}: give two noise levels, 0 <= low < high")
    return low, high
