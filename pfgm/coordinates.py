"""Coordinates of the flow: a state, a time, and the slope of the one over the other.

    dx/dlevel = (x - denoise(x, level/ratio)) / level

is the same flow in each of them:

    Angle     u = x / sqrt(level² + s²) over theta = arctan(level/s), s = sigma_data: du/dtheta = (c_skip x - denoise) / c_out.
              theta runs over less than pi/2, from the horizon of the hemisphere to the data; nothing is stiff, and the error a
              solver controls is relative to the right scale at every level.
    LogSigma  x over log(level), dx/dlog(level) = x - denoise: the published form of PFGM and of DPM-Solver.
    Sigma     x over level: the published form of EDM.
"""

import math
from typing import Protocol

from torch import Tensor


class Coordinates(Protocol):
    """`time(level)` and its inverse `level(time)`; `radius(level)`, x divided by the state; `slope` of the state over time."""

    def time(self, level: float) -> float: ...

    def level(self, time: float) -> float: ...

    def radius(self, level: float) -> float: ...

    def slope(self, x: Tensor, denoised: Tensor, level: float) -> Tensor: ...


class Angle:
    """x / sqrt(level² + s²) over arctan(level/s)."""

    def __init__(self, sigma_data: float):
        self.s = sigma_data

    def time(self, level: float) -> float:
        return math.atan(level / self.s)

    def level(self, time: float) -> float:
        return self.s * math.tan(time)

    def radius(self, level: float) -> float:
        return math.hypot(level, self.s)

    def slope(self, x: Tensor, denoised: Tensor, level: float) -> Tensor:
        q = self.radius(level)
        return ((self.s / q) ** 2 * x - denoised) * (q / (level * self.s))


class LogSigma:
    """x over log(level)."""

    def time(self, level: float) -> float:
        return math.log(level)

    def level(self, time: float) -> float:
        return math.exp(time)

    def radius(self, level: float) -> float:
        return 1.0

    def slope(self, x: Tensor, denoised: Tensor, level: float) -> Tensor:
        return x - denoised


class Sigma:
    """x over level."""

    def time(self, level: float) -> float:
        return level

    def level(self, time: float) -> float:
        return time

    def radius(self, level: float) -> float:
        return 1.0

    def slope(self, x: Tensor, denoised: Tensor, level: float) -> Tensor:
        return (x - denoised) / level
