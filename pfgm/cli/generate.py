"""Drawing to disk: samples of a flow as pictures or arrays."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pfgm.cli.arguments import check_device, chosen_pairs, in_turn, read_condition, read_inpainting, solver_options
from pfgm.cli.output_folder import SampleFolder, Share
from pfgm.cli.outputs import (
    ARRAYS,
    SAMPLE_FOLDER,
    SAMPLES,
    TRAJECTORY,
    check_columns,
    check_output,
    check_writable,
    save_arrays,
    write_images,
)
from pfgm.cli.trajectories import write_trajectory
from pfgm.core.configurable import to_json
from pfgm.evaluation import plots
from pfgm.flow.conditioning import check_conditioning, check_labels
from pfgm.flow.integrity import digest
from pfgm.flow.loading import load
from pfgm.flow.poisson_flow import PoissonFlow, check_batch_size
from pfgm.flow.tuned_solvers import grid_file, optimize_grid, store_grid, stored_grid
from pfgm.sampling.guidance import cost
from pfgm.sampling.sampler import Samples, check_max_calls


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
    part = Share.from_environment() if share is None else Share.parse(share)
    place = check_device(device, part.local_rank)
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
        drawing = SampleFolder(out, pairs, flow.shape, flow.value_range, made, batch_size=batch_size, share=part)
        draw_to_folder(flow, drawing, pairs, settings)
        return
    samples = flow.draw(pairs, progress=True, **settings)
    write_samples(out, samples, pairs, label, flow.value_range, columns)
    report(len(samples.x), [samples], max_calls, out)
    if trajectory is not None:
        write_trajectory(trajectory, flow, pairs, label, samples, batch_size, options, given)
        print(f"their way from the {flow.sampler(**options).start} -> {trajectory}")


def draw_to_folder(
    flow: PoissonFlow, drawing: SampleFolder, pairs: Sequence[tuple[int, int]], settings: dict[str, Any]
) -> None:
    """Draw what is missing of this process's share, and write each batch as it comes."""
    parts = []
    with drawing.lock() as missing:
        for number, samples in flow.batches(pairs, only=missing, progress=drawing.share.rank == 0, **settings):
            drawing.write(drawing.rows(number), samples.x)
            parts.append(dataclasses.replace(samples, x=samples.x[:0], error=None))
    here, new = (sum(len(drawing.rows(batch)) for batch in batches) for batches in (drawing.batches, missing))
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
    if share.count > 1 and (out.suffix or trajectory is not None):
        raise ValueError(
            f"share = {share}, out = {out}, trajectory = {trajectory}: several processes draw to a folder, and no trajectory"
        )
    if trajectory is not None and (max_calls is not None or not out.suffix):
        raise ValueError(
            f"trajectory = {trajectory}, out = {out}, max_calls = {max_calls}: a trajectory is whole, and beside a file; leave "
            "max_calls out, and give a file as out"
        )
    if trajectory is not None:
        check_output(trajectory, TRAJECTORY, shape, name="trajectory", others=[*inputs, out])
    check_output(out, SAMPLES if out.suffix else SAMPLE_FOLDER, shape, others=inputs)


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


def check_pairs(pairs: Sequence[tuple[int, int]], out: Path) -> None:
    """ValueError if there is nothing to draw, or if two samples would have one file."""
    if not pairs:
        raise ValueError("n = 0: there is nothing to draw; give n >= 1")
    if len(set(pairs)) < len(pairs) and not out.suffix:
        raise ValueError(f"seeds: some are given twice, and each names a file of the folder {out}; give each once")
