"""The command that draws samples to disk, as pictures, arrays or a folder."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfgm.cli.options import (
    ConditionOptions,
    GuidanceOptions,
    ModelOptions,
    SeedOptions,
    read_condition,
    read_inpainting,
    repeat_in_turn,
)
from pfgm.cli.output_folder import SampleFolder, Share
from pfgm.cli.outputs import (
    ARRAYS,
    SAMPLE_FOLDER,
    SAMPLES,
    TRAJECTORY,
    check_columns,
    check_name,
    check_output,
    check_writable,
    save_arrays,
    write_images,
)
from pfgm.cli.trajectories import write_trajectory
from pfgm.core.configurable import to_json
from pfgm.flow.conditioning import check_batch_size, check_conditioning, check_labels
from pfgm.flow.integrity import digest
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.flow.tuned_solvers import grid_file, optimize_grid, store_grid, stored_grid
from pfgm.sampling.guidance import cost
from pfgm.sampling.sampler import Samples, check_max_calls
from pfgm.sampling.solvers import SolverConfig

Pairs = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Where samples go.

    Args:
        out: A file .png (grid, or scatter plot of 2-D data), .npz or .pt, replaced if it exists; or a folder of separate PNGs,
            or .npy files for other data, which are written batch by batch and continued by the same command.
        columns: Columns of the grid in a .png file of images (default: as many as rows).
        trajectory: The states from the hemisphere down: .png (strip, field lines of 2-D data), .gif or .npz.
        max_calls: Network calls after which a batch ends where it is.
        batch_size: Samples drawn at a time.
        share: Share of a folder that this process draws, such as 1/4 to 4/4 (default: as torchrun or srun say, else all).
    """

    out: Path = Path("samples.png")
    columns: int | None = None
    trajectory: Path | None = None
    max_calls: int | None = None
    batch_size: int = 256
    share: str | None = None


def draw(
    checkpoint: Path,
    *,
    seeds: SeedOptions,
    under: ConditionOptions,
    guided: GuidanceOptions,
    output: OutputOptions,
    solver: SolverConfig,
    model: ModelOptions,
) -> None:
    """Draw samples from a trained Poisson flow and write them to disk.

    Args:
        checkpoint: A .ckpt file written by training, a run folder, or a folder written by save_pretrained.
    """
    share = Share.from_environment() if output.share is None else Share.parse(output.share)
    flow = model.load(checkpoint, share.local_rank)
    condition = read_condition(under.condition, flow)
    pairs = seeds.pairs(under.labels, condition)
    labels = check_labels(flow, repeat_in_turn("labels", under.labels, len(pairs)), len(pairs))
    conditioning = {
        "condition": repeat_in_turn("condition", condition, len(pairs)),
        "guidance": guided.guidance,
        "guidance_interval": guided.guidance_interval,
        "guide": guided.guide and model.load(guided.guide, share.local_rank),
        "measurement": read_inpainting(guided.inpaint, guided.measurement_noise, flow),
    }
    bound = check_conditioning(flow, len(pairs), labels, conditioning)
    check_max_calls(output.max_calls, cost(bound.denoiser()))
    _ = flow.sampler(_without_search(solver)).plan
    _check_pairs(pairs, output.out)
    check_batch_size(output.batch_size)
    check_outputs(flow.shape, output, [under.condition, *(guided.inpaint or ())], share)
    if solver.grid == "optimized":
        levels = optimized_grid(checkpoint, flow, solver.steps, condition)
        solver = dataclasses.replace(_without_search(solver), grid=levels, steps=None)
    record = _record(flow, seeds, under, condition, output, solver, model, conditioning)
    for one in (flow, conditioning["guide"]):
        if one is not None:
            model.cast(one)
    settings = {"labels": labels, "batch_size": output.batch_size, "config": solver, **conditioning}
    if output.out.suffix:
        _draw_to_file(flow, pairs, output, settings)
    else:
        summary = flow.summary
        folder = SampleFolder(
            output.out, pairs, summary.shape, summary.value_range, record, batch_size=output.batch_size, share=share
        )
        _draw_to_folder(flow, folder, pairs, settings | {"max_calls": output.max_calls})


def _draw_to_file(flow: PoissonFlow, pairs: Pairs, output: OutputOptions, settings: dict[str, Any]) -> None:
    parts = [part for _, part in flow.sample_batches(pairs, progress=True, max_calls=output.max_calls, **settings)]
    x = torch.cat([part.x for part in parts])
    write_samples(output.out, x, pairs, settings["labels"], flow.summary.value_range, output.columns)
    report(len(x), parts, output.max_calls, output.out)
    if output.trajectory is not None:
        write_trajectory(output.trajectory, flow, pairs, x, settings)
        start = settings["config"].start or flow.start
        print(f"their states from the {start} down -> {output.trajectory}")


def _draw_to_folder(flow: PoissonFlow, folder: SampleFolder, pairs: Pairs, settings: dict[str, Any]) -> None:
    """Draw what is missing of this process's share, and write each batch when it is done."""
    parts = []
    with folder.lock() as missing:
        for number, samples in flow.sample_batches(pairs, only=missing, progress=folder.share.rank == 0, **settings):
            folder.write(folder.rows(number), samples.x)
            parts.append(dataclasses.replace(samples, x=samples.x[:0], error=None))
    here, new = (sum(len(folder.rows(batch)) for batch in batches) for batches in (folder.batches, missing))
    if new < here:
        print(f"{here - new} of {here} samples were there already")
    report(new, parts, settings["max_calls"], folder.out)


def write_samples(
    out: Path, x: Tensor, pairs: Pairs, labels: Any, value_range: Sequence[float] | None, columns: int | None = None
) -> None:
    """Write samples [n, *shape] of (seed, index) `pairs` to the file `out`, by its ending."""
    if out.suffix in ARRAYS:
        arrays = {"x": x.float(), "seeds": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)}
        save_arrays(out, arrays if labels is None else arrays | {"labels": labels})
    else:
        write_images(out, x, (), value_range, columns)


def _without_search(solver: SolverConfig) -> SolverConfig:
    """Return `solver` with the default grid in place of one that has to be searched for first."""
    if solver.grid != "optimized":
        return solver
    if solver.method not in (None, "ab3"):
        raise ValueError(f"grid = 'optimized': such grids are for ab3, not {solver.method}; leave method out")
    return dataclasses.replace(solver, method="ab3", grid="paced")


def _record(
    flow: PoissonFlow,
    seeds: SeedOptions,
    under: ConditionOptions,
    condition: Tensor | None,
    output: OutputOptions,
    solver: SolverConfig,
    model: ModelOptions,
    conditioning: dict[str, Any],
) -> dict[str, Any]:
    """Return what determines the samples, as plain data: tensors and flows by their digest, defaults left out."""
    defaults = dataclasses.asdict(SolverConfig())
    record = {name: value for name, value in dataclasses.asdict(solver).items() if value != defaults[name]}
    record |= {name: conditioning[name] for name in ("guidance", "guidance_interval")} | {"labels": under.labels}
    record |= {"dtype": model.dtype, "batch_size": output.batch_size, "max_calls": output.max_calls}
    measurement = conditioning["measurement"]
    tensors = {
        "flow": _contents(flow),
        "guide": conditioning["guide"] and _contents(conditioning["guide"]),
        "condition": condition,
        "measurement": measurement and [measurement.operator.known, measurement.values, measurement.noise],
    }
    record |= {name: digest(value) for name, value in tensors.items() if value is not None}
    in_order = isinstance(under.labels, list) or isinstance(conditioning["guidance"], list) or condition is not None
    record["seeds"] = seeds.seeds if in_order else None  # a sample's position counts only then
    return to_json({name: value for name, value in record.items() if value is not None})


def _contents(flow: PoissonFlow) -> dict[str, Any]:
    return {"flow": flow.config, "tensors": flow.state_dict()}


def check_outputs(shape: Sequence[int], output: OutputOptions, inputs: Sequence[Path | None], share: Share) -> None:
    """Raise ValueError or OSError unless samples of `shape` and their trajectory can be written; make the folders."""
    out, trajectory = output.out, output.trajectory
    check_columns(output.columns, out, shape)
    if share.count > 1 and (out.suffix or trajectory is not None):
        raise ValueError(
            f"share = {share}, out = {out}, trajectory = {trajectory}: several processes draw to a folder, and no trajectory"
        )
    if trajectory is not None and (output.max_calls is not None or not out.suffix):
        raise ValueError(
            f"trajectory = {trajectory}, out = {out}, max_calls = {output.max_calls}: a trajectory is whole, and beside a "
            "file; leave max_calls out, and give a file as out"
        )
    kind = SAMPLES if out.suffix else SAMPLE_FOLDER
    check_name(out, kind, shape, others=inputs)
    if trajectory is not None:
        check_output(trajectory, TRAJECTORY, shape, name="trajectory", others=[*inputs, out])
    check_output(out, kind, shape, others=inputs)


def _check_pairs(pairs: Pairs, out: Path) -> None:
    if not pairs:
        raise ValueError("n = 0: there is nothing to draw; give n >= 1")
    if len(set(pairs)) < len(pairs) and not out.suffix:
        raise ValueError(f"seeds: some are given twice, and each names a file of the folder {out}; give each once")


def report(n: int, parts: Sequence[Samples], max_calls: int | None, out: Path) -> None:
    """Print what was drawn, and warn if samples are not complete."""
    calls, seconds = max((part.calls for part in parts), default=0), sum(part.seconds for part in parts)
    print(f"{n} samples in {calls} network calls and {seconds:.2f} s -> {out}")
    if not all(part.complete for part in parts):
        print(
            f"warning: stopped by max_calls = {max_calls}: the samples are what the network makes of states above the data; "
            "give more calls, larger tolerances or fewer steps",
            file=sys.stderr,
        )


def optimized_grid(checkpoint: Path, flow: PoissonFlow, steps: int | None, condition: Tensor | None) -> list[float]:
    """Return the grid of `steps` for ab3 that is kept beside the checkpoint; search for it and keep it if it is missing."""
    assert steps is not None
    path = grid_file(checkpoint)
    levels = stored_grid(path, flow, steps)
    if levels is None:
        check_writable(path.parent, "grid = 'optimized'", path)
        print(f"looking for the best grid of {steps} steps", file=sys.stderr)
        levels = optimize_grid(flow, steps, condition=condition)
        store_grid(path, flow, levels)
        print(f"the grid -> {path}", file=sys.stderr)
    return levels
