"""Images of a source in one common format: options, formats from the headers, and decoding into memory or on request."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from pfgm.data.batches import SampleSet, split_rows
from pfgm.data.image_sources import Source, open_source
from pfgm.data.labels import csv_labels, number_classes
from pfgm.files.images import ImageError, ImageFormat, Resize, fit

T = TypeVar("T")
Sides = int | tuple[int, int] | None

CHUNK = 64  # images that a thread reads before it reports


@dataclass(frozen=True)
class ImageOptions:
    """How images are read; see `pfgm.data.ImageDataModule` for the fields.

    Raises:
        ValueError: For sizes that are not positive, less than one worker or negative memory.
    """

    size: Sides = None
    crop: Sides = None
    resize: Resize = "crop"
    channels: int | None = None
    labels: bool | str = False
    held_out: float | str = 0.1
    skip_damaged: bool = False
    memory: float | None = None  # GB
    workers: int | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("crop", self.crop)):
            sides = _pair(value)
            if sides is not None and (len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides)):
                raise ValueError(f"{name} = {value}: must be at least 1 pixel. Give one number, or two, (height, width)")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers = {self.workers}: must be at least 1")
        if self.memory is not None and not self.memory >= 0:
            raise ValueError(f"memory = {self.memory}: must be at least 0 GB")

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """(height, width) of the part that is cut out, or None."""
        return _pair(self.crop)

    @property
    def final_size(self) -> tuple[int, int] | None:
        """(height, width) of all images, or None for the size that they have."""
        return _pair(self.crop if self.size is None else self.size)

    @property
    def max_bytes(self) -> float:
        """Bytes of images that are kept in memory."""
        return psutil.virtual_memory().available / 2 if self.memory is None else self.memory * 1e9


def _pair(value: Sides) -> tuple[int, int] | None:
    return (value, value) if isinstance(value, int) else value


@dataclass
class ImageSurvey:
    """The `formats` of the usable images of a source, by number, and why the `damaged` ones cannot be used."""

    source: Source
    formats: dict[int, ImageFormat]
    damaged: dict[int, str]

    @classmethod
    def of(cls, source: Source) -> "ImageSurvey":
        """Read the headers of all images of `source`. Raise ValueError if none can be used."""
        damaged: dict[int, str] = {}
        formats = dict(_each(source.header, range(len(source.names)), damaged, "looking at images", threads=1))
        if not formats:
            raise ValueError(f"{source}: none of {len(damaged)} images can be used ({source.names[0]}: {damaged[0]})")
        return cls(source, formats, damaged)

    def common_format(self, size: tuple[int, int] | None, channels: int | None) -> ImageFormat:
        """Choose one format for all images, RGB if one has colour and 8 bits if one has 8, or raise ValueError.

        Args:
            size: (height, width); default: that of all images, which must have one size.
            channels: 1 or 3; default: the largest number.
        """
        formats = self.formats.values()
        sizes = Counter((one.height, one.width) for one in formats)
        if size is None and len(sizes) > 1:
            common = ", ".join(f"{h} x {w} ({count})" for (h, w), count in sizes.most_common(3))
            raise ValueError(f"{self.source}: images of {len(sizes)} sizes, such as {common}. Give data.size, such as 64")
        height, width = next(iter(sizes)) if size is None else size
        depth = max(one.channels for one in formats) if channels is None else channels
        return ImageFormat(height, width, depth, min(one.bits for one in formats))

    @property
    def threads(self) -> int:
        """Number of threads to read the images with; for small ones the GIL costs more than threads gain."""
        area = sum(one.height * one.width for one in self.formats.values()) / len(self.formats)
        return (os.cpu_count() or 1) if area > 2**15 else 1

    def describe(self) -> str:
        """Describe the images, such as "18 8-bit RGB, 6 8-bit grey, 10 x 10 to 20 x 14"."""
        formats = self.formats.values()
        kinds = Counter(f"{one.bits}-bit {'grey' if one.channels == 1 else 'RGB'}" for one in formats)
        sizes = sorted({(one.height, one.width) for one in formats}, key=lambda size: size[0] * size[1])
        low, high = (f"{height} x {width}" for height, width in (sizes[0], sizes[-1]))
        return ", ".join([*(f"{n} {kind}" for kind, n in kinds.most_common()), low if low == high else f"{low} to {high}"])


class ImageSet:
    """Images of a source in one format, indexed like a tensor [n, C, H, W] but decoded at each access.

    Images of 8 bits are uint8, those of 16 bits int32, since torch has few functions for uint16.

    Args:
        source: The source of the images.
        rows: The numbers of the images in the source.
        format: The format that all are converted to.
        resize: "crop" or "stretch", see `pfgm.files.images.fit`.
        crop: (height, width) of the middle part that is cut out first, or None.
    """

    ndim = 4

    def __init__(
        self,
        source: Source,
        rows: Sequence[int],
        format: ImageFormat,
        resize: Resize = "crop",
        crop: tuple[int, int] | None = None,
    ):
        self.source, self.rows, self.format, self.resize, self.crop = source, rows, format, resize, crop
        self.dtype = torch.uint8 if format.bits == 8 else torch.int32

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, channels, height, width)."""
        return (len(self.rows), self.format.channels, self.format.height, self.format.width)

    @property
    def bytes(self) -> int:
        """Size of all images in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice | int) -> Tensor:
        index = torch.arange(len(self))[rows]
        x = torch.empty(index.numel(), *self.shape[1:], dtype=self.dtype)
        for k, i in enumerate(index.reshape(-1).tolist()):
            try:
                x[k] = self.read(self.rows[i])
            except ImageError as error:
                name = self.source.names[self.rows[i]]
                raise ValueError(f"{self.source}: {name} was readable at the start and is not any more ({error})") from error
        return x.reshape(*index.shape, *self.shape[1:])

    def read(self, row: int) -> Tensor:
        """Decode image `row` of the source, [C, H, W]. Raise ImageError if it is damaged."""
        array = fit(self.source.read(row), self.format, self.resize, self.crop)
        return torch.from_numpy(array.astype("uint8" if self.format.bits == 8 else "int32")).permute(2, 0, 1)

    def decode(self, keep: bool, threads: int = 1) -> tuple["Tensor | ImageSet", dict[int, str]]:
        """Decode all images once, to find the damaged ones.

        Args:
            keep: Whether to keep the images in memory.
            threads: Number of threads that decode.

        Returns:
            The readable images, as a tensor if they are kept, and why each of the others cannot be used, by its number.
        """
        damaged: dict[int, str] = {}
        if not keep:
            shapes = _each(lambda row: self.read(row).shape, self.rows, damaged, "checking images", threads)
            return ImageSet(self.source, [row for row, _ in shapes], self.format, self.resize, self.crop), damaged
        x = torch.empty(self.shape, dtype=self.dtype)
        positions = {row: k for k, row in enumerate(self.rows)}
        for row, image in _each(self.read, self.rows, damaged, "reading images", threads):
            x[positions[row]] = image
        return x[[row not in damaged for row in self.rows]] if damaged else x, damaged


@dataclass(frozen=True)
class ImageSplit:
    """Training and held-out images of one or two sources, known by their headers alone until `load`."""

    train: SampleSet  # of an ImageSet, as held_out
    held_out: SampleSet
    surveys: Sequence[ImageSurvey]
    in_memory: bool  # whether they are kept there
    skip_damaged: bool
    messages: Sequence[str]  # what there is, and how it is read

    @property
    def bits(self) -> int:
        """Depth of the images, 8 or 16."""
        return self.train.x.format.bits

    @property
    def has_flaws(self) -> bool:
        """Whether the headers show images that cannot be used."""
        height, width = self.train.x.crop or (0, 0)
        formats = [one for survey in self.surveys for one in survey.formats.values()]
        small = any(one.height < height or one.width < width for one in formats)
        return small or any(survey.damaged for survey in self.surveys)

    def load(self) -> tuple[SampleSet, SampleSet, list[str]]:
        """Decode all images once, and keep them in memory if they fit.

        Returns:
            Training and held-out samples without the damaged images, and warnings that name these.

        Raises:
            ValueError: If images are damaged and not to be skipped.
        """
        threads = self.surveys[0].threads
        damaged = {survey.source: dict(survey.damaged) for survey in self.surveys}
        loaded = []
        for samples in (self.train, self.held_out):
            images = samples.x
            x, bad = images.decode(self.in_memory, threads)
            damaged[images.source] |= bad
            readable = torch.tensor([row not in bad for row in images.rows])
            loaded.append(SampleSet(x, {key: value[readable] for key, value in samples.conditions.items()}))
        warnings = [self._damage(source, bad) for source, bad in damaged.items() if bad]
        return loaded[0], loaded[1], warnings

    def _damage(self, source: Source, damaged: dict[int, str]) -> str:
        """Name the first damaged images of a source, in a ValueError unless they are skipped."""
        named = sorted((source.names[row], reason) for row, reason in damaged.items())
        some = "; ".join(f"{name} ({reason})" for name, reason in named[:5]) + ("; ..." if len(named) > 5 else "")
        text = f"{source}: {len(named)} of {len(source.names)} images cannot be used"
        if not self.skip_damaged:
            raise ValueError(f"{text}: {some}. Repair or remove them, or leave them out with data.skip_damaged = true")
        return f"{text} and are left out: {some}"


def split_images(path: str, options: ImageOptions, seed: int) -> ImageSplit:
    """Divide images into training and held-out ones, by their headers.

    Args:
        path: The images, see `open_source`.
        options: How they are read; `held_out` is a share, or the path of other images.
        seed: Seed of the split, which depends on nothing else.

    Raises:
        ValueError: If there are no images, no common size, or no labels where the options ask for them.
        OSError: If a path does not exist or cannot be read.
    """
    held_out = options.held_out
    sources = [open_source(path, options.root)]
    if isinstance(held_out, str):
        sources.append(open_source(held_out, options.root, "held_out"))
    surveys = [ImageSurvey.of(source) for source in sources]
    common = surveys[0].common_format(options.final_size, options.channels)
    labels, classes = _read_labels(sources, options.labels)
    rows = [sorted(survey.formats) for survey in surveys]
    if not isinstance(held_out, str):
        rows = [[rows[0][k] for k in indices] for indices in split_rows(len(rows[0]), None, held_out, seed)]

    def samples(k: int) -> SampleSet:
        label = labels[k % len(labels)]
        images = ImageSet(sources[k % len(sources)], rows[k], common, options.resize, options.crop_size)
        return SampleSet(images, {} if label is None else {"label": label[rows[k]]})

    train, rest = samples(0), samples(1)
    in_memory = train.x.bytes + rest.x.bytes <= options.max_bytes
    messages = [*classes, _announcement(path, surveys, train.x, rest.x, in_memory)]
    return ImageSplit(train, rest, surveys, in_memory, options.skip_damaged, messages)


def _read_labels(sources: Sequence[Source], labels: bool | str) -> tuple[list[Tensor | None], list[str]]:
    """Return the classes of all images of each source, numbered in common, and a line that names the classes."""
    if not labels:
        return [None] * len(sources), []
    words = []
    for source in sources:
        stored = csv_labels(Path(labels), source.names) if isinstance(labels, str) else source.labels()
        if stored is None or len(stored) != len(source.names):
            raise ValueError(
                f"labels = {labels}: {source} has {len(stored or ())} labels for {len(source.names)} images. Put the images of "
                "each class into a sub-folder of its name, add EDM's dataset.json, or give a CSV file of files and labels"
            )
        words.append(stored)
    numbers, names = number_classes([word for stored in words for word in stored])
    line = f"{len(names)} classes: " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return list(numbers.split([len(stored) for stored in words])), [line]


def _announcement(path: str, surveys: Sequence[ImageSurvey], train: ImageSet, held_out: ImageSet, in_memory: bool) -> str:
    """Describe the images, and what becomes of them."""
    n, channels, height, width = train.shape
    ignored = sum(survey.source.ignored for survey in surveys)
    small = sum(one.height < height or one.width < width for survey in surveys for one in survey.formats.values())
    return (
        f"{path}: {'; '.join(survey.describe() for survey in surveys)}"
        + (f", {ignored} other files ignored" if ignored else "")
        + f". As {channels} x {height} x {width}"
        + (f" ({small} smaller ones are enlarged)" if small and train.crop is None else "")
        + f": {n} for training, {len(held_out)} held out, {(train.bytes + held_out.bytes) / 1e9:.3g} GB, "
        + ("in memory" if in_memory else "more than data.memory: read from the disk each time, by data.workers")
    )


def _each(
    read: Callable[[int], T], rows: Sequence[int], damaged: dict[int, str], description: str, threads: int
) -> Iterator[tuple[int, T]]:
    """Yield (row, read(row)) for all readable rows, by threads and with a progress bar; add the others to `damaged`."""

    def attempt(row: int) -> tuple[int, T | ImageError]:
        try:
            return row, read(row)
        except ImageError as error:
            return row, ImageError(str(error))  # without the traceback, which holds the pixels

    def attempt_all(chunk: Sequence[int]) -> list[tuple[int, T | ImageError]]:
        return [attempt(row) for row in chunk]

    chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    bar = tqdm(total=len(rows), desc=description, unit=" images", delay=2, leave=False, dynamic_ncols=True, disable=None)
    with ThreadPoolExecutor(threads) as pool, bar:
        for results in map(attempt_all, chunks) if threads == 1 else pool.map(attempt_all, chunks):
            bar.update(len(results))
            for row, result in results:
                if isinstance(result, ImageError):
                    damaged[row] = str(result)
                else:
                    yield row, result
