"""Commands that start from data: encode, decode, interpolate, vary."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfgm.cli.arguments import check_device, parse_seeds, read_condition
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
from pfgm.flow.loading import load
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.latents import Latent, check_points
from pfgm.sampling.latents import interpolate as between
from pfgm.sampling.sampler import seed_pairs
from pfgm.sampling.solvers import ADAPTIVE


def encode(
    checkpoint: Path,
    images: Path,
    *,
    out: Path = Path("latents.npz"),
    labels: int | list[int] | None = None,
    condition: Path | None = None,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    device: str | None = None,
    ema: bool = True,
    trust: list[str] = [],  # noqa: B006 (read only; jsonargparse shows it as the default)
) -> None:
    """Follow the flow from data up to its latents, and say how well they decode again.

    Args:
        checkpoint: a .ckpt written by train.py, or a folder written by save_pretrained.
        images: an image, a folder of images (in the order of their names), or a .npy, .npz or .pt file of samples.
        out: an .npz or .pt file of latents for decode: t, level, D, whether on the plane, and labels if there are any.
        labels: one class for all, or one for each ([1,7,...]), for class-conditional models.
        condition: a file of the conditions, for models that take them; see the draw command.
        method: an adaptive solver: dopri5, dopri8, bosh3 or adaptive_heun.
        rtol: its relative tolerance.
        atol: its absolute tolerance.
        device: cpu, cuda, cuda:1, ... (default: cuda if there is one).
        ema: use the averaged weights rather than the raw ones.
        trust: modules outside pfgm whose networks the checkpoint may name.
    """
    flow = load(checkpoint, check_device(device), ema, trust)
    x = read_inputs(images, flow.shape, flow.value_range, "images").to(flow.mean.device)
    check_output(out, LATENTS, flow.shape, others=[images, condition])
    check_method(method)
    options: dict[str, Any] = {"labels": labels, "condition": read_condition(condition, flow), "method": method}
    options |= {"rtol": rtol, "atol": atol}
    latent = flow.encode(x, **options)
    arrays = {"t": latent.t, "level": torch.tensor(latent.level, dtype=torch.float64), "D": torch.tensor(flow.kernel.D)}
    if labels is not None:
        arrays["labels"] = torch.as_tensor(labels).expand(len(x))
    save_arrays(out, arrays | {"plane": torch.tensor(latent.surface == "plane")})
    print(f"{len(x)} latents -> {out}")
    print(f"round trip: {errors(flow.decode(latent, **options) - x)}, root mean square in the units of the data")


def errors(difference: Tensor) -> str:
    """Median and largest root mean square over the samples of [n, ...]."""
    rms = difference.double().square().flatten(1).mean(1).sqrt()
    return f"median {rms.median():.2g}, worst {rms.max():.2g}"


def decode(
    checkpoint: Path,
    latents: Path,
    *,
    out: Path = Path("decoded.png"),
    labels: int | list[int] | None = None,
    condition: Path | None = None,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    device: str | None = None,
    ema: bool = True,
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Follow the flow from latents of encode down to data.

    Args:
        checkpoint: the one that encoded.
        latents: what encode wrote.
        out: a file .png (grid, or scatter plot of 2-D data), .npz or .pt, or a folder of separate PNGs.
        labels: other classes than those that the latents were encoded with.
        condition: a file of the conditions, for models that take them.
        method: an adaptive solver: dopri5, dopri8, bosh3 or adaptive_heun.
        rtol: its relative tolerance.
        atol: its absolute tolerance.
        device: cpu, cuda, cuda:1, ... (default: cuda if there is one).
        ema: use the averaged weights rather than the raw ones.
        trust: modules outside pfgm whose networks the checkpoint may name.
    """
    flow = load(checkpoint, check_device(device), ema, trust)
    latent, stored = read_latents(latents, flow)
    check_output(out, SAMPLES, flow.shape, others=[latents, condition])
    check_method(method)
    given: Any = stored if labels is None else labels
    c = read_condition(condition, flow)
    x = flow.decode(latent, labels=given, condition=c, method=method, rtol=rtol, atol=atol)
    if out.suffix in ARRAYS:
        save_arrays(out, {"x": x})
    else:
        write_images(out, x, [f"{i:06d}" for i in range(len(x))], flow.value_range)
    print(f"{len(x)} samples -> {out}")


def interpolate(
    checkpoint: Path,
    *,
    images: list[Path] | None = None,
    seeds: str | None = None,
    points: int = 9,
    out: Path = Path("interpolation.png"),
    labels: int | None = None,
    condition: Path | None = None,
    preset: str = "reference",
    temperature: float = 1.0,
    device: str | None = None,
    ema: bool = True,
    trust: list[str] = [],  # noqa: B006
) -> None:
    """The ways between images, or between random samples, through the model's latents.

    Args:
        checkpoint: a .ckpt written by train.py, or a folder written by save_pretrained.
        images: two or more images, or array files of samples, [a.png,b.png,...]: each to the next makes a row.
        seeds: instead, the seeds of two or more random samples, such as 0-4 or 3,7.
        points: columns, both ends included.
        out: a .png strip, or an .npz or .pt file with x [points, rows, ...].
        labels: the class, for class-conditional models.
        condition: a file of one condition, for models that take them.
        preset: how to solve; see the draw command.
        temperature: of random samples; see the draw command.
        device: cpu, cuda, cuda:1, ... (default: cuda if there is one).
        ema: use the averaged weights rather than the raw ones.
        trust: modules outside pfgm whose networks the checkpoint may name.
    """
    if (images is None) == (seeds is None):
        raise ValueError(f"images = {images}, seeds = {seeds}: give one of them")
    if images == []:
        raise ValueError("images is empty: give two or more")
    if images is not None and temperature != 1:
        raise ValueError(f"temperature = {temperature}: it is for random samples, not for images; leave it out")
    check_points(points)
    flow = load(checkpoint, check_device(device), ema, trust)
    check_output(out, STRIP, flow.shape, others=[condition, *(images or [])])
    c, rows = read_condition(condition, flow), []
    if seeds is not None:
        pairs = seed_pairs(seeds=parse_seeds(seeds))
        prior = flow.sampler(temperature=temperature).prior(pairs)
        latent = Latent(prior.t.float(), prior.level * flow.scale, prior.surface)
    else:
        x = torch.cat([read_inputs(path, flow.shape, flow.value_range, "images") for path in images or []]).to(flow.mean.device)
        latent = flow.encode(x, labels=labels, condition=c, preset=preset)
    if c is not None and len(c) != 1:
        raise ValueError(f"condition = {condition}: {len(c)} conditions; give one for all")
    if len(latent.t) < 2:
        raise ValueError(f"images, seeds: {len(latent.t)} given; give two or more")
    first, last = (Latent(t, latent.level, latent.surface) for t in (latent.t[:-1], latent.t[1:]))
    for step in between(first, last, points):
        rows.append(flow.decode(step, labels=labels, condition=c, preset=preset))
    write_strip(out, torch.stack(rows, 1), flow.value_range)
    print(f"{len(first.t)} ways of {points} points -> {out}")


def vary(
    checkpoint: Path,
    images: Path,
    *,
    level: float | list[float],
    n: int | None = None,
    seed: int = 0,
    out: Path = Path("variations.png"),
    labels: int | list[int] | None = None,
    condition: Path | None = None,
    preset: str = "balanced",
    device: str | None = None,
    ema: bool = True,
    trust: list[str] = [],  # noqa: B006
) -> None:
    """Variations of images: noise up to a level, and the flow back.

    Args:
        checkpoint: a .ckpt written by train.py, or a folder written by save_pretrained.
        images: an image, a folder of images, or an array file; each makes a column.
        level: one or more effective noise levels ([0.3,1,3]) in the units of the data: the higher, the freer.
        n: columns if there is a single image (default 8).
        seed: of the noise.
        out: a .png strip with the images themselves in the first row and a row for each level, or an .npz or .pt file with
            x [1 + levels, n, ...].
        labels: one class for all, or one for each ([1,7,...]), for class-conditional models.
        condition: a file of the conditions, for models that take them.
        preset: how to solve; see the draw command.
        device: cpu, cuda, cuda:1, ... (default: cuda if there is one).
        ema: use the averaged weights rather than the raw ones.
        trust: modules outside pfgm whose networks the checkpoint may name.
    """
    levels = level if isinstance(level, list) else [level]
    if (n is not None and n < 1) or not levels:
        raise ValueError(f"n = {n}, level = {level}: give at least one column and one level")
    flow = load(checkpoint, check_device(device), ema, trust)
    x = read_inputs(images, flow.shape, flow.value_range, "images").to(flow.mean.device)
    if n is not None and len(x) > 1:
        raise ValueError(f"n = {n}: {images} has {len(x)} images, each a column; leave n out")
    x = x if len(x) > 1 else x.expand(8 if n is None else n, *flow.shape)
    for one in levels:
        flow.check_level(one)
    check_output(out, STRIP, flow.shape, others=[images, condition])
    c = read_condition(condition, flow)
    rows = [flow.vary(x, one, seed=seed, labels=labels, condition=c, preset=preset).x for one in levels]
    write_strip(out, torch.stack([x, *rows]), flow.value_range)
    print(f"{len(x)} images varied at {len(levels)} levels -> {out}")


def check_method(method: str) -> None:
    """ValueError unless `method` is adaptive."""
    if method not in ADAPTIVE:
        raise ValueError(f"method = {method!r}: give an adaptive method, one of {', '.join(ADAPTIVE)}")


def read_latents(path: Path, flow: PoissonFlow) -> tuple[Latent, Tensor | None]:
    """The latent of a file that encode wrote, and its labels. ValueError or OSError if it is none, or of another flow."""
    arrays = load_arrays(path, ["t", "level", "plane", "D"], ["labels"], name="latents")
    t = arrays["t"].to(flow.mean.device)
    if any(arrays[name].numel() != 1 for name in ("level", "plane", "D")) or not bool(torch.isfinite(t).all()) or not len(t):
        raise ValueError(f"latents = {path}: not what encode writes; encode again")
    if float(arrays["D"]) != flow.kernel.D:
        raise ValueError(f"latents = {path}: they are of D = {float(arrays['D']):g}, this model's D is {flow.kernel.D:g}")
    level, top = float(arrays["level"]), flow.sigma_max * flow.scale
    if not math.isclose(level, top, rel_tol=1e-6):
        raise ValueError(f"latents = {path}: they are of level {level:g}, this model's of {top:g}; give its own")
    return Latent(t, level, "plane" if bool(arrays["plane"]) else "hemisphere"), arrays.get("labels")
