"""TimeMLP: the network for vectors and small arrays."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pfgm.nn.network import Embedding, Network, check_conditions, check_event, check_sizes


class TimeMLP(Network):
    """Residual multilayer perceptron on the flattened event, modulated by noise level and label; a condition joins the event.

    `shape` is the event's, `width` the hidden width, `depth` the number of residual blocks. See `Network` for the contract.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        extra_channels: int = 0,
        condition_shapes: Mapping[str, Sequence[int]] | None = None,
        *,
        width: int = 256,
        depth: int = 4,
    ):
        super().__init__()
        check_event(shape, num_classes, extra_channels)
        check_sizes(width=width, depth=depth)
        self.out_shape = (shape[0] + extra_channels, *shape[1:])
        self.embedding = Embedding(width, num_classes)
        conditions = sum(math.prod(size) for size in check_conditions(condition_shapes).values())
        self.first = nn.Linear(math.prod(shape) + conditions, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = nn.Linear(width, math.prod(self.out_shape))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

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
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        return (h + self.layers(torch.addcmul(shift, self.norm(h), 1 + scale))) * math.sqrt(0.5)
