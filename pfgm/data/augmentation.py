"""Augmentation that does not leak: the network is told what was done to an image, and asked for images to which nothing was.

Source: EDM (arXiv 2206.00364, appendix F.2), after StyleGAN2-ADA (arXiv 2006.06676).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pfgm.core import rng
from pfgm.core.configurable import Configurable
from pfgm.core.rng import Generators

SIZE = 9
"""Numbers that describe an augmentation: mirrored, upside down, scale, turn (2), stretch (2), shift (2)."""


class Augment(Configurable):
    """Random geometric changes of images: mirrored with probability 1/2, and each of five others with `probability`.

    They are: upside down (half of the time), scaled by 2^(.2 n), turned by any angle, stretched by 2^(.2 n) along one direction
    and 2^(-.2 n) across it, and shifted by .125 n of the size each way, with normal n. Borders are reflected. Pixels are
    interpolated bicubically, where EDM resamples through a wavelet at twice the resolution. A stretch n along the direction a
    is told as n (cos 2a, sin 2a), one pair for one change; EDM's n (cos a, sin a) is also that of -n along a + pi.
    """

    def __init__(self, probability: float = 0.12):
        if not 0 <= probability <= 1:
            raise ValueError(f"probability = {probability} must lie in [0, 1]; EDM has .12 to .15")
        self.probability = probability

    def __call__(self, x: Tensor, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Images `x` [B, C, H, W] in floating point, changed, and what was done to each, [B, 9], zero for nothing."""
        mirror, over, scale, turn, stretch, direction, *shift = self._draw(x, generator)
        changed = torch.stack([scale, turn, stretch, *shift]).ne(0).any(0)
        # Where in the old image a pixel of the new one comes from, in pixels from the middle: first stretched, then the others.
        axes = rotation(direction) @ diagonal(torch.exp2(-0.2 * stretch), torch.exp2(0.2 * stretch)) @ rotation(-direction)
        matrix = axes @ rotation(-turn) @ diagonal(torch.exp2(-0.2 * scale), torch.exp2(-0.2 * scale))
        right, down = (-0.125 * size * s for size, s in zip((x.shape[3], x.shape[2]), shift, strict=True))
        x = torch.where(_column(mirror, x), x.flip(3), x)
        x = torch.where(_column(over, x), x.flip(2), x)
        x = torch.where(_column(changed, x), warp(x, matrix, torch.stack([right, down], dim=1)), x)
        label = [mirror.to(x.dtype), over.to(x.dtype), scale, turn.cos() - 1, turn.sin()]
        label += [stretch * (2 * direction).cos(), stretch * (2 * direction).sin(), *shift]
        return x, torch.stack(label, dim=1)

    def _draw(self, x: Tensor, generator: Generators) -> list[Tensor]:
        """[B] each: mirrored, upside down, scale, turn, stretch and its direction, shift right and down; 0 if not done."""
        count, place = len(x), x.device
        u = [rng.uniform(count, generator, device=place) for _ in range(9)]
        n = rng.normal((count, 4), generator, like=x)
        applied = [value < self.probability for value in u[:5]]
        angles = [((2 * value - 1) * math.pi).to(x.dtype) for value in u[5:7]]
        scale, turn, stretch = n[:, 0] * applied[1], angles[0] * applied[2], n[:, 1] * applied[3]
        return [
            u[7] < 0.5,
            applied[0] & (u[8] < 0.5),
            scale,
            turn,
            stretch,
            angles[1],
            n[:, 2] * applied[4],
            n[:, 3] * applied[4],
        ]


def warp(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Images [B, C, H, W] whose pixel at p is that of `x` at `matrix` p + `shift`, in pixels (right, down) from the middle."""
    height, width = x.shape[2:]
    right = [matrix[:, 0, 0], matrix[:, 0, 1] * (height / width), shift[:, 0] * (2 / width)]
    down = [matrix[:, 1, 0] * (width / height), matrix[:, 1, 1], shift[:, 1] * (2 / height)]
    theta = torch.stack([*right, *down], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def rotation(angle: Tensor) -> Tensor:
    """[B] -> [B, 2, 2]: turns (right, down) by `angle`."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(-1, 2, 2)


def diagonal(a: Tensor, b: Tensor) -> Tensor:
    """[B], [B] -> [B, 2, 2]."""
    return torch.diag_embed(torch.stack([a, b], dim=1))


def _column(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1))
