"""PoissonFlow: a trained model as its users meet it, in their own units.

The flow holds the kernel, the denoiser and what the data was like. Everything below it works in centred model space,
model = user / scale - mean; here, and only here, samples come and go in the user's units.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pfgm.core import rng
from pfgm.core.arguments import Array, checked
from pfgm.core.configurable import build, to_json
from pfgm.core.tensors import check_finite_samples, check_levels, check_positive, check_shape, per_sample
from pfgm.flow import checkpoints
from pfgm.flow.conditioning import Conditioning, Given, check_conditioning
from pfgm.sampling.guidance import cost
from pfgm.sampling.latents import Latent, check_points, interpolate
from pfgm.sampling.likelihood import LogProb, estimate_log_prob
from pfgm.sampling.progress import DrawProgress
from pfgm.sampling.sampler import Sampler, SamplerOptions, Samples, Trajectory, check_max_calls, check_start, seed_pairs
from pfgm.sampling.solvers import SolverOptions
from pfgm.theory.data_summary import level_spacing
from pfgm.theory.kernel import StudentTKernel


class Options(SamplerOptions, Conditioning, total=False):
    """How to draw, and under what."""


class PoissonFlow(nn.Module):
    """A denoiser with its range of noise and its units.

    `denoiser` works in centred model space for data of event `shape` and owns the `kernel`. `mean`
    [*shape] (default 0) and `scale` take model space to the user's units, user = (model + mean) scale. sigma_min, sigma_max
    and sigma_data are in model units. `value_range` (low, high) of the user's units is what pictures map to black and white;
    `num_classes` is 0 for a model without labels, which are optional if it is also `unconditional`. Discrete data had so many
    `levels` (0: continuous), `dequantized` or not. Conditions have `condition_shape` and `condition_mean` and `condition_std`
    [C, 1, ...] for each index of its first dimension. `start` as in `Sampler`.
    """

    mean: Tensor
    condition_mean: Tensor | None
    condition_std: Tensor | None

    @checked
    def __init__(
        self,
        denoiser: nn.Module,
        *,
        shape: Sequence[int],
        sigma_min: float,
        sigma_max: float,
        sigma_data: float | None = None,
        mean: Tensor | None = None,
        scale: float = 1.0,
        value_range: Sequence[float] | None = None,
        num_classes: int = 0,
        unconditional: bool = False,
        levels: int = 0,
        dequantized: bool = False,
        condition_shape: Sequence[int] | None = None,
        condition_mean: Tensor | None = None,
        condition_std: Tensor | None = None,
        start: str = "hemisphere",
    ):
        super().__init__()
        check_shape(shape)
        check_levels(sigma_min, sigma_max)
        sigma_data = own_sigma_data(denoiser, sigma_data)
        check_positive("scale", scale)
        check_start(start)
        self.denoiser = denoiser
        self.kernel  # noqa: B018 (a denoiser without one is refused now, not at the first sample)
        self.shape, self.scale, self.num_classes, self.start = tuple(shape), scale, num_classes, start
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.value_range = None if value_range is None else tuple(value_range)
        self.unconditional, self.levels, self.dequantized = unconditional, levels, dequantized
        self.condition_shape = None if condition_shape is None else tuple(condition_shape)
        self.register_buffer("mean", torch.zeros(self.shape) if mean is None else mean)
        channels = None if self.condition_shape is None else (self.condition_shape[0], *[1] * (len(self.condition_shape) - 1))
        self.register_buffer("condition_mean", torch.zeros(channels) if channels and condition_mean is None else condition_mean)
        self.register_buffer("condition_std", torch.ones(channels) if channels and condition_std is None else condition_std)

    @property
    def kernel(self) -> StudentTKernel:
        """The perturbation kernel of the denoiser, which is the only place that knows D."""
        kernel = getattr(self.denoiser, "kernel", None)
        if not isinstance(kernel, StudentTKernel):
            raise ValueError(
                f"denoiser = {type(self.denoiser).__name__}: it has no StudentTKernel as its attribute kernel; set it to that "
                "of the D for which it denoises"
            )
        return kernel

    @property
    def config(self) -> dict[str, Any]:
        """All but the tensors, as strict JSON data; `from_config` makes the flow again."""
        names = ["shape", "sigma_min", "sigma_max", "sigma_data", "scale", "value_range", "num_classes", "unconditional"]
        names += ["levels", "dequantized", "condition_shape", "start"]
        return to_json({"denoiser": self.denoiser} | {name: getattr(self, name) for name in names})

    @classmethod
    def from_config(cls, config: dict[str, Any], trust: Sequence[str] = ()) -> "PoissonFlow":
        """A flow with fresh weights. ValueError for class paths outside this package and outside the modules `trust`."""
        settings = {name: value for name, value in config.items() if name not in ("denoiser", "D")}
        flow = cls(build(config["denoiser"], trust, nn.Module), **settings)
        if "D" in config and float(config["D"]) != flow.kernel.D:  # version 0.1 stored it twice
            raise ValueError(f"D = {config['D']} of the flow is not that of its denoiser, {flow.kernel.D:g}")
        return flow

    def to_model(self, x: Array) -> Tensor:
        """The user's units [B, *shape], also as numpy array -> centred model space."""
        x = torch.as_tensor(x)
        if x.shape[1:] != self.shape or x.is_complex():
            raise ValueError(
                f"x has samples of shape {tuple(x.shape[1:])} and type {x.dtype}; this flow's are real, {self.shape}"
            )
        x = x if x.is_floating_point() else x.float()
        return x / self.scale - self.mean.to(x.dtype)

    def to_user(self, x: Tensor) -> Tensor:
        """Centred model space [B, *shape] -> the user's units."""
        return (x + self.mean.to(x.dtype)) * self.scale

    def sampler(self, **options: Unpack[SamplerOptions]) -> Sampler:
        """The `Sampler` of this flow; options that are None are left out."""
        settings: Any = {"start": self.start, "sigma_max": self.sigma_max}
        settings |= {name: value for name, value in options.items() if value is not None}
        return Sampler(
            self.denoiser, self.kernel, shape=self.shape, sigma_min=self.sigma_min, sigma_data=self.sigma_data, **settings
        )

    @checked
    def sample(
        self,
        n: int | None = None,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        batch_size: int = 256,
        max_calls: int | None = None,
        progress: bool = False,
        **options: Unpack[Options],
    ) -> Samples:
        """`n` samples of `seed` (default 0), or one for each of `seeds`, in the user's units: `Samples` with x [n, *shape].

        Sample i is a function of (seed, i), `seeds` = [k, ...] gives those of (k, 0). `labels` is one class for all or one for
        each. `batch_size` samples are drawn at a time, with a progress bar if `progress`; after `max_calls` of the network a
        batch ends where it is. `options` are those of `Sampler` (without any the preset is "balanced", 10 calls) and of
        `pfgm.flow.Conditioning`: condition, guidance, measurement, .... ValueError for arguments out of range, before
        the first network call; SolverError if solving fails.
        """
        pairs = seed_pairs(n, seed, seeds)
        return self.draw(pairs, labels=labels, batch_size=batch_size, max_calls=max_calls, progress=progress, **options)

    @checked
    def vary(self, x: Array, level: float, *, seed: int = 0, labels: Any = None, **options: Unpack[Options]) -> Samples:
        """A variation of each of `x` [n, *shape]: noise up to the effective `level` and the flow back (arXiv 2108.01073).

        `x` and `level`, between sigma_min and sigma_max, are in the user's units. Near sigma_min x stays what it is, far above
        sigma_data a new sample is drawn. Variation i is a function of (seed, i); options as for `sample`.
        """
        model = self.to_model(x)
        check_finite_samples("x", model)
        self.check_level(level)
        if "sigma_max" in options:
            raise TypeError("sigma_max: variations start at their level; leave it out")
        pairs = seed_pairs(len(x), seed)
        return self.draw(pairs, labels=labels, source=model, sigma_max=level / self.scale, **options)

    def draw(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        labels: Any = None,
        batch_size: int = 256,
        max_calls: int | None = None,
        progress: bool = False,
        source: Tensor | None = None,
        **options: Any,
    ) -> Samples:
        """One sample for each (seed, index) of `pairs`, around `source` [n, *shape] (in model space; default 0); the other
        arguments are those of `sample`."""
        settings: dict[str, Any] = {"labels": labels, "batch_size": batch_size, "max_calls": max_calls, "progress": progress}
        parts = [part for _, part in self.batches(pairs, source=source, **settings, **options)]
        most = {name: max(getattr(part, name) for part in parts) for name in ("calls", "accepted", "rejected")}
        errors = [part.error for part in parts if part.error is not None]
        error = torch.cat(errors) if len(errors) == len(parts) else None
        complete = all(part.complete for part in parts)
        x, seconds = torch.cat([part.x for part in parts]), sum(part.seconds for part in parts)
        return Samples(x, seconds=seconds, error=error, complete=complete, **most)

    def batches(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        labels: Any = None,
        batch_size: int = 256,
        max_calls: int | None = None,
        progress: bool = False,
        source: Tensor | None = None,
        only: Sequence[int] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Samples]]:
        """The batches of `draw` one by one, each with its number; `only` those of some numbers."""
        given, options = self._given(len(pairs), labels, options)
        sampler = self.sampler(**options)
        check_batch_size(batch_size)
        check_max_calls(max_calls, cost(given.denoiser()))
        numbers = range(max(1, -(-len(pairs) // batch_size))) if only is None else only
        chunks = {k: slice(k * batch_size, (k + 1) * batch_size) for k in numbers}
        with DrawProgress(sum(len(pairs[rows]) for rows in chunks.values()), sampler, progress) as bar:
            for number, rows in chunks.items():
                bar.batch(len(pairs[rows]))
                around = None if source is None else source[rows]
                some = given[rows]
                part = sampler.with_denoiser(some.denoiser()).draw(pairs[rows], some.network_label, max_calls, bar, around)
                error = None if part.error is None else part.error * self.scale
                yield number, dataclasses.replace(part, x=self.to_user(part.x), error=error)

    @checked
    def trajectory(
        self,
        pairs: Sequence[tuple[int, int]],
        points: int,
        *,
        labels: Any = None,
        batch_size: int = 256,
        **options: Any,
    ) -> Trajectory:
        """The way of the samples (seed, index) of `pairs` in the user's units, see `Sampler.trajectory`."""
        given, options = self._given(len(pairs), labels, options)
        sampler, ways = self.sampler(**options), []
        check_batch_size(batch_size)
        for i in range(0, max(1, len(pairs)), batch_size):
            rows = slice(i, i + batch_size)
            some = given[rows]
            ways.append(sampler.with_denoiser(some.denoiser()).trajectory(pairs[rows], points, some.network_label))
        x, denoised = (self.to_user(torch.cat([getattr(way, name) for way in ways], 1)) for name in ("x", "denoised"))
        return Trajectory(x, denoised, torch.cat([way.sigma for way in ways], 1) * self.scale, ways[0].level * self.scale)

    @checked
    @torch.no_grad()
    def denoise(self, x: Array, sigma: float | Tensor, label: Any = None, **options: Unpack[Conditioning]) -> Tensor:
        """E[y | x, sigma] for `x` [B, *shape] and `sigma` (float or [B]) > 0 in the user's units: like x.

        ValueError if x or sigma is not finite, sigma not positive, or labels or conditions do not fit.
        """
        model = self.to_model(x)
        level, given = per_sample(sigma, model), self._given(len(model), label, {**options}, Conditioning)[0]
        if not bool(((level > 0) & torch.isfinite(level)).all()):
            raise ValueError(f"sigma = {sigma} must be positive and finite, in the units of x")
        check_finite_samples("x", model)
        own = given.network_label
        return self.to_user(given.denoiser()(model, level / self.scale, **({} if own is None else {"label": own})))

    @checked
    def encode(self, x: Array, *, labels: Any = None, **options: Any) -> Latent:
        """The latent on the plane sigma_max that flows to `x` [B, *shape] (user's units, read at sigma_min).

        `options` are those of `sample` (default: preset "reference"); tolerances of 1e-5 make the round trip through `decode`
        more accurate still.
        """
        model = self.to_model(x)
        check_finite_samples("x", model)
        sampler, label = self._accurate(len(x), labels, options)
        latent = sampler.encode(model, label)
        return dataclasses.replace(latent, level=latent.level * self.scale)

    @checked
    def decode(self, latent: Latent, *, labels: Any = None, **options: Any) -> Tensor:
        """Follow the flow from `latent`, on the surface that it names, to sigma_min; without the last denoising that
        sampling does. [B, *shape] in the user's units."""
        if not isinstance(latent, Latent):
            raise ValueError(f"latent is a {type(latent).__name__}; give what encode returns")
        if latent.t.shape[1:] != self.shape or not latent.t.is_floating_point():
            raise ValueError(
                f"latent.t has shape {tuple(latent.t.shape)} and type {latent.t.dtype}; "
                f"this flow's latents are floating-point and of shape (n, *{self.shape})"
            )
        check_finite_samples("latent.t", latent.t)
        sampler, label = self._accurate(len(latent.t), labels, options)
        return self.to_user(sampler.decode(dataclasses.replace(latent, level=latent.level / self.scale), label))

    @checked
    def interpolate(self, a: Array, b: Array, points: int, *, labels: Any = None, **options: Any) -> Tensor:
        """From `a` to `b` [B, *shape] in `points` steps, both ends included: [points, B, *shape] in the user's units.

        Encoded, followed along great circles (`pfgm.sampling.latents.interpolate`) and decoded; options as for `encode`.
        """
        check_points(points)
        if len(a) != len(b):
            raise ValueError(f"a, b: {len(a)} and {len(b)} samples; give as many of both")
        first, last = (self.encode(x, labels=labels, **options) for x in (a, b))
        return torch.stack([self.decode(latent, labels=labels, **options) for latent in interpolate(first, last, points)])

    @checked
    def log_prob(self, x: Array, *, labels: Any = None, condition: Tensor | None = None, **options: Any) -> Tensor:
        """The log-density of `x` [B, *shape], blurred by the noise of sigma_min, in nats in the user's units: [B] in float64.

        `options` are those of `likelihood.estimate_log_prob`, which also tells the error of the estimate: exact, probes,
        seed, method, rtol, atol, differentiable. ValueError for x that is not finite or of another shape.
        """
        return self.estimate_log_prob(x, labels=labels, condition=condition, **options).value

    @checked
    def estimate_log_prob(self, x: Array, *, labels: Any = None, condition: Tensor | None = None, **options: Any) -> LogProb:
        """`log_prob` with the standard error of each estimate and the network calls."""
        model = self.to_model(x)
        check_finite_samples("x", model)
        given = check_conditioning(self, len(x), labels, {"condition": condition})
        levels: Any = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "sigma_data": self.sigma_data}
        out = estimate_log_prob(given.denoiser(), self.kernel, model, label=given.network_label, **levels, **options)
        return dataclasses.replace(out, value=out.value - math.prod(self.shape) * math.log(self.scale))

    def bits_per_dim(self, x: Tensor, *, labels: Any = None, seed: int = 0, **options: Any) -> Tensor:
        """-log2 P(x)/N of discrete samples `x` [B, *shape] in the user's units: [B], unbiased estimates of an upper bound.

        The bound is the mean over the noise that fills the gaps between the levels (variational dequantisation with uniform
        noise, arXiv 1511.01844), drawn from (seed, i). `options` are those of `log_prob`. ValueError for a model of continuous
        data, and for one trained without that noise: its density may grow without bound at the levels, which is no likelihood.
        """
        self.check_discrete()
        self.to_model(x)  # its checks
        x, spacing, N = torch.as_tensor(x), level_spacing(self.value_range, self.levels), math.prod(self.shape)
        noise = [
            torch.rand(self.shape, generator=rng.generator(seed, i, 0, 0, rng.DEQUANTIZATION)) - 0.5 for i in range(len(x))
        ]
        filled = x + spacing * torch.stack(noise).to(x.device) if noise else x
        value = self.log_prob(filled, labels=labels, seed=seed, **options)
        return -(value / N + math.log(spacing)) / math.log(2)

    def check_level(self, level: float) -> None:
        """ValueError unless the noise `level`, in the user's units, is one that the flow has."""
        low, high = self.sigma_min * self.scale, self.sigma_max * self.scale
        if not low < level <= high:
            raise ValueError(f"level = {level} must lie above {low:g}, up to {high:g}, the model's range in the data's units")

    def check_discrete(self) -> None:
        """ValueError that says why, if the model has no `bits_per_dim`."""
        if not self.levels:
            raise ValueError(
                "bits/dim: this model's data are continuous, so that the figure would depend on units; use log_prob"
            )
        if not self.dequantized:
            raise ValueError(
                f"bits/dim: the {self.levels} levels of this model's data are points to it, since it was trained without noise "
                "between them, and its density there is no likelihood; train with data.dequantize = true"
            )

    def _given(self, n: int, labels: Any, options: dict[str, Any], known: Any = Options) -> tuple[Given, dict[str, Any]]:
        """Checked conditioning of `n` samples, and the options that are the Sampler's. TypeError unless all are `known`."""
        names = Conditioning.__annotations__
        unknown = sorted(options.keys() - known.__annotations__.keys())
        if unknown:
            raise TypeError(f"{unknown[0]!r} is no option here; there are {', '.join(known.__annotations__)}")
        conditioning: Any = {name: options[name] for name in names if name in options}
        given = check_conditioning(self, n, labels, conditioning)
        return given, {name: value for name, value in options.items() if name not in names}

    def _accurate(self, n: int, labels: Any, options: dict[str, Any]) -> tuple[Sampler, Tensor | None]:
        given, options = self._given(n, labels, options)
        if options.get("temperature") is not None:
            raise ValueError(f"temperature = {options['temperature']}: only samples are drawn from the prior; leave it out")
        default = {} if options.keys() & SolverOptions.__annotations__.keys() else {"preset": "reference"}
        return self.sampler(**(default | options)).with_denoiser(given.denoiser()), given.network_label  # type: ignore[typeddict-item]

    @checked
    def save_pretrained(self, folder: str | Path) -> None:
        """Export to `folder`: config.json (valid JSON, also for D = inf) and model.safetensors; `pfgm.load` reads it."""
        checkpoints.write_export(folder, self.config, self.state_dict())


def own_sigma_data(denoiser: nn.Module, value: float | None) -> float:
    """`value`, or if it is None that of the `denoiser`, or .5. ValueError if both are known and differ."""
    own = getattr(denoiser, "sigma_data", 0.5 if value is None else value)
    check_positive("sigma_data", own if value is None else value)
    if value not in (None, own):
        raise ValueError(f"sigma_data = {value}: the denoiser was made with sigma_data = {own}; leave it out")
    return own


def check_batch_size(batch_size: int) -> None:
    """ValueError unless `batch_size` is at least 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1")
