"""Non-leaking augmentation: the network sees what was done to an image, and samples images to which nothing was done.

Source: EDM (arXiv 2206.00364, appendix F.2), after StyleGAN2-ADA (arXiv 2006.06676).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pfgm.core import rng
from pfgm.core.configurable import Configurable
from pfgm.core.rng import Generators

SIZE = 9  # numbers that describe an augmentation: mirrored, upside down, scale, rotation (2), stretch (2), shift (2)


class Changes(NamedTuple):
    """Parameters of the geometric changes of each image, [B] each, 0 or False where a change is not applied."""

    mirrored: Tensor
    upside_down: Tensor
    scale: Tensor  # by 2^(.2 scale)
    angle: Tensor  # radians
    stretch: Tensor  # by 2^(.2 stretch) along `direction` and 2^(-.2 stretch) across it
    direction: Tensor  # radians
    right: Tensor  # shift in units of .125 widths
    down: Tensor  # shift in units of .125 heights


class Augment(Configurable):
    """Apply random geometric changes to images.

    Images are mirrored with probability 1/2. Each of five other changes has `probability`: upside down (half of the time),
    scaling by 2^(.2 n), rotation by any angle, stretching by 2^(.2 n) along one direction and 2^(-.2 n) across it, and
    shifts by .125 n of the size both ways, with standard normal n. Borders are reflected.

    EDM resamples through a wavelet at twice the resolution; this class interpolates bicubically. The label of a stretch n along
    the direction a is n (cos 2a, sin 2a), which is unique; EDM's n (cos a, sin a) also describes -n along a + pi.

    Source: EDM (arXiv 2206.00364, appendix F.2).

    Args:
        probability: Probability of each change; EDM uses .12 to .15.

    Raises:
        ValueError: If `probability` is not in [0, 1].
    """

    def __init__(self, probability: float = 0.12):
        if not 0 <= probability <= 1:
            raise ValueError(f"probability = {probability} must lie in [0, 1]; EDM uses .12 to .15")
        self.probability = probability

    def __call__(self, x: Tensor, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Change images.

        Args:
            x: Images [B, C, H, W], in floating point.
            generator: Source of randomness.

        Returns:
            The changed images, and the labels [B, 9] that describe the changes, zero for none.
        """
        mirrored, upside_down, scale, angle, stretch, direction, *shift = self.sample(x, generator)
        warped = torch.stack([scale, angle, stretch, *shift]).ne(0).any(0)
        # The map from positions in the new image to positions in `x`, both relative to the middle: stretch, then the others.
        axes = rotation(direction) @ diagonal(torch.exp2(-0.2 * stretch), torch.exp2(0.2 * stretch)) @ rotation(-direction)
        matrix = axes @ rotation(-angle) @ diagonal(torch.exp2(-0.2 * scale), torch.exp2(-0.2 * scale))
        right, down = (-0.125 * size * s for size, s in zip((x.shape[3], x.shape[2]), shift, strict=True))
        x = torch.where(_column(mirrored, x), x.flip(3), x)
        x = torch.where(_column(upside_down, x), x.flip(2), x)
        x = torch.where(_column(warped, x), warp(x, matrix, torch.stack([right, down], dim=1)), x)
        label = [mirrored.to(x.dtype), upside_down.to(x.dtype), scale, angle.cos() - 1, angle.sin()]
        label += [stretch * (2 * direction).cos(), stretch * (2 * direction).sin(), *shift]
        return x, torch.stack(label, dim=1)

    def sample(self, x: Tensor, generator: Generators = None) -> Changes:
        """Sample the changes of images `x` [B, C, H, W]."""
        u = [rng.uniform(len(x), generator, device=x.device) for _ in range(9)]
        n = rng.normal((len(x), 4), generator, like=x)
        applied = [value < self.probability for value in u[:5]]
        angles = [((2 * value - 1) * math.pi).to(x.dtype) for value in u[5:7]]
        return Changes(
            mirrored=u[7] < 0.5,
            upside_down=applied[0] & (u[8] < 0.5),
            scale=n[:, 0] * applied[1],
            angle=angles[0] * applied[2],
            stretch=n[:, 1] * applied[3],
            direction=angles[1],
            right=n[:, 2] * applied[4],
            down=n[:, 3] * applied[4],
        )


def warp(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Resample images so that the pixel at p comes from `matrix` p + `shift`.

    Args:
        x: Images [B, C, H, W].
        matrix: Linear maps [B, 2, 2] of positions (right, down) relative to the middle.
        shift: Shifts [B, 2] (right, down) in pixels.

    Returns:
        The images, interpolated bicubically, with reflected borders.
    """
    height, width = x.shape[2:]
    right = [matrix[:, 0, 0], matrix[:, 0, 1] * (height / width), shift[:, 0] * (2 / width)]
    down = [matrix[:, 1, 0] * (width / height), matrix[:, 1, 1], shift[:, 1] * (2 / height)]
    theta = torch.stack([*right, *down], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def rotation(angle: Tensor) -> Tensor:
    """Return the matrices [B, 2, 2] that rotate (right, down) by `angle` [B]."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(-1, 2, 2)


def diagonal(a: Tensor, b: Tensor) -> Tensor:
    """Return the diagonal matrices [B, 2, 2] of `a` and `b` [B]."""
    return torch.diag_embed(torch.stack([a, b], dim=1))


def _column(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1))
