"""Write trajectories of samples from the hemisphere to the data: a picture, an animation or arrays, by the file's ending."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfgm.core.tensors import expand
from pfgm.evaluation import plots
from pfgm.files.atomic import atomic_write
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.sampler import Trajectory

# By ending, for images and for 2-D points: points per trajectory, and how many samples are shown at most.
SIZES = {".png": ((12, 8), (120, 200)), ".gif": ((48, 64), (48, 1000))}


def write_trajectory(
    path: Path,
    flow: PoissonFlow,
    pairs: Sequence[tuple[int, int]],
    x: Tensor,
    settings: dict[str, Any],
) -> None:
    """Compute the trajectories of the first samples again and write them.

    A .png is a strip of images, or shows field lines of 2-D data above all samples. A .gif shows noisy and denoised states side
    by side. An .npz has both for all samples, "x" and "denoised" [points, n, *shape] at "sigma" [points, n], in the user's
    units.

    Args:
        path: File to write.
        flow: Flow that generated the samples.
        pairs: Seed and index of each sample.
        x: Samples that were generated, the ends of the trajectories.
        settings: Keyword arguments of `PoissonFlow.sample` that generated them.
    """
    image = plots.is_image(flow.shape)
    points, most = SIZES[path.suffix][0 if image else 1] if path.suffix in SIZES else (48, len(pairs))
    shown = pairs[:most]
    per_sample = {name: _first(value, len(shown), len(pairs)) for name, value in settings.items()}
    trajectory = flow.trajectory(shown, points, **per_sample)
    denoised, sigma = trajectory.denoised, trajectory.sigma
    if path.suffix == ".npz":
        with atomic_write(path) as temporary:
            np.savez(temporary, x=trajectory.x.cpu(), denoised=denoised.cpu(), sigma=sigma.cpu(), seeds=np.array(shown))
    elif path.suffix == ".gif":
        plots.save_animation(path, rescale(flow, trajectory), denoised, flow.summary.value_range)
    else:
        states = torch.cat([trajectory.x, x[None, : len(shown)].double()])
        if image:
            plots.save_strip(path, states, flow.summary.value_range)
        else:
            r = torch.cat([sigma, torch.zeros_like(sigma[:1])]) * math.sqrt(min(flow.kernel.D, 1e6))
            plots.save_field_lines(path, states, r, x)


def _first(value: Any, n: int, total: int) -> Any:
    """Keep the first `n` of a value that has one entry for each of `total` samples."""
    return value[:n] if isinstance(value, (list, Tensor)) and len(value) == total else value


def rescale(flow: PoissonFlow, trajectory: Trajectory) -> Tensor:
    """Scale noisy states about the mean of the data to the spread of the data at every level, as in angle coordinates."""
    mean = flow.summary.mean.to(trajectory.x) * flow.summary.scale
    level, s = trajectory.level, flow.summary.sigma_data * flow.summary.scale
    return mean + (trajectory.x - mean) * expand(s / (level.square() + s**2).sqrt(), trajectory.x)
