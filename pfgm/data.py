"""Data modules: they know what the data is, its units, and which samples make the batch of a training step.

The stream of training batches is a function of (seed, step, rank): each pass over the data is a permutation drawn from the
seed and the number of the pass, and step k takes the next samples of it. All data is held in memory, in the user's units.
"""

import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pfgm import rng
from pfgm.noise import DataSummary
from pfgm.spec import Recorded

Batch = dict[str, Any]
""""x" [B, *shape], "label" [B] if there are labels, "counters" (k, j) of the stream or first index of the held-out batch,
and "reference" [L, *shape], with "reference_label" [L] if there are labels, if the objective asks for charges."""


class Stream(IterableDataset):
    """The training batches from step `start` on, without end."""

    def __init__(
        self,
        x: Tensor,
        labels: Tensor | None,
        *,
        batch_size: int,
        seed: int,
        start: int,
        rank: int,
        world: int,
        reference_size: int,
    ):
        self.x, self.labels, self.batch_size, self.seed = x, labels, batch_size, seed
        self.start, self.rank, self.world, self.reference_size = start, rank, world, reference_size

    def __iter__(self) -> Iterator[Batch]:
        step = self.start
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> Batch:
        """The batch of training step `step` on this rank."""
        first = (step * self.world + self.rank) * self.batch_size
        index = stream_indices(first, self.batch_size, len(self.x), self.seed)
        batch: Batch = {"x": self.x[index], "counters": (step, self.rank)}
        if self.labels is not None:
            batch["label"] = self.labels[index]
        if self.reference_size:
            charges = self._reference(index, step)
            batch["reference"] = self.x[charges]
            if self.labels is not None:
                batch["reference_label"] = self.labels[charges]
        return batch

    def _reference(self, index: Tensor, step: int) -> Tensor | slice:
        """The charges of the step: all data if reference_size covers it, else the batch and others, without repetition."""
        n = len(self.x)
        if self.reference_size >= n:
            return slice(None)
        order = torch.randperm(n, generator=rng.generator(self.seed, 1, step, self.rank))
        own = index.unique()
        others = order[~torch.isin(order, own)]
        return torch.cat([own, others])[: max(self.reference_size, len(own))]


def stream_indices(first: int, count: int, n: int, seed: int) -> Tensor:
    """Positions first, ..., first+count-1 of the endless sequence of permutations of 0..n-1 made from `seed`."""
    parts, position = [], first
    while position < first + count:
        epoch, offset = divmod(position, n)
        parts.append(_permutation(n, seed, epoch)[offset : offset + first + count - position])
        position += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=rng.generator(seed, 0, epoch))


class HeldOut(Dataset):
    """Held-out batches, each with the index of its first sample, which fixes its noise."""

    def __init__(self, x: Tensor, labels: Tensor | None, batch_size: int, reference_size: int):
        self.x, self.labels, self.batch_size, self.reference_size = x, labels, batch_size, reference_size

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
        batch: Batch = {"x": self.x[rows], "counters": (rows.start,)}
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        if self.reference_size:
            size = max(self.reference_size, len(batch["x"]))
            for name, all_rows in (("reference", self.x), ("reference_label", self.labels)):
                if all_rows is not None:
                    batch[name] = torch.cat([all_rows[rows], all_rows[: rows.start], all_rows[rows.stop :]])[:size]
        return batch


class DataModule(Recorded, pl.LightningDataModule):
    """Samples in memory with their units, split into training and held-out data.

    `train` and `held_out` are samples [n, *shape] in the user's units and labels [n] (or None). model = user / `scale` - mean;
    `mean` (default: of the training data) is in the user's units; `value_range` is what pictures map to black and white.
    Arguments beyond these are the subclasses'. ValueError for data that is empty, not finite or of different shapes.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor | None],
        held_out: tuple[Tensor, Tensor | None],
        *,
        batch_size: int,
        seed: int,
        scale: float = 1.0,
        mean: float | None = None,
        value_range: tuple[float, float] | None = None,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1")
        for part, (x, _) in (("training", train), ("held-out", held_out)):
            if len(x) == 0 or x.ndim < 2:
                raise ValueError(f"the {part} data has shape {tuple(x.shape)}; it needs at least one sample, [n, ...]")
        (self.train_x, self.train_labels), (self.held_out_x, self.held_out_labels) = train, held_out
        self.batch_size, self.seed = batch_size, seed
        num_classes = 0 if self.train_labels is None else int(self.train_labels.max()) + 1
        if num_classes > len(self.train_x):
            raise ValueError(f"labels go up to {num_classes - 1} for {len(self.train_x)} samples; number the classes from 0")
        self.summary = DataSummary.of(self.train_x, scale=scale, value_range=value_range, num_classes=num_classes, mean=mean)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.summary.shape

    @property
    def num_classes(self) -> int:
        """Number of labels, 0 if there are none."""
        return self.summary.num_classes

    def train_dataloader(self) -> DataLoader:
        """The stream from the trainer's present step on, so that a resumed run continues it."""
        trainer: Any = self.trainer
        stream = Stream(
            self.train_x,
            self.train_labels,
            batch_size=self.batch_size,
            seed=self.seed,
            start=trainer.global_step * trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world=trainer.world_size,
            reference_size=trainer.lightning_module.reference_size,
        )
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """The held-out data in order."""
        trainer: Any = self.trainer
        held_out = HeldOut(self.held_out_x, self.held_out_labels, self.batch_size, trainer.lightning_module.reference_size)
        return DataLoader(held_out, batch_size=None)

    test_dataloader = val_dataloader


class Digits(DataModule):
    """The 1797 handwritten digits of scikit-learn (8 x 8, grey), bundled with it: [1, 8, 8] with values in [-1, 1].

    Split at random, each class in proportion, with `held_out` of the digits for validation: the last 297 are by other
    writers, so an ordered split would compare different hands. `labels` trains a class-conditional model.
    """

    def __init__(
        self, batch_size: int = 128, held_out: float = 0.2, labels: bool = False, mean: float | None = None, seed: int = 0
    ):
        from sklearn.datasets import load_digits

        data = load_digits()
        x, y = torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(data.target)
        train, rest = split(x, y, held_out, seed)
        if not labels:
            train, rest = (train[0], None), (rest[0], None)
        super().__init__(train, rest, batch_size=batch_size, seed=seed, mean=mean, value_range=(-1.0, 1.0))


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
        super().__init__((parts[0], None), (parts[1], None), batch_size=batch_size, seed=seed, mean=mean)


class Arrays(DataModule):
    """Samples [n, ...] of any shape from a .npy, .npz or .pt file; of one dimension they become [n, 1].

    An .npz or a .pt with several arrays holds the samples under "x" and, if `labels`, integer classes under "labels". 8-bit
    integers have the range 0..255; for other integers give `value_range` (low, high), which maps to [-1, 1] in model space.
    Other data is scaled to an RMS of .5 there. `held_out` is the part kept for validation.
    """

    def __init__(
        self,
        path: Path,
        batch_size: int = 128,
        held_out: float = 0.1,
        labels: bool = False,
        value_range: tuple[float, float] | None = None,
        mean: float | None = None,
        seed: int = 0,
    ):
        x, y = read_arrays(Path(path), labels)
        if x.dtype == torch.uint8 and value_range is None:
            value_range = (0.0, 255.0)
        check_values(x, value_range, path)
        train, rest = split(x, y, held_out, seed)
        if value_range is not None:
            scale = (value_range[1] - value_range[0]) / 2
        else:
            scale = 2 * DataSummary.of(train[0], mean=mean).sigma_data
        super().__init__(train, rest, batch_size=batch_size, seed=seed, scale=scale, mean=mean, value_range=value_range)


def split(
    x: Tensor, y: Tensor | None, held_out: float, seed: int
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Training and held-out samples at random, each class in proportion. ValueError unless 0 < held_out < 1."""
    from sklearn.model_selection import train_test_split

    if not 0 < held_out < 1:
        raise ValueError(f"held_out = {held_out} must lie between 0 and 1: the part of the data kept for validation")
    if len(x) < 2:
        raise ValueError(f"the data has {len(x)} samples; it needs at least two, one of them held out")
    try:
        rows = train_test_split(np.arange(len(x)), test_size=held_out, random_state=seed, stratify=y)
    except ValueError as error:
        raise ValueError(
            f"held_out = {held_out}: {len(x)} samples cannot be split so, each class in proportion: {error}"
        ) from error
    return tuple((x[index], None if y is None else y[index]) for index in rows)  # type: ignore[return-value]


def read_arrays(path: Path, labels: bool) -> tuple[Tensor, Tensor | None]:
    """Samples, and labels if asked for, of a .npy, .npz or .pt file; no code in it is run. ValueError or OSError if damaged."""
    if path.suffix not in (".npy", ".npz", ".pt"):
        raise ValueError(f"path = {path}: the ending {path.suffix!r} is unknown; use .npy, .npz or .pt")
    if not path.is_file():
        raise FileNotFoundError(f"path = {path} does not exist or is no file; give a .npy, .npz or .pt file")
    try:
        content = torch.load(path, weights_only=True) if path.suffix == ".pt" else np.load(path, allow_pickle=False)
        arrays = {k: content[k] for k in content} if hasattr(content, "keys") else {"x": content}
        if not arrays:
            raise KeyError("x")
        x = arrays["x"] if "x" in arrays or len(arrays) > 1 else next(iter(arrays.values()))
        x = torch.stack(list(x)) if isinstance(x, (list, tuple)) else _widen(torch.as_tensor(x))
        y = _widen(torch.as_tensor(arrays["labels"])) if labels else None
    except KeyError as error:
        raise ValueError(f"path = {path} has no array {error}, only {sorted(arrays)}; add it to the file") from error
    except (ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        # Not the libraries' own words: they advise to load pickles.
        raise ValueError(
            f"path = {path} cannot be read as samples of one shape ({type(error).__name__}): give arrays of numbers, [n, ...]"
        ) from error
    if x.ndim == 0:
        raise ValueError(f"path = {path} holds a single number; give samples, [n, ...]")
    if y is not None and (y.shape != x.shape[:1] or y.is_floating_point() or (len(y) and int(y.min()) < 0)):
        raise ValueError(
            f"path = {path}: labels need one integer >= 0 for each of {len(x)} samples, got {tuple(y.shape)} {y.dtype}"
        )
    return (x[:, None] if x.ndim == 1 else x), None if y is None else y.long()


def _widen(x: Tensor) -> Tensor:
    """Unsigned integers of more than 8 bits as int64: torch has next to no arithmetic for them."""
    return x.long() if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x


def check_values(x: Tensor, value_range: tuple[float, float] | None, path: object) -> None:
    """ValueError for samples that are not finite, or outside `value_range`, or integers without one."""
    if x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"path = {path}: samples of type {x.dtype}; give real numbers")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"path = {path}: {int((~torch.isfinite(x)).sum())} values are NaN or infinite; remove them")
    if not x.is_floating_point() and value_range is None:
        raise ValueError(f"path = {path}: integers of type {x.dtype} need value_range, such as [0, 65535]")
    if value_range is not None:
        if not -math.inf < value_range[0] < value_range[1] < math.inf:
            raise ValueError(f"value_range = {value_range}: give two finite numbers, the first below the second")
        if len(x) and not value_range[0] <= float(x.min()) <= float(x.max()) <= value_range[1]:
            raise ValueError(f"path = {path}: values from {x.min()} to {x.max()} leave value_range = {value_range}")


def _rings(n: int, g: np.random.Generator) -> np.ndarray:
    angle, radius = g.uniform(0, 2 * np.pi, n), g.choice([0.5, 1.0], n) + 0.03 * g.normal(size=n)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _gaussians(n: int, g: np.random.Generator) -> np.ndarray:
    angle = g.integers(0, 8, n) * np.pi / 4
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.08 * g.normal(size=(n, 2))


def _swiss_roll(n: int, g: np.random.Generator) -> np.ndarray:
    t = 1.5 * np.pi * (1 + 2 * g.random(n))
    return t[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1) / (4.5 * np.pi) + 0.02 * g.normal(size=(n, 2))


def _heart(n: int, g: np.random.Generator) -> np.ndarray:
    t = g.uniform(0, 2 * np.pi, n)
    outline = np.stack([16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)], axis=1)
    return outline / 17 + 0.02 * g.normal(size=(n, 2))


TOYS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "rings": _rings,
    "gaussians": _gaussians,
    "swiss_roll": _swiss_roll,
    "heart": _heart,
}
