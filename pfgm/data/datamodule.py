"""The base of all data modules: training and held-out samples with their units, and batches of them."""

import math
from collections.abc import Callable, Iterator, Sequence
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
from pfgm.data.batches import Batch, HeldOutBatches, Preparation, SampleSet, TrainingStream
from pfgm.data.degradations import Degradation
from pfgm.theory.data_summary import DataSummary, level_spacing


class DataModule(Configurable, pl.LightningDataModule):
    """Hold training and held-out samples with their units, and make batches of them.

    Args:
        train: Training samples [n, *shape] in the user's units, with their conditions.
        held_out: Held-out samples of the same kind.
        batch_size: Samples of one batch on one device.
        seed: Seed of order and preparation.
        scale: Size of a model unit in the user's units.
        mean: A number in the user's units to centre on; the mean of the training data by default.
        value_range: (low, high) in the user's units, which pictures show as black and white.
        levels: Number of values that discrete data take, low and high among them; 0 for continuous data.
        dequantize: Whether uniform noise fills the gaps between levels in training; a likelihood of discrete data needs it.
        degrade: Makes a condition of each sample from the sample itself.
        flip: Whether images are mirrored left to right in training, each with probability 1/2.
        workers: Processes that read samples which are not in memory.
        class_names: The name of each class.
        load: Reads training and held-out samples at first use; `train` and `held_out` then only show shapes and labels.

    Raises:
        ValueError: If data are empty, or settings do not fit them.
    """

    # Arguments that say where the data are and how they are read, not what they are: a resumed run may change them.
    PLACES: ClassVar[tuple[str, ...]] = ()

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
        class_names: Sequence[str] = (),
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
        if flip and train.conditions.keys() - {"label"}:
            raise ValueError("flip = True: the conditions of the file would not be mirrored; leave it out, or use degrade")
        self.preparation = Preparation(degrade, level_spacing(value_range, levels) if dequantize else 0.0)
        self.augmentation = replace(self.preparation, flip=flip)
        self.workers = workers
        self._units: dict[str, Any] = {"scale": scale, "mean": mean, "value_range": value_range, "class_names": class_names}
        self._units |= {"levels": levels, "dequantized": dequantize}
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
        """The training samples, read when they are first asked for."""
        return self._loaded[0]

    @cached_property
    def held_out(self) -> SampleSet:
        """The held-out samples, read when they are first asked for."""
        return self._loaded[1]

    @cached_property
    def summary(self) -> DataSummary:
        """The shape, units and statistics of the training data."""
        num_classes = _count_classes(self.train, self.held_out)
        prepared = self.prepared(subsample(self.train, self.seed))
        return DataSummary.from_data(prepared.x, conditions=prepared.conditions, num_classes=num_classes, **self._units)

    def prepared(self, samples: SampleSet) -> SampleSet:
        """Return all of `samples` with their conditions, and noise if dequantised, the same each time."""
        return self.preparation(samples, rng.generator(self.seed, rng.WHOLE))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.summary.shape

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 without labels."""
        return self.summary.num_classes

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each condition but the label, by its key."""
        return self.summary.conditions

    def train_dataloader(self) -> "StepLoader":
        """Return the stream of training batches, a function of the trainer's step.

        Raises:
            ValueError: If epochs would never end, or end within an optimizer step.
        """
        trainer: Any = self.trainer
        _check_epochs(trainer)
        repeated = trainer.overfit_batches if isinstance(trainer.overfit_batches, int) else 0
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
            repeat_batches=repeated,
        )
        return StepLoader(stream, self._loader, trainer)

    def _loader(self, batches: TrainingStream | HeldOutBatches) -> DataLoader:
        """Load batches as they are, in page-locked memory for an accelerator, which then need not be waited for."""
        trainer: Any = self.trainer
        return DataLoader(
            batches,
            batch_size=None,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            num_workers=0 if isinstance(batches.samples.x, Tensor) else self.workers,
        )

    def val_dataloader(self) -> DataLoader:
        """Return the held-out data in order."""
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


class StepLoader:
    """Iterate over training batches from the trainer's present step on, whatever the trainer calls an epoch.

    Args:
        stream: The batches.
        load: Makes the loader of the stream.
        trainer: The trainer that counts the steps.
    """

    def __init__(self, stream: TrainingStream, load: Callable[[TrainingStream], DataLoader], trainer: pl.Trainer):
        self.stream, self.load, self.trainer = stream, load, trainer

    def __iter__(self) -> Iterator[Batch]:
        self.stream.start = self.trainer.global_step
        return iter(self.load(self.stream))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: with these two methods Lightning knows that the loader resumes within an epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the step of the trainer is all the state there is."""


def _check_epochs(trainer: Any) -> None:
    """Raise ValueError unless epochs, if the trainer counts them, are a number of optimizer steps."""
    limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
    endless = isinstance(limit, float)  # an integer is a number of batches, a float a share of them
    if endless and trainer.max_epochs not in (None, -1):
        raise ValueError(
            f"trainer.max_epochs = {trainer.max_epochs}: the stream of training batches has no end, so an epoch has none. "
            "Pass trainer.max_steps instead, or also the length of an epoch, trainer.limit_train_batches."
        )
    if not endless and limit % accumulate and not trainer.fast_dev_run:
        name = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
        raise ValueError(
            f"trainer.{name} = {limit}, trainer.accumulate_grad_batches = {accumulate}: an epoch would end within an optimizer "
            f"step. Pass a multiple of {accumulate}."
        )


SUMMARY_BYTES = 2**31  # larger data are summarised from random samples of this size


def _count_classes(train: SampleSet, held_out: SampleSet) -> int:
    """Return the number of classes; 0 without labels. Raise ValueError for empty data or classes not numbered from 0."""
    for name, samples in (("training", train), ("held-out", held_out)):
        if len(samples) == 0 or samples.x.ndim < 2:
            raise ValueError(f"the {name} data has shape {tuple(samples.x.shape)}; it needs at least one sample, [n, ...]")
    labels = [samples.label for samples in (train, held_out) if samples.label is not None]
    num_classes = int(torch.cat(labels).max()) + 1 if labels else 0
    if num_classes > len(train):
        raise ValueError(f"labels go up to {num_classes - 1} for {len(train)} samples; number the classes from 0")
    return num_classes


def subsample(samples: SampleSet, seed: int) -> SampleSet:
    """Return `samples` if they are small, else SUMMARY_BYTES of them at random, the same whether in memory or not."""
    count = int(SUMMARY_BYTES // (math.prod(samples.x.shape[1:]) * samples.x.dtype.itemsize))
    if len(samples) <= count:
        return samples[:]
    order = torch.randperm(len(samples), generator=rng.generator(seed, rng.WHOLE))
    return samples[order[: max(2, count)].sort().values]
