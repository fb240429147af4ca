"""Solvers: which methods there are, in which coordinates, and how each takes a state along its slope.

torchdiffeq does the adaptive methods and the Runge-Kutta ones on fixed grids, `multistep` the others, `runge_kutta`
those with steps for each sample. The steps of torchdiffeq's adaptive methods are those that the worst sample of a batch needs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor

from pfgm.core.arguments import checked
from pfgm.core.tensors import check_positive
from pfgm.sampling.coordinates import Angle, Coordinates, LogSigma, Sigma
from pfgm.sampling.grids import Grid, make_grid
from pfgm.sampling.multistep import Slope, adams_bashforth, dpm_solver
from pfgm.sampling.runge_kutta import GROW, TABLEAUS, StepError, integrate_per_sample, rms

BOTH, ANGLE, LOG_SIGMA = ("angle", "log_sigma"), ("angle",), ("log_sigma",)
ADAPTIVE = {"dopri5": BOTH, "dopri8": BOTH, "bosh3": BOTH, "adaptive_heun": BOTH}
FIXED = {"euler": BOTH, "midpoint": BOTH, "heun2": BOTH, "rk4": BOTH, "ab2": ANGLE, "ab3": ANGLE}
FIXED |= {"dpmpp_2m": LOG_SIGMA, "dpmpp_3m": LOG_SIGMA, "edm_heun": LOG_SIGMA}
METHODS = ADAPTIVE | FIXED
"""The coordinates in which each method exists, its default first."""
MULTISTEP = {"ab2": 2, "ab3": 3, "dpmpp_2m": 2, "dpmpp_3m": 3}
"""Their orders."""
PUBLISHED = ("dpmpp_2m", "dpmpp_3m", "edm_heun")
"""Methods whose default grid is "rho"."""
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "ab3", "steps": 4},
    "balanced": {"method": "ab3", "steps": 8},
    "reference": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4},
}
"""Named trade-offs: 6 calls, 10 calls, and as many as the error needs to be that of the network alone."""
RTOL, ATOL = 0.05, 0.05
"""Default tolerances, of a state of unit variance."""
FIRST_STEP = 0.05
"""First step of the adaptive methods, as a part of the whole way."""
MAX_STEPS = 10_000
"""Steps after which an adaptive method is given up."""
GIVEN_UP = ("underflow in dt", "max_num_steps exceeded", "non-finite values in state")
"""How torchdiffeq's AssertionErrors begin."""
OnStep = Callable[[Any, Tensor], None]
"""What is told of the time and the state that a step reached."""


@dataclass
class SolverStats:
    """What a solver did: steps accepted and rejected, and an estimate of the state's `error`, root mean square of each sample
    [B], as the sum of what its own lower order says of each step; None for Runge-Kutta methods with fixed steps."""

    accepted: int = 0
    rejected: int = 0
    error: Tensor | None = None

    def __add__(self, other: "SolverStats") -> "SolverStats":
        """Of two ways, one after the other."""
        error = self.error if other.error is None else other.error if self.error is None else self.error + other.error
        return SolverStats(self.accepted + other.accepted, self.rejected + other.rejected, error)


@dataclass(frozen=True)
class _Method:
    method: str
    coordinates: str

    def path(self, sigma_data: float) -> Coordinates:
        """The coordinates the method works in."""
        if self.method == "edm_heun":
            return Sigma()
        return Angle(sigma_data) if self.coordinates == "angle" else LogSigma()


@dataclass(frozen=True)
class Adaptive(_Method):
    """A method that chooses its steps, with the tolerances of the state: one step for the whole batch, by torchdiffeq, or if
    `independent` one for each sample."""

    rtol: float
    atol: float
    independent: bool = False

    def last_level(self, sigma_data: float, start: float, end: float) -> float:
        """Where a draw hands over to the final denoising: at its end."""
        return end

    def levels(self, sigma_data: float, start: float, end: float) -> list[float]:
        """The levels that the way from `start` to `end` must pass through: these two."""
        return [start, end]

    def follow(
        self, slope: Slope, state: Tensor, path: Coordinates, levels: Sequence[float], at: Tensor, on_step: OnStep
    ) -> tuple[Tensor, SolverStats]:
        """The states at the times `at` [points] on the way through `levels`; the first is `state`. StepError if it is lost.

        `on_step(time, state)` is told of each step; times are numbers, or [B] if independent.
        """
        start, way = float(at[0]), float(at[-1] - at[0])
        if self.independent:
            each = integrate_per_sample(
                lambda t, state: way * slope(start + way * t, state),
                state,
                _share(at),
                TABLEAUS[self.method],
                rtol=self.rtol,
                atol=self.atol,
                first_step=FIRST_STEP,
                max_steps=MAX_STEPS,
                on_step=lambda t, state: on_step(start + way * t, state),
            )
            return each.states, SolverStats(int(each.accepted.max()), int(each.rejected.max()), each.error)
        from torchdiffeq import odeint  # here: the command line's help must not wait for it

        right_hand_side = _Watched(slope, start, way, on_step, self)
        # Adaptive methods would step past the end and interpolate, that is ask the network for levels out of range: step_t.
        options = {"norm": right_hand_side.norm, "step_t": at.new_ones(1), "first_step": FIRST_STEP, "ifactor": GROW}
        try:
            states = odeint(
                right_hand_side,
                state,
                _share(at),
                method=self.method,
                rtol=self.rtol,
                atol=self.atol,
                options=options | {"max_num_steps": MAX_STEPS},
            )
        except AssertionError as error:
            if not str(error).startswith(GIVEN_UP):
                raise
            raise StepError(str(error)) from error
        return states, right_hand_side.steps


@dataclass(frozen=True)
class Fixed(_Method):
    """A method on a grid."""

    grid: Grid

    def last_level(self, sigma_data: float, start: float, end: float) -> float:
        """Where a draw hands over to the final denoising: the grid knows."""
        return self.grid.last(self.path(sigma_data), start, end)

    def levels(self, sigma_data: float, start: float, end: float) -> list[float]:
        """Those of the grid."""
        return self.grid.levels(self.path(sigma_data), start, end)

    def follow(
        self, slope: Slope, state: Tensor, path: Coordinates, levels: Sequence[float], at: Tensor, on_step: OnStep
    ) -> tuple[Tensor, SolverStats]:
        """As `Adaptive.follow`; between `levels` the states are interpolated linearly."""
        times = [path.time(level) for level in levels]
        steps = SolverStats(len(times) - 1)
        if self.method in MULTISTEP:
            make = adams_bashforth if self.method in ("ab2", "ab3") else dpm_solver
            return _pick(state, make(slope, state, times, MULTISTEP[self.method]), times, at, on_step, steps), steps
        from torchdiffeq import odeint

        right_hand_side = _Forward(slope, times[0], times[-1] - times[0], on_step)
        grid = _share(torch.tensor(times, dtype=torch.float64, device=state.device))
        method, options = "heun2" if self.method == "edm_heun" else self.method, {"grid_constructor": lambda f, y, t: grid}
        return odeint(right_hand_side, state, _share(at), method=method, options=options), steps


Solver = Adaptive | Fixed


class SolverOptions(TypedDict, total=False):
    """The arguments of `make_solver`."""

    preset: str | None
    method: str | None
    coordinates: str | None
    rtol: float | None
    atol: float | None
    independent: bool | None
    steps: int | None
    grid: str | Sequence[float] | None


@checked
def make_solver(
    preset: str | None = None,
    method: str | None = None,
    coordinates: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    independent: bool | None = None,
    steps: int | None = None,
    grid: str | Sequence[float] | None = None,
) -> Solver:
    """The solver of these names and numbers; ValueError if they do not fit together.

    `preset` is one of PRESETS ("balanced" if nothing is given) and leaves nothing else to say. `method` is one of METHODS
    (default: bosh3 for a tolerance, otherwise ab3), `coordinates` "angle" or "log_sigma" (default: angle where the method
    has it). Adaptive methods take `rtol` and `atol` (default .05 each; of the state, which has unit variance in angle
    coordinates), and those of PAIRS `independent`: steps for each sample, so that it does not depend on its batch mates. The
    others take `steps` and a `grid`: "uniform" in the coordinate's time, "paced" (almost so; default of ab3), "rho" (default
    of edm_heun and DPM-Solver++), or the falling levels themselves, without `steps`. For edm_heun the final denoising is the
    last of its `steps`, as published.
    """
    own = {"method": method, "coordinates": coordinates, "rtol": rtol, "atol": atol, "steps": steps, "grid": grid}
    given = {name: value for name, value in (own | {"independent": independent or None}).items() if value is not None}
    if preset is not None or not given:
        return _of_preset(preset or "balanced", given)
    method = method or ("ab3" if not given.keys() & {"rtol", "atol", "independent"} else "bosh3")
    if method not in METHODS:
        raise ValueError(f"method = {method!r} is unknown; choose one of {', '.join(METHODS)}")
    coordinates = coordinates or METHODS[method][0]
    if coordinates not in BOTH:
        raise ValueError(f"coordinates = {coordinates!r} is unknown; choose one of {', '.join(BOTH)}")
    if coordinates not in METHODS[method]:
        raise ValueError(
            f"coordinates = {coordinates!r}: {method} exists in {METHODS[method][0]} coordinates only; leave it out"
        )
    if method in ADAPTIVE:
        if steps is not None or grid is not None:
            raise ValueError(
                f"steps = {steps}, grid = {grid}: {method} chooses its own steps; give rtol and atol, "
                f"or one of {', '.join(FIXED)}"
            )
        if independent and method not in TABLEAUS:
            raise ValueError(f"independent = True: {method} has no steps for each sample; choose one of {', '.join(TABLEAUS)}")
        tolerances = _tolerance("rtol", rtol, RTOL), _tolerance("atol", atol, ATOL)
        return Adaptive(method, coordinates, *tolerances, bool(independent))
    return _make_fixed(method, coordinates, given, steps, grid)


def _make_fixed(
    method: str, coordinates: str, given: dict[str, Any], steps: int | None, grid: str | Sequence[float] | None
) -> Fixed:
    if given.keys() & {"rtol", "atol"}:
        tolerances = ", ".join(f"{name} = {given[name]}" for name in ("rtol", "atol") if name in given)
        raise ValueError(f"{tolerances}: {method} has fixed steps; give steps, or one of {', '.join(ADAPTIVE)}")
    if "independent" in given:
        raise ValueError(f"independent = True: {method} has fixed steps, its samples are independent already; leave it out")
    if method == "edm_heun" and steps is not None:
        if steps < 2:
            raise ValueError(f"steps = {steps}: edm_heun needs 2 at least, since the final denoising is the last of them")
        steps -= 1
    usual = "paced" if method == "ab3" else "rho" if method in PUBLISHED else "uniform"
    return Fixed(method, coordinates, make_grid(usual if grid is None else grid, steps, method))


def _of_preset(preset: str, given: dict[str, Any]) -> Solver:
    if preset not in PRESETS:
        raise ValueError(f"preset = {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    if given:
        raise ValueError(f"preset = {preset!r} says it all; leave out either preset or {', '.join(given)}")
    return make_solver(**PRESETS[preset])


class _Forward:
    """A slope for torchdiffeq: over a time that runs from 0 to 1."""

    def __init__(self, slope: Slope, start: float, way: float, on_step: OnStep):
        self.slope, self.start, self.way, self.on_step = slope, start, way, on_step

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        return self.way * self.slope(self.start + self.way * float(t), state)

    def callback_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        """A step begins."""
        self.on_step(self.start + self.way * float(t), state)


class _Watched(_Forward):
    """The same for adaptive methods: their norm, and what they did."""

    def __init__(self, slope: Slope, start: float, way: float, on_step: OnStep, solver: Adaptive):
        super().__init__(slope, start, way, on_step)
        self.steps, self.solver, self.ratio = SolverStats(), solver, torch.zeros(())

    def norm(self, error: Tensor) -> Tensor:
        """The largest of the samples' root mean squares: torchdiffeq's default, over the batch, lets one sample be wrong."""
        self.ratio = rms(error)
        return self.ratio.amax()

    def callback_accept_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        self.steps += SolverStats(1, 0, self.ratio * (self.solver.atol + self.solver.rtol * rms(state)))

    def callback_reject_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        self.steps.rejected += 1


def _share(times: Tensor) -> Tensor:
    """Of the way from the first to the last of `times`."""
    share = (times - times[0]) / (times[-1] - times[0])
    share[-1] = 1.0
    return share


def _pick(
    state: Tensor,
    states: Iterable[tuple[Tensor, Tensor]],
    times: Sequence[float],
    at: Tensor,
    on_step: OnStep,
    steps: SolverStats,
) -> Tensor:
    """Of `state` at times[0] and `states` at times[1:], those at the times `at`, linearly in between; no others are kept."""
    picked, wanted, way, error = [state], at[1:-1].tolist(), times[-1] - times[0], torch.zeros((), dtype=torch.float64)
    for (start, end), (after, lower) in zip(pairwise(times), states, strict=True):
        while wanted and (wanted[0] - end) / way <= 0:
            picked.append(torch.lerp(state, after, (wanted.pop(0) - start) / (end - start)))
        state, error = after, error + rms(after - lower)
        on_step(end, state)
    steps.error = error
    return torch.stack([*picked, state])


def _tolerance(name: str, value: float | None, default: float) -> float:
    value = default if value is None else value
    check_positive(name, value)
    return value
