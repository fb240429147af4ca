"""Added noise: draws that go down by the flow and, between the runs, up again by noise.

A plan is a list of runs, falling levels each. Where a run begins above the end of the one before, the kernel's noise lifts the
sample (`StudentTKernel.renoise`). Levels are in model units.

    churn      before each step by the factor 1 + gamma: EDM's stochastic sampler (arXiv 2206.00364, algorithm 2) for every D;
    restart    from t_min to t_max, several times (arXiv 2306.14878).

For D < inf the source of a lift is the denoised point, where the true one would be a draw from the posterior: with few
dimensions and small D, many lifts from a level at which the source is still in doubt shift the weights of the data.
"""

import math
from collections.abc import Sequence

import numpy as np

from pfgm.sampling.solvers import Fixed, Solver

Plan = list[list[float]]
ONE_STEP = ("euler", "midpoint", "heun2", "rk4", "edm_heun")


def churn(levels: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float) -> Plan:
    """A run for each step, begun (1 + gamma) times higher between s_tmin and s_tmax; the last is for the final denoising alone.

    gamma = min(s_churn / len(levels), sqrt(2) - 1), as published.
    """
    gamma = min(s_churn / len(levels), math.sqrt(2) - 1)
    raised = [level * (1 + gamma) if s_tmin <= level <= s_tmax else level for level in levels]
    return [[high, low] for high, low in zip(raised, levels[1:], strict=False)] + [[raised[-1]]]


def restart(levels: Sequence[float], intervals: Sequence[tuple[float, float, int]]) -> Plan:
    """Runs that pass each interval (t_min, t_max, K) K times more, with steps as dense as those of `levels`."""
    plan, top = [], levels[0]
    for low, high, times in sorted(intervals, key=tuple, reverse=True):
        plan += [_between(levels, top, low)] + [_between(levels, high, low)] * (int(times) - 1)
        top = high
    return [*plan, _between(levels, top, levels[-1])]


def _between(levels: Sequence[float], high: float, low: float) -> list[float]:
    """From `high` to `low` as the levels go: by their numbers, linear in log(level) between them."""
    falling = -np.log(levels)
    first, last = np.interp(-np.log([high, low]), falling, np.arange(len(levels)))
    inner = np.interp(np.linspace(first, last, max(1, round(last - first)) + 1)[1:-1], np.arange(len(levels)), falling)
    return [high, *np.exp(-inner).tolist(), low]


def check_churn(solver: Solver, s_churn: float, s_tmin: float, s_tmax: float) -> None:
    """ValueError unless the numbers are in order and the method forgets each step."""
    if not 0 <= s_churn < math.inf:
        raise ValueError(f"s_churn = {s_churn} must be a finite number >= 0")
    if not 0 <= s_tmin <= s_tmax:
        raise ValueError(f"s_tmin = {s_tmin}, s_tmax = {s_tmax}: levels of noise must be 0 <= s_tmin <= s_tmax")
    if not s_churn and (s_tmin, s_tmax) != (0.0, math.inf):
        raise ValueError(f"s_tmin = {s_tmin}, s_tmax = {s_tmax} do nothing without s_churn; give s_churn, or leave them out")
    if s_churn and not (isinstance(solver, Fixed) and solver.method in ONE_STEP):
        raise ValueError(
            f"s_churn = {s_churn}: noise before each step needs fixed steps that remember nothing; "
            f"{solver.method} does not have them, choose method {', '.join(ONE_STEP)}, or restart"
        )


def check_restart(intervals: Sequence[tuple[float, float, int]], lowest: float, highest: float) -> None:
    """ValueError unless each is (t_min, t_max, K) with lowest <= t_min < t_max <= highest and a whole K >= 1; a draw goes from
    `highest` to `lowest`."""
    for interval in intervals:
        if len(interval) != 3 or not lowest <= interval[0] < interval[1] <= highest or interval[2] < 1 or interval[2] % 1:
            raise ValueError(
                f"restart has {list(interval)}: give t_min, t_max and K with {lowest:.4g} <= t_min < t_max <= {highest:.4g}, "
                "the levels from which and to which the draw goes, in model units, and a whole number K >= 1"
            )
