"""Data modules: they know what the data is, its units and levels, and what samples are conditioned on."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from pfgm.core import rng
from pfgm.data.batches import SampleSet, split
from pfgm.data.datamodule import DataModule
from pfgm.data.degradations import Degradation
from pfgm.data.image_dataset import ImageOptions, collect
from pfgm.data.toys import TOYS
from pfgm.files.arrays import check_values, read_samples
from pfgm.files.images import Resize
from pfgm.theory.data_summary import DataSummary, condition_key


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
        seed = rng.natural("seed", seed)
        parts = [torch.tensor(TOYS[name](size, np.random.default_rng((seed, k))), dtype=torch.float32) for k in (0, 1)]
        super().__init__(SampleSet(parts[0]), SampleSet(parts[1]), batch_size=batch_size, seed=seed, mean=mean)


class Arrays(DataModule):
    """Samples [n, ...] of any shape from a .npy, .npz or .pt file; of one dimension they become [n, 1].

    An .npz or a .pt with several arrays holds the samples under "x", with `labels` integer classes under "labels", and with
    `conditions` numbers of any shape under "conditions"; `degrade` makes the conditions of images instead. 8-bit
    integers have the range 0..255; for other integers give `value_range` (low, high), which maps to [-1, 1] in model space.
    Other data is scaled to an RMS of .5 there. `held_out` is the part kept for validation; `dequantize` is for integers, `flip`
    for images, which it mirrors left to right in training, each with probability 1/2.
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
            raise ValueError("conditions, degrade: give one of them, conditions of the file or conditions of the samples")
        x, label, condition = read_samples(Path(path), labels, conditions)
        named = {"label": label, condition_key(() if condition is None else condition.shape[1:]): condition}
        whole = SampleSet(x, {key: value for key, value in named.items() if value is not None})
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


class ImageDataModule(DataModule):
    """Images of any size and kind, in units of 0..255, or 0..65535 if all have 16 bits: [1 or 3, height, width].

    `path` is a folder (with its sub-folders), a .zip, read in place, a .npy, .npz or .pt file, torchvision:NAME[:split], which
    is downloaded to `root` (default: data), or huggingface:ID[:split]. First the middle `crop` of an image is cut out, then it
    gets `size`, both one number or (height, width), by `resize`: "crop" scales it to cover the size and cuts out the middle,
    "stretch" scales both sides. Without either all must have one size. They are grey if all are, or have so many `channels`;
    what is transparent becomes white.

    `labels` are taken from dataset.json (EDM's zips), the first level of sub-folders, the array or the set, if true, or from a
    CSV of files and labels. `held_out` is a share, or the path of other images. Damaged images are named and end the run,
    unless `skip_damaged`. All are kept in memory, as bytes, if they take no more than `memory` GB (default: half of what is
    free; each process of several devices has its own), else read from the disk each time by so many `workers` (default: the
    cores, 8 at most); either way all are read once at the start. `flip` mirrors images left to right in training, each with
    probability 1/2.
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
        check_image_options(resize, channels, memory, workers)
        wanted = ImageOptions(
            size=sides("size", size),
            crop=sides("crop", crop),
            resize=resize,
            channels=channels,
            labels=labels,
            root=root,
            skip_damaged=skip_damaged,
            memory=psutil.virtual_memory().available / 2 if memory is None else memory * 1e9,
        )
        train, rest, bits = collect(os.fspath(path), held_out, wanted, seed)
        top = 2.0**bits - 1
        super().__init__(
            train,
            rest,
            batch_size=batch_size,
            seed=seed,
            scale=top / 2,
            mean=mean,
            value_range=(0.0, top),
            levels=2**bits,
            dequantize=dequantize,
            degrade=degrade,
            flip=flip,
            workers=min(8, os.cpu_count() or 1) if workers is None else workers,
        )


def sides(name: str, value: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width), of one number a square. ValueError, which calls it `name`, if it is none."""
    pair = (value, value) if isinstance(value, int) else value
    if pair is not None and (len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair)):
        raise ValueError(f"{name} = {value}: give one number of pixels, or two, (height, width)")
    return pair


def check_image_options(resize: str, channels: int | None, memory: float | None, workers: int | None) -> None:
    """ValueError for what no images could have."""
    if resize not in ("crop", "stretch"):
        raise ValueError(f'resize = {resize!r}: give "crop" or "stretch"')
    if channels not in (None, 1, 3):
        raise ValueError(f"channels = {channels}: give 1 (grey) or 3 (RGB), or leave it out")
    if (workers is not None and workers < 1) or (memory is not None and not memory >= 0):
        raise ValueError(f"workers = {workers}, memory = {memory}: give at least one worker, and memory >= 0 GB")
