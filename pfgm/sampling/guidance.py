"""Combinations of denoisers: with conditions bound, guided by another denoiser, or guided by a classifier.

Each is a denoiser again, for every solver and for the likelihood, in centred model space.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core.tensors import expand, norm, per_sample
from pfgm.theory.kernel import check_dimensions

Interval = tuple[float, float]


def cost(denoiser: Any, sigma: Tensor | None = None) -> int:
    """Return the network calls that `denoiser` makes at noise levels `sigma` [B]; the most it can make if None."""
    return denoiser.cost(sigma) if hasattr(denoiser, "cost") else 1


class DenoiserWrapper(nn.Module, ABC):
    """Build on another `denoiser`, with its dtype and its network calls."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser, self.dtype = denoiser, getattr(denoiser, "dtype", None)

    def cost(self, sigma: Tensor | None = None) -> int:
        """Return the network calls of one call at `sigma` [B]; the most if None."""
        return cost(self.denoiser, sigma)

    @abstractmethod
    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor:
        """Return the denoised point, like `x` [B, ...]."""


class ConditionedDenoiser(DenoiserWrapper):
    """Bind conditions to a denoiser, or hide some from it.

    Args:
        denoiser: A denoiser that takes these conditions.
        conditions: A tensor [B, ...] for each key; floating-point ones are passed in the dtype of x.
        drop: Keys that are not passed on when a caller gives them; without its label a network is unconditional.
    """

    def __init__(self, denoiser: nn.Module, conditions: Mapping[str, Tensor] | None = None, drop: Sequence[str] = ()):
        super().__init__(denoiser)
        self.conditions, self.drop = dict(conditions or {}), tuple(drop)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor:
        bound = {key: value.to(x.dtype) if value.is_floating_point() else value for key, value in self.conditions.items()}
        return self.denoiser(x, sigma, **bound, **{key: value for key, value in conditions.items() if key not in self.drop})


class WeightedDenoiser(DenoiserWrapper):
    """Weight the guidance by `strength` at noise levels in `interval`, and by `unguided` elsewhere."""

    def __init__(self, denoiser: nn.Module, strength: float | Tensor, interval: Interval, unguided: float):
        super().__init__(denoiser)
        self.strength, self.interval = torch.as_tensor(strength, dtype=torch.float64), check_interval(interval)
        self.unguided = unguided

    def _weight(self, sigma: Tensor) -> Tensor:
        low, high = self.interval
        return torch.where((sigma >= low) & (sigma <= high), self.strength.to(sigma.device), self.unguided)


class GuidedDenoiser(WeightedDenoiser):
    """Extrapolate away from a reference: reference + w (denoised - reference).

    With the same network without a label as reference this is classifier-free guidance (arXiv 2207.12598, whose scale is
    w - 1), with a weaker network autoguidance (arXiv 2406.02507).

    Args:
        denoiser: The denoiser to be guided.
        reference: The denoiser to lead away from.
        strength: w, a float or [B]; 1 is no guidance.
        interval: Noise levels (low, high), in model units, outside which the denoiser is not guided and the reference not
            called (arXiv 2404.07724).
    """

    def __init__(
        self, denoiser: nn.Module, reference: nn.Module, strength: float | Tensor, interval: Interval = (0.0, math.inf)
    ):
        super().__init__(denoiser, strength, interval, unguided=1.0)
        self.reference = reference

    def cost(self, sigma: Tensor | None = None) -> int:
        """Count the calls of the reference too if any sample is guided at `sigma` [B]."""
        own = super().cost(sigma)
        return own + cost(self.reference, sigma) if sigma is None or bool((self._weight(sigma) != 1).any()) else own

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor:
        denoised, weight = self.denoiser(x, sigma, **conditions), self._weight(per_sample(sigma, x))
        if bool((weight == 1).all()):
            return denoised
        reference = self.reference(x, sigma, **conditions)
        return reference + expand(weight, denoised) * (denoised - reference)


class ClassifierGuidedDenoiser(WeightedDenoiser):
    """Pull a denoiser towards a class by a classifier of noisy samples, for every D:

        denoised + w (|x - denoised|² + D sigma²)/(N + D - 2) ∇_x log P(label | x, sigma).

    At D = inf the factor is the familiar sigma² (arXiv 2105.05233). The rule takes P under D - 2 augmented dimensions for that
    under D, and the mean of the squared distance for its value at the denoised point; the identity without these is exact.

    Args:
        denoiser: The denoiser to be guided.
        classifier: Maps (x, sigma) to logits [B, K], for the law of x at this D. Its calls are not counted.
        label: The class of each sample, [B].
        D: Number of augmented dimensions; N + D > 2.
        strength: w, a float or [B]; 1 is Bayes' rule.
        interval: Noise levels (low, high), in model units, outside which there is no guidance.
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
        super().__init__(denoiser, strength, interval, unguided=0.0)
        self.classifier, self.label, self.D = classifier, label, check_dimensions(D)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor:
        level = per_sample(sigma, x)
        denoised = self.denoiser(x, sigma, **conditions)
        weight = self._weight(level) * _variance(x, denoised, level, self.D)
        return denoised + expand(weight, x) * self._gradient(x, level)

    def _gradient(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return ∇_x log P(label | x, sigma)."""
        differentiable = torch.is_grad_enabled() and x.requires_grad  # for likelihoods
        with torch.enable_grad():
            point = x if differentiable else x.detach().requires_grad_()
            logits = self.classifier(point, sigma)
            if logits.ndim != 2 or len(logits) != len(x):
                raise ValueError(f"classifier returned shape {tuple(logits.shape)}; it has to give logits [{len(x)}, classes]")
            if int(self.label.max()) >= logits.shape[1]:
                raise ValueError(f"labels go up to {int(self.label.max())}, the classifier has {logits.shape[1]} classes")
            own = logits.log_softmax(1).gather(1, self.label[:, None]) + 0 * point.sum()  # it may ignore x
            (gradient,) = torch.autograd.grad(own.sum(), point, create_graph=differentiable)
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError("classifier: the gradient of its log-probabilities is NaN or infinite")
        return gradient


def _variance(x: Tensor, denoised: Tensor, sigma: Tensor, D: float) -> Tensor:
    """Return (|x - denoised|² + D sigma²)/(N + D - 2) [B], which is sigma² at D = inf."""
    N = x[0].numel()
    if math.isinf(D):
        return sigma.square()
    if N + D <= 2:
        raise ValueError(f"N = {N}, D = {D}: classifier guidance needs N + D > 2")
    return (norm(x - denoised).square() + D * sigma.square()) / (N + D - 2)


def check_interval(interval: Interval) -> Interval:
    """Return `interval` as a pair. Raise ValueError unless 0 <= low < high."""
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not 0 <= low < high:
        raise ValueError(f"guidance_interval = {interval!r}: give two noise levels, 0 <= low < high")
    return low, high
