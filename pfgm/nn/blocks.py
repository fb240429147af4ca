"""Building blocks of the U-Net, for `dims` = 1 (signals), 2 (images) or 3 (volumes) spatial dimensions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
FILTER = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FILTER_UP = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolution(dims: int, channels_in: int, channels_out: int, size: int = 3) -> nn.Module:
    """Return a convolution with an odd kernel `size` that keeps the spatial size of its input."""
    return CONVOLUTION[dims](channels_in, channels_out, size, padding=size // 2)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group normalisation with at most 32 groups, each of at least four channels unless these do not divide."""
    return nn.GroupNorm(math.gcd(channels, min(32, max(1, channels // 4))), channels, eps=1e-6)


def zero_init(layer: nn.Module) -> nn.Module:
    """Set the weights and the bias of `layer` to zero and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def pad(x: Tensor, multiple: int) -> Tensor:
    """Repeat the far borders of `x` [B, C, ...] until all spatial sizes are multiples of `multiple`."""
    # Not -size % multiple: torch.compile cannot take the remainder of a negative symbolic size.
    missing = [(multiple - size % multiple) % multiple for size in reversed(x.shape[2:])]
    return F.pad(x, [n for far in missing for n in (0, far)], mode="replicate")


class Resample(nn.Module):
    """Halve or, if `up`, double every spatial dimension by a separable FIR filter with an even number of `taps`.

    The filter is normalised, so that constants stay constant away from the border; beyond the border x counts as zero. (1, 1)
    averages or repeats pixels, (1, 3, 3, 1) is the filter of NCSN++ (arXiv 2011.13456, section 4.1).
    """

    def __init__(self, dims: int, up: bool, taps: Sequence[float] = (1, 1)):
        super().__init__()
        self.dims, self.up, self.taps = dims, up, tuple(taps)
        self.kernel: Tensor
        line = torch.tensor(self.taps, dtype=torch.float32)
        kernel = line = line / line.sum() * (2 if up else 1)
        for _ in range(dims - 1):
            kernel = kernel[..., None] * line
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.taps == (1, 1):
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else POOL[self.dims](x, 2)
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, *self.kernel.shape)
        filtered = FILTER_UP[self.dims] if self.up else FILTER[self.dims]
        return filtered(x, kernel, stride=2, padding=len(self.taps) // 2 - 1, groups=x.shape[1])


class ResampleAndConvolve(nn.Module):
    """Lead from one resolution level to the next: resample, then convolve."""

    def __init__(self, dims: int, channels: int, resample: Resample):
        super().__init__()
        self.resample = resample
        self.conv = convolution(dims, channels, channels)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.conv(self.resample(x))


class Block(nn.Module):
    """Compute (skip(x) + F(x)) / sqrt(2), where F consists of two normalised convolutions with the embedding in between.

    The embedding scales and shifts the second normalisation if `scale_shift`, and is added before it otherwise. `resample`
    acts on both branches. Self-attention follows, with `head_channels` a head, unless that is 0.
    """

    def __init__(
        self,
        dims: int,
        channels: int,
        out_channels: int,
        embedding: int,
        *,
        dropout: float,
        scale_shift: bool,
        resample: Resample | None = None,
        head_channels: int = 0,
    ):
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(out_channels)
        self.conv1 = convolution(dims, channels, out_channels)
        self.conv2 = zero_init(convolution(dims, out_channels, out_channels))
        self.scale_shift = scale_shift
        self.modulation = nn.Linear(embedding, (1 + scale_shift) * out_channels)
        self.dropout = nn.Dropout(dropout)
        self.resample = resample or nn.Identity()
        plain = channels == out_channels and resample is None
        self.skip = nn.Identity() if plain else convolution(dims, channels, out_channels, 1)
        self.attention = Attention(dims, out_channels, head_channels) if head_channels else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        modulation = self.modulation(embedding).reshape(len(x), -1, *(1 for _ in h.shape[2:]))
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + modulation)
        x = (self.skip(self.resample(x)) + self.conv2(self.dropout(F.silu(h)))) * math.sqrt(0.5)
        return x if self.attention is None else self.attention(x)


class Attention(nn.Module):
    """Apply self-attention over all positions, with `head_channels` channels a head if these divide, else with one head."""

    def __init__(self, dims: int, channels: int, head_channels: int):
        super().__init__()
        self.heads = channels // head_channels if channels % head_channels == 0 else 1
        self.norm = group_norm(channels)
        self.qkv = convolution(dims, channels, 3 * channels, 1)
        self.out = zero_init(convolution(dims, channels, channels, 1))

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return (x + self.out(h)) * math.sqrt(0.5)
