"""Plans of stochastic draws, in which noise lifts the samples between runs down the flow.

A plan is a list of runs, and a run a list of falling levels in model units. Where a run begins above the end of the previous
one, the kernel's noise lifts the samples (`StudentTKernel.renoise`), at every D. For D < inf the source of a lift is the
denoised point, whereas exact renoising would sample it from the posterior. With few dimensions and small D, many lifts from a
level at which the source is still uncertain shift the weights of the data.
"""

import math
from collections.abc import Sequence

import numpy as np

from pfgm.sampling.solvers import Interval

Plan = list[list[float]]


def churn(levels: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float) -> Plan:
    """Plan one run for each step, begun (1 + gamma) times higher at levels from s_tmin to s_tmax (arXiv 2206.00364, alg. 2).

    As published, gamma = min(s_churn / len(levels), sqrt(2) - 1). The last run has a single level, that of the final denoising.
    """
    gamma = min(s_churn / len(levels), math.sqrt(2) - 1)
    raised = [level * (1 + gamma) if s_tmin <= level <= s_tmax else level for level in levels]
    return [[high, low] for high, low in zip(raised, levels[1:], strict=False)] + [[raised[-1]]]


def restart(levels: Sequence[float], intervals: Sequence[Interval]) -> Plan:
    """Plan runs that pass each interval (t_min, t_max, K) K times more, as densely as `levels` (arXiv 2306.14878)."""
    plan, top = [], levels[0]
    for low, high, repeats in sorted(intervals, key=tuple, reverse=True):
        plan += [_between(levels, top, low)] + [_between(levels, high, low)] * (int(repeats) - 1)
        top = high
    return [*plan, _between(levels, top, levels[-1])]


def _between(levels: Sequence[float], high: float, low: float) -> list[float]:
    """Return levels from `high` to `low` as dense as `levels`, whose index is taken as linear in log(level) between them."""
    falling = -np.log(levels)
    first, last = np.interp(-np.log([high, low]), falling, np.arange(len(levels)))
    inner = np.interp(np.linspace(first, last, max(1, round(last - first)) + 1)[1:-1], np.arange(len(levels)), falling)
    return [high, *np.exp(-inner).tolist(), low]


def check_restart_levels(intervals: Sequence[Interval], lowest: float, highest: float) -> None:
    """Raise ValueError unless the intervals lie between the levels `lowest` and `highest` of a draw."""
    for t_min, t_max, repeats in intervals:
        if not lowest <= t_min < t_max <= highest:
            raise ValueError(
                f"restart has {[t_min, t_max, repeats]}: give t_min, t_max and K with {lowest:.4g} <= t_min < t_max <= "
                f"{highest:.4g}, the levels between which the draw goes, in model units."
            )
