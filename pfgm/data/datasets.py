"""Data modules for digits, points in the plane, arrays and images, with their units and levels."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pfgm.core import rng
from pfgm.data.batches import SampleSet, split
from pfgm.data.datamodule import DataModule, rank_zero_info, rank_zero_warn
from pfgm.data.degradations import Degradation
from pfgm.data.image_dataset import ImageOptions, split_images
from pfgm.data.toys import TOYS
from pfgm.files.arrays import check_values, read_samples
from pfgm.files.images import Resize
from pfgm.theory.data_summary import DataSummary, condition_key


class Digits(DataModule):
    """The 1797 handwritten digits of scikit-learn: grey, [1, 8, 8], with 17 levels in [-1, 1].

    The split is random and stratified by class: the last 297 digits are by other writers, so an ordered split would compare
    different hands.

    Args:
        batch_size: Samples in a batch.
        held_out: Share of the digits that is kept for validation.
        labels: Whether to train a class-conditional model.
        degrade: A degradation, for a model that undoes it.
        dequantize: Whether to fill the gaps between levels with noise, for a model with a likelihood.
        mean: Mean in the units of the data; default: that of the training data.
        seed: Seed of the split and of the batches.
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
        train, rest = split(SampleSet(x, {"label": y}), held_out, seed)
        if not labels:
            train, rest = SampleSet(train.x), SampleSet(rest.x)
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
    """Points in the plane, [2], about 2 across; as many others are held out.

    Args:
        name: "rings" (two), "gaussians" (eight), "swiss_roll" or "heart".
        size: Number of training points.
        batch_size: Points in a batch.
        mean: Mean in the units of the data; default: that of the training data.
        seed: Seed of the points and of the batches.

    Raises:
        ValueError: If `size` is less than 1.
    """

    def __init__(
        self,
        name: Literal["rings", "gaussians", "swiss_roll", "heart"] = "heart",
        size: int = 4096,
        batch_size: int = 256,
        mean: float | None = None,
        seed: int = 0,
    ):
        if size < 1:
            raise ValueError(f"size = {size} must be at least 1")
        seed = rng.natural("seed", seed)
        train, held_out = (
            SampleSet(torch.tensor(TOYS[name](size, np.random.default_rng((seed, k))), dtype=torch.float32)) for k in (0, 1)
        )
        super().__init__(train, held_out, batch_size=batch_size, seed=seed, mean=mean)


class Arrays(DataModule):
    """Samples [n, ...] of any shape from an array file; samples [n] become [n, 1].

    A file with several arrays holds the samples under "x". Data without a range is scaled to an RMS of .5 in model space.

    Args:
        path: A .npy, .npz or .pt file.
        batch_size: Samples in a batch.
        held_out: Share of the samples that is kept for validation.
        labels: Whether to read integer classes, [n], from the array "labels".
        conditions: Whether to read conditions, [n, ...], from the array "conditions".
        degrade: A degradation that makes the conditions from images instead.
        value_range: (low, high), which become -1 and 1 in model space. Necessary for integers, except that 8-bit integers have
            the range 0..255.
        dequantize: Whether to fill the gaps between integers with noise, for a model with a likelihood.
        flip: Whether to mirror images left to right in training, each with probability 1/2.
        mean: Mean in the units of the data; default: that of the training data.
        seed: Seed of the split and of the batches.

    Raises:
        ValueError: If the file is damaged, lacks an array, or its values do not fit the options.
        OSError: If there is no such file.
    """

    PLACES = ("path",)

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
            raise ValueError("conditions = True, degrade: both make conditions. Leave one of them out")
        x, label, condition = read_samples(Path(path), labels, conditions)
        named = {} if label is None else {"label": label}
        whole = SampleSet(x, named if condition is None else named | {condition_key(condition.shape[1:]): condition})
        if whole.x.dtype == torch.uint8 and value_range is None:
            value_range = (0.0, 255.0)
        check_values(whole.x, value_range, path)
        train, rest = split(whole, held_out, seed)
        if value_range is not None:
            scale = (value_range[1] - value_range[0]) / 2
        else:
            scale = 2 * DataSummary.from_data(train.x, mean=mean).sigma_data
        super().__init__(
            train,
            rest,
            batch_size=batch_size,
            seed=seed,
            scale=scale,
            mean=mean,
            value_range=value_range,
            levels=_integer_levels(whole.x, value_range),
            dequantize=dequantize,
            degrade=degrade,
            flip=flip,
        )


def _integer_levels(x: Tensor, value_range: tuple[float, float] | None) -> int:
    """Count the integers in `value_range`; return 0 if the samples are not integers."""
    if x.is_floating_point() or value_range is None:
        return 0
    low, high = value_range
    if low != int(low) or high != int(high):
        raise ValueError(f"value_range = {value_range}: the data are integers. Give two integers")
    return int(high - low) + 1


class ImageDataModule(DataModule):
    """Images of any size and kind, in units of 0..255, or 0..65535 if all have 16 bits: [1 or 3, height, width].

    Making the module reads only the headers of the images. They are decoded when `setup` is called or `train`, `held_out` or
    `summary` is first used, by each process for itself. Transparent pixels become white.

    Args:
        path: A folder with its sub-folders, a .zip, which stays packed, a .npy, .npz or .pt file, torchvision:NAME[:split] or
            huggingface:ID[:split].
        size: Size of the samples in pixels, one number or (height, width); default: that of all images.
        batch_size: Samples in a batch.
        crop: Size of the middle part of each image that is cut out first.
        resize: "crop" scales an image to cover `size` and cuts out the middle; "stretch" scales both sides.
        channels: 1 (grey) or 3 (RGB); default: grey if all images are.
        labels: True for the classes of dataset.json (EDM's zips), of the first level of sub-folders, of the array "labels" or
            of the data set; or the path of a CSV file with the columns file and label.
        held_out: Share of the images that is kept for validation, or the path of other images.
        flip: Whether to mirror images left to right in training, each with probability 1/2.
        degrade: A degradation, for a model that undoes it.
        dequantize: Whether to fill the gaps between levels with noise, for a model with a likelihood.
        skip_damaged: Whether to leave damaged images out with a warning; else they are an error that names them.
        memory: GB of images that are kept in memory, as bytes; more are decoded at each use. Default: half of what is free.
            Each process has its own.
        workers: Processes that decode images which are not in memory; default: one for each core, at most 8.
        root: Folder of torchvision's data sets, which are downloaded to it; default: data.
        mean: Mean in the units of the data; default: that of the training data.
        seed: Seed of the split and of the batches.

    Raises:
        ValueError: If there are no images, if they are damaged or of several sizes, or if labels are missing.
        OSError: If a path does not exist, cannot be read or cannot be downloaded.
    """

    PLACES = ("path", "root", "memory", "workers")

    def __init__(
        self,
        path: str | os.PathLike,
        size: int | tuple[int, int] | None = None,
        batch_size: int = 128,
        *,
        crop: int | tuple[int, int] | None = None,
        resize: Resize = "crop",
        channels: Literal[1, 3] | None = None,
        labels: bool | str = False,
        held_out: float | str = 0.1,
        flip: bool = False,
        degrade: Degradation | None = None,
        dequantize: bool = False,
        skip_damaged: bool = False,
        memory: float | None = None,
        workers: int | None = None,
        root: str | None = None,
        mean: float | None = None,
        seed: int = 0,
    ):
        options = ImageOptions(size, crop, resize, channels, labels, held_out, skip_damaged, memory, workers, root)
        self._images = split_images(os.fspath(path), options, seed)
        for message in self._images.messages:
            rank_zero_info(message)
        bits = self._images.bits
        super().__init__(
            self._images.train,
            self._images.held_out,
            batch_size=batch_size,
            seed=seed,
            scale=(2.0**bits - 1) / 2,
            mean=mean,
            value_range=(0.0, 2.0**bits - 1),
            levels=2**bits,
            dequantize=dequantize,
            degrade=degrade,
            flip=flip,
            workers=min(8, os.cpu_count() or 1) if workers is None else workers,
            load=self._decode,
        )
        if self._images.has_flaws and not skip_damaged:
            self.setup()  # raises, and names the images with intact headers too

    def _decode(self) -> tuple[SampleSet, SampleSet]:
        train, held_out, warnings = self._images.load()
        for warning in warnings:
            rank_zero_warn(warning)
        return train, held_out
