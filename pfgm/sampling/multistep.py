"""Linear multistep methods make one network call per step and reuse the values of earlier steps, on grids of any spacing."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from pfgm.sampling.methods import ANGLE, LOG_SIGMA, Method, Slope, on_grid, register

History = Sequence[tuple[float, Tensor]]  # times and values, the newest first


class Multistep(ABC):
    """Step by u1 = carry u0 + Σ w_j value_j over the values at the last `order` times, as a `Stepper`.

    A subclass gives the weights w and, if they differ from 1 and the slope, what is carried and remembered.
    """

    def __init__(self, order: int):
        self.order = order

    @abstractmethod
    def weights(self, times: Sequence[float], end: float) -> Sequence[float]:
        """Return the weights of the values at `times`, the newest first, for the step from times[0] to `end`."""

    def carry(self, h: float) -> float:
        """Return the factor of the state in a step of length h."""
        return 1.0

    def value(self, state: Tensor, slope: Tensor) -> Tensor:
        """Return what is remembered of a state and its slope."""
        return slope

    def __call__(self, slope: Slope, state: Tensor, times: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the state at each of times[1:], and the same step by the method of one order less."""
        history: list[tuple[float, Tensor]] = []
        for start, end in pairwise(times):
            history = [(start, self.value(state, slope(start, state))), *history][: self.order]
            state, lower = self.step(slope, state, history, end)
            yield state, lower

    def step(self, slope: Slope, state: Tensor, history: History, end: float) -> tuple[Tensor, Tensor]:
        """Step to `end` with all values of `history`, and without the oldest unless it is the only one."""
        carried = self.carry(end - history[0][0]) * state
        return carried + self._combine(history, end), carried + self._combine(history[:-1] or history, end)

    def _combine(self, history: History, end: float) -> Tensor:
        weights = self.weights([time for time, _ in history], end)
        return sum((w * value for w, (_, value) in zip(weights, history, strict=True)), start=0 * history[0][1])


class AdamsBashforth(Multistep):
    """Integrate d state/dt = slope by the Adams-Bashforth method of order 2 or 3 with variable steps.

        u1 = u0 + ∫ P(t) dt,    P = polynomial through the last `order` slopes

    Order 2 begins with an Euler step (one call), order 3 with a midpoint step (two calls) and a step with two slopes. The
    local error of these steps is of order h^order, so the global order is kept.
    Source: Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations I, section III.5.
    """

    def weights(self, times: Sequence[float], end: float) -> Sequence[float]:
        h = end - times[0]
        return fit_weights(times, [h ** (m + 1) / (m + 1) for m in range(len(times))])  # ∫ (t - start)^m dt

    def step(self, slope: Slope, state: Tensor, history: History, end: float) -> tuple[Tensor, Tensor]:
        if self.order < 3 or len(history) > 1:
            return super().step(slope, state, history, end)
        start, first = history[0]
        h, middle = end - start, (start + end) / 2
        return state + h * slope(middle, state + (middle - start) * first), state + h * first


class DPMSolver(Multistep):
    """Integrate the flow by DPM-Solver++(2M) or (3M), in x over t = log(level), with data prediction.

        x1 = e^h x0 - ∫ e^(t1-t) P(t) dt,    h = t1 - t0,    P = polynomial through the last `order` denoised points

    Order 2 uses the published weights 1 + 1/(2r) and -1/(2r) with r = h_before/h, times 1 - e^h. They are exact for a constant
    and approximate the moment of t - t0 by (1 - e^h) h/2. Source: DPM-Solver++ (arXiv 2211.01095), algorithm 2.
    """

    def weights(self, times: Sequence[float], end: float) -> Sequence[float]:
        h = end - times[0]
        integrals = [math.expm1(h)]  # ∫ e^(h-t) t^m dt from 0 to h, by parts
        for m in range(1, len(times)):
            integrals.append(integrals[0] * h / 2 if self.order == 2 else m * integrals[-1] - h**m)
        return fit_weights(times, [-value for value in integrals])

    def carry(self, h: float) -> float:
        return math.exp(h)

    def value(self, state: Tensor, slope: Tensor) -> Tensor:
        return state - slope


def fit_weights(times: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Compute the weights w with Σ w_j (t_j - t_0)^m = moments[m] for every m."""
    nodes = np.array(times) - times[0]
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(moments)).tolist()


register(Method("ab2", 2, ANGLE, on_grid(AdamsBashforth(2))))
register(Method("ab3", 3, ANGLE, on_grid(AdamsBashforth(3)), grid="paced"))
register(Method("dpmpp_2m", 2, LOG_SIGMA, on_grid(DPMSolver(2)), grid="rho"))
register(Method("dpmpp_3m", 3, LOG_SIGMA, on_grid(DPMSolver(3)), grid="rho"))
