"""UNet: the network for signals, images and volumes of any size and number of channels."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfgm.nn.blocks import Attention, Block, Resample, ResampleAndConvolve, convolution, group_norm, pad, zero_init
from pfgm.nn.network import ConditionShapes, Embedding, Network, check_arguments

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


class UNet(Network):
    """Apply a convolutional U-Net to signals, images or volumes; see `Network` for the contract.

    Sizes that do not divide are padded by repeating the border, and cropped. An image condition, of any size, is resized and
    concatenated to the input; a vector condition joins the embedding of the noise level.

    The published networks for CIFAR-10 differ only by the frequencies of the noise embedding. `configs/cifar10_edm.yaml` has
    EDM's DDPM++ (arXiv 2206.00364, table 7; 55.7 million parameters), `configs/cifar10_pfgm.yaml` that of score_sde and PFGM
    (arXiv 2011.13456; 61.8 million). EDM's NCSN++ (56.4 million) adds to the former resample_filter=(1, 3, 3, 1),
    residual_input=True, noise_features=256, fourier_scale=16.

    Args:
        shape: Shape of a sample, (C, L), (C, H, W) or (C, D, H, W); see `Network` for the next three arguments.
        width: Number of channels that `multipliers` multiply.
        multipliers: Level i has width * multipliers[i] channels at 1/2^i of the resolution.
        blocks: Residual blocks of each level on the way down. There is one more on the way up.
        dropout: Dropout probability in residual blocks.
        attention: Whether there is self-attention in the middle.
        attention_levels: Levels with self-attention after each block on the way down and the last one on the way up.
        head_channels: Channels of each attention head.
        scale_shift: Whether the embedding scales and shifts normalised features; otherwise it is added to them.
        resblock_updown: Whether residual blocks resample; otherwise a convolution after the resampling leads to the next level.
        resample_filter: Taps of the filter that resamples, an even number.
        residual_input: Whether the convolved and filtered input is added again at each lower level.
        noise_features: Number of sines and cosines that embed the noise level.
        fourier_scale: Scale of normally distributed frequencies; geometric frequencies if None.
        augmentation_size: Size of the vector that describes how a sample was augmented; 0 for none.
        glorot: Whether to initialise as EDM does, by Glorot's uniform distribution without biases.

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
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        dropout: float = 0.0,
        attention: bool = True,
        attention_levels: Sequence[int] = (),
        head_channels: int = 32,
        scale_shift: bool = True,
        resblock_updown: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        residual_input: bool = False,
        noise_features: int = 32,
        fourier_scale: float | None = None,
        augmentation_size: int = 0,
        glorot: bool = False,
    ):
        super().__init__()
        sizes = {"width": width, "blocks": blocks, "multipliers": min(multipliers, default=0), "head_channels": head_channels}
        conditions = check_arguments(shape, num_classes, extra_channels, condition_shapes, sizes)
        _check_dimensions(shape, conditions)
        _check_options(len(multipliers), dropout, attention_levels, resample_filter)
        dims, widths = len(shape) - 1, [width * multiplier for multiplier in multipliers]
        heads = [head_channels if level in attention_levels else 0 for level in range(len(widths))]
        image, vector = (conditions.get(key, (0,))[0] for key in ("image", "vector"))
        residual = functools.partial(Block, dims, embedding=4 * width, dropout=dropout, scale_shift=scale_shift)

        def resampling(channels: int, up: bool) -> nn.Module:
            resample = Resample(dims, up, resample_filter)
            if resblock_updown:
                return residual(channels, channels, resample=resample)
            return ResampleAndConvolve(dims, channels, resample)

        self.dims, self.augmentation_size, self.multiple = dims, augmentation_size, 2 ** (len(widths) - 1)
        self.embedding = Embedding(
            4 * width, num_classes, noise_features, vector, augmentation_size=augmentation_size, fourier_scale=fourier_scale
        )
        source = shape[0] + image  # channels of the input on its own way down
        self.first = convolution(dims, source, width)
        self.down, self.up, self.inputs = nn.ModuleList(), nn.ModuleList(), nn.ModuleDict()
        skips = [width]  # channels of all features on the way down
        for level, channels in enumerate(widths):
            if level:
                self.down.append(resampling(skips[-1], up=False))
                if residual_input:
                    path = convolution(dims, source, skips[-1]), Resample(dims, False, resample_filter)
                    self.inputs[str(len(self.down) - 1)], source = nn.Sequential(*path), skips[-1]
                skips.append(skips[-1])
            for _ in range(blocks):
                self.down.append(residual(skips[-1], channels, head_channels=heads[level]))
                skips.append(channels)
        below = widths[-1]
        self.middle = nn.ModuleList([residual(below, below)])
        if attention:
            self.middle.append(Attention(dims, below, head_channels))
        self.middle.append(residual(below, below))
        for level, channels in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                self.up.append(residual(below + skips.pop(), channels, head_channels=heads[level] if i == blocks else 0))
                below = channels
            if level:
                self.up.append(resampling(channels, up=True))
        if glorot:
            _draw_glorot(self)
        last = convolution(dims, widths[0], shape[0] + extra_channels)
        self.last = nn.Sequential(group_norm(widths[0]), nn.SiLU(), zero_init(last))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        label: Tensor | None = None,
        image: Tensor | None = None,
        vector: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        size = x.shape[2:]
        if image is not None:
            resized = F.interpolate(image, size, mode=INTERPOLATION[self.dims], align_corners=False)
            x = torch.cat([x, resized], dim=1)
        embedding = self.embedding(c_noise, label, vector, augmentation)
        source = pad(x, self.multiple)
        h = self.first(source)
        skips = [h]
        for i, layer in enumerate(self.down):
            h = layer(h, embedding)
            if str(i) in self.inputs:
                h = source = (h + self.inputs[str(i)](source)) * math.sqrt(0.5)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            if not isinstance(layer.resample, Resample):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding)
        return self.last(h)[(..., *(slice(length) for length in size))]


def _check_dimensions(shape: Sequence[int], conditions: ConditionShapes) -> None:
    """Raise ValueError unless samples and conditions have numbers of dimensions that the U-Net can use."""
    if len(shape) - 1 not in INTERPOLATION:
        raise ValueError(
            f"shape = {tuple(shape)}: UNet needs (channels, length), (channels, height, width) or (channels, depth, height, "
            "width). Use TimeMLP for vectors"
        )
    for name, dims in (("image", len(shape)), ("vector", 1)):
        if len(conditions.get(name, ())) not in (0, dims):
            raise ValueError(f"condition_shapes = {dict(conditions)}: {name!r} must have {dims} dimensions for this UNet")


def _check_options(levels: int, dropout: float, attention_levels: Sequence[int], taps: Sequence[float]) -> None:
    """Raise ValueError if an option is out of range for a network with so many `levels`."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} must lie in [0, 1)")
    if not all(0 <= level < levels for level in attention_levels):
        raise ValueError(f"attention_levels = {tuple(attention_levels)}: the levels of multipliers are 0..{levels - 1}")
    if len(taps) < 2 or len(taps) % 2 or not sum(taps) > 0:
        raise ValueError(f"resample_filter = {tuple(taps)}: give an even number of taps of positive sum, such as (1, 3, 3, 1)")


def _draw_glorot(net: nn.Module) -> None:
    """Draw uniform weights of variance 2/(fan_in + fan_out), .2 of that for queries, keys and values; set biases to zero.

    The zero-initialised outputs of residual branches stay at zero.
    """
    for name, module in net.named_modules():
        outputs = name.endswith((".conv2", ".out"))
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not outputs:
            nn.init.xavier_uniform_(module.weight, math.sqrt(0.2) if name.endswith(".qkv") else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
