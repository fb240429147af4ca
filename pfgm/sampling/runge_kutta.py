"""Integrate by embedded Runge-Kutta methods with a separate step size for each sample of a batch.

Each sample has its own time, step size and error test, unlike in torchdiffeq, where the hardest sample of a batch sets the step
of all. A finished sample waits for the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pfgm.core.tensors import expand
from pfgm.sampling.methods import Problem, Slope, SolverStats, StepError, rms

SAFETY = 0.9  # factor of the step size that would just meet the tolerance
SHRINK, GROW = 0.2, 2.0  # bounds of the ratio of successive step sizes


@dataclass(frozen=True)
class ButcherTableau:
    """Hold the coefficients of an explicit embedded Runge-Kutta method with the FSAL property."""

    order: int  # of the solution that is propagated
    rows: Sequence[Sequence[float]]  # a_i; the last gives the solution, whose slope is the first of the next step
    error: Sequence[float]  # weights of all stages in the error estimate, the difference of the two solutions


TABLEAUS = {
    "adaptive_heun": ButcherTableau(2, ((1.0,), (1 / 2, 1 / 2)), (-1 / 2, 1 / 2, 0)),  # Heun-Euler
    "bosh3": ButcherTableau(  # Bogacki-Shampine
        3, ((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)), (-5 / 72, 1 / 12, 1 / 9, -1 / 8)
    ),
    "dopri5": ButcherTableau(  # Dormand-Prince
        5,
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    ),
}


def integrate_per_sample(tableau: ButcherTableau, problem: Problem) -> tuple[Tensor, SolverStats]:
    """Integrate with a step size for each sample; the counts are those of the sample that needs most.

    The error of a sample is the RMS of (error estimate)/(atol + rtol |state|). A step is accepted if it is at most 1. A PI
    controller sets the next step, with k = order of the method:

        h_next = h · .9 error^(-.7/k) error_before^(.4/k)

    Source: Hairer, Wanner, Solving Ordinary Differential Equations II, section IV.2. States between steps come from cubic
    Hermite interpolation.
    """
    unit = problem.rescaled()
    state, states = unit.state, unit.state.expand(len(unit.at), *unit.state.shape).clone()
    zero = torch.zeros(len(state), dtype=torch.float64, device=state.device)
    time, step, before, total = zero, zero + unit.first_step, zero + 1, zero
    accepted, rejected = zero.long(), zero.long()
    first = unit.slope(time, state)
    for _ in range(unit.max_steps):
        running = time < 1
        if not bool(running.any()):
            return states, SolverStats(int(accepted.max()), int(rejected.max()), total)
        end = (time + step).clamp(max=1)
        if bool((running & (end <= time)).any()):
            raise StepError("the step size vanished")
        after, last, difference = _step(unit.slope, state, time, end - time, first, tableau)
        scale = unit.atol + unit.rtol * torch.maximum(state.abs(), after.abs())
        error = rms(difference / scale).clamp(min=1e-10)
        good = running & (error <= 1)
        for k, moment in enumerate(unit.at.tolist()):
            rows = good & (time < moment) & (moment <= end)
            if bool(rows.any()):
                ends = (time[rows], end[rows], state[rows], after[rows], first[rows], last[rows])
                states[k, rows] = _hermite(moment, *ends)
        factor = SAFETY * error ** (-0.7 / tableau.order) * before ** (0.4 / tableau.order)
        step = torch.where(running, (end - time) * factor.clamp(SHRINK, GROW), step)
        before = torch.where(good, error.clamp(min=1e-4), before)
        total = total + rms(difference) * good
        accepted, rejected = accepted + good, rejected + (running & ~good)
        time = torch.where(good, end, time)
        state, first = (torch.where(expand(good, old).bool(), new, old) for old, new in ((state, after), (first, last)))
        unit.on_step(time, state)
    raise StepError(f"more than {unit.max_steps} steps")


def _step(
    slope: Slope, state: Tensor, time: Tensor, step: Tensor, first: Tensor, tableau: ButcherTableau
) -> tuple[Tensor, Tensor, Tensor]:
    """Make one step; return the state after it, the slope there and the error estimate."""
    slopes, h, after = [first], expand(step, state), state
    for row in tableau.rows:
        after = state + h * _sum(row, slopes)
        slopes.append(slope(time + sum(row) * step, after))
    return after, slopes[-1], h * _sum(tableau.error, slopes)


def _sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return sum((w * k for w, k in zip(weights, slopes, strict=True) if w), start=0 * slopes[0])


def _hermite(moment: float, t0: Tensor, t1: Tensor, y0: Tensor, y1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """Evaluate at `moment` the cubic through (t0, y0) and (t1, y1) with slopes k0 and k1."""
    h, s = expand(t1 - t0, y0), expand((moment - t0) / (t1 - t0), y0)
    bend = (1 - s) * h * k0 - s * h * k1 + (2 * s - 1) * (y1 - y0)
    return (1 - s) * y0 + s * y1 + s * (1 - s) * bend
