"""Solvers: which methods there are, in which coordinates, and how each takes a state along its slope.

torchdiffeq does the adaptive methods and the Runge-Kutta ones on fixed grids, `pfgm.multistep` the others. Adaptive methods
bound the error of the worst sample of a batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pfgm.coordinates import Angle, Coordinates, LogSigma, Sigma
from pfgm.grid import Grid, make_grid
from pfgm.kernel import check_positive
from pfgm.multistep import Slope, adams_bashforth, dpm_solver

BOTH, ANGLE, LOG_SIGMA = ("angle", "log_sigma"), ("angle",), ("log_sigma",)
ADAPTIVE = {"dopri5": BOTH, "dopri8": BOTH, "bosh3": BOTH, "adaptive_heun": BOTH}
FIXED = {"euler": BOTH, "midpoint": BOTH, "heun2": BOTH, "rk4": BOTH, "ab2": ANGLE, "ab3": ANGLE}
FIXED |= {"dpmpp_2m": LOG_SIGMA, "dpmpp_3m": LOG_SIGMA, "edm_heun": LOG_SIGMA}
METHODS = ADAPTIVE | FIXED
"""The coordinates in which each method exists, its default first."""
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


@dataclass
class Steps:
    """What a solver did: steps accepted and rejected."""

    accepted: int = 0
    rejected: int = 0


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
    """A method of torchdiffeq that chooses its steps, with the tolerances of the state."""

    rtol: float
    atol: float

    def last_level(self, sigma_data: float, start: float, end: float) -> float:
        """Where a draw hands over to the final denoising: at its end."""
        return end

    def follow(
        self, slope: Slope, state: Tensor, path: Coordinates, start: float, end: float, at: Tensor
    ) -> tuple[Tensor, Steps]:
        """The states at the times `at` [points], the first that of `state` at level `start`. AssertionError of torchdiffeq."""
        from torchdiffeq import odeint  # here: the command line's help must not wait for it

        right_hand_side = _Counting(slope, float(at[0]), float(at[-1]))
        # Adaptive methods would step past the end and interpolate, that is ask the network for levels out of range: step_t.
        options = {"norm": worst_sample, "first_step": FIRST_STEP, "step_t": at.new_ones(1), "max_num_steps": MAX_STEPS}
        states = odeint(
            right_hand_side,
            state,
            right_hand_side.share(at),
            method=self.method,
            rtol=self.rtol,
            atol=self.atol,
            options=options,
        )
        return states, right_hand_side.steps


@dataclass(frozen=True)
class Fixed(_Method):
    """A method on a grid."""

    grid: Grid

    def last_level(self, sigma_data: float, start: float, end: float) -> float:
        """Where a draw hands over to the final denoising: the grid knows."""
        return self.grid.last(self.path(sigma_data), start, end)

    def follow(
        self, slope: Slope, state: Tensor, path: Coordinates, start: float, end: float, at: Tensor
    ) -> tuple[Tensor, Steps]:
        """As `Adaptive.follow`; between grid points the states are interpolated linearly."""
        times = [path.time(level) for level in self.grid.levels(path, start, end)]
        steps = Steps(len(times) - 1)
        if self.method in ("ab2", "ab3"):
            return _pick(state, adams_bashforth(slope, state, times, int(self.method[-1])), times, at), steps
        if self.method in ("dpmpp_2m", "dpmpp_3m"):
            return _pick(state, dpm_solver(slope, state, times, int(self.method[-2])), times, at), steps
        from torchdiffeq import odeint

        right_hand_side = _Forward(slope, times[0], times[-1])
        grid = right_hand_side.share(torch.tensor(times, dtype=torch.float64, device=state.device))
        method, options = "heun2" if self.method == "edm_heun" else self.method, {"grid_constructor": lambda f, y, t: grid}
        return odeint(right_hand_side, state, right_hand_side.share(at), method=method, options=options), steps


Solver = Adaptive | Fixed


def make_solver(
    preset: str | None = None,
    method: str | None = None,
    coordinates: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    steps: int | None = None,
    grid: str | Sequence[float] | None = None,
) -> Solver:
    """The solver of these names and numbers; ValueError if they do not fit together.

    `preset` is one of PRESETS ("balanced" if nothing is given) and leaves nothing else to say. `method` is one of METHODS
    (default: adaptive_heun for a tolerance, otherwise ab3), `coordinates` "angle" or "log_sigma" (default: angle where the
    method has it). Adaptive methods take `rtol` and `atol` (default .05 each; of the state, which has unit variance in angle
    coordinates). The others take `steps` and a `grid`: "uniform" in the coordinate's time, "rho" (default of edm_heun and
    DPM-Solver++), or the falling levels themselves, without `steps`. For edm_heun the final denoising is the last of its
    `steps`, as published.
    """
    own = {"method": method, "coordinates": coordinates, "rtol": rtol, "atol": atol, "steps": steps, "grid": grid}
    given = {name: value for name, value in own.items() if value is not None}
    if preset is not None or not given:
        return _of_preset(preset or "balanced", given)
    method = method or ("ab3" if rtol is None and atol is None else "adaptive_heun")
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
        return Adaptive(method, coordinates, _tolerance("rtol", rtol, RTOL), _tolerance("atol", atol, ATOL))
    if rtol is not None or atol is not None:
        raise ValueError(f"rtol = {rtol}, atol = {atol}: {method} has fixed steps; give steps, or one of {', '.join(ADAPTIVE)}")
    if method == "edm_heun" and steps is not None:
        if steps < 2:
            raise ValueError(f"steps = {steps}: edm_heun needs 2 at least, since the final denoising is the last of them")
        steps -= 1
    return Fixed(method, coordinates, make_grid(grid or ("rho" if method in PUBLISHED else "uniform"), steps, method))


def _of_preset(preset: str, given: dict[str, Any]) -> Solver:
    if preset not in PRESETS:
        raise ValueError(f"preset = {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    if given:
        raise ValueError(f"preset = {preset!r} says it all; leave out either preset or {', '.join(given)}")
    return make_solver(**PRESETS[preset])


def worst_sample(error: Tensor) -> Tensor:
    """The largest of the samples' root mean squares: torchdiffeq's default, over the batch, lets one sample be wrong."""
    return error.flatten(1).square().mean(1).sqrt().amax()


class _Forward:
    """A slope for torchdiffeq: over a time that runs from 0 to 1."""

    def __init__(self, slope: Slope, start: float, end: float):
        self.slope, self.start, self.way = slope, start, end - start

    def share(self, times: Tensor) -> Tensor:
        share = (times - self.start) / self.way
        share[0], share[-1] = 0.0, 1.0
        return share

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        return self.way * self.slope(self.start + self.way * float(t), state)


class _Counting(_Forward):
    """The same for adaptive methods: it counts their steps."""

    def __init__(self, slope: Slope, start: float, end: float):
        super().__init__(slope, start, end)
        self.steps = Steps()

    def callback_accept_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        self.steps.accepted += 1

    def callback_reject_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        self.steps.rejected += 1


def _pick(state: Tensor, states: Iterable[Tensor], times: Sequence[float], at: Tensor) -> Tensor:
    """Of `state` at times[0] and `states` at times[1:], those at the times `at`, linearly in between; no others are kept."""
    picked, wanted, way = [state], at[1:-1].tolist(), times[-1] - times[0]
    for (start, end), after in zip(pairwise(times), states, strict=True):
        while wanted and (wanted[0] - end) / way <= 0:
            picked.append(torch.lerp(state, after, (wanted.pop(0) - start) / (end - start)))
        state = after
    return torch.stack([*picked, state])


def _tolerance(name: str, value: float | None, default: float) -> float:
    value = default if value is None else value
    check_positive(name, value)
    return value
