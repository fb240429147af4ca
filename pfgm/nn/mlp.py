"""TimeMLP: the network for vectors and small arrays."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pfgm.nn.blocks import zero_init
from pfgm.nn.network import ConditionShapes, Embedding, Network, check_arguments


class TimeMLP(Network):
    """Apply a residual multilayer perceptron to flattened samples, modulated by noise level and label.

    Conditions, of any number of dimensions, are flattened and concatenated to the sample, an image before a vector. See
    `Network` for the contract and the first four arguments.

    Args:
        width: Width of the hidden layers.
        depth: Number of residual blocks.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        extra_channels: int = 0,
        condition_shapes: ConditionShapes | None = None,
        *,
        width: int = 256,
        depth: int = 4,
    ):
        super().__init__()
        conditions = check_arguments(shape, num_classes, extra_channels, condition_shapes, {"width": width, "depth": depth})
        self.out_shape = (shape[0] + extra_channels, *shape[1:])
        self.embedding = Embedding(width, num_classes)
        self.first = nn.Linear(sum(map(math.prod, (shape, *conditions.values()))), width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = zero_init(nn.Linear(width, math.prod(self.out_shape)))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        label: Tensor | None = None,
        image: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        embedding = self.embedding(c_noise, label)
        h = self.first(torch.cat([part.flatten(1) for part in (x, image, vector) if part is not None], dim=1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(nn.functional.silu(h)).reshape(len(x), *self.out_shape)


class _Block(nn.Module):
    """Add two layers of the normalised and modulated features to them."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        return (h + self.layers(torch.addcmul(shift, self.norm(h), 1 + scale))) * math.sqrt(0.5)
