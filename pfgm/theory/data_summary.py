"""Summary of the data that a model has to know: shape, units, size, classes and conditions.

Model space is the user's units, scaled and centred: model = user / scale - mean. Everything below `PoissonFlow` works there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core import rng
from pfgm.core.configurable import Configurable, build, public_path, to_json
from pfgm.core.tensors import check_positive, check_shape, norm

BLOCK_BYTES = 2**25  # size of the float64 copy of a block of data
TENSORS = ("mean", "condition_stats")  # constructor arguments that are stored with the weights


class DataSummary(Configurable, nn.Module):
    """Hold what a flow knows of its data, and convert between the user's units and model space.

    Args:
        shape: Shape of one sample, without the batch.
        sigma_data: Root mean square over samples and coordinates of the centred data, in model units.
        norm: Mean Euclidean norm of a centred sample, in model units; None if unknown.
        power_std: Standard deviation over samples of |y|²/N, in squared model units.
        scale: Size of a model unit in the user's units.
        value_range: (low, high) in the user's units, which pictures show as black and white.
        num_classes: Number of classes; 0 for data without labels.
        class_names: The name of each class; empty if they have none.
        levels: Number of values that discrete data take; 0 for continuous data.
        dequantized: Whether uniform noise fills the gaps between the levels in training.
        conditions: The shape of each condition but the label, by its key ("image", "vector").
        mean: Mean over samples, [*shape] in model units; zero until weights are loaded if None.
        condition_stats: Mean and standard deviation [C, 1, ...] of each condition; 0 and 1 until weights are loaded if None.

    Raises:
        ValueError: If shape, sigma_data or scale are out of range.
    """

    mean: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        sigma_data: float = 0.5,
        norm: float | None = None,
        power_std: float = 0.0,
        scale: float = 1.0,
        value_range: Sequence[float] | None = None,
        num_classes: int = 0,
        class_names: Sequence[str] = (),
        levels: int = 0,
        dequantized: bool = False,
        conditions: Mapping[str, Sequence[int]] | None = None,
        mean: Tensor | None = None,
        condition_stats: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ):
        super().__init__()
        check_shape(shape)
        check_positive("sigma_data", sigma_data)
        check_positive("scale", scale)
        self.shape, self.sigma_data, self.norm, self.power_std = tuple(shape), sigma_data, norm, power_std
        self.scale, self.value_range = scale, None if value_range is None else (value_range[0], value_range[1])
        self.num_classes, self.class_names = num_classes, tuple(class_names)
        self.levels, self.dequantized = levels, dequantized
        self.conditions = {key: tuple(of_one) for key, of_one in (conditions or {}).items()}
        self.register_buffer("mean", torch.zeros(self.shape) if mean is None else mean)
        for key, of_one in self.conditions.items():
            channels = (of_one[0], *[1] * (len(of_one) - 1))
            stats = (condition_stats or {}).get(key, (torch.zeros(channels), torch.ones(channels)))
            self.register_buffer(f"{key}_mean", stats[0])
            self.register_buffer(f"{key}_std", stats[1])

    @classmethod
    def from_data(
        cls,
        data: Tensor,
        *,
        scale: float = 1.0,
        mean: float | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        **settings: Any,
    ) -> "DataSummary":
        """Summarise samples.

        Args:
            data: Samples [n, *shape] in the user's units.
            scale: Size of a model unit in the user's units.
            mean: A number in the user's units to centre on; the mean of the data by default.
            conditions: The condition of each sample, [n, ...] for each key; a key "label" is left to `num_classes`.
            **settings: Further arguments of `DataSummary`.

        Raises:
            ValueError: If all samples are equal.
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
        tensors = {key: value for key, value in (conditions or {}).items() if key != "label"}
        return cls(
            tuple(centre.shape),
            sigma_data=math.sqrt(power.mean()),
            norm=float(norms.mean()),
            power_std=float(power.std(correction=0)),
            scale=scale,
            mean=centre.float(),
            conditions={key: tuple(value.shape[1:]) for key, value in tensors.items()},
            condition_stats={key: _channel_statistics(value) for key, value in tensors.items()},
            **settings,
        )

    @property
    def spec(self) -> dict[str, Any]:
        """Class path and arguments as JSON data, without the tensors, which are stored with the weights."""
        arguments = {name: value for name, value in self._arguments.items() if name not in TENSORS}
        return {"class_path": public_path(type(self)), "init_args": to_json(arguments)}

    @property
    def mean_norm(self) -> float:
        """The mean norm of a centred sample, in model units. Raise ValueError if it is unknown."""
        if self.norm is None:
            raise ValueError("norm = None: PFGM's noise follows from the mean norm of the data; give it to the DataSummary")
        return self.norm

    def replace(self, **changes: Any) -> "DataSummary":
        """Return a copy with some of the plain settings changed."""
        stored = self.spec
        copy: DataSummary = build({**stored, "init_args": stored["init_args"] | changes}, kind=DataSummary)
        copy.load_state_dict(self.state_dict())
        return copy

    def to_model(self, x: Tensor) -> Tensor:
        """Convert samples [B, *shape] from the user's units to centred model space."""
        return x / self.scale - self.mean.to(x.dtype)

    def to_user(self, x: Tensor) -> Tensor:
        """Convert samples [B, *shape] from centred model space to the user's units."""
        return (x + self.mean.to(x.dtype)) * self.scale

    def normalize(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `conditions` with those that have a mean and a standard deviation brought to about unit variance."""
        return {key: self._normalized(key, value) if key in self.conditions else value for key, value in conditions.items()}

    def _normalized(self, key: str, value: Tensor) -> Tensor:
        return (value.float() - getattr(self, f"{key}_mean")) / getattr(self, f"{key}_std")

    def check_discrete(self) -> None:
        """Raise ValueError unless a model of these data has bits per dimension."""
        if not self.levels:
            raise ValueError(
                "bits/dim: this model's data are continuous, so that the figure would depend on units; use log_prob"
            )
        if not self.dequantized:
            raise ValueError(
                f"bits/dim: the {self.levels} levels of this model's data are points to it, since it was trained without noise "
                "between them, and its density there is no likelihood; train with data.dequantize = true"
            )

    def fill_gaps(self, x: Tensor, seed: int) -> Tensor:
        """Add uniform noise as wide as the gap between two levels to `x` [B, *shape], a function of (seed, i) for sample i."""
        if not len(x):
            return x
        draws = [torch.rand(self.shape, generator=rng.generator(seed, i, 0, 0, rng.DEQUANTIZATION)) for i in range(len(x))]
        return x + level_spacing(self.value_range, self.levels) * (torch.stack(draws) - 0.5).to(x.device)


def condition_key(shape: Sequence[int]) -> str:
    """Return the usual key of a condition of `shape`: "vector" for one dimension, "image" for more."""
    return "vector" if len(shape) == 1 else "image"


def _channel_statistics(condition: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1 where it vanishes) over samples and all but the first dimension, [C, 1, ...] each."""
    over = [i for i in range(condition.ndim) if i != 1]
    wide = condition.double()
    mean, std = wide.mean(over, keepdim=True)[0], wide.std(over, correction=0, keepdim=True)[0]
    return mean.float(), torch.where(std > 1e-6 * mean.abs(), std, 1.0).float()


def level_spacing(value_range: Sequence[float] | None, levels: int) -> float:
    """Return the distance of neighbouring values among `levels` of them from the low to the high end of `value_range`.

    Raises:
        ValueError: If there is no range, or fewer than two levels.
    """
    if value_range is None or levels < 2:
        raise ValueError(f"value_range = {value_range}, levels = {levels}: discrete data needs a range and two levels or more")
    return (value_range[1] - value_range[0]) / (levels - 1)
