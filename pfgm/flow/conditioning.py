"""Labels, conditions, guidance and measurements of samples, checked before any network call."""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from pfgm.sampling.guidance import ClassifierGuidedDenoiser, ConditionedDenoiser, GuidedDenoiser, Interval, check_interval
from pfgm.sampling.inverse import MeasuredDenoiser, Measurement
from pfgm.sampling.ode import input_dtype
from pfgm.sampling.solvers import SolverConfig

if TYPE_CHECKING:
    from pfgm.flow.poisson_flow import PoissonFlow

MAX_CLASSES = 2**31  # bound on labels for a classifier, whose number of classes is not known before it is called


class Conditioning(TypedDict, total=False):
    """Name what sample, vary, denoise, encode, decode and interpolate of a flow take besides labels.

    condition: For models trained with conditions: [n, ...], or one for all, in the user's units; a mapping by key ("image",
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
    """Hold the checked conditions of n samples, as tensors [n, ...]; for the other fields see `Conditioning`."""

    flow: "PoissonFlow"
    conditions: Mapping[str, Tensor]  # normalised for the network, by key
    label: Tensor | None
    guidance: Tensor | None
    interval: Interval
    guide: "PoissonFlow | None"
    classifier: Callable[[Tensor, Tensor], Tensor] | None
    measurement: Measurement | None

    def __getitem__(self, rows: slice) -> "BoundConditions":
        """Return the conditions of some of the samples."""
        measurement = self.measurement
        return replace(
            self,
            conditions={key: value[rows] for key, value in self.conditions.items()},
            label=None if self.label is None else self.label[rows],
            guidance=None if self.guidance is None else self.guidance[rows],
            measurement=None if measurement is None else replace(measurement, values=measurement.values[rows]),
        )

    def denoiser(self) -> nn.Module:
        """Return the flow's denoiser under these conditions, denoise(x, sigma) in model space."""
        summary, classifier, measurement = self.flow.summary, self.classifier, self.measurement
        denoiser = self._bind(self.flow, self.label)
        if classifier is not None and self.label is not None:
            strength = 1.0 if self.guidance is None else self.guidance
            denoiser = ClassifierGuidedDenoiser(
                denoiser,
                lambda x, sigma: classifier(summary.to_user(x), sigma * summary.scale),
                self.label,
                self.flow.kernel.D,
                strength,
                self.interval,
            )
        elif self.guidance is not None:
            weaker = self._bind(self.flow, None) if self.guide is None else self._bind(self.guide, self.label)
            denoiser = GuidedDenoiser(denoiser, weaker, self.guidance, self.interval)
        if measurement is None:
            return denoiser
        operator = measurement.operator
        return MeasuredDenoiser(
            denoiser, lambda x: operator(summary.to_user(x)), measurement.values, measurement.noise, measurement.iterations
        )

    def _bind(self, flow: "PoissonFlow", label: Tensor | None) -> nn.Module:
        """Bind to the denoiser of `flow` those conditions that it was trained with."""
        conditions = {key: self.conditions[key] for key in flow.summary.conditions}
        if label is not None and flow.summary.num_classes:
            conditions["label"] = label
        return ConditionedDenoiser(flow.denoiser, conditions) if conditions else flow.denoiser


CONDITIONS = tuple(Conditioning.__annotations__)
OPTIONS = (*CONDITIONS, "config", *(field.name for field in fields(SolverConfig)))


def check_options(flow: "PoissonFlow", n: int, labels: Any, options: Mapping[str, Any]) -> tuple[BoundConditions, SolverConfig]:
    """Separate and check the conditions of `n` samples and the solver's settings."""
    _check_names(options, OPTIONS)
    bound = check_conditioning(flow, n, labels, {name: value for name, value in options.items() if name in CONDITIONS})
    solver = {name: value for name, value in options.items() if name not in CONDITIONS and value is not None}
    return bound, SolverConfig.resolve(solver.pop("config", None), solver)


def check_conditioning(flow: "PoissonFlow", n: int, labels: Any, options: Mapping[str, Any]) -> BoundConditions:
    """Check labels, and `options` named as in `Conditioning`, for `n` samples of `flow`.

    Raises:
        ValueError: If they do not fit the flow, are missing, or have no effect.
    """
    _check_names(options, CONDITIONS)
    guidance, interval = options.get("guidance"), options.get("guidance_interval")
    classifier, guide = options.get("classifier"), options.get("guide")
    conditions = _check_conditions(flow, options.get("condition"), n)
    if classifier is not None and labels is not None and not flow.summary.num_classes:
        label: Tensor | None = _class_indices(labels, n, MAX_CLASSES, flow.device)
    else:
        label = check_labels(flow, labels, n)
    if guidance is None and (guide is not None or interval is not None):
        raise ValueError("guidance = None: guide and guidance_interval need a strength. Pass guidance, such as 2.")
    strength = None
    if guidance is not None:
        strength = _numbers(f"guidance = {reprlib.repr(guidance)}", guidance, (), n, flow.device).double().expand(n)
    if classifier is not None and guide is not None:
        raise ValueError("guide, classifier: they exclude each other. Leave one of them out.")
    if classifier is not None:
        _check_classifier(flow, label)
    elif guide is not None:
        _check_guide(flow, guide, label)
    elif guidance is not None and (label is None or not flow.unconditional):
        raise ValueError(
            f"guidance: classifier-free guidance needs labels ({'none given' if label is None else 'given'}) and a model "
            f"trained with label_dropout > 0 (this one: {'yes' if flow.unconditional else 'no'}), or a guide or classifier"
        )
    measurement = _check_measurement(flow, n, options.get("measurement"))
    levels = (0.0, math.inf) if interval is None else check_interval(interval)
    return BoundConditions(flow, conditions, label, strength, levels, guide, classifier, measurement)


def _check_names(options: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no option here; there are {', '.join(known)}")


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError unless `batch_size` is at least 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1")


def check_labels(flow: "PoissonFlow", labels: Any, n: int) -> Tensor | None:
    """Return `labels`, one for all or one for each sample, as [n]. Raise ValueError if they do not fit the flow."""
    num_classes = flow.summary.num_classes
    if labels is None:
        if num_classes and not flow.unconditional:
            raise ValueError(f"labels = None: this model is class-conditional. Pass labels from 0..{num_classes - 1}.")
        return None
    if not num_classes:
        raise ValueError(f"labels = {labels}: this model was trained without labels. Leave labels out.")
    return _class_indices(labels, n, num_classes, flow.device)


def _check_conditions(flow: "PoissonFlow", condition: Any, n: int) -> dict[str, Tensor]:
    """Return the conditions of `n` samples, normalised for the network, by key."""
    shapes = flow.summary.conditions
    if condition is None and shapes:
        described = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise ValueError(f"condition = None: this model needs conditions: {described}. Pass them.")
    if condition is None:
        return {}
    if not shapes:
        raise ValueError("condition: this model was trained without conditions. Leave condition out.")
    values = condition if isinstance(condition, Mapping) else {next(iter(shapes)): condition}
    if values.keys() != shapes.keys():
        raise ValueError(f"condition has {sorted(values)}, this model needs {sorted(shapes)}. Pass a tensor for each.")
    checked = {key: _numbers(f"{key} condition", values[key], shape, n, flow.device).float() for key, shape in shapes.items()}
    return {key: value.expand(n, *value.shape[1:]) for key, value in flow.summary.normalize(checked).items()}


def _numbers(name: str, value: Any, shape: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    """Return finite numbers of `shape`, one for all or one for each of `n` samples, as [1 or n, *shape]."""
    try:
        tensor = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected numbers. Pass a list or an array.") from error
    if tensor.is_complex():
        raise ValueError(f"{name}: complex numbers are not supported. Pass real ones.")
    for_all = (shape, (1, *shape)) if shape else (shape,)  # a list of one label is for one sample
    if tensor.shape not in (*for_all, (n, *shape)) or not bool(torch.isfinite(tensor.float()).all()):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}. Pass finite numbers {shape} for all, or one for each of the {n} samples."
        )
    return tensor[None] if tensor.shape == shape else tensor


def _class_indices(labels: Any, n: int, classes: int, device: torch.device) -> Tensor:
    given = _numbers(f"labels = {reprlib.repr(labels)}", labels, (), n, device)
    label = given.long()
    if given.is_floating_point() or given.dtype == torch.bool or not bool(((label >= 0) & (label < classes)).all()):
        raise ValueError(f"labels = {labels}: this model's labels are the integers 0..{classes - 1}.")
    return label.expand(n)


def _check_classifier(flow: "PoissonFlow", label: Tensor | None) -> None:
    if label is None:
        raise ValueError("labels = None: a classifier guides towards labels. Pass them.")
    N = math.prod(flow.shape)
    if N + flow.kernel.D <= 2:
        raise ValueError(f"classifier: guidance by it needs N + D > 2; this flow has N = {N}, D = {flow.kernel.D:g}.")


def _check_guide(flow: "PoissonFlow", guide: "PoissonFlow", label: Tensor | None) -> None:
    """Raise ValueError unless both flows have the same data, D and units, and the guide takes these labels."""
    if not hasattr(guide, "denoiser"):
        raise ValueError(f"guide = {guide!r}: expected a flow. Pass what pfgm.load returns.")
    own, other = flow.summary, guide.summary
    for name in ("shape", "scale", "conditions", "num_classes"):
        ours, theirs = getattr(own, name), getattr(other, name)
        if ours != theirs and (theirs or name in ("shape", "scale")):  # it may lack conditions and labels
            raise ValueError(f"guide: its {name} is {theirs}, this flow's is {ours}. Pass a guide for the same data.")
    if label is None and other.num_classes and not guide.unconditional:
        raise ValueError("labels = None: the guide was trained with labels only. Pass them.")
    if guide.kernel.D != flow.kernel.D:
        raise ValueError(f"guide: it has D = {guide.kernel.D:g}, this flow D = {flow.kernel.D:g}. Pass one of the same D.")
    ours, theirs = dict(own.named_buffers()), dict(other.named_buffers())
    for name in ours.keys() & theirs.keys():
        if not torch.allclose(ours[name], theirs[name].to(ours[name]), rtol=1e-4, atol=1e-4):
            raise ValueError(f"guide: its {name} is not this flow's. Pass a guide trained on the same data.")


def _check_measurement(flow: "PoissonFlow", n: int, measurement: Measurement | None) -> Measurement | None:
    """Return `measurement` with values [n, ...]. Raise ValueError if its operator does not return values of this shape."""
    if measurement is None:
        return None
    if not isinstance(measurement, Measurement):
        raise ValueError(f"measurement = {measurement!r}: expected a pfgm.sampling.Measurement.")
    like = input_dtype(flow.denoiser, torch.float32)
    try:
        tried = measurement.operator(torch.zeros(2, *flow.shape, device=flow.device, dtype=like))
        two, *expected = tried.shape
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"measurement: its operator does not map samples [B, *{flow.shape}] of type {like} to a tensor [B, ...]: {error}"
        ) from error
    if two != 2:
        raise ValueError(f"measurement: its operator returns {tuple(tried.shape)} for 2 samples. Keep samples apart.")
    name = f"measurement: its operator returns {tuple(expected)}, values"
    values = _numbers(name, measurement.values, tuple(expected), n, flow.device)
    return replace(measurement, values=values.to(like).expand(n, *expected))
