"""The flow's ordinary differential equation and its solution.

    dx/dlevel = (x - denoise(x, level/ratio)) / level

with ratio = 1 on the plane sigma = level, and ratio = varsigma/sigma, fixed for each sample, on hemispheres. D does not appear.
The state is float64; see `pfgm.sampling.coordinates` for its forms and `pfgm.sampling.methods` for the methods.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core.tensors import expand
from pfgm.sampling.coordinates import Coordinates
from pfgm.sampling.guidance import cost
from pfgm.sampling.methods import OnStep, Slope, SolverStats
from pfgm.sampling.runge_kutta import StepError
from pfgm.sampling.solvers import Solver


class SolverError(RuntimeError):
    """The flow could not be integrated: the denoiser returned NaN or infinity, or the step size vanished."""


class OutOfCalls(Exception):
    """A call would exceed the number of network calls allowed."""


class CountedDenoiser:
    """Present a denoiser to a solver: float64 in and out, calls counted, non-finite values refused.

    Networks get their input in the dtype of their parameters, or of their attribute `dtype` if they have one.

    Args:
        denoiser: denoiser in centred model space.
        conditions: tensors [B, ...] passed to `denoiser` by name with each call.
        dtype: dtype of the input of denoisers without parameters.
        on_call: called after each call with the number of calls so far and the level, the highest if samples differ.

    Attributes:
        calls: network calls so far.
        level: level of the last call.
        max_calls: number of calls that must not be exceeded.
        dtype: dtype of the input.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        conditions: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        on_call: Callable[[int, float], None] | None = None,
    ):
        self.denoiser, self.conditions, self.on_call = denoiser, conditions, on_call
        self.calls, self.level, self.max_calls = 0, math.nan, math.inf
        self.dtype = input_dtype(denoiser, dtype)

    def __call__(self, x: Tensor, level: float | Tensor, ratio: Tensor) -> Tensor:
        """Return denoise(x, level/ratio).

        Args:
            x: points [B, ...] in model space.
            level: effective noise level, a float or [B].
            ratio: level/sigma of each sample, [B].

        Raises:
            OutOfCalls: the call would exceed `max_calls`.
            SolverError: the denoiser returned another shape than that of x, or values that are not finite.
        """
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
    """Hold what following the flow gave.

    Args:
        states: points x [points, B, ...] in float64, the first being the start. If calls ran out, the start and the last
            point reached.
        levels: levels [points] of the states; NaN if calls ran out.
        level: level of the last state, a float or, if calls ran out and samples have steps of their own, [B].
        stats: steps taken, and the estimated error in the unit of x.
        complete: False if calls ran out before the end.
    """

    states: Tensor
    levels: Tensor
    level: float | Tensor
    stats: SolverStats
    complete: bool = True

    @property
    def end(self) -> Tensor:
        """The last state [B, ...]."""
        return self.states[-1]


def follow(
    denoise: CountedDenoiser,
    x: Tensor,
    levels: Sequence[float],
    *,
    solver: Solver,
    sigma_data: float,
    ratio: Tensor | None = None,
    points: int = 2,
) -> Solution:
    """Follow the flow from `x` at levels[0] through `levels` to the last.

    Args:
        denoise: denoiser whose flow it is.
        x: points [B, ...] in model space.
        levels: levels that the solution passes through, rising or falling; a single one returns `x` itself.
        solver: solver to use.
        sigma_data: standard deviation of the data, in the unit of x.
        ratio: level/sigma of each sample, [B], which stays fixed (default 1).
        points: number of states to return, equally spaced in the coordinates' time.

    Returns:
        The solution, which is incomplete if `denoise` ran out of calls.

    Raises:
        SolverError: the denoiser's values are not finite, or the tolerance cannot be met.
    """
    if len(levels) == 1:
        here = torch.full((points,), levels[0], dtype=torch.float64, device=x.device)
        return Solution(x.double().expand(points, *x.shape), here, levels[0], SolverStats())
    coordinates = solver.coordinates(sigma_data)
    ratios = (torch.ones(len(x)) if ratio is None else ratio).to(x.device, torch.float64)

    def slope(time: Any, state: Tensor) -> Tensor:
        level = coordinates.level(time)
        wide = expand(level, state) if isinstance(level, Tensor) else level
        point = coordinates.radius(wide) * state
        return coordinates.slope(point, denoise(point, level, ratios), wide)

    start, end = coordinates.time(levels[0]), coordinates.time(levels[-1])
    times = torch.linspace(start, end, points, dtype=torch.float64, device=x.device)
    state = x.double() / coordinates.radius(levels[0])
    progress = _Progress(start, state)
    try:
        states, stats = solve(denoise, slope, state, levels, solver, coordinates, times, progress)
    except OutOfCalls:
        return progress.solution(x, coordinates)
    at = [levels[0], *map(coordinates.level, times[1:-1].tolist()), levels[-1]]
    radii = torch.tensor([coordinates.radius(level) for level in at], dtype=torch.float64, device=x.device)
    if stats.error is not None:
        stats.error = stats.error * coordinates.radius(levels[-1])
    states = states * radii.reshape(-1, *[1] * x.ndim)
    return Solution(states, torch.tensor(at, dtype=torch.float64, device=x.device), levels[-1], stats)


class _Progress:
    """Keeps the time and the state that a solver has reached, and counts the steps."""

    def __init__(self, time: Any, state: Tensor):
        self.time, self.state, self.steps = time, state, 0

    def __call__(self, time: Any, state: Tensor) -> None:
        self.steps += bool(torch.as_tensor(time != self.time).any())
        self.time, self.state = time, state

    def solution(self, x: Tensor, coordinates: Coordinates) -> Solution:
        """Return the incomplete solution that began at `x`."""
        level = coordinates.level(self.time)
        wide = expand(level, x.double()) if isinstance(level, Tensor) else level
        states = torch.stack([x.double(), coordinates.radius(wide) * self.state])
        return Solution(states, torch.full((2,), torch.nan), level, SolverStats(self.steps), complete=False)


def solve(
    denoise: CountedDenoiser,
    slope: Slope,
    state: Tensor,
    levels: Sequence[float],
    solver: Solver,
    coordinates: Coordinates,
    times: Tensor,
    on_step: OnStep,
) -> tuple[Tensor, SolverStats]:
    """Call `solver.follow` for a `state` whose slope asks `denoise`. Raise SolverError, with advice, if the solver gives up."""
    try:
        return solver.follow(slope, state, coordinates, levels, times, on_step)
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
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else iter(())
    return next((p.dtype for p in parameters if p.is_floating_point()), default)
