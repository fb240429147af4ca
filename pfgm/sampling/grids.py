"""Grids place the levels at which fixed-step solvers call the denoiser, from sigma_max down to the data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pfgm.sampling.coordinates import Angle, Coordinates

RHO = 7  # exponent of EDM's grid (arXiv 2206.00364, eq. 5)
MAX_STEPS = 100_000  # a larger number is taken for a mistake


@dataclass(frozen=True)
class Grid:
    """Pass only the two ends, for adaptive methods; subclasses add levels between."""

    def levels(self, coordinates: Coordinates, start: float, end: float) -> list[float]:
        """Return the levels from `start` to `end`, both included, upwards or downwards."""
        return [start, end]

    def last(self, coordinates: Coordinates, start: float, end: float) -> float:
        """Return the level, `end` or above, at which sampling stops and the final denoising takes over."""
        return end


@dataclass(frozen=True)
class KarrasGrid(Grid):
    """Divide level^(1/7) into `steps` equal steps, as EDM does (arXiv 2206.00364, eq. 5)."""

    steps: int

    def levels(self, coordinates: Coordinates, start: float, end: float) -> list[float]:
        roots = np.linspace(start ** (1 / RHO), end ** (1 / RHO), self.steps + 1)
        return [start, *(roots[1:-1] ** RHO).tolist(), end]


@dataclass(frozen=True)
class UniformGrid(Grid):
    """Divide the coordinates' time into `steps` equal steps.

    In angle coordinates sampling stops REST of a step above the data. Below, the slope is mostly noise of the network, and the
    final denoising covers this part as well.
    """

    steps: int

    REST = 1 / 3

    def levels(self, coordinates: Coordinates, start: float, end: float) -> list[float]:
        times = self._times(coordinates.time(start), coordinates.time(end))
        return [start, *map(coordinates.level, times[1:-1].tolist()), end]

    def last(self, coordinates: Coordinates, start: float, end: float) -> float:
        if not isinstance(coordinates, Angle):
            return end
        return max(end, coordinates.level(coordinates.time(start) * self.REST / (self._lengths().sum() + self.REST)))

    def _times(self, first: float, last: float) -> np.ndarray:
        return np.linspace(first, last, self.steps + 1)

    def _lengths(self) -> np.ndarray:
        return np.ones(self.steps)


@dataclass(frozen=True)
class PacedGrid(UniformGrid):
    """Divide the coordinates' time into `steps` almost equal steps, tuned for ab3.

    The first step, which makes two calls, is longer. The second, which knows only two slopes, and the last are shorter. On
    networks for digits the error is 4 to 31 % below that of the uniform grid with the same number of calls
    (`benchmarks/README.md`).
    """

    FIRST, SECOND, LAST, REST = 1.1, 0.8, 0.8, 0.3  # lengths in units of the other steps

    def _times(self, first: float, last: float) -> np.ndarray:
        lengths = self._lengths()
        return np.append(first, first + np.cumsum(lengths) / lengths.sum() * (last - first))

    def _lengths(self) -> np.ndarray:
        lengths = np.ones(self.steps)
        lengths[0] = self.FIRST
        lengths[1:2] = self.SECOND
        lengths[-1] = self.LAST
        return lengths


@dataclass(frozen=True)
class ExplicitGrid(Grid):
    """Use explicit, decreasing levels `values`.

    Sampling stops at the last. Encoding, decoding and integration add one step to their end.
    """

    values: tuple[float, ...]

    def levels(self, coordinates: Coordinates, start: float, end: float) -> list[float]:
        """Return the values as levels. Raise ValueError unless they begin at the higher end and stop above the lower."""
        top, bottom = max(start, end), min(start, end)
        first, last = self.values[0], self.values[-1]
        if not math.isclose(first, top, rel_tol=1e-4):
            raise ValueError(f"grid begins at {first:g}, but the highest level here is {top:g}. Make {top:g} the first level.")
        if last < bottom * (1 - 1e-4):
            raise ValueError(f"grid ends at {last:g}, but the lowest level here is {bottom:g}. Leave out the levels below.")
        inner = [*self.values[1:], bottom] if last > bottom * (1 + 1e-4) else [*self.values[1:-1], bottom]
        return [top, *inner] if start > end else [top, *inner][::-1]

    def last(self, coordinates: Coordinates, start: float, end: float) -> float:
        """Return the last value. Raise ValueError if it is below `end`."""
        last = self.values[-1]
        if last < end * (1 - 1e-4):
            raise ValueError(f"grid ends at {last:g}, below sigma_min = {end:g}. Leave out the levels below.")
        return end if math.isclose(last, end, rel_tol=1e-4) else last


NAMED_GRIDS: dict[str, Callable[[int], Grid]] = {"paced": PacedGrid, "uniform": UniformGrid, "rho": KarrasGrid}


def make_grid(grid: str | Sequence[float], steps: int | None, method: str) -> Grid:
    """Make a grid of `steps` from its name, or from explicit levels, without steps.

    Raises:
        ValueError: the name is unknown, the levels do not decrease, or `steps` does not fit; the message names the `method`.
    """
    if not isinstance(grid, str):
        levels = tuple(float(level) for level in grid)
        if len(levels) < 2 or not math.inf > levels[0] or not all(a > b > 0 for a, b in pairwise(levels)):
            raise ValueError(f"grid = {list(levels)}: pass at least two levels, positive, finite and decreasing.")
        if steps is not None:
            raise ValueError(f"steps = {steps}: the grid of {len(levels)} levels already sets the steps. Leave steps out.")
        return ExplicitGrid(levels)
    if grid not in NAMED_GRIDS:
        raise ValueError(
            f"grid = {grid!r} is unknown. Choose one of {', '.join(NAMED_GRIDS)}, or pass decreasing levels, "
            "such as those of pfgm.optimize_grid (optimized on the command line)."
        )
    if steps is None or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps = {steps}: {method} takes fixed steps. Choose a number from 1 to {MAX_STEPS}.")
    return NAMED_GRIDS[grid](steps)
