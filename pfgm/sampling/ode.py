"""The flow's ordinary differential equation and its solution.

    dx/dlevel = (x - denoise(x, level/ratio)) / level

with ratio = 1 on the plane sigma = level, and ratio = varsigma/sigma, fixed for each sample, on hemispheres. D does not appear.
The state is float64; see `pfgm.sampling.coordinates` for its forms and `pfgm.sampling.methods` for the methods.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core.tensors import expand
from pfgm.sampling.coordinates import Coordinates
from pfgm.sampling.guidance import cost
from pfgm.sampling.methods import Problem, SolverStats, StepError
from pfgm.sampling.solvers import Solver

FIRST_STEP = 0.05  # first step of adaptive methods, as a fraction of the whole interval
MAX_STEPS = 10_000  # number of steps after which adaptive methods give up
OnCall = Callable[[int, float], None]  # gets the number of calls so far and the level, the highest if samples differ


class SolverError(RuntimeError):
    """The flow could not be integrated: the denoiser returned NaN or infinity, or the step size vanished."""


class OutOfCalls(Exception):
    """A call would exceed the number of network calls allowed."""


class CountedDenoiser:
    """Present a denoiser to a solver: float64 in and out, calls counted, non-finite values refused.

    The input of a denoiser without a dtype of its own, see `input_dtype`, has the given one.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        conditions: Mapping[str, Tensor],
        dtype: torch.dtype,
        on_call: OnCall | None = None,
    ):
        self.denoiser, self.conditions, self.on_call = denoiser, conditions, on_call
        self.calls, self.level, self.max_calls = 0, math.nan, math.inf
        self.dtype = input_dtype(denoiser, dtype)

    def __call__(self, x: Tensor, level: float | Tensor, ratio: Tensor) -> Tensor:
        """Return denoise(x, level/ratio). Raise OutOfCalls or, for values that are not finite or no x, SolverError."""
        sigma = (level / ratio).to(self.dtype)
        calls = cost(self.denoiser, sigma)
        if self.calls + calls > self.max_calls:
            raise OutOfCalls
        denoised = self.denoiser(x.to(self.dtype), sigma, **self.conditions)
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            returned = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise SolverError(
                f"denoiser returned {returned} for x of shape {tuple(x.shape)}. It must return the denoised x, of its shape."
            )
        self.calls += calls
        self.level = float(level.max()) if isinstance(level, Tensor) else level
        if not bool(torch.isfinite(denoised).all()):
            bad = int((~torch.isfinite(denoised).flatten(1).all(1)).sum())
            raise SolverError(
                f"the denoiser returned NaN or infinity for {bad} of {len(x)} samples at level {self.level:.4g} "
                f"(call {self.calls}). Its weights may have diverged in training, or its dtype may be too narrow: try float32."
            )
        if self.on_call is not None:
            self.on_call(self.calls, self.level)
        return denoised.double()


@dataclass
class Solution:
    """Hold what following the flow gave; if calls ran out, only the start and the last point reached."""

    states: Tensor  # x [points, B, ...], float64
    levels: Tensor  # levels [points] of the states; NaN if calls ran out
    level: float | Tensor  # that of the last state; [B] if calls ran out and samples have steps of their own
    stats: SolverStats  # with the error in the unit of x
    complete: bool = True  # False if calls ran out


def follow(
    denoise: CountedDenoiser,
    x: Tensor,
    levels: Sequence[float],
    solver: Solver,
    coordinates: Coordinates,
    ratio: Tensor | None = None,
    points: int = 2,
) -> Solution:
    """Follow the flow from `x` [B, ...] at levels[0] through `levels` to the last; a single level returns `x` itself.

    `ratio` [B] is level/sigma of each sample (default 1). The states are at `points` equal steps of the coordinates' time.
    """
    if len(levels) == 1:
        here = torch.full((points,), levels[0], dtype=torch.float64, device=x.device)
        return Solution(x.double().expand(points, *x.shape), here, levels[0], SolverStats())
    ratios = (torch.ones(len(x)) if ratio is None else ratio).to(x.device, torch.float64)

    def broadcast(level: Any) -> Any:
        return expand(level, state) if isinstance(level, Tensor) else level

    def slope(time: Any, state: Tensor) -> Tensor:
        level = coordinates.level(time)
        point = coordinates.radius(broadcast(level)) * state
        return coordinates.slope(point, denoise(point, level, ratios), broadcast(level))

    times = [coordinates.time(level) for level in levels]
    at = torch.linspace(times[0], times[-1], points, dtype=torch.float64, device=x.device)
    state = x.double() / coordinates.radius(levels[0])
    reached, steps = (times[0], state), 0

    def on_step(time: Any, state: Tensor) -> None:
        nonlocal reached, steps
        steps += bool(torch.as_tensor(time != reached[0]).any())
        reached = time, state

    try:
        states, stats = solve(solver, denoise, Problem(slope, state, times, at, on_step))
    except OutOfCalls:
        level = coordinates.level(reached[0])
        end = coordinates.radius(broadcast(level)) * reached[1]
        return Solution(torch.stack([x.double(), end]), torch.full((2,), torch.nan), level, SolverStats(steps), complete=False)
    if stats.error is not None:
        stats.error = stats.error * coordinates.radius(levels[-1])
    passed = [levels[0], *map(coordinates.level, at[1:-1].tolist()), levels[-1]]
    radii = torch.tensor([coordinates.radius(level) for level in passed], dtype=torch.float64, device=x.device)
    here = torch.tensor(passed, dtype=torch.float64, device=x.device)
    return Solution(expand(radii, states) * states, here, levels[-1], stats)


def solve(solver: Solver, denoise: CountedDenoiser, problem: Problem) -> tuple[Tensor, SolverStats]:
    """Solve a problem whose slope asks `denoise`. Raise SolverError, with advice, if the solver gives up."""
    problem = replace(problem, rtol=solver.rtol, atol=solver.atol, first_step=FIRST_STEP, max_steps=MAX_STEPS)
    try:
        return solver.integrate(problem)
    except StepError as error:
        raise SolverError(
            f"{solver.method.name} could not meet its tolerance at level {denoise.level:.4g} after {denoise.calls} calls "
            f"({error}). Raise rtol and atol, or use a method with fixed steps such as ab3. If that is no better, the network "
            "is not smooth there."
        ) from error


def input_dtype(denoiser: Any, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a denoiser's input: of its attribute `dtype`, of its parameters, or `default`."""
    own = getattr(denoiser, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), default)
