"""Grids tuned for a flow: the levels at which steps of ab3 make the smallest error on a few of its own samples."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfgm.core.arguments import checked
from pfgm.files.atomic import atomic_write
from pfgm.files.untrusted import read_text
from pfgm.flow.checkpoints import checkpoint_path
from pfgm.flow.integrity import digest
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.coordinates import Angle

SEED = 2**32 - 1  # seed of the samples, which no user would draw with
ROUNDS = 3  # passes over all levels
FIRST_MOVE = 0.3  # how far a level is moved in the first pass, in gaps to its neighbour; each pass halves it


@checked
def optimize_grid(flow: PoissonFlow, steps: int, n: int = 64, condition: Tensor | None = None) -> list[float]:
    """Search for the step placement of ab3 that suits this flow best.

    Starting from the paced grid, each level is moved up and down as long as the mean root mean square error of the samples
    falls, against converged ones (preset "reference") of the same starts. This pattern search in the coordinate's time takes
    about 6 steps (steps + 2) network calls.

    Args:
        flow: A trained flow.
        steps: Number of steps, at least 1.
        n: Number of samples, at least 1, of all classes in turn.
        condition: For models with conditions, [m, ...], used in turn.

    Returns:
        Falling levels in model units, for the argument `grid` of `PoissonFlow.sample`.
    """
    if n < 1:
        raise ValueError(f"n = {n} must be at least 1")
    classes = flow.summary.num_classes
    under: dict[str, Any] = {"seed": SEED, "labels": [i % classes for i in range(n)] if classes else None}
    under["condition"] = None if condition is None else condition[torch.arange(n) % len(condition)]
    path, plan = Angle(flow.summary.sigma_data), flow.sampler(method="ab3", steps=steps).plan[0]
    exact = flow.sample(n, preset="reference", **under).x

    def error(times: list[float]) -> float:
        x = flow.sample(n, method="ab3", grid=[plan[0], *map(path.level, times[1:-1])], **under).x
        return float((x - exact).flatten(1).square().mean(1).sqrt().mean())

    times = [*map(path.time, plan), path.time(flow.sigma_min)]
    best = error(times)
    for move in (FIRST_MOVE / 2**k for k in range(ROUNDS)):
        for k in range(1, steps + 1):
            for neighbour in (k - 1, k + 1):
                tried = [*times[:k], times[k] + move * (times[neighbour] - times[k]), *times[k + 1 :]]
                if tried[k] != times[k] and (found := error(tried)) < best:
                    best, times = found, tried
                    break
    return [plan[0], *map(path.level, times[1:-1])]


def grid_file(checkpoint: Path) -> Path:
    """Return the file that keeps the grids of a checkpoint, a run folder or an export."""
    last = checkpoint_path(checkpoint)
    checkpoint = last if last.is_file() else checkpoint
    return checkpoint / "grids.json" if checkpoint.is_dir() else checkpoint.with_suffix(".grids.json")


def stored_grid(path: Path, flow: PoissonFlow, steps: int) -> list[float] | None:
    """Return the grid of `steps` for this flow in a file, None if there is none. Raise ValueError for another file."""
    levels = _read(path).get(_name(flow), {}).get(str(steps))
    if levels is not None and len(levels) != steps + 1:
        raise ValueError(f"{path} has a grid of {len(levels) - 1} steps for {steps}. Delete it, and it will be made again.")
    return levels


def store_grid(path: Path, flow: PoissonFlow, levels: list[float]) -> None:
    """Add a grid to the file `path`, and drop grids of other weights, since the checkpoint has changed."""
    name = _name(flow)
    grids = _read(path).get(name, {}) | {str(len(levels) - 1): levels}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({name: grids}, indent=2) + "\n")


def _name(flow: PoissonFlow) -> str:
    return digest({"flow": flow.config, "tensors": flow.state_dict()})


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    if not path.exists():
        return {}
    try:
        grids = json.loads(read_text(path, path))
        return {name: {steps: [*map(float, found)] for steps, found in table.items()} for name, table in grids.items()}
    except (ValueError, TypeError, AttributeError, ArithmeticError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no file of grids ({error}). Delete it, and it will be made again.") from error
