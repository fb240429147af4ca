"""UNet: the network for images of any height, width and number of channels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfgm.nn.network import Embedding, Network, check_sizes


class UNet(Network):
    """Convolutional U-Net after DDPM++ (arXiv 2011.13456) and EDM, at a size for small images.

    `shape` = (C, H, W); level i of `multipliers` has width * multipliers[i] channels at 1/2^i of the resolution, with `blocks`
    residual blocks on the way down and up, self-attention in the middle if `attention`, and `dropout` in the blocks. Sizes
    that do not divide are padded by repeating the border and cropped. A condition that is an image, of any size, is resized
    and concatenated to the input; a vector joins the embedding. See `Network` for the contract.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        extra_channels: int = 0,
        condition_shape: Sequence[int] | None = None,
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"shape = {tuple(shape)}: UNet needs images (channels, height, width); use TimeMLP for vectors")
        check_sizes(width=width, blocks=blocks, multipliers=min(multipliers, default=0))
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout} must lie in [0, 1)")
        if condition_shape is not None and len(condition_shape) not in (1, 3):
            raise ValueError(f"condition_shape = {tuple(condition_shape)}: UNet takes images (C, H, W) and vectors (K,)")
        embedding, self.image_condition = 4 * width, len(condition_shape or ()) == 3
        channels_in = shape[0] + (condition_shape[0] if condition_shape and self.image_condition else 0)
        self.multiple = 2 ** (len(multipliers) - 1)
        vector = condition_shape[0] if condition_shape and not self.image_condition else 0
        self.embedding = Embedding(embedding, num_classes, condition_size=vector)
        self.first = nn.Conv2d(channels_in, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = width, [width]
        for level, multiplier in enumerate(multipliers):
            if level:
                self.down.append(_Resample(channels, 0.5))
                skips.append(channels)
            for _ in range(blocks):
                self.down.append(_Block(channels, width * multiplier, embedding, dropout))
                channels = width * multiplier
                skips.append(channels)
        self.middle = nn.ModuleList([_Block(channels, channels, embedding, dropout)])
        if attention:
            self.middle.append(_Attention(channels))
        self.middle.append(_Block(channels, channels, embedding, dropout))
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(_Block(channels + skips.pop(), width * multiplier, embedding, dropout))
                channels = width * multiplier
            if level:
                self.up.append(_Resample(channels, 2.0))
        self.last = nn.Sequential(
            _group_norm(channels), nn.SiLU(), _zero(nn.Conv2d(channels, shape[0] + extra_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        if self.image_condition and condition is not None:
            x = torch.cat([x, F.interpolate(condition, (height, width), mode="bilinear", align_corners=False)], dim=1)
        padded = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        embedding = self.embedding(c_noise, label, condition)
        h = self.first(padded)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            h = layer(h if isinstance(layer, _Resample) else torch.cat([h, skips.pop()], dim=1), embedding)
        return self.last(h)[..., :height, :width]


class _Block(nn.Module):
    """Residual block: two normalised convolutions, scaled and shifted in between by the embedding."""

    def __init__(self, channels: int, out_channels: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = _group_norm(channels), _group_norm(out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * out_channels)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return (self.skip(x) + self.conv2(self.dropout(h))) * math.sqrt(0.5)


class _Attention(nn.Module):
    """Self-attention over all pixels, 32 channels to a head where they divide."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // 32) if channels % 32 == 0 else 1
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return (x + self.out(h)) * math.sqrt(0.5)


class _Resample(nn.Module):
    """Halve by averaging or double by repeating, then convolve."""

    def __init__(self, channels: int, factor: float):
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.avg_pool2d(x, 2) if self.factor < 1 else F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, min(32, max(1, channels // 4))), channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
