"""What samples can be drawn under: labels, conditions, guidance, measurements; checked before any work, then batch by batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from pfgm.nn.network import condition_key
from pfgm.sampling.guidance import ClassifierGuidedDenoiser, ConditionedDenoiser, GuidedDenoiser, Interval, check_interval
from pfgm.sampling.inverse import MeasuredDenoiser, Measurement
from pfgm.sampling.ode import input_dtype

if TYPE_CHECKING:
    from pfgm.flow.poisson_flow import PoissonFlow


class Conditioning(TypedDict, total=False):
    """What a flow's sample, vary, denoise, encode, decode and interpolate take besides labels.

    `condition` [n, *condition_shape], or one for all, in the user's units, for a model that was trained with conditions.
    `guidance` is the strength, one for all or one for each sample, 1 being none, at levels in `guidance_interval` (low,
    high; in model units): classifier-free if the model was trained with label dropout; away from the `guide`, another flow of
    the same data, if one is given; or by `classifier`(x, sigma) -> logits of noisy samples, in the user's units (then 1 is
    Bayes' rule). `measurement` draws from the posterior given what was measured.
    """

    condition: Tensor | None
    guidance: float | Sequence[float] | Tensor | None
    guidance_interval: Interval | None
    guide: "PoissonFlow | None"
    classifier: Callable[[Tensor, Tensor], Tensor] | None
    measurement: Measurement | None


@dataclass(frozen=True)
class Given:
    """Checked conditioning of n samples of `flow`; tensors [n, ...] in model space."""

    flow: "PoissonFlow"
    label: Tensor | None
    condition: Tensor | None = None
    guidance: Tensor | None = None
    interval: Interval = (0.0, math.inf)
    guide: "PoissonFlow | None" = None
    classifier: Callable[[Tensor, Tensor], Tensor] | None = None
    measurement: Measurement | None = None

    def __getitem__(self, rows: slice) -> "Given":
        """That of some of the samples."""
        names = ("label", "condition", "guidance")
        parts: dict[str, Any] = {name: None if (v := getattr(self, name)) is None else v[rows] for name in names}
        measured = self.measurement
        if measured is not None:
            parts["measurement"] = replace(measured, values=measured.values[rows])
        return replace(self, **parts)

    @property
    def network_label(self) -> Tensor | None:
        """The labels that the flow's own network gets."""
        return self.label if self.flow.num_classes else None

    @property
    def _named(self) -> dict[str, Tensor]:
        return {} if self.condition is None else {condition_key(self.condition.ndim - 1): self.condition}

    def denoiser(self) -> nn.Module:
        """The flow's denoiser under all this: denoise(x, sigma, label) in model space."""
        flow, scale = self.flow, self.flow.scale
        plain = flow.denoiser if self.condition is None else ConditionedDenoiser(flow.denoiser, self._named)
        denoiser: nn.Module = plain
        if self.classifier is not None and self.label is not None:
            asked, strength = self.classifier, 1.0 if self.guidance is None else self.guidance

            def classifier(x: Tensor, sigma: Tensor) -> Tensor:
                return asked(flow.to_user(x), sigma * scale)

            denoiser = ClassifierGuidedDenoiser(plain, classifier, self.label, flow.kernel.D, strength, self.interval)
        elif self.guidance is not None:
            denoiser = GuidedDenoiser(plain, self._reference(), self.guidance, self.interval)
        measured = self.measurement
        if measured is None:
            return denoiser
        operator, values = measured.operator, measured.values
        return MeasuredDenoiser(denoiser, lambda x: operator(flow.to_user(x)), values, measured.noise, measured.iterations)

    def _reference(self) -> nn.Module:
        """What guidance leads away from: the guide under the same conditions, or the flow without labels."""
        if self.guide is None:
            return ConditionedDenoiser(self.flow.denoiser, self._named, takes_label=False)
        condition = None if self.guide.condition_shape is None else self._named
        return ConditionedDenoiser(self.guide.denoiser, condition, takes_label=self.guide.num_classes > 0)


def check_conditioning(flow: "PoissonFlow", n: int, labels: Any, options: Conditioning) -> Given:
    """`labels` and `options` for `n` samples of `flow`. ValueError for what does not fit it, is missing, or is superfluous."""
    classifier, guide = options.get("classifier"), options.get("guide")
    condition = check_condition(flow, options.get("condition"), n)
    if classifier is not None and labels is not None and not flow.num_classes:
        label: Tensor | None = _integers(labels, n, 2**31, flow.mean.device)  # how many classes it has is not known here
    else:
        label = check_labels(flow, labels, n)
    guidance = _strength(options.get("guidance"), n, flow.mean.device)
    if guidance is None and (guide is not None or options.get("guidance_interval") is not None):
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
    interval = options.get("guidance_interval")
    measurement = _checked_measurement(flow, n, options.get("measurement"))
    bounds = (0.0, math.inf) if interval is None else check_interval(interval)
    return Given(flow, label, condition, guidance, bounds, guide, classifier, measurement)


def check_labels(flow: "PoissonFlow", labels: Any, n: int) -> Tensor | None:
    """`labels`, one for all or one for each, as [n]; None for none. ValueError if they are out of range, of the wrong number,
    missing, or given in vain."""
    if labels is None:
        if flow.num_classes and not flow.unconditional:
            raise ValueError(f"labels = None: this model is class-conditional; give labels from 0..{flow.num_classes - 1}")
        return None
    if not flow.num_classes:
        raise ValueError(f"labels = {labels}: this model was trained without labels; leave labels out")
    return _integers(labels, n, flow.num_classes, flow.mean.device)


def check_condition(flow: "PoissonFlow", condition: Any, n: int) -> Tensor | None:
    """`condition` [n, *condition_shape], or one for all, in the user's units, normalised as the network gets it.

    ValueError if it is missing, given in vain, not finite, or of another shape.
    """
    shape, mean, std = flow.condition_shape, flow.condition_mean, flow.condition_std
    if condition is None:
        if shape is not None:
            raise ValueError(f"condition = None: this model needs conditions of shape {shape}; give them")
        return None
    if shape is None or mean is None or std is None:
        raise ValueError("condition: this model was trained without conditions; leave condition out")
    c = _tensor("condition", condition, torch.float32, mean.device)
    c = c[None] if c.ndim == len(shape) else c
    if c.shape[1:] != shape or len(c) not in (1, n) or not bool(torch.isfinite(c).all()):
        raise ValueError(
            f"condition has shape {tuple(c.shape)}; give finite numbers {shape}, one for all or one for each of {n} samples"
        )
    return normalized_condition(flow, c).expand(n, *shape)


def normalized_condition(flow: "PoissonFlow", condition: Tensor) -> Tensor:
    """`condition` [B, ...] in the user's units, as the network gets it; nothing is checked."""
    assert flow.condition_mean is not None
    assert flow.condition_std is not None
    return (condition - flow.condition_mean) / flow.condition_std


def _tensor(name: str, value: Any, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Numbers as a tensor, in `dtype` if given. ValueError for anything else."""
    try:
        tensor = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} = {value!r}: give numbers, in a list or an array") from error
    if tensor.is_complex():
        raise ValueError(f"{name}: complex numbers; give real ones")
    if dtype is None and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        dtype = torch.long
    return tensor.to(dtype)


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
    """[n] in float64."""
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
    """ValueError unless both have the same data, D and units, and the guide can do with these labels."""
    if not hasattr(guide, "denoiser"):
        raise ValueError(f"guide = {guide!r}: give a flow, such as pfgm.load gives")
    for name in ("shape", "scale", "condition_shape", "num_classes"):
        one, other = getattr(flow, name), getattr(guide, name)
        if one != other and not (name in ("condition_shape", "num_classes") and not other):
            raise ValueError(f"guide: its {name} is {other}, this flow's is {one}; give a guide for the same data")
    if label is None and guide.num_classes and not guide.unconditional:
        raise ValueError("labels = None: the guide was trained with labels only; give them")
    if guide.kernel.D != flow.kernel.D:
        raise ValueError(f"guide: it has D = {guide.kernel.D:g}, this flow D = {flow.kernel.D:g}; give one of the same D")
    for name in ("mean", "condition_mean", "condition_std"):
        one, other = getattr(flow, name), getattr(guide, name)
        if one is not None and other is not None and not torch.allclose(one, other.to(one), rtol=1e-4, atol=1e-4):
            raise ValueError(f"guide: its {name} is not this flow's; give a guide trained on the same data")


def _checked_measurement(flow: "PoissonFlow", n: int, measurement: Measurement | None) -> Measurement | None:
    """`measurement` with values [n, ...]. ValueError if they are not what its operator gives."""
    if measurement is None:
        return None
    if not isinstance(measurement, Measurement):
        raise ValueError(f"measurement = {measurement!r}: give a pfgm.sampling.Measurement")
    like = input_dtype(flow.denoiser, torch.float32)
    values = measurement.values.to(flow.mean.device, like)
    try:
        tried = measurement.operator(torch.zeros(2, *flow.shape, device=flow.mean.device, dtype=like))
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
