"""What samplers expect of denoisers and denoisers of networks, and the embedding that networks share."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pfgm.core.configurable import Configurable

CONDITIONS = ("image", "vector")  # what `condition_shapes` of a network may name
ConditionShapes = Mapping[str, Sequence[int]]


class Denoiser(Protocol):
    """Estimates clean samples; solvers, guidance and likelihoods use only this interface.

    `denoise(x, sigma, **conditions)` returns E[y | x, sigma, conditions], like `x` [B, ...], for noise levels `sigma` (float
    or [B]). Conditions are tensors with B rows, passed by keyword and handed on unread: usually `label`, `image`, `vector`.
    """

    def __call__(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor: ...


class Network(Configurable, nn.Module):
    """Base class of networks. It records the constructor arguments, from which a checkpoint rebuilds the network.

    Subclasses implement `net(x, c_noise, *, label=None, image=None, vector=None, augmentation=None)` and may leave out keywords
    that they do not use:

    - x: noisy samples [B, C, ...] of about unit variance.
    - c_noise: noise levels [B], log(sigma) / 4.
    - label: classes [B] in 0..num_classes - 1, or num_classes for no label. None means no label for the whole batch.
    - image: condition [B, C', ...] with as many dimensions as x, of any size and about unit variance.
    - vector: condition [B, K] of about unit variance.
    - augmentation: how each sample was augmented, [B, augmentation_size]; None means not at all.

    They return [B, C + extra_channels, ...].

    Args of subclasses:
        shape: shape of a sample, (C, ...).
        num_classes: number of classes, 0 for a network without labels.
        extra_channels: output channels beyond C. PFGM's v_z needs one.
        condition_shapes: shapes of the conditions "image" and "vector", without the batch dimension, if there are any.
    """


def check_sizes(**sizes: int) -> None:
    """Raise ValueError naming the first of `sizes` that is not an integer >= 1."""
    for name, size in sizes.items():
        if not (isinstance(size, int) and size >= 1):
            raise ValueError(f"{name} = {size}: must be an integer >= 1")


def check_event(shape: Sequence[int], num_classes: int, extra_channels: int) -> None:
    """Raise ValueError unless these can be arguments of a network."""
    if not len(shape) or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"shape = {tuple(shape)}: must be integers >= 1, (C, ...)")
    if not 0 <= num_classes < 2**31 or not 0 <= extra_channels < 2**31:
        raise ValueError(f"num_classes = {num_classes}, extra_channels = {extra_channels}: must be integers >= 0")


def check_conditions(shapes: ConditionShapes | None, known: Sequence[str] = CONDITIONS) -> dict[str, tuple[int, ...]]:
    """Return `condition_shapes` as a dictionary of tuples.

    Raises:
        ValueError: if it names conditions other than `known`, or a shape has sizes below 1.
    """
    shapes = dict(shapes or {})
    for name, shape in shapes.items():
        if name not in known:
            raise ValueError(f"condition_shapes: no condition {name!r} here; this network takes {', '.join(known) or 'none'}")
        if not len(shape) or not all(isinstance(size, int) and size >= 1 for size in shape):
            raise ValueError(f"condition_shapes = {shapes}: the shape of {name!r} must be integers >= 1")
    return {name: tuple(shape) for name, shape in shapes.items()}


class Embedding(nn.Module):
    """Noise level, label, condition vector and augmentation -> [B, width].

    Sines and cosines of c_noise = log(sigma)/4 at geometric frequencies, so that each factor of sigma is resolved alike, from
    the smallest noise to the horizon; with `fourier_scale`, at frequencies of |N(0, fourier_scale²)| instead (NCSN++, arXiv
    2011.13456). `num_classes` > 0 adds a learned vector for each label and one for "no label", the last, `vector_size` > 0
    a linear map of a condition vector, `augmentation_size` > 0 one of a vector that is zero for a sample as it is.
    """

    def __init__(
        self,
        width: int,
        num_classes: int = 0,
        features: int = 32,
        vector_size: int = 0,
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
        self.condition = nn.Linear(vector_size, features) if vector_size else None
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
        vector: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        phase = c_noise[:, None] * self.frequencies(c_noise.device)
        features = torch.cat([phase.sin(), phase.cos()], dim=1).to(next(self.mlp.parameters()).dtype)
        if self.labels is not None:
            none = self.labels.num_embeddings - 1
            features = features + self.labels(torch.full_like(c_noise, none, dtype=torch.long) if label is None else label)
        if self.condition is not None:
            features = features + self.condition(vector)
        if self.augmentation is not None and augmentation is not None:
            features = features + self.augmentation(augmentation.to(features.dtype))
        return self.mlp(features)
