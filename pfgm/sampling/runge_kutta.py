"""Embedded Runge-Kutta methods in which each sample of a batch has steps of its own.

torchdiffeq has one step for a whole batch, so that the hardest sample sets it and the others' results depend on their batch
mates. Here each sample has its own time, step and decision; a sample that has arrived waits for the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pfgm.core.tensors import expand
from pfgm.sampling.methods import Integrator, Problem, Slope, SolverStats, rms

SAFETY, SHRINK, GROW = 0.9, 0.2, 2.0
"""Of the step size: the share of the step that would just do, and the most it may change by."""


@dataclass(frozen=True)
class ButcherTableau:
    """A method of `order` with an error estimate: the rows of the Butcher tableau, the last of which is the solution (its slope
    is the first of the next step), and the `error` weights of all stages."""

    order: int
    rows: Sequence[Sequence[float]]
    error: Sequence[float]


TABLEAUS = {
    "adaptive_heun": ButcherTableau(2, ((1.0,), (1 / 2, 1 / 2)), (-1 / 2, 1 / 2, 0)),
    "bosh3": ButcherTableau(3, ((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)), (-5 / 72, 1 / 12, 1 / 9, -1 / 8)),
    "dopri5": ButcherTableau(
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
"""Heun-Euler, Bogacki-Shampine and Dormand-Prince."""


class StepError(RuntimeError):
    """The steps became too small, or too many."""


@dataclass
class Each:
    """States and what was done: `states` [points, B, ...], steps `accepted` and `rejected` [B], summed local `error` [B]."""

    states: Tensor
    accepted: Tensor
    rejected: Tensor
    error: Tensor


def integrate_per_sample(
    slope: Slope,
    state: Tensor,
    at: Tensor,
    pair: ButcherTableau,
    *,
    rtol: float,
    atol: float,
    first_step: float,
    max_steps: int,
    on_step: Callable[[Tensor, Tensor], None],
) -> Each:
    """From `state` [B, ...] at time at[0] = 0 to time at[-1] = 1, with the states at all times `at` [points].

    The step is h · .9 error^(-.7/order) error_before^(.4/order) (a PI controller; Hairer and Wanner, Solving Ordinary
    Differential Equations II, IV.2), the error being the sample's root mean square of error/(atol + rtol |state|). Between
    steps states are cubic Hermite interpolations. `on_step(times, states)` follows the progress. StepError after `max_steps`,
    or if a step vanishes.
    """
    zero = torch.zeros(len(state), dtype=torch.float64, device=state.device)
    time, step, before, total = zero, zero + first_step, zero + 1, zero
    accepted, rejected = zero.long(), zero.long()
    states = state.expand(len(at), *state.shape).clone()
    first = slope(time, state)
    for _ in range(max_steps):
        running = time < 1
        if not bool(running.any()):
            return Each(states, accepted, rejected, total)
        end = (time + step).clamp(max=1)
        if bool((running & (end <= time)).any()):
            raise StepError("a step vanished")
        after, last, difference = _step(slope, state, time, end - time, first, pair)
        scale = atol + rtol * torch.maximum(state.abs(), after.abs())
        error = rms(difference / scale).clamp(min=1e-10)
        good = running & (error <= 1)
        for k, moment in enumerate(at.tolist()):
            rows = good & (time < moment) & (moment <= end)
            if bool(rows.any()):
                ends = (time[rows], end[rows], state[rows], after[rows], first[rows], last[rows])
                states[k, rows] = _hermite(moment, *ends)
        factor = SAFETY * error ** (-0.7 / pair.order) * before ** (0.4 / pair.order)
        step = torch.where(running, (end - time) * factor.clamp(SHRINK, GROW), step)
        before = torch.where(good, error.clamp(min=1e-4), before)
        total = total + rms(difference) * good
        accepted, rejected = accepted + good, rejected + (running & ~good)
        time = torch.where(good, end, time)
        state, first = (torch.where(expand(good, old).bool(), new, old) for old, new in ((state, after), (first, last)))
        on_step(time, state)
    raise StepError(f"{max_steps} steps were not enough")


def per_sample(pair: ButcherTableau) -> Integrator:
    """Make an integrator of the method `pair` in which each sample has steps of its own."""

    def integrate(problem: Problem) -> tuple[Tensor, SolverStats]:
        unit = problem.rescaled()
        each = integrate_per_sample(
            unit.slope,
            unit.state,
            unit.at,
            pair,
            rtol=unit.rtol,
            atol=unit.atol,
            first_step=unit.first_step,
            max_steps=unit.max_steps,
            on_step=unit.on_step,
        )
        return each.states, SolverStats(int(each.accepted.max()), int(each.rejected.max()), each.error)

    return integrate


def _step(
    slope: Slope, state: Tensor, time: Tensor, step: Tensor, first: Tensor, pair: ButcherTableau
) -> tuple[Tensor, Tensor, Tensor]:
    """The state after `step`, the slope there and the error."""
    slopes, h, after = [first], expand(step, state), state
    for row in pair.rows:
        after = state + h * _sum(row, slopes)
        slopes.append(slope(time + sum(row) * step, after))
    return after, slopes[-1], h * _sum(pair.error, slopes)


def _sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return sum((w * k for w, k in zip(weights, slopes, strict=True) if w), start=0 * slopes[0])


def _hermite(moment: float, t0: Tensor, t1: Tensor, y0: Tensor, y1: Tensor, k0: Tensor, k1: Tensor) -> Tensor:
    """The cubic through (t0, y0) and (t1, y1) with slopes k0 and k1, at `moment`."""
    h, s = expand(t1 - t0, y0), expand((moment - t0) / (t1 - t0), y0)
    bend = (1 - s) * h * k0 - s * h * k1 + (2 * s - 1) * (y1 - y0)
    return (1 - s) * y0 + s * y1 + s * (1 - s) * bend
