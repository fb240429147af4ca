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
from typing import Any, Protocol

import torch
from torch import Tensor

Number = Any
"""A float, or a float64 tensor of a shape that fits x."""


class Coordinates(Protocol):
    """`time(level)` and its inverse `level(time)`; `radius(level)`, x divided by the state; `slope` of the state over time."""

    def time(self, level: Number) -> Number: ...

    def level(self, time: Number) -> Number: ...

    def radius(self, level: Number) -> Number: ...

    def slope(self, x: Tensor, denoised: Tensor, level: Number) -> Tensor: ...


class Angle:
    """x / sqrt(level² + s²) over arctan(level/s)."""

    def __init__(self, sigma_data: float):
        self.s = sigma_data

    def time(self, level: Number) -> Number:
        return _library(level).atan(level / self.s)

    def level(self, time: Number) -> Number:
        return self.s * _library(time).tan(time)

    def radius(self, level: Number) -> Number:
        return (level**2 + self.s**2) ** 0.5

    def slope(self, x: Tensor, denoised: Tensor, level: Number) -> Tensor:
        q = self.radius(level)
        return ((self.s / q) ** 2 * x - denoised) * (q / (level * self.s))


class LogSigma:
    """x over log(level)."""

    def time(self, level: Number) -> Number:
        return _library(level).log(level)

    def level(self, time: Number) -> Number:
        return _library(time).exp(time)

    def radius(self, level: Number) -> Number:
        return 0 * level + 1

    def slope(self, x: Tensor, denoised: Tensor, level: Number) -> Tensor:
        return x - denoised


class Sigma:
    """x over level."""

    def time(self, level: Number) -> Number:
        return level

    def level(self, time: Number) -> Number:
        return time

    def radius(self, level: Number) -> Number:
        return 0 * level + 1

    def slope(self, x: Tensor, denoised: Tensor, level: Number) -> Tensor:
        return (x - denoised) / level


def _library(value: Number) -> Any:
    """Where the functions of `value` are."""
    return torch if isinstance(value, Tensor) else math
