"""The registry of solver methods: what a method is, and the problem that it integrates.

Each file that implements methods registers every one of them by a single call, `register(Method(...))`. Names, defaults and
capabilities are read from this registry and are stated nowhere else. A new method with fixed steps is a `Stepper`, registered
with `on_grid(stepper)` as its integrator; `multistep.py` has a base class for those that reuse earlier steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pfgm.sampling.coordinates import Angle, Coordinates, LogSigma

# Derivative of the state [B, ...] at a time: a float, or [B] if each sample has its own.
Slope = Callable[[Any, Tensor], Tensor]
# Called with the time and the state that a step has reached.
OnStep = Callable[[Any, Tensor], None]
# Makes the coordinates for data of a given sigma_data.
MakeCoordinates = Callable[[float], Coordinates]

ANGLE: dict[str, MakeCoordinates] = {"angle": Angle}
LOG_SIGMA: dict[str, MakeCoordinates] = {"log_sigma": lambda sigma_data: LogSigma()}
BOTH = ANGLE | LOG_SIGMA


class StepError(RuntimeError):
    """Signal that the step size vanished or the number of steps exceeded its limit."""


@dataclass
class SolverStats:
    """Count the steps of a solver and estimate its error.

    Args:
        accepted: steps taken.
        rejected: steps tried in vain by an adaptive method.
        error: estimated root mean square error of each sample's state, [B], in the unit of the state: the sum of the
            differences between each step and a step of lower order. None for Runge-Kutta methods with fixed steps.
    """

    accepted: int = 0
    rejected: int = 0
    error: Tensor | None = None

    def __add__(self, other: "SolverStats") -> "SolverStats":
        """Add the counts and the errors of two successive integrations."""
        error = self.error if other.error is None else other.error if self.error is None else self.error + other.error
        return SolverStats(self.accepted + other.accepted, self.rejected + other.rejected, error)


@dataclass(frozen=True)
class Problem:
    """Pose an initial value problem to a method."""

    slope: Slope
    state: Tensor  # initial state [B, ...], float64
    times: Sequence[float]  # monotone; the grid of fixed-step methods, of which adaptive ones use the ends
    at: Tensor  # times [points] of the states to return, in the order and with the ends of `times`
    on_step: OnStep = lambda time, state: None  # called after (or, by torchdiffeq, before) each step
    rtol: float = 0.0  # tolerances of adaptive methods
    atol: float = 0.0
    first_step: float = 1.0  # first step of adaptive methods, as a fraction of the whole interval
    max_steps: int = 0  # number of steps after which adaptive methods give up

    def rescaled(self) -> "Problem":
        """Rescale time linearly, so that it runs from 0 to 1."""
        start, length = self.times[0], self.times[-1] - self.times[0]
        grid = torch.tensor(self.times, dtype=torch.float64, device=self.state.device)
        return replace(
            self,
            slope=lambda time, state: length * self.slope(start + length * time, state),
            times=_fractions(grid).tolist(),
            at=_fractions(self.at),
            on_step=lambda time, state: self.on_step(start + length * time, state),
        )


# Returns the states [points, B, ...] at the times `problem.at` and the statistics; raises StepError if it has to give up.
Integrator = Callable[[Problem], tuple[Tensor, SolverStats]]
# Yields the states at times[1:], each with the state that a method of lower order makes of the last step, or None.
Stepper = Callable[[Slope, Tensor, Sequence[float]], Iterable[tuple[Tensor, Tensor | None]]]


@dataclass(frozen=True)
class Method:
    """Describe a solver method by its properties and its integrator.

    Args:
        name: name by which users choose the method.
        order: order of convergence.
        coordinates: coordinates in which the method exists, by name, the default first.
        integrate: integrator that steps the whole batch at once.
        adaptive: whether the method chooses its steps to meet a tolerance, rather than follow a grid.
        per_sample: integrator of an adaptive method that gives each sample steps of its own, if there is one.
        grid: default grid of a fixed-step method.
        one_step: whether a fixed-step method starts each step afresh, so that noise may be added before it.
        counts_denoising: whether the final denoising is the last of the user's `steps`.
    """

    name: str
    order: int
    coordinates: Mapping[str, MakeCoordinates]
    integrate: Integrator
    adaptive: bool = False
    per_sample: Integrator | None = None
    grid: str = "uniform"
    one_step: bool = False
    counts_denoising: bool = False


METHODS: dict[str, Method] = {}  # all methods by name


def register(method: Method) -> None:
    """Add `method` to the registry."""
    METHODS[method.name] = method


def on_grid(stepper: Stepper) -> Integrator:
    """Make an integrator of a `stepper`; between the grid's times the states are interpolated linearly."""
    return partial(_follow_grid, stepper)  # which, unlike a closure, can be pickled


def _follow_grid(stepper: Stepper, problem: Problem) -> tuple[Tensor, SolverStats]:
    times, state, stats = problem.times, problem.state, SolverStats(len(problem.times) - 1)
    states, pending, length = [state], problem.at[1:-1].tolist(), times[-1] - times[0]
    for (start, end), (after, lower) in zip(pairwise(times), stepper(problem.slope, state, times), strict=True):
        while pending and (pending[0] - end) / length <= 0:
            states.append(torch.lerp(state, after, (pending.pop(0) - start) / (end - start)))
        state, stats = after, stats + SolverStats(error=None if lower is None else rms(after - lower))
        problem.on_step(end, state)
    return torch.stack([*states, state]), stats


def _fractions(times: Tensor) -> Tensor:
    fractions = (times - times[0]) / (times[-1] - times[0])
    fractions[-1] = 1.0
    return fractions


def rms(error: Tensor) -> Tensor:
    """Return the root mean square of each sample of `error` [B, ...]: [B]."""
    return error.flatten(1).square().mean(1).sqrt()
