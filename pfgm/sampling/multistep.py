"""Linear multistep methods make one network call per step and reuse the values of earlier steps.

Each method integrates exactly the polynomial through the values it remembers, on grids of any spacing.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from torch import Tensor

from pfgm.sampling.methods import ANGLE, LOG_SIGMA, Method, Slope, on_grid, register

History = Sequence[tuple[float, Tensor]]  # times and values, the newest first


def adams_bashforth(slope: Slope, state: Tensor, times: Sequence[float], order: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Integrate d state/dt = slope by the Adams-Bashforth method with variable steps.

        u1 = u0 + ∫ P(t) dt,    P = polynomial through the last `order` slopes

    Order 2 begins with an Euler step (one call), order 3 with a midpoint step (two calls) and a step with two slopes. The
    local error of these steps is of order h^order, so the global order is kept.
    Source: Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations I, section III.5.

    Args:
        slope: derivative of the state.
        state: state [B, ...] at times[0].
        times: grid of times, increasing or decreasing.
        order: 2 or 3.

    Yields:
        The state at each of times[1:], and the same step by the method of one order less.
    """
    history: list[tuple[float, Tensor]] = []
    for start, end in pairwise(times):
        h, first = end - start, slope(start, state)
        history = [(start, first), *history][:order]
        if len(history) == 1 and order == 3:
            middle, lower = (start + end) / 2, state + h * first
            state = state + h * slope(middle, state + (middle - start) * first)
        else:
            moments = [h ** (m + 1) / (m + 1) for m in range(len(history))]  # ∫ (t - start)^m dt from start to end
            lower = state + _combine_newest(history, start, moments)
            state = state + _combine(history, start, moments)
        yield state, lower


def dpm_solver(slope: Slope, x: Tensor, times: Sequence[float], order: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Integrate the flow by DPM-Solver++(2M) or (3M), in x over t = log(level), with data prediction.

        x1 = e^h x0 - ∫ e^(t1-t) P(t) dt,    h = t1 - t0,    P = polynomial through the last `order` denoised points

    Order 2 uses the published weights 1 + 1/(2r) and -1/(2r) with r = h_before/h, times 1 - e^h. They are exact for a constant
    and approximate the moment of t - t0 by (1 - e^h) h/2. Source: DPM-Solver++ (arXiv 2211.01095), algorithm 2.

    Args:
        slope: dx/dt = x - denoised.
        x: state [B, ...] at times[0].
        times: grid of log(level).
        order: 2 or 3.

    Yields:
        The same as `adams_bashforth`.
    """
    history: list[tuple[float, Tensor]] = []
    for start, end in pairwise(times):
        history = [(start, x - slope(start, x)), *history][:order]
        h = end - start
        if order == 2 and len(history) == 2:
            moments = [-math.expm1(h), -math.expm1(h) * h / 2]
        else:
            moments = _exponential_moments(h, len(history))
        lower = math.exp(h) * x + _combine_newest(history, start, moments)
        x = math.exp(h) * x + _combine(history, start, moments)
        yield x, lower


def _combine(history: History, origin: float, moments: Sequence[float]) -> Tensor:
    """Compute Σ w_j value_j, with weights w such that Σ w_j (t_j - origin)^m = moments[m] for every m."""
    nodes = np.array([time - origin for time, _ in history])
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(moments))
    return sum((float(w) * value for w, (_, value) in zip(weights, history, strict=True)), start=0 * history[0][1])


def _combine_newest(history: History, origin: float, moments: Sequence[float]) -> Tensor:
    """Combine all values but the oldest, or the only value."""
    keep = max(1, len(history) - 1)
    return _combine(history[:keep], origin, moments[:keep])


def _exponential_moments(h: float, number: int) -> list[float]:
    """Compute -∫ e^(h-t) t^m dt from 0 to h, for m < number, by parts: I_0 = e^h - 1, I_m = m I_(m-1) - h^m."""
    integrals = [math.expm1(h)]
    for m in range(1, number):
        integrals.append(m * integrals[-1] - h**m)
    return [-value for value in integrals]


register(Method("ab2", 2, ANGLE, on_grid(partial(adams_bashforth, order=2))))
register(Method("ab3", 3, ANGLE, on_grid(partial(adams_bashforth, order=3)), grid="paced"))
register(Method("dpmpp_2m", 2, LOG_SIGMA, on_grid(partial(dpm_solver, order=2)), grid="rho"))
register(Method("dpmpp_3m", 3, LOG_SIGMA, on_grid(partial(dpm_solver, order=3)), grid="rho"))
