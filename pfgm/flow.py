"""PoissonFlow: a trained model as its users meet it, in their own units.

The flow holds the kernel, the denoiser and what the data was like. Everything below it works in centred model space,
model = user / scale - mean; here, and only here, samples come and go in the user's units.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pfgm import storage
from pfgm.kernel import StudentTKernel, check_positive, per_sample
from pfgm.likelihood import log_prob
from pfgm.progress import DrawProgress
from pfgm.sampler import (
    Latent,
    Sampler,
    SamplerOptions,
    Samples,
    Trajectory,
    check_finite_samples,
    check_levels,
    check_max_calls,
    check_start,
    seed_pairs,
)
from pfgm.spec import build, to_json

PREFIX = "flow."
"""Of the flow's tensors in the state of the training module."""


class PoissonFlow(nn.Module):
    """A denoiser with its kernel, its range of noise and its units.

    `denoiser` works in centred model space for data of event `shape`; `D` is the number of augmented dimensions. `mean`
    [*shape] (default 0) and `scale` take model space to the user's units, user = (model + mean) scale. sigma_min, sigma_max
    and sigma_data are in model units. `value_range` (low, high) of the user's units is what pictures map to black and white;
    `num_classes` is 0 for a model without labels; `start` as in `Sampler`.
    """

    mean: Tensor

    def __init__(
        self,
        denoiser: nn.Module,
        D: float,
        *,
        shape: Sequence[int],
        sigma_min: float,
        sigma_max: float,
        sigma_data: float = 0.5,
        mean: Tensor | None = None,
        scale: float = 1.0,
        value_range: Sequence[float] | None = None,
        num_classes: int = 0,
        start: str = "hemisphere",
    ):
        super().__init__()
        check_levels(sigma_min, sigma_max)
        check_positive("sigma_data", sigma_data)
        check_positive("scale", scale)
        check_start(start)
        self.denoiser, self.kernel = denoiser, StudentTKernel(D)
        self.shape, self.scale, self.num_classes, self.start = tuple(shape), scale, num_classes, start
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.value_range = None if value_range is None else tuple(value_range)
        self.register_buffer("mean", torch.zeros(self.shape) if mean is None else mean)

    @property
    def config(self) -> dict[str, Any]:
        """All but the tensors, as strict JSON data; `from_config` makes the flow again."""
        names = ("shape", "sigma_min", "sigma_max", "sigma_data", "scale", "value_range", "num_classes", "start")
        return to_json({"denoiser": self.denoiser, "D": self.kernel.D} | {name: getattr(self, name) for name in names})

    @classmethod
    def from_config(cls, config: dict[str, Any], trust: Sequence[str] = ()) -> "PoissonFlow":
        """A flow with fresh weights. ValueError for class paths outside this package and outside the modules `trust`."""
        return cls(
            build(config["denoiser"], trust, nn.Module), **{name: value for name, value in config.items() if name != "denoiser"}
        )

    def to_model(self, x: Tensor) -> Tensor:
        """The user's units [B, *shape] -> centred model space."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x has samples of shape {tuple(x.shape[1:])}; this flow's are {self.shape}")
        x = x if x.is_floating_point() else x.float()
        return x / self.scale - self.mean.to(x.dtype)

    def to_user(self, x: Tensor) -> Tensor:
        """Centred model space [B, *shape] -> the user's units."""
        return (x + self.mean.to(x.dtype)) * self.scale

    def sampler(self, **options: Unpack[SamplerOptions]) -> Sampler:
        """The `Sampler` of this flow; options that are None are left out."""
        settings: Any = {"start": self.start} | {name: value for name, value in options.items() if value is not None}
        return Sampler(
            self.denoiser,
            self.kernel,
            shape=self.shape,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            sigma_data=self.sigma_data,
            **settings,
        )

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
        **options: Unpack[SamplerOptions],
    ) -> Samples:
        """`n` samples of `seed` (default 0), or one for each of `seeds`, in the user's units: `Samples` with x [n, *shape].

        Sample i is a function of (seed, i), `seeds` = [k, ...] gives those of (k, 0). `labels` is one class for all or one for
        each. `batch_size` samples are drawn at a time, with a progress bar if `progress`; after `max_calls` of the network a
        batch ends where it is. `options` are those of `Sampler`; without any the preset is "balanced", 10 calls. ValueError
        for arguments out of range, before the first network call; SolverError if solving fails.
        """
        pairs = seed_pairs(n, seed, seeds)
        return self.draw(pairs, labels=labels, batch_size=batch_size, max_calls=max_calls, progress=progress, **options)

    def draw(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        labels: Any = None,
        batch_size: int = 256,
        max_calls: int | None = None,
        progress: bool = False,
        **options: Unpack[SamplerOptions],
    ) -> Samples:
        """One sample for each (seed, index) of `pairs`; the other arguments are those of `sample`."""
        sampler, label = self.sampler(**options), self.check_labels(labels, len(pairs))
        check_batch_size(batch_size)
        check_max_calls(max_calls)
        parts = []
        with DrawProgress(len(pairs), sampler, progress) as bar:
            for i in range(0, max(1, len(pairs)), batch_size):
                batch, part = pairs[i : i + batch_size], None if label is None else label[i : i + batch_size]
                bar.batch(len(batch))
                parts.append(sampler.draw(batch, part, max_calls, bar))
        x = self.to_user(torch.cat([part.x for part in parts]))
        most = {name: max(getattr(part, name) for part in parts) for name in ("calls", "accepted", "rejected")}
        errors = [part.error for part in parts if part.error is not None]
        error = torch.cat(errors) * self.scale if len(errors) == len(parts) else None
        complete = all(part.complete for part in parts)
        return Samples(x, seconds=sum(part.seconds for part in parts), error=error, complete=complete, **most)

    def trajectory(
        self,
        pairs: Sequence[tuple[int, int]],
        points: int,
        *,
        labels: Any = None,
        batch_size: int = 256,
        **options: Unpack[SamplerOptions],
    ) -> Trajectory:
        """The way of the samples (seed, index) of `pairs` in the user's units, see `Sampler.trajectory`."""
        sampler, label = self.sampler(**options), self.check_labels(labels, len(pairs))
        check_batch_size(batch_size)
        ways = []
        for i in range(0, max(1, len(pairs)), batch_size):
            part = None if label is None else label[i : i + batch_size]
            ways.append(sampler.trajectory(pairs[i : i + batch_size], points, part))
        x, denoised = (self.to_user(torch.cat([getattr(way, name) for way in ways], 1)) for name in ("x", "denoised"))
        return Trajectory(x, denoised, torch.cat([way.sigma for way in ways], 1) * self.scale, ways[0].level * self.scale)

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Tensor:
        """E[y | x, sigma] for `x` [B, *shape] and `sigma` (float or [B]) > 0 in the user's units: like x.

        ValueError if x or sigma is not finite, sigma not positive, or the labels do not fit.
        """
        level, model = per_sample(sigma, x), self.to_model(x)
        if not bool(((level > 0) & torch.isfinite(level)).all()):
            raise ValueError(f"sigma = {sigma} must be positive and finite, in the units of x")
        check_finite_samples("x", model)
        return self.to_user(self.denoiser(model, level / self.scale, self.check_labels(label, len(x))))

    def encode(self, x: Tensor, *, labels: Any = None, **options: Any) -> Latent:
        """The latent on the plane sigma_max that flows to `x` [B, *shape] (user's units, read at sigma_min).

        `options` are those of `Sampler` (default: preset "reference"); tolerances of 1e-5 make the round trip through `decode`
        more accurate still.
        """
        model = self.to_model(x)
        check_finite_samples("x", model)
        latent = self._accurate(options).encode(model, self.check_labels(labels, len(x)))
        return dataclasses.replace(latent, level=latent.level * self.scale)

    def decode(self, latent: Latent, *, labels: Any = None, **options: Any) -> Tensor:
        """Follow the flow from `latent`, on the surface that it names, to sigma_min; without the last denoising that
        sampling does. [B, *shape] in the user's units."""
        if latent.t.shape[1:] != self.shape or not latent.t.is_floating_point():
            raise ValueError(
                f"latent.t has shape {tuple(latent.t.shape)} and type {latent.t.dtype}; "
                f"this flow's latents are floating-point and of shape (n, *{self.shape})"
            )
        check_finite_samples("latent.t", latent.t)
        model = dataclasses.replace(latent, level=latent.level / self.scale)
        return self.to_user(self._accurate(options).decode(model, self.check_labels(labels, len(latent.t))))

    def log_prob(self, x: Tensor, *, labels: Any = None, **options: Any) -> Tensor:
        """The log-density of `x` [B, *shape], blurred by the noise of sigma_min, in nats in the user's units: [B] in float64.

        `options` are those of `pfgm.likelihood.estimate_log_prob`, which also tells the error of the estimate: exact, probes,
        seed, method, rtol, atol, differentiable. ValueError for x that is not finite or of another shape.
        """
        model = self.to_model(x)
        check_finite_samples("x", model)
        levels = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "sigma_data": self.sigma_data}
        label = self.check_labels(labels, len(x))
        value = log_prob(self.denoiser, self.kernel, model, label=label, **levels, **options)
        return value - math.prod(self.shape) * math.log(self.scale)

    def _accurate(self, options: dict[str, Any]) -> Sampler:
        return self.sampler(**({"preset": "reference"} if not options.keys() - {"start"} else {}) | options)

    def check_labels(self, labels: int | Sequence[int] | Tensor | None, n: int) -> Tensor | None:
        """`labels` as [n] on the flow's device. ValueError if out of range, of the wrong number, missing, or given in vain."""
        if labels is None:
            if self.num_classes:
                raise ValueError(f"labels = None: this model is class-conditional; give labels from 0..{self.num_classes - 1}")
            return None
        if not self.num_classes:
            raise ValueError(f"labels = {labels}: this model was trained without labels; leave labels out")
        label = torch.as_tensor(labels, device=self.mean.device)
        if label.is_floating_point() or (label.numel() and not bool(((label >= 0) & (label < self.num_classes)).all())):
            raise ValueError(f"labels = {labels}: this model's labels are the integers 0..{self.num_classes - 1}")
        if label.ndim > 1 or (label.ndim == 1 and len(label) != n):
            raise ValueError(f"labels has shape {tuple(label.shape)}; give one label, or one for each of the {n} samples")
        return label.long().expand(n)

    def save_pretrained(self, folder: str | Path) -> None:
        """Export to `folder`: config.json (valid JSON, also for D = inf) and model.safetensors; `pfgm.load` reads it."""
        storage.write_export(folder, self.config, self.state_dict())


def check_batch_size(batch_size: int) -> None:
    """ValueError unless `batch_size` is at least 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1")


def load(path: str | Path, device: str | torch.device = "cpu", ema: bool = True, trust: Sequence[str] = ()) -> PoissonFlow:
    """The flow of a checkpoint (`.ckpt`) or of a folder written by `save_pretrained`, in eval mode on `device`.

    `ema` takes the averaged weights of a checkpoint, otherwise the raw ones. No code of the file is run; networks from other
    packages are made only if their module is in `trust`. FileNotFoundError if there is nothing, CheckpointError if it is
    damaged, altered, of another format, or if weights and network do not match; ValueError for a class path not trusted.
    """
    if Path(path).is_dir():
        if not ema:
            raise ValueError(f"ema = False: the export {path} holds the averaged weights only; give a .ckpt file")
        config, state = storage.read_export(path)
    else:
        checkpoint = storage.read_checkpoint(path)
        config = checkpoint[storage.KEY]["flow"]
        weights = checkpoint["state_dict"] if ema else checkpoint.get("current_model_state", checkpoint["state_dict"])
        state = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    try:
        flow = PoissonFlow.from_config(config, trust)
        flow.load_state_dict(state)
    except RuntimeError as error:
        raise storage.CheckpointError(
            f"{path}: the weights do not match the network that the file describes: {error}"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise storage.CheckpointError(f"{path}: the file's description of the flow is incomplete ({error})") from error
    return flow.to(device).eval()
