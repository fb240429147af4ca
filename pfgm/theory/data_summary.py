"""Training laws of the noise level, and values recommended from the data.

sigma is in the units of model space. A law draws sigma for the denoising objective; `PoissonFlowNoise` is PFGM's own
perturbation, which draws x and z together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from pfgm.core.configurable import Configurable, public_path, to_json
from pfgm.core.tensors import norm

BLOCK_BYTES = 2**25
"""Size of the float64 copy of a block of data."""


@dataclass(frozen=True)
class DataSummary(Configurable):
    """What a flow has to know of its data.

    The user's units are (model + mean) scale. In model units: `mean` [*shape] over samples (None: to be loaded with the
    weights) and, of the centred data, `sigma_data`, the RMS over samples and coordinates, `norm`, the mean Euclidean norm of a
    sample, and `power_std`, the standard deviation over samples of |y|²/N. `value_range`
    (low, high), in the user's units, is what pictures map to black and white; `num_classes` is 0 without labels. Discrete data
    has so many `levels` (0: continuous), and is `dequantized` if noise fills the gaps. Conditions have `condition_shape` and,
    for each index of its first dimension, the mean and standard deviation `condition_mean` and `condition_std` [C, 1, ...].
    """

    shape: tuple[int, ...]
    sigma_data: float
    norm: float
    power_std: float
    scale: float = 1.0
    value_range: tuple[float, float] | None = None
    num_classes: int = 0
    levels: int = 0
    dequantized: bool = False
    condition_shape: tuple[int, ...] | None = None
    mean: Tensor | None = None
    condition_mean: Tensor | None = None
    condition_std: Tensor | None = None

    TENSORS: ClassVar = ("mean", "condition_mean", "condition_std")

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "condition_shape", None if self.condition_shape is None else tuple(self.condition_shape))

    @classmethod
    def of(
        cls,
        data: Tensor,
        *,
        scale: float = 1.0,
        value_range: tuple[float, float] | None = None,
        num_classes: int = 0,
        mean: float | None = None,
        levels: int = 0,
        dequantized: bool = False,
        condition: Tensor | None = None,
    ) -> "DataSummary":
        """Summary of `data` [n, *shape] in the user's units, centred on its own mean or on a given number, and of the
        `condition` [n, ...] of each sample.

        ValueError if all samples are equal.
        """
        rows = data.split(max(1, BLOCK_BYTES // (8 * data[0].numel())))
        if all(bool((block == data[0]).all()) for block in rows):
            raise ValueError(f"data: all {len(data)} samples are equal; there is no distribution to learn")
        if mean is None:
            centre = torch.stack([block.double().sum(0) for block in rows]).sum(0) / (len(data) * scale)
        else:
            centre = torch.full_like(data[0], mean / scale, dtype=torch.float64)
        norms = torch.cat([norm(block.double() / scale - centre) for block in rows])
        power = norms.square() / centre.numel()
        c_mean, c_std = (None, None) if condition is None else _channel_statistics(condition)
        return cls(
            tuple(centre.shape),
            sigma_data=math.sqrt(power.mean()),
            norm=float(norms.mean()),
            power_std=float(power.std(correction=0)),
            scale=scale,
            value_range=value_range,
            num_classes=num_classes,
            levels=levels,
            dequantized=dequantized,
            condition_shape=None if condition is None else tuple(condition.shape[1:]),
            mean=centre.float(),
            condition_mean=c_mean,
            condition_std=c_std,
        )

    @property
    def spec(self) -> dict[str, Any]:
        """As for every Recorded, without the tensors, which are stored with the weights."""
        init_args = {field.name: to_json(getattr(self, field.name)) for field in fields(self) if field.name not in self.TENSORS}
        return {"class_path": public_path(type(self)), "init_args": init_args}


def _channel_statistics(condition: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1 where it vanishes) over samples and all but the first dimension, [C, 1, ...] each."""
    over = [i for i in range(condition.ndim) if i != 1]
    wide = condition.double()
    mean, std = wide.mean(over, keepdim=True)[0], wide.std(over, correction=0, keepdim=True)[0]
    return mean.float(), torch.where(std > 1e-6 * mean.abs(), std, 1.0).float()


def level_spacing(value_range: Sequence[float] | None, levels: int) -> float:
    """The distance of neighbours among `levels` values from the low to the high end of `value_range`.

    ValueError if there is no range or fewer than two levels.
    """
    if value_range is None or levels < 2:
        raise ValueError(f"value_range = {value_range}, levels = {levels}: discrete data needs a range and two levels or more")
    return (value_range[1] - value_range[0]) / (levels - 1)
