"""The flow's ordinary differential equation, its coordinates and its solvers.

    dx/dlevel = (x - denoise(x, level/ratio)) / level

with ratio = 1 on the plane sigma = level, and ratio = varsigma/sigma, fixed for each sample, on hemispheres. D does not appear.
Two coordinates, both integrated over a time that runs from 0 to 1:

    angle      u = x / sqrt(level² + s²), theta = arctan(level/s), du/dtheta = (c_skip x - denoise) / c_out, s = sigma_data.
               theta runs over less than pi/2, from the horizon of the hemisphere to the data; nothing is stiff, and the error
               a solver controls is relative to the right scale at every level.
    log_sigma  x over log level, dx/dlog(level) = x - denoise: the published form of PFGM, for comparison.

The solvers are torchdiffeq's. The state is float64; adaptive methods bound the error of the worst sample of the batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "rk4")
METHODS = ADAPTIVE + FIXED
RTOL, ATOL = 0.05, 0.05
"""Default tolerances, of a state of unit variance."""
FIRST_STEP = 0.05
"""First step of the adaptive methods, as a part of the whole way."""
MAX_STEPS = 10_000
"""Steps after which an adaptive method is given up."""


class SolverError(RuntimeError):
    """The flow could not be integrated: the denoiser returned NaN or infinity, or the step size vanished."""


class Angle:
    """x / sqrt(level² + s²) over arctan(level / s)."""

    def __init__(self, sigma_data: float):
        self.s = sigma_data

    def time(self, level: float) -> float:
        return math.atan(level / self.s)

    def level(self, time: Tensor) -> Tensor:
        return self.s * time.tan()

    def radius(self, level: Tensor) -> Tensor:
        """x divided by the state."""
        return (level.square() + self.s**2).sqrt()

    def drift(self, x: Tensor, denoised: Tensor, level: Tensor) -> Tensor:
        q = self.radius(level)
        return ((self.s / q).square() * x - denoised) * q / (level * self.s)


class LogSigma:
    """x over log(level)."""

    def __init__(self, sigma_data: float):
        """`sigma_data` is of no use here; the signature is that of `Angle`."""

    def time(self, level: float) -> float:
        return math.log(level)

    def level(self, time: Tensor) -> Tensor:
        return time.exp()

    def radius(self, level: Tensor) -> Tensor:
        return torch.ones_like(level)

    def drift(self, x: Tensor, denoised: Tensor, level: Tensor) -> Tensor:
        return x - denoised


COORDINATES: dict[str, type[Angle] | type[LogSigma]] = {"angle": Angle, "log_sigma": LogSigma}


@dataclass(frozen=True)
class Solver:
    """A method with its coordinates and accuracy, checked when made.

    `method` is one of METHODS, `coordinates` of COORDINATES. Adaptive methods take `rtol` and `atol` (default .05 each; of
    the state, which has unit variance in angle coordinates), fixed ones `steps`, uniform in time. ValueError otherwise.
    """

    method: str = "adaptive_heun"
    coordinates: str = "angle"
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        _check_name("method", self.method, METHODS)
        _check_name("coordinates", self.coordinates, tuple(COORDINATES))
        if self.method in ADAPTIVE:
            if self.steps is not None:
                raise ValueError(
                    f"steps = {self.steps}: {self.method} chooses its own steps; give rtol and atol, or one of {FIXED}"
                )
            for name, value in (("rtol", self.rtol), ("atol", self.atol)):
                if value is not None and not 0 < value < math.inf:
                    raise ValueError(f"{name} = {value} must be a positive finite number")
        else:
            if self.steps is None or self.steps < 1:
                raise ValueError(f"steps = {self.steps}: the fixed method {self.method} needs a number of steps >= 1")
            if self.rtol is not None or self.atol is not None:
                raise ValueError(
                    f"rtol = {self.rtol}, atol = {self.atol}: {self.method} has fixed steps; give steps, or one of {ADAPTIVE}"
                )

    def options(self, like: Tensor) -> dict[str, Any]:
        """What torchdiffeq.odeint has to be told."""
        if self.method in FIXED:
            grid = torch.linspace(0, 1, (self.steps or 0) + 1, dtype=torch.float64, device=like.device)
            return {"options": {"grid_constructor": lambda func, y0, t: grid}}
        # Adaptive methods would step past the end and interpolate, that is ask the network for levels out of range: step_t.
        end = torch.ones(1, dtype=torch.float64, device=like.device)
        options = {"norm": worst_sample, "first_step": FIRST_STEP, "step_t": end, "max_num_steps": MAX_STEPS}
        return {
            "rtol": RTOL if self.rtol is None else self.rtol,
            "atol": ATOL if self.atol is None else self.atol,
            "options": options,
        }


class CountedDenoiser:
    """A denoiser as a solver sees it: float64 in and out, calls counted, values that are not finite refused.

    Networks get their input in the dtype of their parameters (or of their attribute `dtype`), denoisers without parameters in
    `dtype`. After each call `on_call(calls, level)` is told the number of calls so far and the level that was asked for.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        label: Tensor | None = None,
        *,
        dtype: torch.dtype,
        on_call: Callable[[int, float], None] | None = None,
    ):
        self.denoiser, self.label, self.on_call, self.calls = denoiser, label, on_call, 0
        self.dtype = input_dtype(denoiser, dtype)

    def __call__(self, x: Tensor, level: Tensor, ratio: Tensor) -> Tensor:
        """denoise(x, level/ratio) for `x` [B, ...], `level` [], `ratio` [B]. SolverError if it is not finite."""
        sigma = (level / ratio).to(self.dtype)
        point = x.to(self.dtype)
        denoised = self.denoiser(point, sigma) if self.label is None else self.denoiser(point, sigma, self.label)
        self.calls += 1
        if not bool(torch.isfinite(denoised).all()):
            bad = int((~torch.isfinite(denoised).flatten(1).all(1)).sum())
            raise SolverError(
                f"the denoiser returned NaN or infinity for {bad} of {len(x)} samples at level {float(level):.4g} "
                f"(call {self.calls}); its weights may have diverged in training, or its dtype may be too narrow: try float32"
            )
        if self.on_call is not None:
            self.on_call(self.calls, float(level))
        return denoised.double()


def solve(
    denoise: CountedDenoiser,
    x: Tensor,
    level_from: float,
    level_to: float,
    *,
    solver: Solver,
    sigma_data: float,
    ratio: Tensor | None = None,
    points: int = 2,
) -> tuple[Tensor, Tensor]:
    """Follow the flow from `x` [B, ...] at `level_from` to `level_to`, up or down, with `ratio` [B] fixed (default 1).

    Returns float64 states [points, B, ...] at levels [points] equally spaced in the coordinate's time; the first is x itself.
    SolverError if the denoiser is not finite or the tolerance cannot be met.
    """
    from torchdiffeq import odeint  # here: the command line's help must not wait for it

    path, ratios = COORDINATES[solver.coordinates](sigma_data), torch.ones(len(x)) if ratio is None else ratio
    ratios = ratios.to(x.device, torch.float64)
    start, way = path.time(level_from), path.time(level_to) - path.time(level_from)

    def right_hand_side(t: Tensor, u: Tensor) -> Tensor:
        level = path.level(start + way * t)
        point = path.radius(level) * u
        return way * path.drift(point, denoise(point, level, ratios), level)

    t = torch.linspace(0, 1, points, dtype=torch.float64, device=x.device)
    levels = path.level(start + way * t)
    try:
        states = odeint(right_hand_side, x.double() / path.radius(levels[0]), t, method=solver.method, **solver.options(x))
    except AssertionError as error:
        raise SolverError(
            f"{solver.method} could not meet its tolerance after {denoise.calls} calls ({error}); "
            "raise rtol and atol, or use a fixed method"
        ) from error
    return states * path.radius(levels).reshape(-1, *[1] * x.ndim), levels


def worst_sample(error: Tensor) -> Tensor:
    """The largest of the samples' root mean squares: torchdiffeq's default, over the batch, lets one sample be wrong."""
    return error.flatten(1).square().mean(1).sqrt().amax()


def input_dtype(denoiser: Any, default: torch.dtype) -> torch.dtype:
    """The dtype in which a denoiser wants its samples."""
    wanted = getattr(denoiser, "dtype", None)
    if isinstance(wanted, torch.dtype):
        return wanted
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else iter(())
    return next((p.dtype for p in parameters if p.is_floating_point()), default)


def _check_name(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} = {value!r} is unknown; choose one of {', '.join(known)}")
