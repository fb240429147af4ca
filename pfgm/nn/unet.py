"""UNet: the network for signals, images and volumes of any size and number of channels."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfgm.nn.blocks import Attention, Block, Resample, ResampleAndConvolve, convolution, group_norm, pad, zero_init
from pfgm.nn.network import Embedding, Network, check_conditions, check_event, check_sizes

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


class UNet(Network):
    """Convolutional U-Net for `shape` = (C, L), (C, H, W) or (C, D, H, W); see `Network` for the contract.

    Level i of `multipliers` has width * multipliers[i] channels at 1/2^i of the resolution, with `blocks` residual blocks on
    the way down and one more on the way up, and `dropout` in them. Sizes that do not divide are padded by repeating the border
    and cropped. A condition with the dimensions of the sample, of any size, is resized and concatenated to the input; a vector
    joins the embedding.

    `attention` puts self-attention in the middle, `attention_levels` also after each block of these levels on the way down and
    the last on the way up, with `head_channels` channels to a head. `scale_shift`: the embedding scales and shifts, else it
    is added. `resblock_updown` resamples inside residual blocks, by the filter `resample_filter`. `residual_input` adds the
    convolved and filtered input again at each lower level. Noise levels are embedded by `noise_features` sines and cosines, of
    geometric frequencies or, with a `fourier_scale`, of normal ones. `augmentation_size` numbers that describe how a sample was
    augmented join the embedding. `glorot` draws the weights as EDM does (Glorot's uniform law, no biases).

    The published networks for CIFAR-10, but for the frequencies of the noise embedding: EDM's DDPM++ (arXiv 2206.00364, table
    7), of 55.7 million parameters, is width=128, multipliers=(2, 2, 2), blocks=4, attention_levels=(1,), head_channels=256,
    scale_shift=False, resblock_updown=True, noise_features=128, augmentation_size=9, dropout=.13, glorot=True; its NCSN++, of
    56.4 million, has besides resample_filter=(1, 3, 3, 1), residual_input=True, noise_features=256, fourier_scale=16. DDPM++ of
    score_sde and PFGM (arXiv 2011.13456), of 61.8 million, has multipliers=(1, 2, 2, 2), dropout=.1 and no augmentation.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        extra_channels: int = 0,
        condition_shapes: Mapping[str, Sequence[int]] | None = None,
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
        conditions = check_conditions(condition_shapes)
        _check_shapes(shape, conditions)
        check_event(shape, num_classes, extra_channels)
        check_sizes(width=width, blocks=blocks, multipliers=min(multipliers, default=0), head_channels=head_channels)
        _check_options(len(multipliers), dropout, attention_levels, resample_filter)
        self.dims, self.augmentation_size, self.multiple = len(shape) - 1, augmentation_size, 2 ** (len(multipliers) - 1)
        channels_in, vector = shape[0] + conditions.get("image", (0,))[0], conditions.get("vector", (0,))[0]
        self.embedding = Embedding(
            4 * width, num_classes, noise_features, vector, augmentation_size=augmentation_size, fourier_scale=fourier_scale
        )
        make = partial(Block, self.dims, embedding=4 * width, dropout=dropout, scale_shift=scale_shift)

        def block(channels: int, out: int, level: int | None = None) -> Block:
            return make(channels, out, head_channels=head_channels if level in attention_levels else 0)

        def between(channels: int, up: bool) -> nn.Module:
            resample = Resample(self.dims, up, resample_filter)
            if resblock_updown:
                return make(channels, channels, resample=resample)
            return ResampleAndConvolve(self.dims, channels, resample)

        self.first = convolution(self.dims, channels_in, width)
        self.down, self.up, self.inputs = nn.ModuleList(), nn.ModuleList(), nn.ModuleDict()
        channels, skips, input_channels = width, [width], channels_in
        for level, multiplier in enumerate(multipliers):
            if level:
                self.down.append(between(channels, up=False))
                if residual_input:
                    path = convolution(self.dims, input_channels, channels), Resample(self.dims, False, resample_filter)
                    self.inputs[str(len(self.down) - 1)], input_channels = nn.Sequential(*path), channels
                skips.append(channels)
            for _ in range(blocks):
                self.down.append(block(channels, width * multiplier, level))
                channels = width * multiplier
                skips.append(channels)
        self.middle = nn.ModuleList([block(channels, channels)])
        if attention:
            self.middle.append(Attention(self.dims, channels, head_channels))
        self.middle.append(block(channels, channels))
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(blocks + 1):
                self.up.append(block(channels + skips.pop(), width * multiplier, level if i == blocks else None))
                channels = width * multiplier
            if level:
                self.up.append(between(channels, up=True))
        if glorot:
            _draw_glorot(self)
        last = convolution(self.dims, channels, shape[0] + extra_channels)
        self.last = nn.Sequential(group_norm(channels), nn.SiLU(), zero_init(last))

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
        padded = source = pad(x, self.multiple)
        h = self.first(padded)
        skips = [h]
        for i, layer in enumerate(self.down):
            h = layer(h, embedding)
            if str(i) in self.inputs:
                h = source = (h + self.inputs[str(i)](source)) * math.sqrt(0.5)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for i, layer in enumerate(self.up):
            h = layer(h if self._enlarges(i) else torch.cat([h, skips.pop()], dim=1), embedding)
        return self.last(h)[(..., *(slice(s) for s in size))]

    def _enlarges(self, i: int) -> bool:
        """Whether layer `i` of the way up leads to the next level, and takes no skip."""
        return isinstance(getattr(self.up[i], "resample", None), Resample)


def _check_shapes(shape: Sequence[int], conditions: Mapping[str, Sequence[int]]) -> None:
    if len(shape) - 1 not in INTERPOLATION:
        raise ValueError(
            f"shape = {tuple(shape)}: UNet needs (channels, length), (channels, height, width) or (channels, depth, height, "
            "width); use TimeMLP for vectors"
        )
    for name, dims in (("image", len(shape)), ("vector", 1)):
        if len(conditions.get(name, ())) not in (0, dims):
            raise ValueError(f"condition_shapes = {dict(conditions)}: {name!r} must have {dims} dimensions")


def _check_options(levels: int, dropout: float, attention_levels: Sequence[int], taps: Sequence[float]) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout} must lie in [0, 1)")
    if not all(isinstance(level, int) and 0 <= level < levels for level in attention_levels):
        raise ValueError(f"attention_levels = {tuple(attention_levels)}: the levels of multipliers are 0..{levels - 1}")
    if len(taps) < 2 or len(taps) % 2 or not sum(taps) > 0:
        raise ValueError(f"resample_filter = {tuple(taps)}: give an even number of taps of positive sum, such as (1, 3, 3, 1)")


def _draw_glorot(net: nn.Module) -> None:
    """Uniform weights of variance 2/(fan_in + fan_out), .2 of that for queries, keys and values, and no biases.

    Outputs that start at zero stay so.
    """
    for name, module in net.named_modules():
        outputs = name.endswith((".conv2", ".out"))
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not outputs:
            nn.init.xavier_uniform_(module.weight, math.sqrt(0.2) if name.endswith(".qkv") else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
