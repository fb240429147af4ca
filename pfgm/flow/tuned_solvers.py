"""Grids found for a flow: the levels at which so many steps of ab3 make the smallest error on a few of its own samples."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfgm.core.arguments import checked
from pfgm.files.atomic import atomic_write
from pfgm.files.untrusted import read_text
from pfgm.flow.integrity import digest
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.coordinates import Angle
from pfgm.sampling.sampler import seed_pairs

SEED = 2**32 - 1
"""Of the samples: not one that a user would draw with."""
ROUNDS, FIRST_MOVE = 3, 0.3
"""Passes over all levels, and how far each is moved in the first, in parts of the gap to its neighbour; then half as far."""


@checked
def optimize_grid(flow: PoissonFlow, steps: int, n: int = 64, condition: Tensor | None = None) -> list[float]:
    """The falling levels of a grid of `steps` for ab3, from sigma_max to where the final denoising takes over, in model units.

    From the paced grid on, each level is moved up and down as long as the mean root mean square error of `n` samples falls,
    against converged ones (preset "reference") of the same starts: a pattern search in the coordinate's time, of about 6 steps
    (steps + 2) network calls. Samples are of all classes in turn and, for models with conditions, under those of `condition`
    [m, ...] in turn. For the argument `grid` of `PoissonFlow.sample`. ValueError unless steps >= 1 and n >= 1.
    """
    if n < 1:
        raise ValueError(f"n = {n} must be at least 1")
    given: dict[str, Any] = {"labels": [i % flow.num_classes for i in range(n)] if flow.num_classes else None}
    given["condition"] = None if condition is None else condition[torch.arange(n) % len(condition)]
    path, plan = Angle(flow.sigma_data), flow.sampler(method="ab3", steps=steps).plan[0]
    exact = flow.draw(seed_pairs(n, SEED), **given, preset="reference").x

    def error(times: list[float]) -> float:
        x = flow.draw(seed_pairs(n, SEED), **given, method="ab3", grid=[plan[0], *map(path.level, times[1:-1])]).x
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
    """Where the grids of a checkpoint or exported folder are kept."""
    return checkpoint / "grids.json" if checkpoint.is_dir() else checkpoint.with_suffix(".grids.json")


def stored_grid(path: Path, flow: PoissonFlow, steps: int) -> list[float] | None:
    """The grid of `steps` in the file `path`, or None if there is none for this flow and its weights. ValueError if the file
    is no file of grids."""
    levels = _read(path).get(_name(flow), {}).get(str(steps))
    if levels is not None and len(levels) != steps + 1:
        raise ValueError(f"{path} has a grid of {len(levels) - 1} steps for {steps}; delete it and it will be made again")
    return levels


def store_grid(path: Path, flow: PoissonFlow, levels: list[float]) -> None:
    """Add a grid to the file `path`; grids of other weights go, since the checkpoint is now another."""
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
        raise ValueError(f"{path} is no file of grids ({error}); delete it and it will be made again") from error
