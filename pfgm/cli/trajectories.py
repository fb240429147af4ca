"""The way of samples from the hemisphere down to the data, on disk: a picture, an animation or arrays, by the file's ending."""

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

ENDINGS = (".png", ".gif", ".npz")
POINTS = {"strip": 12, "lines": 120, "film": 48, "cloud": 48, "arrays": 48}
MOST = {"strip": 8, "lines": 200, "film": 64, "cloud": 1000}
"""Points of the way, and how many samples are shown at most, by what is made of images and points."""


def check_trajectory(path: Path, out: Path, shape: Sequence[int]) -> None:
    """ValueError unless `path` is a .png, .gif or .npz of its own, for samples of a `shape` whose way can be shown so."""
    if path.suffix not in ENDINGS:
        raise ValueError(f"trajectory = {path}: give a name that ends in {', '.join(ENDINGS)}")
    if path.suffix != ".npz" and not (plots.is_image(shape) or tuple(shape) == (2,)):
        raise ValueError(
            f"trajectory = {path}: only images (1 or 3, H, W) and points (2,) can be shown, not {tuple(shape)}; use .npz"
        )
    if path.is_dir():
        raise ValueError(f"trajectory = {path} is a folder; choose another name")
    if path.absolute() == out.absolute():
        raise ValueError(f"trajectory = {path} is also out; give two names")


def write_trajectory(
    path: Path,
    flow: PoissonFlow,
    pairs: Sequence[tuple[int, int]],
    x: Tensor,
    settings: dict[str, Any],
) -> None:
    """The way of the first (seed, index) `pairs`, drawn again with `options` under what is `given`; `samples` are their ends.

    .png: a strip of 8 images, or field lines of 2-D data above all samples; .gif: noisy and denoised states, side
    by side; .npz: both for all samples, "x" and "denoised" [points, n, *shape], at "sigma" [points, n], in the user's units.
    """
    image, film, cloud = plots.is_image(flow.shape), ("strip", "film"), ("lines", "cloud")
    kind = "arrays" if path.suffix == ".npz" else (film if image else cloud)[path.suffix == ".gif"]
    few = pairs[: MOST.get(kind, len(pairs))]
    own = {name: _first(value, len(few), len(pairs)) for name, value in settings.items()}
    way = flow.trajectory(few, POINTS[kind], **own)
    if kind == "arrays":
        with atomic_write(path) as temporary:
            np.savez(temporary, x=way.x.cpu(), denoised=way.denoised.cpu(), sigma=way.sigma.cpu(), seeds=np.array(few))
    elif path.suffix == ".gif":
        plots.save_animation(path, _rescaled(flow, way), way.denoised, flow.summary.value_range)
    else:
        states = torch.cat([way.x, x[None, : len(few)].double()])
        if kind == "strip":
            plots.save_strip(path, states, flow.summary.value_range)
        else:
            r = torch.cat([way.sigma, torch.zeros_like(way.sigma[:1])]) * math.sqrt(min(flow.kernel.D, 1e6))
            plots.save_field_lines(path, states, r, x)


def _first(value: Any, few: int, all_: int) -> Any:
    """What belongs to the first samples, if there is one for each."""
    return value[:few] if isinstance(value, (list, Tensor)) and len(value) == all_ else value


def _rescaled(flow: PoissonFlow, way: Trajectory) -> Tensor:
    """The noisy states about the data's mean, with the spread of the data at every level: in angle coordinates."""
    summary = flow.summary
    mean = summary.mean.to(way.x) * summary.scale
    level, s = way.level, summary.sigma_data * summary.scale
    return mean + (way.x - mean) * expand(s / (level.square() + s**2).sqrt(), way.x)
