"""The flow's ordinary differential equation, followed by a solver.

    dx/dlevel = (x - denoise(x, level/ratio)) / level

with ratio = 1 on the plane sigma = level, and ratio = varsigma/sigma, fixed for each sample, on hemispheres. D does not appear.
The state is float64; see `pfgm.sampling.coordinates` for its forms and `pfgm.sampling.solvers` for the methods.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core.tensors import expand
from pfgm.sampling.coordinates import Coordinates
from pfgm.sampling.guidance import cost
from pfgm.sampling.multistep import Slope
from pfgm.sampling.runge_kutta import StepError
from pfgm.sampling.solvers import OnStep, Solver, SolverStats


class SolverError(RuntimeError):
    """The flow could not be integrated: the denoiser returned NaN or infinity, or the step size vanished."""


class OutOfCalls(Exception):
    """The denoiser was asked more often than allowed."""


class CountedDenoiser:
    """A denoiser as a solver sees it: float64 in and out, calls counted, values that are not finite refused.

    Networks get their input in the dtype of their parameters (or of their attribute `dtype`), denoisers without parameters in
    `dtype`. After each call `on_call(calls, level)` is told the number of calls so far and the (highest) level that was asked
    for, also kept as `level`. Beyond `max_calls` calls OutOfCalls is raised.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        label: Tensor | None = None,
        *,
        dtype: torch.dtype,
        on_call: Callable[[int, float], None] | None = None,
    ):
        self.denoiser, self.label, self.on_call = denoiser, label, on_call
        self.calls, self.level, self.max_calls = 0, math.nan, math.inf
        self.dtype = input_dtype(denoiser, dtype)

    def __call__(self, x: Tensor, level: float | Tensor, ratio: Tensor) -> Tensor:
        """denoise(x, level/ratio) for `x` [B, ...], `level` (float or [B]) and `ratio` [B]. SolverError if it is not finite."""
        sigma = (level / ratio).to(self.dtype)
        price = cost(self.denoiser, sigma)
        if self.calls + price > self.max_calls:
            raise OutOfCalls
        point = x.to(self.dtype)
        denoised = self.denoiser(point, sigma) if self.label is None else self.denoiser(point, sigma, label=self.label)
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise SolverError(
                f"denoiser returned {got} for x of shape {tuple(x.shape)}; it must return the denoised x, of its shape"
            )
        self.calls += price
        self.level = float(level.max()) if isinstance(level, Tensor) else level
        if not bool(torch.isfinite(denoised).all()):
            bad = int((~torch.isfinite(denoised).flatten(1).all(1)).sum())
            raise SolverError(
                f"the denoiser returned NaN or infinity for {bad} of {len(x)} samples at level {self.level:.4g} "
                f"(call {self.calls}); its weights may have diverged in training, or its dtype may be too narrow: try float32"
            )
        if self.on_call is not None:
            self.on_call(self.calls, self.level)
        return denoised.double()


@dataclass
class Solution:
    """What following the flow gave: float64 `states` [points, B, ...] at `levels` [points] and what the solver did, `steps`.

    The error in `steps` is in the units of x. If calls ran out, the way is not `complete`: its states are the first and the
    last that was reached, whose `level` (float or [B]) is above the end.
    """

    states: Tensor
    levels: Tensor
    level: float | Tensor
    steps: SolverStats
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
    """Follow the flow from `x` [B, ...] at levels[0] through `levels` to the last, with `ratio` [B] fixed (default 1).

    The states of the Way are at `points` levels equally spaced in the coordinate's time; the first is x itself. SolverError if
    the denoiser is not finite or the tolerance cannot be met.
    """
    path = solver.path(sigma_data)
    if len(levels) == 1:
        here = torch.full((points,), levels[0], dtype=torch.float64, device=x.device)
        return Solution(x.double().expand(points, *x.shape), here, levels[0], SolverStats())
    ratios = torch.ones(len(x)) if ratio is None else ratio
    ratios = ratios.to(x.device, torch.float64)

    def slope(time: Any, state: Tensor) -> Tensor:
        level = path.level(time)
        wide = expand(level, state) if isinstance(level, Tensor) else level
        point = path.radius(wide) * state
        return path.slope(point, denoise(point, level, ratios), wide)

    start, end = path.time(levels[0]), path.time(levels[-1])
    times = torch.linspace(start, end, points, dtype=torch.float64, device=x.device)
    state = x.double() / path.radius(levels[0])
    reached = _Reached(start, state)
    try:
        states, steps = solve(denoise, slope, state, levels, solver, path, times, reached)
    except OutOfCalls:
        level = path.level(reached.time)
        wide = expand(level, x.double()) if isinstance(level, Tensor) else level
        states, way = torch.stack([x.double(), path.radius(wide) * reached.state]), torch.full((2,), torch.nan)
        return Solution(states, way, level, SolverStats(reached.steps), complete=False)
    passed = [levels[0], *map(path.level, times[1:-1].tolist()), levels[-1]]
    radii = torch.tensor([path.radius(level) for level in passed], dtype=torch.float64, device=x.device)
    if steps.error is not None:
        steps.error = steps.error * path.radius(levels[-1])
    way = torch.tensor(passed, dtype=torch.float64, device=x.device)
    return Solution(states * radii.reshape(-1, *[1] * x.ndim), way, levels[-1], steps)


class _Reached:
    """The time and the state that a solver has reached, and in how many steps."""

    def __init__(self, time: Any, state: Tensor):
        self.time, self.state, self.steps = time, state, 0

    def __call__(self, time: Any, state: Tensor) -> None:
        self.steps += bool(torch.as_tensor(time != self.time).any())
        self.time, self.state = time, state


def solve(
    denoise: CountedDenoiser,
    slope: Slope,
    state: Tensor,
    levels: Sequence[float],
    solver: Solver,
    path: Coordinates,
    times: Tensor,
    on_step: OnStep,
) -> tuple[Tensor, SolverStats]:
    """`solver.follow` for any `state` whose slope asks `denoise`; what it cannot do becomes a SolverError with advice."""
    try:
        return solver.follow(slope, state, path, levels, times, on_step)
    except StepError as error:
        raise SolverError(
            f"{solver.method} could not meet its tolerance at level {denoise.level:.4g} after {denoise.calls} calls ({error}); "
            "raise rtol and atol, or use a fixed method such as ab3; if that is no better, the network is not smooth there"
        ) from error


def input_dtype(denoiser: Any, default: torch.dtype) -> torch.dtype:
    """The dtype in which a denoiser wants its samples."""
    wanted = getattr(denoiser, "dtype", None)
    if isinstance(wanted, torch.dtype):
        return wanted
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else iter(())
    return next((p.dtype for p in parameters if p.is_floating_point()), default)
