"""PoissonFlow: a denoiser joined with what is known of its data.

Here, and only here, samples are in the user's units. Everything below works in centred model space.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core.arguments import Array, checked
from pfgm.core.configurable import build, to_json
from pfgm.core.tensors import check_finite_samples, check_levels, per_sample
from pfgm.flow import checkpoints
from pfgm.flow.conditioning import check_batch_size, check_conditioning, check_options
from pfgm.sampling.guidance import cost
from pfgm.sampling.latents import Latent, check_points, interpolate
from pfgm.sampling.likelihood import LogProb, estimate_log_prob
from pfgm.sampling.progress import SamplingProgress
from pfgm.sampling.sampler import Sampler, Samples, Trajectory, check_max_calls, seed_pairs
from pfgm.sampling.solvers import SOLVER_FIELDS, SolverConfig, Start
from pfgm.theory.data_summary import DataSummary, level_spacing
from pfgm.theory.kernel import StudentTKernel


class PoissonFlow(nn.Module):
    """Sample, encode, edit and score with a denoiser, in the user's units.

    Samples are [B, *shape], and `labels` one class for all samples, or one for each. The options of methods that solve the
    flow's ODE are the fields of `SolverConfig`, or a `config`, and the entries of `pfgm.flow.conditioning.Conditioning`
    (condition, guidance, measurement, ...). encode, decode and interpolate use the preset "reference" by default; tolerances of
    1e-5 make the round trip more accurate still.

    Args:
        denoiser: A denoiser in centred model space; its attribute `kernel` holds D.
        summary: What is known of the data.
        sigma_min: Lowest noise level, in model units.
        sigma_max: Highest noise level, in model units.
        unconditional: Whether a model with classes also draws without labels.
        start: Surface where samples start by default, see `Sampler`.

    Raises:
        ValueError: If the denoiser has no kernel or another sigma_data than the summary, or if levels are out of range.
    """

    @checked
    def __init__(
        self,
        denoiser: nn.Module,
        summary: DataSummary,
        *,
        sigma_min: float,
        sigma_max: float,
        unconditional: bool = False,
        start: Start = "hemisphere",
    ):
        super().__init__()
        check_levels(sigma_min, sigma_max)
        used = getattr(denoiser, "sigma_data", summary.sigma_data)
        if used != summary.sigma_data:
            raise ValueError(f"sigma_data = {summary.sigma_data}: the denoiser was made with sigma_data = {used}")
        self.denoiser, self.summary = denoiser, summary
        self.shape, self.class_names = summary.shape, summary.class_names
        self.sigma_min, self.sigma_max, self.unconditional, self.start = sigma_min, sigma_max, unconditional, start
        self.kernel  # noqa: B018 (a denoiser without one is refused now, not at the first sample)

    @property
    def kernel(self) -> StudentTKernel:
        """The perturbation kernel of the denoiser, which is the only place that knows D."""
        kernel = getattr(self.denoiser, "kernel", None)
        if not isinstance(kernel, StudentTKernel):
            raise ValueError(f"denoiser = {type(self.denoiser).__name__}: it has no StudentTKernel. Set its attribute kernel.")
        return kernel

    @property
    def device(self) -> torch.device:
        """The device of the flow."""
        return self.summary.mean.device

    @property
    def config(self) -> dict[str, Any]:
        """The description of the flow without its tensors, as strict JSON data; `from_config` makes the flow again."""
        names = ("denoiser", "summary", "sigma_min", "sigma_max", "unconditional", "start")
        return to_json({name: getattr(self, name) for name in names})

    @classmethod
    def from_config(cls, config: dict[str, Any], trust: Sequence[str] = ()) -> "PoissonFlow":
        """Make a flow with fresh weights. Raise ValueError for classes outside this package and the modules `trust`."""
        parts = {"denoiser": build(config["denoiser"], trust, nn.Module), "summary": build(config["summary"], kind=DataSummary)}
        return cls(**(config | parts))

    def to_model(self, x: Array) -> Tensor:
        """Convert samples from the user's units to centred model space."""
        x = torch.as_tensor(x)
        if x.shape[1:] != self.shape or x.is_complex():
            raise ValueError(f"x has samples of shape {tuple(x.shape[1:])} of {x.dtype}; this flow's are real, {self.shape}")
        return self.summary.to_model(x if x.is_floating_point() else x.float())

    def _finite_in_model(self, x: Array) -> Tensor:
        """Convert samples to model space. Raise ValueError if there are none, or any is not finite."""
        model = self.to_model(x)
        check_finite_samples("x", model)
        return model

    def sampler(self, config: SolverConfig | None = None, sigma_max: float | None = None, **fields: Any) -> Sampler:
        """Return the `Sampler` of this flow, in model space, for a `config` or its fields."""
        config = SolverConfig.resolve(config, fields)
        return Sampler(
            self.denoiser,
            self.kernel,
            shape=self.shape,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max if sigma_max is None else sigma_max,
            sigma_data=self.summary.sigma_data,
            config=dataclasses.replace(config, start=config.start or self.start),
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
        **options: Any,
    ) -> Samples:
        """Draw samples.

        Args:
            n: Number of samples; sample i is a function of (seed, i).
            seed: Seed of all n samples; 0 by default.
            seeds: Instead of n and seed, one sample for each; `[k]` is sample 0 of seed k.
            labels: One class for all samples, or one for each.
            batch_size: Samples drawn at a time.
            max_calls: Network calls after which a batch ends where it is.
            progress: Whether to show a progress bar.
            **options: Solver (by default the preset "balanced", 10 calls) and conditions, see `PoissonFlow`.

        Returns:
            Samples x [n, *shape] in the user's units, with their costs.

        Raises:
            ValueError: If arguments are out of range, before the first network call.
            SolverError: If solving fails.
        """
        pairs = seed_pairs(n, seed, seeds)
        settings: Any = {"labels": labels, "batch_size": batch_size, "max_calls": max_calls, "progress": progress}
        return Samples.joined([samples for _, samples in self.sample_batches(pairs, **settings, **options)])

    @checked
    def vary(
        self, x: Array, level: float, *, seed: int = 0, labels: Any = None, batch_size: int = 256, **options: Any
    ) -> Samples:
        """Draw a variation of each sample: noise up to an effective level, and the flow back (arXiv 2108.01073).

        Near sigma_min a sample stays what it is, far above sigma_data a new one is drawn. For other arguments see `sample`.

        Args:
            x: Samples [n, *shape].
            level: Effective noise level in the user's units.
            seed: Seed; variation i is a function of (seed, i).
        """
        source = self._finite_in_model(x)
        self.check_level(level)
        pairs, sigma_max = seed_pairs(len(x), seed), level / self.summary.scale
        settings: Any = {"labels": labels, "batch_size": batch_size, "source": source, "sigma_max": sigma_max}
        return Samples.joined([samples for _, samples in self.sample_batches(pairs, **settings, **options)])

    def sample_batches(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        labels: Any = None,
        batch_size: int = 256,
        max_calls: int | None = None,
        progress: bool = False,
        source: Tensor | None = None,
        sigma_max: float | None = None,
        only: Iterable[int] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Samples]]:
        """Draw batch by batch, and yield each with its number. For other arguments see `sample`.

        Args:
            pairs: (seed, index) of each sample.
            source: Centres of the noise [n, *shape] in model space; 0 by default.
            sigma_max: Where to start, in model units; the flow's own sigma_max by default.
            only: Numbers of the batches to draw; all by default.
        """
        bound, config = check_options(self, len(pairs), labels, options)
        sampler, batches = self.sampler(config, sigma_max), _batches(len(pairs), batch_size)
        check_max_calls(max_calls, cost(bound.denoiser()))
        chosen = {k: batches[k] for k in (range(len(batches)) if only is None else only)}
        with SamplingProgress(sum(len(pairs[rows]) for rows in chosen.values()), sampler, progress) as bar:
            for number, rows in chosen.items():
                bar.batch(len(pairs[rows]))
                one = sampler.with_denoiser(bound[rows].denoiser())
                centres = None if source is None else source[rows]
                samples = one.draw(pairs[rows], max_calls=max_calls, on_call=bar, source=centres)
                error = None if samples.error is None else samples.error * self.summary.scale
                yield number, dataclasses.replace(samples, x=self.summary.to_user(samples.x), error=error)

    @checked
    def trajectory(
        self, pairs: Sequence[tuple[int, int]], points: int, *, labels: Any = None, batch_size: int = 256, **options: Any
    ) -> Trajectory:
        """Return the states of the samples (seed, index) of `pairs` at `points` times; see `Sampler.trajectory`."""
        bound, config = check_options(self, len(pairs), labels, options)
        sampler, batches = self.sampler(config), _batches(len(pairs), batch_size)
        parts = [sampler.with_denoiser(bound[rows].denoiser()).trajectory(pairs[rows], points) for rows in batches]
        x, denoised, sigma = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("x", "denoised", "sigma"))
        to_user, scale = self.summary.to_user, self.summary.scale
        return Trajectory(to_user(x), to_user(denoised), sigma * scale, parts[0].level * scale)

    @checked
    @torch.no_grad()
    def denoise(self, x: Array, sigma: float | Tensor, label: Any = None, **options: Any) -> Tensor:
        """Return E[y | x, sigma], like `x`.

        Args:
            x: Noisy samples.
            sigma: Noise level > 0 in the user's units, a float or [B].
            label: One class for all samples, or one for each.
            **options: Entries of `Conditioning`.

        Raises:
            ValueError: If x or sigma is not finite, sigma not positive, or labels or conditions do not fit.
        """
        model = self._finite_in_model(x)
        level, bound = per_sample(sigma, model), check_conditioning(self, len(model), label, options)
        if not bool(((level > 0) & torch.isfinite(level)).all()):
            raise ValueError(f"sigma = {sigma} must be positive and finite, in the units of x")
        return self.summary.to_user(bound.denoiser()(model, level / self.summary.scale))

    @checked
    def encode(self, x: Array, *, labels: Any = None, **options: Any) -> Latent:
        """Return the latents on the plane sigma_max that flow to `x`, read at sigma_min."""
        model = self._finite_in_model(x)
        latent = self._map_sampler(len(x), labels, options).encode(model)
        return dataclasses.replace(latent, level=latent.level * self.summary.scale)

    @checked
    def decode(self, latent: Latent, *, labels: Any = None, **options: Any) -> Tensor:
        """Follow the flow from `latent` to sigma_min, without the final denoising of samples: decode inverts encode."""
        t = latent.t
        if t.shape[1:] != self.shape or not t.is_floating_point():
            raise ValueError(f"latent.t has shape {tuple(t.shape)} of {t.dtype}; this flow's are floats, (n, *{self.shape})")
        check_finite_samples("latent.t", t)
        sampler = self._map_sampler(len(t), labels, options)
        return self.summary.to_user(sampler.decode(dataclasses.replace(latent, level=latent.level / self.summary.scale)))

    @checked
    def interpolate(self, a: Array, b: Array, points: int, *, labels: Any = None, **options: Any) -> Tensor:
        """Interpolate from `a` to `b` by `pfgm.sampling.interpolate` of their latents: [points, B, *shape], ends included."""
        check_points(points)
        if len(a) != len(b):
            raise ValueError(f"a, b: {len(a)} and {len(b)} samples. Pass as many of both.")
        first, last = (self.encode(x, labels=labels, **options) for x in (a, b))
        return torch.stack([self.decode(latent, labels=labels, **options) for latent in interpolate(first, last, points)])

    def log_prob(self, x: Array, *, labels: Any = None, condition: Any = None, **options: Any) -> Tensor:
        """Return the log-density of `x`, blurred by the noise of sigma_min: [B] in nats in the user's units.

        The options are those of `pfgm.sampling.estimate_log_prob`: exact, probes, seed, method, rtol, atol, differentiable.
        """
        return self.estimate_log_prob(x, labels=labels, condition=condition, **options).value

    @checked
    def estimate_log_prob(self, x: Array, *, labels: Any = None, condition: Any = None, **options: Any) -> LogProb:
        """Return `log_prob` with the standard error of each estimate and the network calls."""
        model, summary = self._finite_in_model(x), self.summary
        bound = check_conditioning(self, len(x), labels, {"condition": condition})
        levels: Any = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "sigma_data": summary.sigma_data}
        out = estimate_log_prob(bound.denoiser(), self.kernel, model, **levels, **options)
        return dataclasses.replace(out, value=out.value - math.prod(self.shape) * math.log(summary.scale))

    def bits_per_dim(self, x: Tensor, *, labels: Any = None, seed: int = 0, **options: Any) -> Tensor:
        """Estimate -log2 P(x)/N of discrete samples: [B], unbiased estimates of an upper bound.

        The bound is the mean over the noise that fills the gaps between levels (variational dequantisation with uniform noise,
        arXiv 1511.01844), drawn from (seed, i). The options are those of `log_prob`.

        Raises:
            ValueError: For a model of continuous data, and for one trained without that noise, whose density is no likelihood.
        """
        self.summary.check_discrete()
        self.to_model(x)  # its checks
        N, spacing = math.prod(self.shape), level_spacing(self.summary.value_range, self.summary.levels)
        filled = self.summary.fill_gaps(torch.as_tensor(x), seed)
        value = self.log_prob(filled, labels=labels, seed=seed, **options)
        return -(value / N + math.log(spacing)) / math.log(2)

    def check_level(self, level: float) -> None:
        """Raise ValueError unless the flow has the noise `level`, in the user's units."""
        low, high = self.sigma_min * self.summary.scale, self.sigma_max * self.summary.scale
        if not low < level <= high:
            raise ValueError(f"level = {level} must lie above {low:g}, up to {high:g}, the model's range in the data's units")

    @checked
    def save_pretrained(self, folder: str | Path) -> None:
        """Export the flow to `folder`: config.json (valid JSON, also for D = inf) and model.safetensors."""
        checkpoints.write_export(folder, self.config, self.state_dict())

    def _map_sampler(self, n: int, labels: Any, options: dict[str, Any]) -> Sampler:
        """Return the sampler of a map between planes, accurate unless a solver is chosen."""
        bound, config = check_options(self, n, labels, options)
        if config.temperature != 1:
            raise ValueError(f"temperature = {config.temperature}: only samples are drawn from the prior. Leave it out.")
        if all(getattr(config, name) is None for name in SOLVER_FIELDS):
            config = dataclasses.replace(config, preset="reference")
        return self.sampler(config).with_denoiser(bound.denoiser())


def _batches(n: int, batch_size: int) -> list[slice]:
    """Split the rows of `n` samples; no samples are one empty batch."""
    check_batch_size(batch_size)
    return [slice(i, i + batch_size) for i in range(0, max(1, n), batch_size)]
