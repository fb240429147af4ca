"""Labels, conditions, guidance and measurements of samples, checked before any network call."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from pfgm.sampling.guidance import ClassifierGuidedDenoiser, ConditionedDenoiser, GuidedDenoiser, Interval, check_interval
from pfgm.sampling.inverse import MeasuredDenoiser, Measurement
from pfgm.sampling.ode import input_dtype

if TYPE_CHECKING:
    from pfgm.flow.poisson_flow import PoissonFlow

MAX_CLASSES = 2**31  # bound on labels for a classifier, whose number of classes is not known before it is called


class Conditioning(TypedDict, total=False):
    """Name what sample, vary, denoise, encode, decode and interpolate of a flow take besides labels.

    condition: Of models trained with conditions: [n, ...], or one for all, in the user's units; a mapping by key ("image",
        "vector") if there are several.
    guidance: Guidance scale, one for all or one for each sample; 1 is none. Classifier-free for a model trained with label
        dropout; away from the `guide`; or by the `classifier` (then 1 is Bayes' rule).
    guidance_interval: Noise levels (low, high), in model units, between which guidance acts.
    guide: A weaker flow of the same data, for autoguidance.
    classifier: Maps (x, sigma) in the user's units to logits of noisy samples.
    measurement: Linear measurements; samples are drawn from the posterior.
    """

    condition: Tensor | Mapping[str, Tensor] | None
    guidance: float | Sequence[float] | Tensor | None
    guidance_interval: Interval | None
    guide: "PoissonFlow | None"
    classifier: Callable[[Tensor, Tensor], Tensor] | None
    measurement: Measurement | None


@dataclass(frozen=True)
class BoundConditions:
    """Checked conditions of n samples of a flow, as tensors [n, ...] in model space.

    Args:
        flow: The flow.
        conditions: What its network takes, normalised, by key.
        target: The class that a classifier pulls towards, [n].
        guidance: Guidance scale, a number or [n].
        interval: Noise levels between which guidance acts.
        guide: The flow to lead away from.
        classifier: A classifier of noisy samples, in the user's units.
        measurement: Measurements, in the user's units.
    """

    flow: "PoissonFlow"
    conditions: Mapping[str, Tensor]
    target: Tensor | None = None
    guidance: Tensor | None = None
    interval: Interval = (0.0, math.inf)
    guide: "PoissonFlow | None" = None
    classifier: Callable[[Tensor, Tensor], Tensor] | None = None
    measurement: Measurement | None = None

    def __getitem__(self, rows: slice) -> "BoundConditions":
        """Return the conditions of some of the samples."""
        changes: dict[str, Any] = {"conditions": {key: value[rows] for key, value in self.conditions.items()}}
        changes["target"] = None if self.target is None else self.target[rows]
        changes["guidance"] = None if self.guidance is None else self.guidance[rows]
        if self.measurement is not None:
            changes["measurement"] = replace(self.measurement, values=self.measurement.values[rows])
        return replace(self, **changes)

    def denoiser(self) -> nn.Module:
        """Return the flow's denoiser under these conditions, denoise(x, sigma) in model space."""
        flow, measurement = self.flow, self.measurement
        denoiser = self._guided(_bound(flow.denoiser, self.conditions))
        if measurement is None:
            return denoiser
        to_user, operator = flow.summary.to_user, measurement.operator
        return MeasuredDenoiser(
            denoiser, lambda x: operator(to_user(x)), measurement.values, measurement.noise, measurement.iterations
        )

    def _guided(self, denoiser: nn.Module) -> nn.Module:
        if self.classifier is not None and self.target is not None:
            strength = 1.0 if self.guidance is None else self.guidance
            return ClassifierGuidedDenoiser(
                denoiser, self._model_classifier, self.target, self.flow.kernel.D, strength, self.interval
            )
        if self.guidance is not None:
            return GuidedDenoiser(denoiser, self._reference(), self.guidance, self.interval)
        return denoiser

    def _model_classifier(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert self.classifier is not None
        return self.classifier(self.flow.summary.to_user(x), sigma * self.flow.summary.scale)

    def _reference(self) -> nn.Module:
        """Return the denoiser to lead away from: the guide under the same conditions, or the flow without labels."""
        if self.guide is None:
            return _bound(self.flow.denoiser, {key: value for key, value in self.conditions.items() if key != "label"})
        known = {*self.guide.summary.conditions, *(["label"] if self.guide.summary.num_classes else [])}
        return _bound(self.guide.denoiser, {key: value for key, value in self.conditions.items() if key in known})


def _bound(denoiser: nn.Module, conditions: Mapping[str, Tensor]) -> nn.Module:
    return ConditionedDenoiser(denoiser, conditions) if conditions else denoiser


def check_conditioning(flow: "PoissonFlow", n: int, labels: Any, options: Conditioning) -> BoundConditions:
    """Check `labels` and `options` for `n` samples of `flow`.

    Raises:
        ValueError: For what does not fit the flow, is missing, or has no effect.
    """
    classifier, guide, interval = options.get("classifier"), options.get("guide"), options.get("guidance_interval")
    conditions = check_conditions(flow, options.get("condition"), n)
    if classifier is not None and labels is not None and not flow.summary.num_classes:
        label: Tensor | None = _integers(labels, n, MAX_CLASSES, flow.device)
    else:
        label = check_labels(flow, labels, n)
    guidance = _strength(options.get("guidance"), n, flow.device)
    if guidance is None and (guide is not None or interval is not None):
        raise ValueError("guidance = None: guide and guidance_interval need a strength; give guidance, such as 2")
    if classifier is not None:
        _check_classifier(flow, label, guide)
    elif guide is not None:
        _check_guide(flow, guide, label)
    elif guidance is not None and (label is None or not flow.unconditional):
        raise ValueError(
            f"guidance: classifier-free guidance needs labels ({'none given' if label is None else 'given'}) and a model "
            f"trained with label_dropout > 0 (this one: {'yes' if flow.unconditional else 'no'}); or give a guide or classifier"
        )
    measurement = _check_measurement(flow, n, options.get("measurement"))
    bounds = (0.0, math.inf) if interval is None else check_interval(interval)
    if label is not None and flow.summary.num_classes:
        conditions["label"] = label
    return BoundConditions(flow, conditions, label, guidance, bounds, guide, classifier, measurement)


def check_labels(flow: "PoissonFlow", labels: Any, n: int) -> Tensor | None:
    """Return `labels`, one for all or one for each sample, as [n]; None for none.

    Raises:
        ValueError: If labels are out of range, of another number, missing, or have no effect.
    """
    num_classes = flow.summary.num_classes
    if labels is None:
        if num_classes and not flow.unconditional:
            raise ValueError(f"labels = None: this model is class-conditional; give labels from 0..{num_classes - 1}")
        return None
    if not num_classes:
        raise ValueError(f"labels = {labels}: this model was trained without labels; leave labels out")
    return _integers(labels, n, num_classes, flow.device)


def check_conditions(flow: "PoissonFlow", condition: Any, n: int) -> dict[str, Tensor]:
    """Return the conditions of `n` samples, normalised for the network, by key.

    Raises:
        ValueError: If a condition is missing, has no effect, is not finite, or has another shape.
    """
    shapes = flow.summary.conditions
    if condition is None and shapes:
        described = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise ValueError(f"condition = None: this model needs conditions: {described}; give them")
    if condition is None:
        return {}
    if not shapes:
        raise ValueError("condition: this model was trained without conditions; leave condition out")
    values = condition if isinstance(condition, Mapping) else {next(iter(shapes)): condition}
    if values.keys() != shapes.keys():
        raise ValueError(f"condition has {sorted(values)}; this model needs {sorted(shapes)}, a tensor for each")
    checked = {key: _check_condition(key, values[key], shape, n, flow.device) for key, shape in shapes.items()}
    return {key: value.expand(n, *value.shape[1:]) for key, value in flow.summary.normalize(checked).items()}


def _check_condition(key: str, value: Any, shape: Sequence[int], n: int, device: torch.device) -> Tensor:
    c = _tensor("condition", value, torch.float32, device)
    c = c[None] if c.ndim == len(shape) else c
    if c.shape[1:] != shape or len(c) not in (1, n) or not bool(torch.isfinite(c).all()):
        raise ValueError(
            f"condition has shape {tuple(c.shape)}; give finite numbers {shape} as {key}, one for all or one for each of {n} "
            "samples"
        )
    return c


def _tensor(name: str, value: Any, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Return numbers as a tensor, in `dtype` if given. Raise ValueError for anything else."""
    try:
        tensor = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} = {value!r}: give numbers, in a list or an array") from error
    if tensor.is_complex():
        raise ValueError(f"{name}: complex numbers; give real ones")
    if dtype is None and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        dtype = torch.long
    return tensor if dtype is None else tensor.to(dtype)


def _integers(labels: Any, n: int, classes: int, device: torch.device) -> Tensor:
    label = _tensor("labels", labels, None, device)
    if (
        label.is_floating_point()
        or label.dtype == torch.bool
        or (label.numel() and not bool(((label >= 0) & (label < classes)).all()))
    ):
        raise ValueError(f"labels = {labels}: this model's labels are the integers 0..{classes - 1}")
    if label.ndim > 1 or (label.ndim == 1 and len(label) != n):
        raise ValueError(f"labels has shape {tuple(label.shape)}; give one label, or one for each of the {n} samples")
    return label.long().expand(n)


def _strength(guidance: Any, n: int, device: torch.device) -> Tensor | None:
    """Return the guidance scale as [n] in float64."""
    if guidance is None:
        return None
    strength = _tensor("guidance", guidance, torch.float64, device)
    if strength.ndim > 1 or (strength.ndim == 1 and len(strength) != n) or not bool(torch.isfinite(strength).all()):
        raise ValueError(f"guidance = {guidance}: give one finite strength, or one for each of the {n} samples; 1 is none")
    return strength.expand(n)


def _check_classifier(flow: "PoissonFlow", label: Tensor | None, guide: Any) -> None:
    if guide is not None:
        raise ValueError("guide, classifier: give one of them")
    if label is None:
        raise ValueError("labels = None: a classifier guides towards labels; give them")
    N = math.prod(flow.shape)
    if N + flow.kernel.D <= 2:
        raise ValueError(f"classifier: guidance by it needs N + D > 2; this flow has N = {N}, D = {flow.kernel.D:g}")


def _check_guide(flow: "PoissonFlow", guide: "PoissonFlow", label: Tensor | None) -> None:
    """Raise ValueError unless both flows have the same data, D and units, and the guide takes these labels."""
    if not hasattr(guide, "denoiser"):
        raise ValueError(f"guide = {guide!r}: give a flow, such as pfgm.load returns")
    own, other = flow.summary, guide.summary
    for name in ("shape", "scale", "conditions", "num_classes"):
        ours, theirs = getattr(own, name), getattr(other, name)
        if ours != theirs and not (name in ("conditions", "num_classes") and not theirs):
            raise ValueError(f"guide: its {name} is {theirs}, this flow's is {ours}; give a guide for the same data")
    if label is None and other.num_classes and not guide.unconditional:
        raise ValueError("labels = None: the guide was trained with labels only; give them")
    if guide.kernel.D != flow.kernel.D:
        raise ValueError(f"guide: it has D = {guide.kernel.D:g}, this flow D = {flow.kernel.D:g}; give one of the same D")
    ours, theirs = dict(own.named_buffers()), dict(other.named_buffers())
    for name in ours.keys() & theirs.keys():
        if not torch.allclose(ours[name], theirs[name].to(ours[name]), rtol=1e-4, atol=1e-4):
            raise ValueError(f"guide: its {name} is not this flow's; give a guide trained on the same data")


def _check_measurement(flow: "PoissonFlow", n: int, measurement: Measurement | None) -> Measurement | None:
    """Return `measurement` with values [n, ...]. Raise ValueError if they are not what its operator gives."""
    if measurement is None:
        return None
    if not isinstance(measurement, Measurement):
        raise ValueError(f"measurement = {measurement!r}: give a pfgm.sampling.Measurement")
    like = input_dtype(flow.denoiser, torch.float32)
    values = measurement.values.to(flow.device, like)
    try:
        tried = measurement.operator(torch.zeros(2, *flow.shape, device=flow.device, dtype=like))
        two, *expected = tried.shape
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"measurement: its operator does not take samples [B, *{flow.shape}] of type {like}, or gives no [B, ...]: {error}"
        ) from error
    if two != 2:
        raise ValueError(f"measurement: its operator gives {tuple(tried.shape)} for 2 samples; keep samples apart")
    if values.ndim == len(expected):
        values = values[None]
    if [*values.shape[1:]] != expected or len(values) not in (1, n):
        raise ValueError(
            f"measurement: values of shape {tuple(values.shape)}; its operator gives {tuple(expected)} for each of {n} samples"
        )
    return replace(measurement, values=values.expand(n, *expected))
