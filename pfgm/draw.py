"""Drawing to disk: samples of a flow as pictures or arrays."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pfgm import plot
from pfgm.conditioning import check_labels
from pfgm.flow import PoissonFlow, check_batch_size, load
from pfgm.ode import SolverError
from pfgm.optimal import grid_file, optimize_grid, store_grid, stored_grid
from pfgm.sampler import Samples, check_max_calls, seed_pairs
from pfgm.storage import replacing
from pfgm.trajectory import check_trajectory, write_trajectory

ARRAYS = (".npz", ".pt")


def parse_seeds(text: str) -> list[int]:
    """ "1,2,5-10" as a list of seeds. ValueError for anything else."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            seeds += range(int(first), int(last) + 1) if dash else [int(first)]
        if not seeds:
            raise ValueError
    except ValueError:
        raise ValueError(f"seeds = {text!r}: give numbers and rising ranges such as 0-63 or 1,2,5-10, none negative") from None
    return seeds


def check_output(out: Path, shape: Sequence[int]) -> None:
    """Make the folder of `out` and make sure that it can be written and can hold samples of `shape`.

    `out` is a file .png (grid or scatter plot), .npz or .pt, or a folder of separate PNGs. ValueError or OSError otherwise.
    """
    if out.suffix and out.suffix not in (".png", *ARRAYS):
        raise ValueError(
            f"out = {out}: the ending {out.suffix!r} is unknown; use .png, .npz, .pt, or a folder for separate PNGs"
        )
    points = tuple(shape) == (2,) and out.suffix
    if out.suffix not in ARRAYS and not (plot.is_image(shape) or points):
        raise ValueError(f"out = {out}: samples of shape {tuple(shape)} are no images; use a file ending in .npz or .pt")
    if (out.suffix and out.is_dir()) or (not out.suffix and out.is_file()):
        raise ValueError(f"out = {out} is a {'folder' if out.is_dir() else 'file'}; choose another name")
    check_writable(out.parent if out.suffix else out, "out", out)


def check_writable(folder: Path, name: str, path: Path) -> None:
    """Make `folder`. OSError that names the argument `name` and its `path` if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{name} = {path} cannot be written: {error.strerror}; choose another folder") from error


def write_samples(
    out: Path, samples: Samples, pairs: Sequence[tuple[int, int]], labels: Any, value_range: plot.ValueRange
) -> None:
    """Write drawn `samples` of (seed, index) `pairs` to `out`, by its ending; see `check_output`."""
    if out.suffix == ".png":
        plot.save_samples(out, samples.x, value_range)
    elif out.suffix in ARRAYS:
        arrays = {"x": samples.x.float().cpu(), "seeds": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)}
        if labels is not None:
            arrays["labels"] = labels.cpu()
        with replacing(out) as temporary:
            if out.suffix == ".pt":
                torch.save(arrays, temporary)
            else:
                numbers: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
                np.savez(temporary, **numbers)
    else:
        for (seed, index), image in zip(pairs, plot.to_bytes(samples.x, value_range), strict=True):
            plot.save_image(out / f"{seed:06d}-{index:06d}.png", image)


def draw(
    checkpoint: Path,
    *,
    n: int | None = None,
    seed: int | None = None,
    seeds: str | None = None,
    labels: int | list[int] | None = None,
    out: Path = Path("samples.png"),
    trajectory: Path | None = None,
    preset: str | None = None,
    method: str | None = None,
    coordinates: str | None = None,
    start: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    independent: bool = False,
    steps: int | None = None,
    grid: str | list[float] | None = None,
    s_churn: float | None = None,
    s_tmin: float | None = None,
    s_tmax: float | None = None,
    restart: list[tuple[float, float, int]] | None = None,
    max_calls: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
    ema: bool = True,
    trust: list[str] = [],  # noqa: B006 (read only; jsonargparse shows it as the default)
) -> None:
    """Draw samples from a trained Poisson flow and write them to disk.

    Args:
        checkpoint: a .ckpt written by train.py, or a folder written by save_pretrained.
        n: number of samples (default 64, unless seeds are given); sample i is a function of (seed, i).
        seed: the seed of all n samples (default 0).
        seeds: instead of n and seed, one sample for each of these, such as 0-63 or 1,2,5-10.
        labels: one class for all samples, or one for each ([1,7,...]).
        out: a file .png (grid, or scatter plot of 2-D data), .npz or .pt, or a folder of separate PNGs; replaced if it exists.
        trajectory: the way from the hemisphere: a .png (a strip for images, field lines for 2-D data), a .gif of noisy and
            denoised states, or an .npz of both.
        preset: fast (6 calls), balanced (10 calls, the default) or reference (dopri5 at tolerance 1e-4).
        method: adaptive dopri5, dopri8, bosh3, adaptive_heun, or fixed ab2, ab3, euler, midpoint, heun2, rk4, or, for
            comparison, dpmpp_2m, dpmpp_3m, edm_heun (default: bosh3 if a tolerance is given, otherwise ab3).
        coordinates: angle (default) or log_sigma (that of dpmpp_2m, dpmpp_3m, edm_heun).
        start: hemisphere (default) or hyperplane.
        rtol: relative tolerance of adaptive methods (default .05).
        atol: absolute tolerance of adaptive methods (default .05).
        independent: adaptive steps for each sample (adaptive_heun, bosh3, dopri5), so that it does not depend on its batch.
        steps: number of steps of fixed methods.
        grid: of fixed methods: uniform, paced (default of ab3), rho, a falling list of levels in model units, or optimized:
            the best for ab3 with this checkpoint, found when first asked for and kept in a .json beside it.
        s_churn: of one-step methods: noise added before the steps, as in EDM (default 0).
        s_tmin: lowest level at which it is added, in model units (default 0).
        s_tmax: highest level at which it is added (default inf).
        restart: intervals [[t_min, t_max, K], ...] of levels; each is passed K times more, lifted from t_min to t_max by noise.
        max_calls: network calls after which a batch ends where it is.
        batch_size: samples drawn at a time.
        device: cpu, cuda, cuda:1, ... (default: cuda if there is one).
        dtype: of the network's weights and arithmetic.
        ema: use the averaged weights rather than the raw ones.
        trust: modules outside pfgm whose networks the checkpoint may name.
    """
    pairs = seed_pairs(64 if n is None and seeds is None else n, seed, None if seeds is None else parse_seeds(seeds))
    place = check_device(device)
    flow = load(checkpoint, place, ema, trust)
    label = check_labels(flow, labels[0] if isinstance(labels, list) and len(labels) == 1 else labels, len(pairs))
    options: dict[str, Any] = {"preset": preset, "method": method, "coordinates": coordinates, "start": start}
    options |= {"rtol": rtol, "atol": atol, "independent": independent, "steps": steps, "grid": grid}
    options |= {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "restart": restart}
    if grid == "optimized":
        options |= {"method": method or "ab3", "grid": "paced"}  # until all is checked
        if options["method"] != "ab3":
            raise ValueError(f"grid = 'optimized': such grids are for ab3, not {method}; leave method out")
    _ = flow.sampler(**options).plan  # its checks come before any folder is made
    check_pairs(pairs, out)
    check_batch_size(batch_size)
    check_max_calls(max_calls)
    check_output(out, flow.shape)
    if trajectory is not None and max_calls is not None:
        raise ValueError(f"trajectory = {trajectory}, max_calls = {max_calls}: a trajectory is whole; leave one of them out")
    if trajectory is not None:
        check_trajectory(trajectory, out, flow.shape)
        check_writable(trajectory.parent, "trajectory", trajectory)
    if grid == "optimized":
        options |= {"grid": optimized_grid(checkpoint, flow, options["steps"]), "steps": None}
    flow.denoiser.to(getattr(torch, dtype))
    samples = flow.draw(pairs, labels=label, batch_size=batch_size, max_calls=max_calls, progress=True, **options)
    write_samples(out, samples, pairs, label, flow.value_range)
    print(f"{len(pairs)} samples in {samples.calls} network calls and {samples.seconds:.2f} s -> {out}")
    if not samples.complete:
        print(
            f"sample.py: warning: stopped by max_calls = {max_calls}: the samples are what the network makes of states above "
            "the data; give more calls, larger tolerances or fewer steps",
            file=sys.stderr,
        )
    if trajectory is not None:
        write_trajectory(trajectory, flow, pairs, label, samples, batch_size, options)
        print(f"their way from the {flow.sampler(**options).start} -> {trajectory}")


def optimized_grid(checkpoint: Path, flow: PoissonFlow, steps: int) -> list[float]:
    """The grid of `steps` for ab3 that is kept beside the checkpoint; found and written if it is not yet there."""
    path = grid_file(checkpoint)
    levels = stored_grid(path, flow, steps)
    if levels is None:
        check_writable(path.parent, "grid = 'optimized'", path)
        print(f"looking for the best grid of {steps} steps", file=sys.stderr)
        levels = optimize_grid(flow, steps)
        store_grid(path, flow, levels)
        print(f"the grid -> {path}", file=sys.stderr)
    return levels


def check_pairs(pairs: Sequence[tuple[int, int]], out: Path) -> None:
    """ValueError if there is nothing to draw, or if two samples would have one file."""
    if not pairs:
        raise ValueError("n = 0: there is nothing to draw; give n >= 1")
    if len(set(pairs)) < len(pairs) and not out.suffix:
        raise ValueError(f"seeds: some are given twice, and each names a file of the folder {out}; give each once")


def check_device(device: str | None) -> torch.device:
    """The device of that name, or the best there is. ValueError if it is unknown or not here."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device = {device!r} cannot be used here ({str(error).partition(chr(10))[0]}); try cpu") from error
    return place


def main(args: list[str] | None = None) -> None:
    """The command line of sample.py. An error of the user's making is one line on stderr and exit code 2."""
    from jsonargparse import auto_cli

    try:
        auto_cli(draw, args=args, as_positional=True)
    except (ValueError, OSError, SolverError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(2)
