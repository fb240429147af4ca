"""The contracts of denoisers and networks, and the embedding that networks share."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pfgm.core.configurable import Configurable
from pfgm.core.tensors import check_shape

ConditionShapes = Mapping[str, Sequence[int]]  # by the keys "image" and "vector"


class Denoiser(Protocol):
    """Estimate clean samples: solvers, guidance and likelihoods use only this interface.

    `denoise(x, sigma, **conditions)` returns E[y | x, sigma, conditions], like `x` [B, ...], for noise levels `sigma` (float
    or [B]). Conditions are tensors with B rows, usually `label`, `image` or `vector`, which are passed on unread.
    """

    def __call__(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor) -> Tensor: ...


class Network(Configurable, nn.Module):
    """Record the constructor arguments, from which a checkpoint rebuilds the network: the base class of networks.

    Subclasses implement `net(x, c_noise, *, label=None, image=None, vector=None, augmentation=None)` and may leave out the
    keywords that they do not use. They return a tensor [B, C + extra_channels, ...]. The arguments are

    - `x`: noisy samples [B, C, ...] of about unit variance;
    - `c_noise`: noise levels [B] as log(sigma) / 4;
    - `label`: classes [B] in 0..num_classes - 1, or num_classes for no label (None: no label in the whole batch);
    - `image`: a condition [B, C', ...] with as many dimensions as x, of any size and of about unit variance;
    - `vector`: a condition [B, K] of about unit variance;
    - `augmentation`: how each sample was augmented, [B, augmentation_size] (None: not at all).

    Args:
        shape: Shape of a sample, (C, ...).
        num_classes: Number of classes; 0 for a network without labels.
        extra_channels: Output channels beyond C. PFGM's v_z needs one.
        condition_shapes: Shapes of the conditions "image" and "vector", without the batch dimension. None for no conditions.
    """


def check_arguments(
    shape: Sequence[int],
    num_classes: int,
    extra_channels: int,
    condition_shapes: ConditionShapes | None,
    sizes: Mapping[str, int],
    known: Sequence[str] = ("image", "vector"),
) -> dict[str, Sequence[int]]:
    """Return the condition shapes; raise ValueError for conditions that are not `known` and for numbers out of range."""
    check_shape(shape)
    for name, size in sizes.items():
        if not (isinstance(size, int) and size >= 1):
            raise ValueError(f"{name} = {size}: expected an integer >= 1")
    if not 0 <= num_classes < 2**31 or not 0 <= extra_channels < 2**31:
        raise ValueError(f"num_classes = {num_classes}, extra_channels = {extra_channels}: expected integers >= 0")
    conditions = dict(condition_shapes or {})
    for key, condition_shape in conditions.items():
        if key not in known:
            keys = f"only {', '.join(known)}" if known else "none"
            raise ValueError(f"condition_shapes: {key!r} is not a condition of this network, which takes {keys}")
        check_shape(condition_shape, f"condition_shapes[{key!r}]")
    return conditions


class Embedding(nn.Module):
    """Embed noise levels, labels, condition vectors and augmentations in one vector [B, width].

    Noise levels enter as sines and cosines, `features` together, of c_noise = log(sigma)/4. Geometric frequencies resolve each
    factor of sigma alike; with `fourier_scale` s they are |N(0, s²)| instead (NCSN++, arXiv 2011.13456). Each class has a
    learned vector, and "no label" the last. Augmentations are mapped without a bias, so that zeros stand for none.
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
            raise ValueError(f"augmentation_size = {augmentation_size} must not be negative; pfgm.data.Augment needs 9")
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
        """Return the frequencies [features/2] in radians, for |N(0, s²)| its quantiles: nothing is drawn or stored."""
        # Not a buffer: in bfloat16 the rounded frequencies would shift the highest by a third of a radian.
        count = self.features // 2
        if self.fourier_scale is None:
            return 2 * math.pi * torch.logspace(-3, 3, count, base=2.0, device=device)
        middle = (torch.arange(count, device=device) + 0.5) / count
        return 2 * math.pi * self.fourier_scale * torch.special.ndtri((1 + middle) / 2)

    def forward(
        self, c_noise: Tensor, label: Tensor | None = None, vector: Tensor | None = None, augmentation: Tensor | None = None
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
