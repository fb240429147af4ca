"""Commands that start from data: encode, decode, interpolate, vary."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfgm.cli.options import ConditionOptions, ModelOptions, parse_seeds, read_condition
from pfgm.cli.outputs import (
    ARRAYS,
    LATENTS,
    SAMPLES,
    STRIP,
    check_output,
    save_arrays,
    write_images,
    write_strip,
)
from pfgm.files.arrays import load_arrays, read_inputs
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.latents import Latent, check_points
from pfgm.sampling.latents import interpolate as interpolate_latents
from pfgm.sampling.sampler import seed_pairs
from pfgm.sampling.solvers import ADAPTIVE, SolverConfig

ACCURATE = SolverConfig(method="dopri5", rtol=1e-5, atol=1e-5)  # for the round trip through encode and decode


def encode(
    checkpoint: Path,
    images: Path,
    *,
    out: Path = Path("latents.npz"),
    under: ConditionOptions,
    solver: SolverConfig,
    model: ModelOptions,
) -> None:
    """Follow the flow from data up to its latents, and report how well they decode again.

    Args:
        checkpoint: A .ckpt file written by training, a run folder, or a folder written by save_pretrained.
        images: An image, a folder of images (in the order of their names), or a .npy, .npz or .pt file of samples.
        out: An .npz or .pt file of latents for decode: t, level, D, whether on the plane, and labels if there are any.
    """
    flow = model.load(checkpoint)
    x = read_inputs(images, flow.shape, flow.summary.value_range, "images").to(flow.device)
    check_output(out, LATENTS, flow.shape, others=[images, under.condition])
    options: Any = {"labels": under.labels, "condition": read_condition(under.condition, flow), "config": _accurate(solver)}
    model.cast(flow)
    latent = flow.encode(x, **options)
    arrays = {"t": latent.t, "level": torch.tensor(latent.level, dtype=torch.float64), "D": torch.tensor(flow.kernel.D)}
    if under.labels is not None:
        arrays["labels"] = torch.as_tensor(under.labels).expand(len(x))
    save_arrays(out, arrays | {"plane": torch.tensor(latent.surface == "plane")})
    print(f"{len(x)} latents -> {out}")
    print(f"round trip: {describe_errors(flow.decode(latent, **options) - x)}, root mean square in the units of the data")


def describe_errors(difference: Tensor) -> str:
    """Return the median and largest root mean square over the samples of [n, ...], in words."""
    rms = difference.double().square().flatten(1).mean(1).sqrt()
    return f"median {rms.median():.2g}, worst {rms.max():.2g}"


def decode(
    checkpoint: Path,
    latents: Path,
    *,
    out: Path = Path("decoded.png"),
    under: ConditionOptions,
    solver: SolverConfig,
    model: ModelOptions,
) -> None:
    """Follow the flow from latents of encode down to data.

    Args:
        checkpoint: The model that encoded.
        latents: The file that encode wrote; its labels are used unless others are given.
        out: A file .png (grid, or scatter plot of 2-D data), .npz or .pt, or a folder of separate PNGs.
    """
    flow = model.load(checkpoint)
    latent, stored = read_latents(latents, flow)
    check_output(out, SAMPLES, flow.shape, others=[latents, under.condition])
    labels: Any = stored if under.labels is None else under.labels
    config, condition = _accurate(solver), read_condition(under.condition, flow)
    model.cast(flow)
    x = flow.decode(latent, labels=labels, condition=condition, config=config)
    if out.suffix in ARRAYS:
        save_arrays(out, {"x": x})
    else:
        write_images(out, x, [f"{i:06d}" for i in range(len(x))], flow.summary.value_range)
    print(f"{len(x)} samples -> {out}")


def interpolate(
    checkpoint: Path,
    *,
    images: list[Path] | None = None,
    seeds: str | None = None,
    points: int = 9,
    out: Path = Path("interpolation.png"),
    under: ConditionOptions,
    solver: SolverConfig,
    model: ModelOptions,
) -> None:
    """Interpolate between images, or between random samples, through the model's latents.

    Args:
        checkpoint: A .ckpt file written by training, a run folder, or a folder written by save_pretrained.
        images: Two or more images, or array files of samples, [a.png,b.png,...]: each to the next makes a row.
        seeds: Instead, the seeds of two or more random samples, such as 0-4 or 3,7.
        points: Columns, both ends included.
        out: A .png strip, or an .npz or .pt file with x [points, rows, ...].
    """
    if (images is None) == (seeds is None):
        raise ValueError(f"images = {images}, seeds = {seeds}: give one of them")
    if images == []:
        raise ValueError("images is empty: give two or more")
    if images is not None and solver.temperature != 1:
        raise ValueError(f"temperature = {solver.temperature}: it is for random samples, not for images; leave it out")
    check_points(points)
    flow = model.load(checkpoint)
    check_output(out, STRIP, flow.shape, others=[under.condition, *(images or [])])
    options: dict[str, Any] = {"labels": under.labels, "condition": read_condition(under.condition, flow)}
    if options["condition"] is not None and len(options["condition"]) != 1:
        raise ValueError(f"condition = {under.condition}: {len(options['condition'])} conditions; give one for all")
    config = _reference(solver)
    model.cast(flow)
    if seeds is not None:
        prior = flow.sampler(temperature=solver.temperature).prior(seed_pairs(seeds=parse_seeds(seeds)))
        latent = Latent(prior.t.float(), prior.level * flow.summary.scale, prior.surface)
    else:
        parts = [read_inputs(path, flow.shape, flow.summary.value_range, "images") for path in images or []]
        latent = flow.encode(torch.cat(parts).to(flow.device), config=config, **options)
    if len(latent.t) < 2:
        raise ValueError(f"images, seeds: {len(latent.t)} given; give two or more")
    first, last = (Latent(t, latent.level, latent.surface) for t in (latent.t[:-1], latent.t[1:]))
    steps = interpolate_latents(first, last, points)
    rows = [flow.decode(step, config=config, **options) for step in steps]
    write_strip(out, torch.stack(rows, 1), flow.summary.value_range)
    print(f"{len(first.t)} interpolations of {points} points -> {out}")


def vary(
    checkpoint: Path,
    images: Path,
    *,
    level: float | list[float],
    n: int | None = None,
    seed: int = 0,
    out: Path = Path("variations.png"),
    under: ConditionOptions,
    solver: SolverConfig,
    model: ModelOptions,
) -> None:
    """Vary images: noise up to a level, and the flow back.

    Args:
        checkpoint: A .ckpt file written by training, a run folder, or a folder written by save_pretrained.
        images: An image, a folder of images, or an array file; each makes a column.
        level: One or more effective noise levels ([0.3,1,3]) in the units of the data: the higher, the freer.
        n: Columns if there is a single image (default: 8).
        seed: Seed of the noise.
        out: A .png strip with the images themselves in the first row and a row for each level, or an .npz or .pt file with
            x [1 + levels, n, ...].
    """
    levels = level if isinstance(level, list) else [level]
    if (n is not None and n < 1) or not levels:
        raise ValueError(f"n = {n}, level = {level}: give at least one column and one level")
    flow = model.load(checkpoint)
    x = read_inputs(images, flow.shape, flow.summary.value_range, "images").to(flow.device)
    if n is not None and len(x) > 1:
        raise ValueError(f"n = {n}: {images} has {len(x)} images, each a column; leave n out")
    x = x if len(x) > 1 else x.expand(8 if n is None else n, *flow.shape)
    for one in levels:
        flow.check_level(one)
    check_output(out, STRIP, flow.shape, others=[images, under.condition])
    options: Any = {"labels": under.labels, "condition": read_condition(under.condition, flow), "config": solver}
    model.cast(flow)
    rows = [flow.vary(x, one, seed=seed, **options).x for one in levels]
    write_strip(out, torch.stack([x, *rows]), flow.summary.value_range)
    print(f"{len(x)} images varied at {len(levels)} levels -> {out}")


def _accurate(solver: SolverConfig) -> SolverConfig:
    """Return `solver`, or ACCURATE if nothing is chosen. Raise ValueError unless its method is adaptive."""
    config = ACCURATE if solver == SolverConfig() else solver
    if config.method is not None and config.method not in ADAPTIVE:
        raise ValueError(f"method = {config.method!r}: give an adaptive method, one of {', '.join(ADAPTIVE)}")
    return config


def _reference(solver: SolverConfig) -> SolverConfig:
    """Return `solver` without its temperature, which is the prior's; the preset "reference" if nothing else is chosen."""
    plain = dataclasses.replace(solver, temperature=1.0)
    return SolverConfig(preset="reference") if plain == SolverConfig() else plain


def read_latents(path: Path, flow: PoissonFlow) -> tuple[Latent, Tensor | None]:
    """Read the latents of a file that encode wrote, and their labels.

    Raises:
        ValueError: If the file holds no latents, or those of another flow.
    """
    arrays = load_arrays(path, ["t", "level", "plane", "D"], ["labels"], name="latents")
    t = arrays["t"].to(flow.device)
    if any(arrays[name].numel() != 1 for name in ("level", "plane", "D")) or not bool(torch.isfinite(t).all()) or not len(t):
        raise ValueError(f"latents = {path}: not what encode writes; encode again")
    if float(arrays["D"]) != flow.kernel.D:
        raise ValueError(f"latents = {path}: they are of D = {float(arrays['D']):g}, this model's D is {flow.kernel.D:g}")
    level, top = float(arrays["level"]), flow.sigma_max * flow.summary.scale
    if not math.isclose(level, top, rel_tol=1e-6):
        raise ValueError(f"latents = {path}: they are of level {level:g}, this model's of {top:g}; give its own")
    return Latent(t, level, "plane" if bool(arrays["plane"]) else "hemisphere"), arrays.get("labels")
