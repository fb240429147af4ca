"""Multistep methods: one call of the network a step, the slopes of earlier steps remembered.

All are exact integrals of the polynomial through the remembered values, on grids of any spacing:

    adams_bashforth   the slope is the polynomial, u1 = u0 + ∫ slope dt;
    dpm_solver        the denoised point is the polynomial in t = log(level) (arXiv 2211.01095, data prediction),
                      x1 = e^h x0 - ∫ e^(t1-t) denoised(t) dt, h = t1 - t0.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from torch import Tensor

from pfgm.sampling.methods import ANGLE, LOG_SIGMA, Method, Slope, on_grid, register


def adams_bashforth(slope: Slope, state: Tensor, times: Sequence[float], order: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The states at times[1:], by the method of `order` 2 or 3, each with what one order less makes of the last step.

    The first step costs one call at order 2 (Euler) and two at order 3 (midpoint), the second uses two slopes: each of these
    is one step with an error of the order of the step to the power of `order`, which does not lower the order of the whole.
    """
    history: list[tuple[float, Tensor]] = []
    for start, end in pairwise(times):
        first = slope(start, state)
        history = [(start, first), *history][:order]
        if len(history) == 1 and order == 3:
            middle, lower = (start + end) / 2, state + (end - start) * first
            state = state + (end - start) * slope(middle, state + (middle - start) * first)
        else:
            h = end - start
            moments = [h ** (m + 1) / (m + 1) for m in range(len(history))]
            lower = state + _one_order_less(history, start, moments)
            state = state + _combine(history, start, moments)
        yield state, lower


def dpm_solver(slope: Slope, x: Tensor, times: Sequence[float], order: int) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++(2M) or (3M) in x over log(level): the states at times[1:], one call each, as `adams_bashforth`.

    Order 2 has the published weights 1 + 1/(2r), -1/(2r) with r = h_before/h, times 1 - e^h.
    """
    history: list[tuple[float, Tensor]] = []
    for start, end in pairwise(times):
        history = [(start, x - slope(start, x)), *history][:order]
        h = end - start
        if order == 2 and len(history) == 2:
            moments = [-math.expm1(h), -math.expm1(h) * h / 2]
        else:
            moments = _exponential_moments(h, len(history))
        lower = math.exp(h) * x + _one_order_less(history, start, moments)
        x = math.exp(h) * x + _combine(history, start, moments)
        yield x, lower


def _combine(history: Sequence[tuple[float, Tensor]], origin: float, moments: Sequence[float]) -> Tensor:
    """Σ w_j value_j, where the functional Σ w_j f(t_j) has the given moments, of f = (t - origin)^m."""
    nodes = np.array([time - origin for time, _ in history])
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(moments))
    return sum((float(w) * value for w, (_, value) in zip(weights, history, strict=True)), start=0 * history[0][1])


def _one_order_less(history: Sequence[tuple[float, Tensor]], origin: float, moments: Sequence[float]) -> Tensor:
    """The same without the oldest value; with it if there is no other."""
    keep = max(1, len(history) - 1)
    return _combine(history[:keep], origin, moments[:keep])


def _exponential_moments(h: float, number: int) -> list[float]:
    """-∫_0^h e^(h-t) t^m dt for m < number, by parts."""
    integrals = [math.expm1(h)]
    for m in range(1, number):
        integrals.append(m * integrals[-1] - h**m)
    return [-value for value in integrals]


register(Method("ab2", 2, ANGLE, on_grid(partial(adams_bashforth, order=2))))
register(Method("ab3", 3, ANGLE, on_grid(partial(adams_bashforth, order=3)), grid="paced"))
register(Method("dpmpp_2m", 2, LOG_SIGMA, on_grid(partial(dpm_solver, order=2)), grid="rho"))
register(Method("dpmpp_3m", 3, LOG_SIGMA, on_grid(partial(dpm_solver, order=3)), grid="rho"))
