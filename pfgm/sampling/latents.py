"""Latents: points high above the data, and the ways between them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pfgm.core.arguments import check_types
from pfgm.core.tensors import expand, norm

MOST_POINTS = 10**5
"""Of a way, which is kept in memory."""


@dataclass
class Latent:
    """A point high above the data: direction `t` = x/sigma [n, ...] at `level`, on the "plane" or the "hemisphere".

    On the plane x = level t at sigma = level; on the hemisphere sigma = level/ratio with the ratio varsigma/sigma of t.
    """

    t: Tensor
    level: float
    surface: str

    def __post_init__(self) -> None:
        check_types(type(self).__init__, vars(self))
        if self.surface not in ("plane", "hemisphere"):
            raise ValueError(f"surface = {self.surface!r} is unknown; choose plane or hemisphere")
        if not 0 < self.level < math.inf:
            raise ValueError(f"level = {self.level} must be a positive finite number")


def check_points(points: int) -> None:
    """ValueError unless `points` is a whole number from 2 to `MOST_POINTS`."""
    if not isinstance(points, int) or not 2 <= points <= MOST_POINTS:
        raise ValueError(f"points = {points!r} must be at least 2, the two ends, and at most {MOST_POINTS}")


def interpolate(a: Latent, b: Latent, points: int) -> list[Latent]:
    """`points` latents from `a` to `b`, both ends included: directions along great circles, lengths |t| geometrically.

    The prior's direction is uniform on the sphere and independent of |t|, so that the ways between two of its samples stay
    where it has its mass, for every D; the straight line, which is the great circle of the augmented hemisphere seen from
    above, falls short of it for D >> 1. ValueError for latents of other shapes, levels or surfaces, at the origin, or
    opposite to each other.
    """
    check_points(points)
    if a.t.shape != b.t.shape or a.level != b.level or a.surface != b.surface:
        raise ValueError(
            f"latents of shapes {tuple(a.t.shape)}, {tuple(b.t.shape)}, levels {a.level:g}, {b.level:g} on {a.surface}, "
            f"{b.surface} have no way between them; encode both alike"
        )
    lengths = [norm(latent.t) for latent in (a, b)]
    if not all(bool((length > 0).all()) for length in lengths):
        raise ValueError("a latent at t = 0 has no direction; there is no great circle from it")
    first, second = (
        latent.t.double() / expand(length, latent.t.double()) for latent, length in zip((a, b), lengths, strict=True)
    )
    angle = torch.acos((first * second).flatten(1).sum(1).clamp(-1, 1))
    if bool((angle > math.pi - 1e-6).any()):
        raise ValueError("two latents are opposite to each other; no great circle between them is the shortest")
    latents = []
    for fraction in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        # sin((1-f) angle)/sin(angle), which is 1 - f for a small angle
        near, far = (torch.where(angle > 1e-9, (f * angle).sin() / angle.sin(), f) for f in (1 - fraction, fraction))
        length = lengths[0] ** (1 - fraction) * lengths[1] ** fraction
        t = expand(length * near, first) * first + expand(length * far, first) * second
        latents.append(replace(a, t=t.to(a.t.dtype)))
    return latents
