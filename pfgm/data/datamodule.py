"""The base of all data modules: samples with their units, split into training and held-out data, and batches of them."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info as rank_zero_info  # for the data sets
from pytorch_lightning.utilities import rank_zero_warn as rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from pfgm.core import rng
from pfgm.core.configurable import Configurable
from pfgm.data.batches import HeldOutBatches, Preparation, SampleSet, TrainingStream
from pfgm.data.degradations import Degradation
from pfgm.theory.data_summary import DataSummary, level_spacing


class DataModule(Configurable, pl.LightningDataModule):
    """Samples with their units, split into training and held-out data.

    `train` and `held_out` have samples [n, *shape] in the user's units, with labels and conditions if there are any. model =
    user / `scale` - mean; `mean` (default: of the training data) is in the user's units; `value_range` (low, high) is what
    pictures map to black and white. Discrete data has so many `levels`, low and high among them (0: continuous); with
    `dequantize` uniform noise fills the gaps between them in training, without which it has no likelihood. `degrade` makes
    conditions of the samples themselves; `flip` mirrors images left to right in training, each with probability 1/2. So many
    `workers` read samples that are not in memory. With `load`, `train` and `held_out` only show shapes and labels, and what it
    returns replaces them at first use. ValueError for data that is empty, not finite or of different shapes.
    """

    PLACES: ClassVar[tuple[str, ...]] = ()
    """Arguments that say where the data is and how it is read, not what it is: a resumed run may change them."""

    def __init__(
        self,
        train: SampleSet,
        held_out: SampleSet,
        *,
        batch_size: int,
        seed: int,
        scale: float = 1.0,
        mean: float | None = None,
        value_range: tuple[float, float] | None = None,
        levels: int = 0,
        dequantize: bool = False,
        degrade: Degradation | None = None,
        flip: bool = False,
        workers: int = 0,
        load: Callable[[], tuple[SampleSet, SampleSet]] | None = None,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1")
        _count_classes(train, held_out)
        if dequantize and not levels:
            raise ValueError("dequantize = True: this data is continuous, it has no levels; leave dequantize out")
        self.batch_size, self.seed = batch_size, seed
        if degrade is not None:
            degrade.shape(tuple(train.x.shape[1:]))
        if flip and train.x.ndim != 4:
            raise ValueError(f"flip = True: it mirrors images, not samples of shape {tuple(train.x.shape[1:])}; leave it out")
        if flip and train.condition is not None:
            raise ValueError("flip = True: the conditions of the file would not be mirrored; leave it out, or use degrade")
        self.preparation = Preparation(degrade, level_spacing(value_range, levels) if dequantize else 0.0)
        self.augmentation = replace(self.preparation, flip=flip)
        self.workers = workers
        units = {"scale": scale, "value_range": value_range, "mean": mean, "levels": levels, "dequantized": dequantize}
        self._units: dict[str, Any] = units
        self._load = load
        if load is None:
            self.train, self.held_out = train, held_out
            self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read samples that are not in memory yet, and summarise them. Later calls do nothing."""
        self.summary  # noqa: B018

    @cached_property
    def _loaded(self) -> tuple[SampleSet, SampleSet]:
        assert self._load is not None
        return self._load()

    @cached_property
    def train(self) -> SampleSet:
        """Training samples, read when they are first asked for."""
        return self._loaded[0]

    @cached_property
    def held_out(self) -> SampleSet:
        """Held-out samples, read when they are first asked for."""
        return self._loaded[1]

    @cached_property
    def summary(self) -> DataSummary:
        """Shape, units and statistics of the training data."""
        num_classes = _count_classes(self.train, self.held_out)
        prepared = self.prepared(some(self.train, self.seed))
        return DataSummary.of(prepared.x, condition=prepared.condition, num_classes=num_classes, **self._units)

    def prepared(self, part: SampleSet) -> SampleSet:
        """All of `part` with its conditions, and noise if dequantised, the same each time."""
        return self.preparation(part, rng.generator(self.seed, rng.WHOLE))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.summary.shape

    @property
    def num_classes(self) -> int:
        """Number of labels, 0 if there are none."""
        return self.summary.num_classes

    @property
    def condition_shape(self) -> tuple[int, ...] | None:
        """Of the condition of one sample, None if there are none."""
        return self.summary.condition_shape

    def train_dataloader(self) -> DataLoader:
        """The stream from the trainer's present step on, so that a resumed run continues it."""
        trainer: Any = self.trainer
        stream = TrainingStream(
            self.train,
            self.augmentation,
            batch_size=self.batch_size,
            seed=self.seed,
            start=trainer.global_step,
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            reference_size=trainer.lightning_module.reference_size,
        )
        return self._loader(stream)

    def _loader(self, batches: TrainingStream | HeldOutBatches) -> DataLoader:
        """Batches as they are, in page-locked memory for an accelerator, which then need not be waited for."""
        trainer: Any = self.trainer
        return DataLoader(
            batches,
            batch_size=None,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            num_workers=0 if isinstance(batches.part.x, Tensor) else self.workers,
        )

    def val_dataloader(self) -> DataLoader:
        """The held-out data in order."""
        trainer: Any = self.trainer
        held_out = HeldOutBatches(
            self.held_out,
            self.preparation,
            batch_size=self.batch_size,
            seed=self.seed,
            reference_size=trainer.lightning_module.reference_size,
        )
        return self._loader(held_out)

    test_dataloader = val_dataloader


def _count_classes(train: SampleSet, held_out: SampleSet) -> int:
    """Return the number of classes, 0 without labels. ValueError for empty data or classes that are not numbered from 0."""
    for name, part in (("training", train), ("held-out", held_out)):
        if len(part) == 0 or part.x.ndim < 2:
            raise ValueError(f"the {name} data has shape {tuple(part.x.shape)}; it needs at least one sample, [n, ...]")
    labels = [part.label for part in (train, held_out) if part.label is not None]
    num_classes = int(torch.cat(labels).max()) + 1 if labels else 0
    if num_classes > len(train):
        raise ValueError(f"labels go up to {num_classes - 1} for {len(train)} samples; number the classes from 0")
    return num_classes


SUMMARY_BYTES = 2**31
"""Size of the samples that stand for data of more."""


def some(part: SampleSet, seed: int) -> SampleSet:
    """`part` if it is small, else samples of it at random that take SUMMARY_BYTES; the same whether it is in memory or not."""
    count = int(SUMMARY_BYTES // (math.prod(part.x.shape[1:]) * part.x.dtype.itemsize))
    if len(part) <= count:
        return part[:]
    return part[torch.randperm(len(part), generator=rng.generator(seed, rng.WHOLE))[: max(2, count)].sort().values]
