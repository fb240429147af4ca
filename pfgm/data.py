"""Data modules: they know what the data is, its units and levels, and what samples are conditioned on.

All data is held in memory, in the user's units; `pfgm.stream` makes the batches.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pfgm import rng
from pfgm.degrade import Degradation
from pfgm.files import check_values, read_samples
from pfgm.noise import DataSummary, level_spacing
from pfgm.spec import Recorded
from pfgm.stream import HeldOut, Part, Preparation, Stream
from pfgm.toys import TOYS


class DataModule(Recorded, pl.LightningDataModule):
    """Samples in memory with their units, split into training and held-out data.

    `train` and `held_out` have samples [n, *shape] in the user's units, with labels and conditions if there are any. model =
    user / `scale` - mean; `mean` (default: of the training data) is in the user's units; `value_range` (low, high) is what
    pictures map to black and white. Discrete data has so many `levels`, low and high among them (0: continuous); with
    `dequantize` uniform noise fills the gaps between them in training, without which it has no likelihood. `degrade` makes
    conditions of the samples themselves; `flip` mirrors images left to right in training, each with probability 1/2. ValueError
    for data that is empty, not finite or of different shapes.
    """

    def __init__(
        self,
        train: Part,
        held_out: Part,
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
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1")
        for name, part in (("training", train), ("held-out", held_out)):
            if len(part) == 0 or part.x.ndim < 2:
                raise ValueError(f"the {name} data has shape {tuple(part.x.shape)}; it needs at least one sample, [n, ...]")
        if dequantize and not levels:
            raise ValueError("dequantize = True: this data is continuous, it has no levels; leave dequantize out")
        self.train, self.held_out, self.batch_size, self.seed = train, held_out, batch_size, seed
        num_classes = 0 if train.label is None else int(train.label.max()) + 1
        if num_classes > len(train):
            raise ValueError(f"labels go up to {num_classes - 1} for {len(train)} samples; number the classes from 0")
        if degrade is not None:
            degrade.shape(train.x.shape[1:])
        if flip and train.x.ndim != 4:
            raise ValueError(f"flip = True: it mirrors images, not samples of shape {tuple(train.x.shape[1:])}; leave it out")
        if flip and train.condition is not None:
            raise ValueError("flip = True: the conditions of the file would not be mirrored; leave it out, or use degrade")
        self.preparation = Preparation(degrade, level_spacing(value_range, levels) if dequantize else 0.0)
        self.augmentation = replace(self.preparation, flip=flip)
        prepared = self.prepared(train)
        self.summary = DataSummary.of(
            prepared.x,
            condition=prepared.condition,
            scale=scale,
            value_range=value_range,
            num_classes=num_classes,
            mean=mean,
            levels=levels,
            dequantized=dequantize,
        )

    def prepared(self, part: Part) -> Part:
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
        stream = Stream(
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

    def _loader(self, batches: Dataset) -> DataLoader:
        """Batches as they are, in page-locked memory for an accelerator, which then need not be waited for."""
        trainer: Any = self.trainer
        return DataLoader(batches, batch_size=None, pin_memory=trainer.strategy.root_device.type == "cuda")

    def val_dataloader(self) -> DataLoader:
        """The held-out data in order."""
        trainer: Any = self.trainer
        held_out = HeldOut(
            self.held_out,
            self.preparation,
            batch_size=self.batch_size,
            seed=self.seed,
            reference_size=trainer.lightning_module.reference_size,
        )
        return self._loader(held_out)

    test_dataloader = val_dataloader


class Digits(DataModule):
    """The 1797 handwritten digits of scikit-learn (8 x 8, grey), bundled with it: [1, 8, 8], 17 levels in [-1, 1].

    Split at random, each class in proportion, with `held_out` of the digits for validation: the last 297 are by other
    writers, so an ordered split would compare different hands. `labels` trains a class-conditional model, `degrade` one that
    undoes a degradation, `dequantize` one with a likelihood.
    """

    def __init__(
        self,
        batch_size: int = 128,
        held_out: float = 0.2,
        labels: bool = False,
        degrade: Degradation | None = None,
        dequantize: bool = False,
        mean: float | None = None,
        seed: int = 0,
    ):
        from sklearn.datasets import load_digits

        data = load_digits()
        x, y = torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(data.target)
        train, rest = split(Part(x, y), held_out, seed)
        if not labels:
            train, rest = Part(train.x), Part(rest.x)
        super().__init__(
            train,
            rest,
            batch_size=batch_size,
            seed=seed,
            mean=mean,
            value_range=(-1.0, 1.0),
            levels=17,
            dequantize=dequantize,
            degrade=degrade,
        )


class Toy(DataModule):
    """Points in the plane, [2]: "rings" (two), "gaussians" (eight), "swiss_roll" or "heart", `size` of them, about 2 across."""

    def __init__(
        self,
        name: Literal["rings", "gaussians", "swiss_roll", "heart"] = "heart",
        size: int = 4096,
        batch_size: int = 256,
        mean: float | None = None,
        seed: int = 0,
    ):
        if name not in TOYS:
            raise ValueError(f"name = {name!r} is unknown; choose one of {', '.join(TOYS)}")
        if size < 1:
            raise ValueError(f"size = {size} must be at least 1")
        parts = [torch.tensor(TOYS[name](size, np.random.default_rng((seed, k))), dtype=torch.float32) for k in (0, 1)]
        super().__init__(Part(parts[0]), Part(parts[1]), batch_size=batch_size, seed=seed, mean=mean)


class Arrays(DataModule):
    """Samples [n, ...] of any shape from a .npy, .npz or .pt file; of one dimension they become [n, 1].

    An .npz or a .pt with several arrays holds the samples under "x", with `labels` integer classes under "labels", and with
    `conditions` numbers of any shape under "conditions"; `degrade` makes the conditions of images instead. 8-bit
    integers have the range 0..255; for other integers give `value_range` (low, high), which maps to [-1, 1] in model space.
    Other data is scaled to an RMS of .5 there. `held_out` is the part kept for validation; `dequantize` is for integers, `flip`
    for images, which it mirrors left to right in training, each with probability 1/2.
    """

    def __init__(
        self,
        path: Path,
        batch_size: int = 128,
        held_out: float = 0.1,
        labels: bool = False,
        conditions: bool = False,
        degrade: Degradation | None = None,
        value_range: tuple[float, float] | None = None,
        dequantize: bool = False,
        flip: bool = False,
        mean: float | None = None,
        seed: int = 0,
    ):
        if conditions and degrade is not None:
            raise ValueError("conditions, degrade: give one of them, conditions of the file or conditions of the samples")
        whole = Part(*read_samples(Path(path), labels, conditions))
        if whole.x.dtype == torch.uint8 and value_range is None:
            value_range = (0.0, 255.0)
        check_values(whole.x, value_range, path)
        train, rest = split(whole, held_out, seed)
        if value_range is not None:
            scale = (value_range[1] - value_range[0]) / 2
        else:
            scale = 2 * DataSummary.of(train.x, mean=mean).sigma_data
        super().__init__(
            train,
            rest,
            batch_size=batch_size,
            seed=seed,
            scale=scale,
            mean=mean,
            value_range=value_range,
            levels=integer_levels(whole.x, value_range),
            dequantize=dequantize,
            degrade=degrade,
            flip=flip,
        )


def integer_levels(x: Tensor, value_range: tuple[float, float] | None) -> int:
    """How many integers there are in `value_range`, 0 for samples `x` that are no integers."""
    if x.is_floating_point() or value_range is None:
        return 0
    low, high = value_range
    if low != int(low) or high != int(high):
        raise ValueError(f"value_range = {value_range}: the data are integers; give two integers")
    return int(high - low) + 1


def split(part: Part, held_out: float, seed: int) -> tuple[Part, Part]:
    """Training and held-out samples at random, each class in proportion. ValueError unless 0 < held_out < 1."""
    from sklearn.model_selection import train_test_split

    if not 0 < held_out < 1:
        raise ValueError(f"held_out = {held_out} must lie between 0 and 1: the part of the data kept for validation")
    if len(part) < 2:
        raise ValueError(f"the data has {len(part)} samples; it needs at least two, one of them held out")
    try:
        rows = train_test_split(np.arange(len(part)), test_size=held_out, random_state=seed, stratify=part.label)
    except ValueError as error:
        raise ValueError(
            f"held_out = {held_out}: {len(part)} samples cannot be split so, each class in proportion: {error}"
        ) from error
    train, rest = (part[torch.from_numpy(index)] for index in rows)
    return train, rest
