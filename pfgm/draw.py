"""Drawing to disk: samples of a flow as pictures or arrays."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pfgm.core.configurable import to_json
from pfgm.core.tensors import check_positive
from pfgm.drawing import Drawing, Share
from pfgm.evaluation import plots
from pfgm.files import arrays as arrays_module
from pfgm.files.arrays import read_inputs
from pfgm.flow.conditioning import check_conditioning, check_labels
from pfgm.flow.integrity import digest
from pfgm.flow.loading import load
from pfgm.flow.poisson_flow import PoissonFlow, check_batch_size
from pfgm.flow.tuned_solvers import grid_file, optimize_grid, store_grid, stored_grid
from pfgm.output import (
    ARRAYS,
    check_columns,
    check_folder,
    check_other_file,
    check_output,
    check_writable,
    save_arrays,
    write_images,
)
from pfgm.sampling.guidance import cost
from pfgm.sampling.inverse import Mask, Measurement
from pfgm.sampling.sampler import Samples, check_max_calls, seed_pairs
from pfgm.trajectory import check_trajectory, write_trajectory

MOST_SEEDS = 10**7
"""In one command."""


def parse_seeds(text: str) -> list[int]:
    """ "1,2,5-10" as a list of seeds. ValueError for anything else."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            some = range(int(first), int(last if dash else first) + 1)
            if not some or len(seeds) + len(some) > MOST_SEEDS:
                raise ValueError
            seeds += some
    except ValueError:
        raise ValueError(
            f"seeds = {text!r}: give numbers and rising ranges such as 0-63 or 1,2,5-10, none negative, {MOST_SEEDS} in all"
        ) from None
    return seeds


def write_samples(
    out: Path,
    samples: Samples,
    pairs: Sequence[tuple[int, int]],
    labels: Any,
    value_range: plots.ValueRange,
    columns: int | None = None,
) -> None:
    """Write drawn `samples` of (seed, index) `pairs` to the file `out`, by its ending; see `check_output`."""
    if out.suffix in ARRAYS:
        arrays = {"x": samples.x.float(), "seeds": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)}
        save_arrays(out, arrays if labels is None else arrays | {"labels": labels})
    else:
        write_images(out, samples.x, (), value_range, columns)


def solver_options(
    *,
    preset: str | None = None,
    method: str | None = None,
    coordinates: str | None = None,
    start: str | None = None,
    temperature: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    independent: bool = False,
    steps: int | None = None,
    grid: str | list[float] | None = None,
    s_churn: float | None = None,
    s_tmin: float | None = None,
    s_tmax: float | None = None,
    restart: list[tuple[float, float, int]] | None = None,
) -> dict[str, Any]:
    """How to follow the flow, as options of `PoissonFlow.sampler`.

    Args:
        preset: fast (6 calls), balanced (10 calls, the default) or reference (dopri5 at tolerance 1e-4).
        method: adaptive dopri5, dopri8, bosh3, adaptive_heun, or fixed ab2, ab3, euler, midpoint, heun2, rk4, or, for
            comparison, dpmpp_2m, dpmpp_3m, edm_heun (default: bosh3 if a tolerance is given, otherwise ab3).
        coordinates: angle (default) or log_sigma (that of dpmpp_2m, dpmpp_3m, edm_heun).
        start: hemisphere (default) or hyperplane.
        temperature: scales the prior (default 1; below it samples are more alike; useful from .8 to 1.2).
        rtol: relative tolerance of adaptive methods (default .05).
        atol: absolute tolerance of adaptive methods (default .05).
        independent: adaptive steps for each sample (adaptive_heun, bosh3, dopri5), so that it does not depend on its batch.
        steps: number of steps of fixed methods.
        grid: uniform, paced (default of ab3), rho, falling levels in model units, or optimized (for ab3; kept in a .json).
        s_churn: of one-step methods: noise added before the steps, as in EDM (default 0).
        s_tmin: lowest level at which it is added, in model units (default 0).
        s_tmax: highest level at which it is added (default inf).
        restart: intervals [[t_min, t_max, K], ...] of levels; each is passed K times more, lifted from t_min to t_max by noise.
    """
    return dict(locals())


def draw(
    checkpoint: Path,
    *,
    n: int | None = None,
    seed: int | None = None,
    seeds: str | None = None,
    labels: int | list[int] | None = None,
    condition: Path | None = None,
    guidance: float | list[float] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guide: Path | None = None,
    inpaint: tuple[Path, Path] | None = None,
    measurement_noise: float | None = None,
    out: Path = Path("samples.png"),
    columns: int | None = None,
    trajectory: Path | None = None,
    max_calls: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    share: str | None = None,
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32",
    ema: bool = True,
    trust: list[str] = [],  # noqa: B006 (read only; jsonargparse shows it as the default)
    **solver: Any,
) -> None:
    """Draw samples from a trained Poisson flow and write them to disk.

    With encode, decode, interpolate or vary as the first word the flow is used otherwise: sample.py encode --help.

    Args:
        checkpoint: a .ckpt written by train.py, or a folder written by save_pretrained.
        n: number of samples (default 64, or one for each condition or label); sample i is a function of (seed, i).
        seed: the seed of all n samples (default 0).
        seeds: instead of n and seed, one sample for each of these, such as 0-63 or 1,2,5-10.
        labels: one class for all samples, or several ([1,7,...]) in turn, each for as many samples.
        condition: array file ("conditions", or a single array) or images; one for all samples, or several in turn.
        guidance: strength, or one for each sample ([1,2,...]); 1 is none. Needs labels and label dropout, or a guide.
        guidance_interval: noise levels (low, high), in model units, between which guidance acts (default: all).
        guide: checkpoint of a weaker model of the same data, for autoguidance.
        inpaint: an image, and a mask that is white where the image is to be filled in: --inpaint image.png mask.png.
        measurement_noise: of the image's known part, in the units of the data (default: the model's lowest noise level).
        out: a file .png (grid, or scatter plot of 2-D data), .npz or .pt, replaced if it exists; or a folder of separate PNGs,
            or .npy files for other data, which are written as they come and continued by the same command.
        columns: of the grid in a .png file of images (default: as many as rows).
        trajectory: the way from the hemisphere: .png (strip, field lines of 2-D data), .gif or .npz (noisy and denoised).
        max_calls: network calls after which a batch ends where it is.
        batch_size: samples drawn at a time.
        device: cpu, cuda, cuda:1, ... (default: cuda if there is one, of several the one of this process).
        share: which part of a folder this process draws, such as 1/4 to 4/4 (default: as torchrun or srun say, else all).
        dtype: of the network's weights and arithmetic.
        ema: use the averaged weights rather than the raw ones.
        trust: modules outside pfgm whose networks the checkpoint may name.
        solver: how to follow the flow, see `solver_options`.
    """
    options = solver_options(**solver)
    part = Share.found() if share is None else Share.parse(share)
    place = check_device(device, part.local)
    flow = load(checkpoint, place, ema, trust)
    c = read_condition(condition, flow)
    pairs = chosen_pairs(n, seed, seeds, labels, c)
    label = check_labels(flow, in_turn("labels", labels, len(pairs)), len(pairs))
    given: dict[str, Any] = {"condition": in_turn("condition", c, len(pairs)), "guidance": guidance}
    given |= {"guidance_interval": guidance_interval, "guide": guide and load(guide, place, ema, trust)}
    given["measurement"] = read_inpainting(inpaint, measurement_noise, flow)
    check_max_calls(max_calls, cost(check_conditioning(flow, len(pairs), label, given).denoiser()))  # type: ignore[arg-type]
    check_solver(flow, options)
    check_pairs(pairs, out)
    check_batch_size(batch_size)
    check_outputs(flow.shape, out, columns, trajectory, max_calls, [condition, *(inpaint or ())], part)
    if options["grid"] == "optimized":
        options |= {"method": "ab3", "grid": optimized_grid(checkpoint, flow, options["steps"], c), "steps": None}
    made = options | given | {"flow": flow, "dtype": dtype, "labels": labels, "batch_size": batch_size, "max_calls": max_calls}
    in_order = isinstance(labels, list) or isinstance(guidance, list) or c is not None  # then a sample's place counts
    made = recorded(made | {"seeds": seeds if in_order else None})
    for one in (flow, given["guide"] or flow):
        one.denoiser.to(getattr(torch, dtype))
    settings: dict[str, Any] = {"labels": label, "batch_size": batch_size, "max_calls": max_calls, **options, **given}
    if not out.suffix:
        drawing = Drawing(out, pairs, flow.shape, flow.value_range, made, batch_size=batch_size, share=part)
        draw_to_folder(flow, drawing, pairs, settings)
        return
    samples = flow.draw(pairs, progress=True, **settings)
    write_samples(out, samples, pairs, label, flow.value_range, columns)
    report(len(samples.x), [samples], max_calls, out)
    if trajectory is not None:
        write_trajectory(trajectory, flow, pairs, label, samples, batch_size, options, given)
        print(f"their way from the {flow.sampler(**options).start} -> {trajectory}")


def chosen_pairs(
    n: int | None, seed: int | None, seeds: str | None, labels: int | list[int] | None, condition: Tensor | None
) -> list[tuple[int, int]]:
    """(seed, index) of each sample: of `n` of `seed`, or of one for each of `seeds`; as many as there are conditions or labels,
    if there are several, otherwise 64."""
    if n is None and seeds is None:
        several = [len(one) for one in (condition, labels) if one is not None and not isinstance(one, int) and len(one) > 1]
        n = several[0] if several else 64
    return seed_pairs(n, seed, None if seeds is None else parse_seeds(seeds))


def draw_to_folder(flow: PoissonFlow, drawing: Drawing, pairs: Sequence[tuple[int, int]], settings: dict[str, Any]) -> None:
    """Draw what is missing of this process's share, and write each batch as it comes."""
    parts = []
    with drawing.opened() as missing:
        for number, samples in flow.batches(pairs, only=missing, progress=drawing.share.number == 0, **settings):
            drawing.write(drawing.rows(number), samples.x)
            parts.append(dataclasses.replace(samples, x=samples.x[:0], error=None))
    here, new = (sum(len(drawing.rows(batch)) for batch in batches) for batches in (drawing.mine, missing))
    if new < here:
        print(f"{here - new} of {here} samples were there already")
    report(new, parts, settings["max_calls"], drawing.out)


def recorded(made: dict[str, Any]) -> dict[str, Any]:
    """What makes samples as plain data: large parts by their digest, what is not given left out."""
    flows = {name: value for name, value in made.items() if isinstance(value, PoissonFlow)}
    digests = {name: digest({"flow": flow.config, "tensors": flow.state_dict()}) for name, flow in flows.items()}
    measured = made.pop("measurement")
    if measured is not None:
        digests["measurement"] = digest([measured.operator.known, measured.values, measured.noise])
    if made["condition"] is not None:
        digests["condition"] = digest(made["condition"])
    return to_json({name: value for name, value in (made | digests).items() if value is not None})


def check_solver(flow: PoissonFlow, options: dict[str, Any]) -> None:
    """ValueError for options that are no solver's; for an optimized grid before it is searched."""
    if options["grid"] == "optimized":
        if options["method"] not in (None, "ab3"):
            raise ValueError(f"grid = 'optimized': such grids are for ab3, not {options['method']}; leave method out")
        options = options | {"method": "ab3", "grid": "paced"}
    _ = flow.sampler(**options).plan


def check_outputs(
    shape: Sequence[int],
    out: Path,
    columns: int | None,
    trajectory: Path | None,
    max_calls: int | None,
    inputs: Sequence[Path | None],
    share: Share,
) -> None:
    """ValueError or OSError unless samples of `shape` and their trajectory can be written; makes the folders."""
    check_columns(columns, out, shape)
    check_other_file(out, *inputs)
    if share.of > 1 and (out.suffix or trajectory is not None):
        raise ValueError(
            f"share = {share}, out = {out}, trajectory = {trajectory}: several processes draw to a folder, and no trajectory"
        )
    if trajectory is not None and (max_calls is not None or not out.suffix):
        raise ValueError(
            f"trajectory = {trajectory}, out = {out}, max_calls = {max_calls}: a trajectory is whole, and beside a file; leave "
            "max_calls out, and give a file as out"
        )
    if trajectory is not None:
        check_other_file(trajectory, *inputs, name="trajectory")
        check_trajectory(trajectory, out, shape)
    if out.suffix:
        check_output(out, shape)
    else:
        check_folder(out)
    if trajectory is not None:
        check_writable(trajectory.parent, "trajectory", trajectory)


def report(n: int, parts: Sequence[Samples], max_calls: int | None, out: Path) -> None:
    """Say what was drawn, and warn if it is not complete."""
    calls, seconds = max((part.calls for part in parts), default=0), sum(part.seconds for part in parts)
    print(f"{n} samples in {calls} network calls and {seconds:.2f} s -> {out}")
    if not all(part.complete for part in parts):
        print(
            f"sample.py: warning: stopped by max_calls = {max_calls}: the samples are what the network makes of states above "
            "the data; give more calls, larger tolerances or fewer steps",
            file=sys.stderr,
        )


def optimized_grid(checkpoint: Path, flow: PoissonFlow, steps: int, condition: Tensor | None) -> list[float]:
    """The grid of `steps` for ab3 that is kept beside the checkpoint; found and written if it is not yet there."""
    path = grid_file(checkpoint)
    levels = stored_grid(path, flow, steps)
    if levels is None:
        check_writable(path.parent, "grid = 'optimized'", path)
        print(f"looking for the best grid of {steps} steps", file=sys.stderr)
        levels = optimize_grid(flow, steps, condition=condition)
        store_grid(path, flow, levels)
        print(f"the grid -> {path}", file=sys.stderr)
    return levels


def in_turn(name: str, values: Any, n: int) -> Any:
    """A list or tensor of m values as one of `n`, each n/m times in turn; None and single numbers as they are.

    ValueError if m does not divide n.
    """
    if values is None or isinstance(values, int) or len(values) == 1:
        return values[0] if isinstance(values, list) else values
    if not len(values) or n % len(values):
        raise ValueError(f"{name}: {len(values)} for {n} samples, in turn; give a number that divides {n}, or another n")
    return [*values] * (n // len(values)) if isinstance(values, list) else values[torch.arange(n) % len(values)]


def read_condition(path: Path | None, flow: PoissonFlow) -> Tensor | None:
    """Conditions [n, *condition_shape] in the user's units from a file of arrays or of images; None for no file."""
    if path is None:
        return None
    if flow.condition_shape is None:
        raise ValueError(f"condition = {path}: this model was trained without conditions; leave condition out")
    return read_inputs(path, flow.condition_shape, flow.value_range, "condition", key="conditions").to(flow.mean.device)


def read_inpainting(paths: tuple[Path, Path] | None, noise: float | None, flow: PoissonFlow) -> Measurement | None:
    """The known part of an image, by a mask that is white, or True, where it is to be filled in."""
    if paths is None:
        if noise is not None:
            raise ValueError(f"measurement_noise = {noise}: nothing is measured; give inpaint as well")
        return None
    image = read_inputs(paths[0], flow.shape, flow.value_range, "inpaint").to(flow.mean.device)
    filled = read_mask(paths[1], flow.shape).to(flow.mean.device)
    if len(image) != 1:
        raise ValueError(f"inpaint = {paths[0]}: {len(image)} images; give one")
    if noise is not None:
        check_positive("measurement_noise", noise)
    known = Mask(~filled)
    return Measurement(known, known(image), flow.sigma_min * flow.scale if noise is None else noise)


def read_mask(path: Path, shape: Sequence[int]) -> Tensor:
    """A mask [*shape], True where it is white, or 1 in an array of the last dimensions of `shape`. ValueError if it is no mask,
    or the same everywhere."""
    if path.suffix in arrays_module.ARRAYS:
        mask = arrays_module.load_arrays(path, ["x"], name="inpaint")["x"]
        if tuple(mask.shape) != tuple(shape)[len(shape) - mask.ndim :] or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"inpaint = {path}: {tuple(mask.shape)} is no mask of {tuple(shape)}; give 1 to fill in, else 0")
    else:
        mask = arrays_module.read_images(path, (1, *shape[1:]), "inpaint")[0]
    filled = (mask > 0.5).expand(*shape)
    if bool((filled == filled.flatten()[0]).all()):
        raise ValueError(f"inpaint = {path}: the mask is the same everywhere; make it white where the image is to be filled in")
    return filled


def check_pairs(pairs: Sequence[tuple[int, int]], out: Path) -> None:
    """ValueError if there is nothing to draw, or if two samples would have one file."""
    if not pairs:
        raise ValueError("n = 0: there is nothing to draw; give n >= 1")
    if len(set(pairs)) < len(pairs) and not out.suffix:
        raise ValueError(f"seeds: some are given twice, and each names a file of the folder {out}; give each once")


def check_device(device: str | None, local: int = 0) -> torch.device:
    """The device of that name, or the best for process `local` of this machine. ValueError if it is unknown or not here."""
    try:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        place = torch.device(device or (f"cuda:{local % gpus}" if gpus else "cpu"))
        torch.empty(0, device=place).cpu()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError among them, of devices without memory
        raise ValueError(f"device = {device!r} cannot be used here ({str(error).partition(chr(10))[0]}); try cpu") from error
    return place
