"""The flow's ordinary differential equation, followed by a solver.

    dx/dlevel = (x - denoise(x, level/ratio)) / level

with ratio = 1 on the plane sigma = level, and ratio = varsigma/sigma, fixed for each sample, on hemispheres. D does not appear.
The state is float64; see `pfgm.coordinates` for its forms and `pfgm.solver` for the methods.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.solver import Solver, Steps


class SolverError(RuntimeError):
    """The flow could not be integrated: the denoiser returned NaN or infinity, or the step size vanished."""


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

    def __call__(self, x: Tensor, level: float, ratio: Tensor) -> Tensor:
        """denoise(x, level/ratio) for `x` [B, ...] and `ratio` [B]. SolverError if it is not finite."""
        sigma = (level / ratio).to(self.dtype)
        point = x.to(self.dtype)
        denoised = self.denoiser(point, sigma) if self.label is None else self.denoiser(point, sigma, self.label)
        self.calls += 1
        if not bool(torch.isfinite(denoised).all()):
            bad = int((~torch.isfinite(denoised).flatten(1).all(1)).sum())
            raise SolverError(
                f"the denoiser returned NaN or infinity for {bad} of {len(x)} samples at level {level:.4g} "
                f"(call {self.calls}); its weights may have diverged in training, or its dtype may be too narrow: try float32"
            )
        if self.on_call is not None:
            self.on_call(self.calls, level)
        return denoised.double()


@dataclass
class Way:
    """What following the flow gave: float64 `states` [points, B, ...] at `levels` [points], and the solver's `steps`."""

    states: Tensor
    levels: Tensor
    steps: Steps

    @property
    def end(self) -> Tensor:
        """The last state [B, ...]."""
        return self.states[-1]


def follow(
    denoise: CountedDenoiser,
    x: Tensor,
    level_from: float,
    level_to: float,
    *,
    solver: Solver,
    sigma_data: float,
    ratio: Tensor | None = None,
    points: int = 2,
) -> Way:
    """Follow the flow from `x` [B, ...] at `level_from` to `level_to`, up or down, with `ratio` [B] fixed (default 1).

    The states of the Way are at `points` levels equally spaced in the coordinate's time; the first is x itself. SolverError if
    the denoiser is not finite or the tolerance cannot be met.
    """
    path = solver.path(sigma_data)
    ratios = torch.ones(len(x)) if ratio is None else ratio
    ratios = ratios.to(x.device, torch.float64)

    def slope(time: float, state: Tensor) -> Tensor:
        level = path.level(time)
        point = path.radius(level) * state
        return path.slope(point, denoise(point, level, ratios), level)

    times = torch.linspace(path.time(level_from), path.time(level_to), points, dtype=torch.float64, device=x.device)
    try:
        states, steps = solver.follow(slope, x.double() / path.radius(level_from), path, level_from, level_to, times)
    except AssertionError as error:
        raise SolverError(
            f"{solver.method} could not meet its tolerance after {denoise.calls} calls ({error}); "
            "raise rtol and atol, or use a fixed method"
        ) from error
    levels = [level_from, *map(path.level, times[1:-1].tolist()), level_to]
    radii = torch.tensor([path.radius(level) for level in levels], dtype=torch.float64, device=x.device)
    return Way(states * radii.reshape(-1, *[1] * x.ndim), torch.tensor(levels, dtype=torch.float64, device=x.device), steps)


def input_dtype(denoiser: Any, default: torch.dtype) -> torch.dtype:
    """The dtype in which a denoiser wants its samples."""
    wanted = getattr(denoiser, "dtype", None)
    if isinstance(wanted, torch.dtype):
        return wanted
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else iter(())
    return next((p.dtype for p in parameters if p.is_floating_point()), default)
