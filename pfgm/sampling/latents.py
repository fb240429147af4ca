"""Latents are the points of the prior's surface that encode samples; this module interpolates between them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pfgm.core.arguments import check_types
from pfgm.core.tensors import expand, norm

MAX_POINTS = 10**5  # of an interpolation, which is kept in memory


@dataclass
class Latent:
    """Hold the latents of n samples at one noise level.

    On the hyperplane, sigma = level and x = level t. On the hemisphere, sigma = level/ratio and x = sigma t, where ratio =
    level/sigma is a function of |t| (`StudentTKernel.effective_level` at sigma = 1).

    Args:
        t: noise directions x/sigma, [n, ...].
        level: effective noise level.
        surface: "plane" or "hemisphere".

    Raises:
        ValueError: if the surface is unknown or the level not positive and finite.
    """

    t: Tensor
    level: float
    surface: str

    def __post_init__(self) -> None:
        check_types(type(self).__init__, vars(self))
        if self.surface not in ("plane", "hemisphere"):
            raise ValueError(f"surface = {self.surface!r} is unknown. Choose plane or hemisphere.")
        if not 0 < self.level < math.inf:
            raise ValueError(f"level = {self.level}: must be a positive finite number.")


def check_points(points: int) -> None:
    """Raise ValueError unless `points` is an integer from 2 to MAX_POINTS."""
    if not isinstance(points, int) or not 2 <= points <= MAX_POINTS:
        raise ValueError(f"points = {points!r}: must be an integer from 2 (both ends) to {MAX_POINTS}.")


def interpolate(a: Latent, b: Latent, points: int) -> list[Latent]:
    """Interpolate between latents: directions along great circles of R^N, lengths |t| geometrically.

    The prior's direction is uniform on the sphere and independent of |t|. So interpolated latents of two prior samples are
    typical prior samples, for every D. The straight line is the projection of the great circle on the augmented hemisphere;
    its middle is too short for D >> 1.

    Args:
        a: latents [n, ...].
        b: latents of the same shape, level and surface.
        points: number of latents, including both ends.

    Raises:
        ValueError: if shapes, levels or surfaces differ, a latent is at the origin, or two latents are opposite to each other.
    """
    check_points(points)
    if a.t.shape != b.t.shape or a.level != b.level or a.surface != b.surface:
        raise ValueError(
            f"a, b: shapes {tuple(a.t.shape)}, {tuple(b.t.shape)}, levels {a.level:g}, {b.level:g}, surfaces {a.surface}, "
            f"{b.surface} must agree. Encode both in the same way."
        )
    x, y, x_length, y_length = a.t.double(), b.t.double(), norm(a.t), norm(b.t)
    if not bool(((x_length > 0) & (y_length > 0)).all()):
        raise ValueError("a, b: a latent at t = 0 has no direction, so no great circle begins there.")
    first, second = x / expand(x_length, x), y / expand(y_length, y)
    angle = torch.acos((first * second).flatten(1).sum(1).clamp(-1, 1))
    if bool((angle > math.pi - 1e-6).any()):
        raise ValueError("a, b: two latents are opposite to each other, so no great circle between them is the shortest.")
    latents = []
    for fraction in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        # weight sin(f angle)/sin(angle), which tends to f as the angle tends to 0
        near, far = (torch.where(angle > 1e-9, (f * angle).sin() / angle.sin(), f) for f in (1 - fraction, fraction))
        length = x_length ** (1 - fraction) * y_length**fraction
        t = expand(length * near, first) * first + expand(length * far, first) * second
        latents.append(replace(a, t=t.to(a.t.dtype)))
    return latents
