"""Coordinates in which solvers integrate the flow: a state, a time, and the derivative of the state with respect to the time.

The flow of a sample with fixed ratio level/sigma is, for every D,

    dx/dlevel = (x - denoise(x, sigma)) / level,    sigma = level/ratio.

Here level is the effective noise level. On the hyperplane sigma = level the ratio is 1.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

Number = Any  # a float, or a float64 tensor that broadcasts against x


class Coordinates(ABC):
    """Define a time and the state x/q; q is 1 unless a subclass has another `radius`."""

    @abstractmethod
    def time(self, level: Number) -> Number:
        """Return the time of a level."""

    @abstractmethod
    def level(self, time: Number) -> Number:
        """Return the level of a time, the inverse of `time`."""

    @abstractmethod
    def slope(self, x: Tensor, denoised: Tensor, level: Number) -> Tensor:
        """Return d state / d time."""

    def radius(self, level: Number) -> Number:
        """Return the factor q of x = q state."""
        return 0 * level + 1


class Angle(Coordinates):
    """Use the state u = x/q over the angle theta = arctan(level/s), where q² = level² + s² and s = sigma_data.

        du/dtheta = (c_skip x - denoised) / c_out,    c_skip = s²/q²,    c_out = level s/q.

    c_skip and c_out are those of EDM's preconditioning (arXiv 2206.00364, table 1). State and derivative have about unit
    variance at every level, and theta covers less than pi/2, so the flow is not stiff and tolerances are relative to x.
    """

    def __init__(self, sigma_data: float):
        self.s = sigma_data

    def time(self, level: Number) -> Number:
        return _math(level).atan(level / self.s)

    def level(self, time: Number) -> Number:
        return self.s * _math(time).tan(time)

    def radius(self, level: Number) -> Number:
        return (level**2 + self.s**2) ** 0.5

    def slope(self, x: Tensor, denoised: Tensor, level: Number) -> Tensor:
        q = self.radius(level)
        return ((self.s / q) ** 2 * x - denoised) * (q / (level * self.s))


class LogSigma(Coordinates):
    """Use the state x over log(level), dx/dlog(level) = x - denoised, as PFGM and DPM-Solver do."""

    def time(self, level: Number) -> Number:
        return _math(level).log(level)

    def level(self, time: Number) -> Number:
        return _math(time).exp(time)

    def slope(self, x: Tensor, denoised: Tensor, level: Number) -> Tensor:
        return x - denoised


class Sigma(Coordinates):
    """Use the state x over level, dx/dlevel = (x - denoised)/level, as EDM does."""

    def time(self, level: Number) -> Number:
        return level

    def level(self, time: Number) -> Number:
        return time

    def slope(self, x: Tensor, denoised: Tensor, level: Number) -> Tensor:
        return (x - denoised) / level


def _math(value: Number) -> Any:
    return torch if isinstance(value, Tensor) else math
