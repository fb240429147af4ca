"""Where the solvers with fixed steps ask the network: levels from the horizon down to the data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from pfgm.sampling.coordinates import Angle, Coordinates

RHO = 7
"""Exponent of EDM's grid (arXiv 2206.00364, eq. 5)."""
LAST_STEP = 1 / 3
"""What the final denoising takes of the way to the data, in steps of the uniform grid in angle."""


FIRST, SECOND, LAST, REST = 1.1, 0.8, 0.8, 0.3
"""The same of the paced grid, in its inner steps, and the steps that differ from these."""


MOST_STEPS = 100_000
"""More are a mistake."""


class Grid(Protocol):
    """`levels(path, start, end)` of a way up or down; `last(path, start, end)`, where a draw leaves the rest to denoising."""

    def levels(self, path: Coordinates, start: float, end: float) -> list[float]: ...

    def last(self, path: Coordinates, start: float, end: float) -> float: ...


@dataclass(frozen=True)
class UniformGrid:
    """`steps` equal steps of the coordinate's time.

    In angle coordinates a draw ends a third of a step above the data: closer, the slope is mostly the network's noise, and
    the final denoising does that part of the way as well.
    """

    steps: int

    def levels(self, path: Coordinates, start: float, end: float) -> list[float]:
        times = np.linspace(path.time(start), path.time(end), self.steps + 1)
        return [start, *map(path.level, times[1:-1].tolist()), end]

    def last(self, path: Coordinates, start: float, end: float) -> float:
        if not isinstance(path, Angle):
            return end
        return max(end, path.level(path.time(start) * LAST_STEP / (self.steps + LAST_STEP)))


@dataclass(frozen=True)
class PacedGrid:
    """Almost equal steps of the coordinate's time, for ab3: the first, which has two calls, is longer, the second, which knows
    two slopes only, and the last are shorter, and a draw leaves .3 of a step to the final denoising.

    On networks for digits the error is 4 to 31 % below that of the uniform grid, at the same calls (`benchmarks/README.md`).
    """

    steps: int

    def levels(self, path: Coordinates, start: float, end: float) -> list[float]:
        shares = np.cumsum(self._steps()) / self._steps().sum()
        times = path.time(start) + shares[:-1] * (path.time(end) - path.time(start))
        return [start, *map(path.level, times.tolist()), end]

    def last(self, path: Coordinates, start: float, end: float) -> float:
        if not isinstance(path, Angle):
            return end
        return max(end, path.level(path.time(start) * REST / (self._steps().sum() + REST)))

    def _steps(self) -> np.ndarray:
        steps = np.ones(self.steps)
        steps[0] = FIRST
        steps[1:2] = SECOND
        steps[-1] = LAST
        return steps


@dataclass(frozen=True)
class KarrasGrid:
    """`steps` equal steps of level^(1/7): EDM's grid."""

    steps: int

    def levels(self, path: Coordinates, start: float, end: float) -> list[float]:
        roots = np.linspace(start ** (1 / RHO), end ** (1 / RHO), self.steps + 1)
        return [start, *(roots[1:-1] ** RHO).tolist(), end]

    def last(self, path: Coordinates, start: float, end: float) -> float:
        return end


@dataclass(frozen=True)
class ExplicitGrid:
    """The falling `values` themselves. A draw ends at the last; other ways go on to their end in one more step."""

    values: tuple[float, ...]

    def levels(self, path: Coordinates, start: float, end: float) -> list[float]:
        """ValueError if the way does not begin at the first value, or ends above the last."""
        top, bottom = max(start, end), min(start, end)
        first, last = self.values[0], self.values[-1]
        if not math.isclose(first, top, rel_tol=1e-4):
            raise ValueError(f"grid begins at {first:g}; this way begins at {top:g}, so that must be the first level")
        if last < bottom * (1 - 1e-4):
            raise ValueError(f"grid ends at {last:g}; this way ends at {bottom:g}, above it; leave out the lowest levels")
        inner = [*self.values[1:], bottom] if last > bottom * (1 + 1e-4) else [*self.values[1:-1], bottom]
        return [top, *inner] if start > end else [top, *inner][::-1]

    def last(self, path: Coordinates, start: float, end: float) -> float:
        """ValueError if the last value is below the end."""
        last = self.values[-1]
        if last < end * (1 - 1e-4):
            raise ValueError(f"grid ends at {last:g}, below sigma_min = {end:g}; leave out the lowest levels")
        return end if math.isclose(last, end, rel_tol=1e-4) else last


NAMED: dict[str, Callable[[int], Grid]] = {"paced": PacedGrid, "uniform": UniformGrid, "rho": KarrasGrid}


def make_grid(grid: str | Sequence[float], steps: int | None, method: str) -> Grid:
    """One of the NAMED grids of `steps`, or the one of the given levels, for the `method` named in errors: ValueError."""
    if not isinstance(grid, str):
        levels = tuple(float(level) for level in grid)
        if len(levels) < 2 or not math.inf > levels[0] or not all(a > b > 0 for a, b in pairwise(levels)):
            raise ValueError(f"grid = {list(levels)}: give at least two levels, positive, finite and falling")
        if steps is not None:
            raise ValueError(f"steps = {steps}: the given grid of {len(levels)} levels says how many; leave steps out")
        return ExplicitGrid(levels)
    if grid not in NAMED:
        raise ValueError(
            f"grid = {grid!r} is unknown; choose one of {', '.join(NAMED)}, or give falling levels, "
            "such as those of pfgm.optimize_grid (optimized on the command line)"
        )
    if steps is None or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps = {steps}: the fixed method {method} needs a number of steps from 1 to {MOST_STEPS}")
    return NAMED[grid](steps)
