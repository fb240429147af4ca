"""What every network shares: the contract, and the embedding of noise level and label."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pfgm.core.configurable import Configurable


class Network(Configurable, nn.Module):
    """Base of networks: remembers its constructor arguments, so that a checkpoint can make it again.

    The contract is `net(x, c_noise, label=None)`: `x` [B, C, ...] of about unit variance, `c_noise` [B] (log of the noise
    level, over 4), `label` [B] in 0..num_classes-1, or num_classes or None for no label -> [B, C + extra_channels, ...].
    Networks of models with conditions get a fourth argument, `condition` [B, *condition_shape] of about unit variance; those
    with an `augmentation_size` take `augmentation` [B, augmentation_size], how samples were augmented (None: not at all).
    Constructors take `shape` = (C, ...), `num_classes` (0: no labels), `extra_channels` (further outputs; PFGM's v_z needs
    one) and `condition_shape` (None: no conditions).
    """


def check_sizes(**sizes: int) -> None:
    """ValueError naming the first of `sizes` that is not a whole number >= 1."""
    for name, size in sizes.items():
        if not (isinstance(size, int) and size >= 1):
            raise ValueError(f"{name} = {size} must be a whole number >= 1")


def check_event(shape: Sequence[int], num_classes: int, extra_channels: int) -> None:
    """ValueError unless a network can be for samples of `shape`, so many classes and further outputs."""
    if not len(shape) or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"shape = {tuple(shape)}: give whole numbers >= 1, (C, ...)")
    if not 0 <= num_classes < 2**31 or not 0 <= extra_channels < 2**31:
        raise ValueError(f"num_classes = {num_classes}, extra_channels = {extra_channels}: give whole numbers >= 0")


class Embedding(nn.Module):
    """Noise level, label, condition vector and augmentation -> [B, width].

    Sines and cosines of c_noise = log(sigma)/4 at geometric frequencies, so that each factor of sigma is resolved alike, from
    the smallest noise to the horizon; with `fourier_scale`, at frequencies of |N(0, fourier_scale²)| instead (NCSN++, arXiv
    2011.13456). `num_classes` > 0 adds a learned vector for each label and one for "no label", the last, `condition_size` > 0
    a linear map of a condition vector, `augmentation_size` > 0 one of a vector that is zero for a sample as it is.
    """

    def __init__(
        self,
        width: int,
        num_classes: int = 0,
        features: int = 32,
        condition_size: int = 0,
        *,
        augmentation_size: int = 0,
        fourier_scale: float | None = None,
    ):
        super().__init__()
        if augmentation_size < 0:
            raise ValueError(f"augmentation_size = {augmentation_size} must not be negative; pfgm.data.augmentation has 9")
        if features < 2 or features % 2:
            raise ValueError(f"noise_features = {features} must be an even number: as many sines as cosines")
        if fourier_scale is not None and not 0 < fourier_scale < math.inf:
            raise ValueError(f"fourier_scale = {fourier_scale} must be a positive finite number")
        self.features, self.fourier_scale = features, fourier_scale
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.labels = nn.Embedding(num_classes + 1, features) if num_classes else None
        self.condition = nn.Linear(condition_size, features) if condition_size else None
        self.augmentation = nn.Linear(augmentation_size, features, bias=False) if augmentation_size else None

    def frequencies(self, device: torch.device) -> Tensor:
        """[features/2] in radians; of |N(0, s²)| the quantiles, so that there is nothing to draw or to store."""
        # Not a buffer: in bfloat16 the rounded frequencies would shift the highest by a third of a radian.
        count = self.features // 2
        if self.fourier_scale is None:
            return 2 * math.pi * torch.logspace(-3, 3, count, base=2.0, device=device)
        middle = (torch.arange(count, device=device) + 0.5) / count
        return 2 * math.pi * self.fourier_scale * torch.special.ndtri((1 + middle) / 2)

    def forward(
        self,
        c_noise: Tensor,
        label: Tensor | None = None,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        phase = c_noise[:, None] * self.frequencies(c_noise.device)
        features = torch.cat([phase.sin(), phase.cos()], dim=1).to(next(self.mlp.parameters()).dtype)
        if self.labels is not None:
            none = self.labels.num_embeddings - 1
            features = features + self.labels(torch.full_like(c_noise, none, dtype=torch.long) if label is None else label)
        if self.condition is not None:
            features = features + self.condition(condition)
        if self.augmentation is not None and augmentation is not None:
            features = features + self.augmentation(augmentation.to(features.dtype))
        return self.mlp(features)
