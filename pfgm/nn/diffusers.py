"""Adapters that give networks of other packages the interface of `pfgm.nn.Network`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pfgm.nn.blocks import pad, zero_init
from pfgm.nn.network import ConditionShapes, Network, check_arguments


class DiffusersUNet(Network):
    """Adapt `diffusers.UNet2DModel` to the contract of `Network`, for images and with labels as the only conditions.

    The noise level enters as the timestep 250 (c_noise + 2), which lies within 0..1000 for levels from .0003 to 3000. Images
    whose size does not divide are padded, and the output is cropped. See `Network` for the first four arguments.

    Args:
        options: Arguments of UNet2DModel, except channels, sample size and classes, which follow from the data.

    Raises:
        ImportError: If diffusers is not installed.
        ValueError: If the shape is not that of images, if there are conditions, or if UNet2DModel refuses `options`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        extra_channels: int = 0,
        condition_shapes: ConditionShapes | None = None,
        *,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ImportError("DiffusersUNet needs diffusers: pip install 'pfgm[diffusers]'") from error
        if len(shape) != 3:
            raise ValueError(f"shape = {tuple(shape)}: DiffusersUNet needs images (channels, height, width)")
        check_arguments(shape, num_classes, extra_channels, condition_shapes, sizes={}, known=())
        sizes = {"in_channels": shape[0], "out_channels": shape[0] + extra_channels, "sample_size": tuple(shape[1:])}
        classes = {"num_class_embeds": num_classes + 1} if num_classes else {}
        self.num_classes = num_classes
        self.model: Any
        try:
            self.model = UNet2DModel(**sizes, **classes, **(options or {}))
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"options = {dict(options or {})}: UNet2DModel refuses them: {error}") from error
        self.multiple = 2 ** (len(self.model.config.block_out_channels) - 1)
        zero_init(self.model.conv_out)

    def forward(self, x: Tensor, c_noise: Tensor, *, label: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        if self.num_classes and label is None:
            label = c_noise.new_full(c_noise.shape, self.num_classes).long()
        out = self.model(pad(x, self.multiple), 250 * (c_noise + 2), class_labels=label, return_dict=False)[0]
        return out[..., :height, :width]
