"""Many images in one form: what a source holds, the form it is given, and reading it, into memory or when asked for."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from pfgm.data.batches import SampleSet, split_rows
from pfgm.data.image_sources import Source, open_source
from pfgm.data.labels import csv_labels, numbered
from pfgm.files.images import ImageError, ImageFormat, Resize, fit

T = TypeVar("T")

CHUNK = 64
"""Images that a thread reads before it reports."""


@dataclass
class ImageSurvey:
    """The form of each image of a source, and why those of `damaged` cannot be used."""

    forms: dict[int, ImageFormat]
    damaged: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> "ImageSurvey":
        """By the headers of all images. ValueError if none can be used."""
        damaged: dict[int, str] = {}
        forms = dict(_each(source.header, range(len(source.names)), damaged, "looking at images", threads=1))
        if not forms:
            raise ValueError(f"{source.place}: none of {len(damaged)} images can be used, {source.names[0]}: {damaged[0]}")
        return cls(forms, damaged)

    def form(self, place: str, size: Sequence[int] | None, channels: int | None) -> ImageFormat:
        """The form for all: grey and 16 bits if all are, of `size` (height, width), or of the one size that they have.

        ValueError, which names the `place`, if they have several and none is given.
        """
        sizes = Counter((form.height, form.width) for form in self.forms.values())
        if size is None and len(sizes) > 1:
            common = ", ".join(f"{h} x {w} ({count})" for (h, w), count in sizes.most_common(3))
            raise ValueError(f"{place} has images of {len(sizes)} sizes, such as {common}; give data.size, such as 64")
        height, width = next(iter(sizes)) if size is None else size
        forms = self.forms.values()
        return ImageFormat(
            height,
            width,
            max(form.channels for form in forms) if channels is None else channels,
            min(form.bits for form in forms),
        )

    @property
    def threads(self) -> int:
        """How many should read the images: for small ones Python's own lock costs more than several threads gain."""
        area = sum(form.height * form.width for form in self.forms.values()) / len(self.forms)
        return (os.cpu_count() or 1) if area > 2**15 else 1

    def kinds(self) -> str:
        """What there is, in words."""
        forms = self.forms.values()
        kinds = Counter(f"{form.bits}-bit {'grey' if form.channels == 1 else 'RGB'}" for form in forms)
        sizes = sorted({(form.height, form.width) for form in forms}, key=lambda size: size[0] * size[1])
        low, high = (f"{height} x {width}" for height, width in (sizes[0], sizes[-1]))
        return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()) + (
            f", {low}" if low == high else f", {low} to {high}"
        )


class ImageSet:
    """The images `rows` of a source in one form, indexed like a tensor [n, C, H, W] but read from the disk each time.

    Of 8 bits they are uint8, of 16 int32, since torch has few functions for uint16.
    """

    ndim = 4

    def __init__(
        self, source: Source, rows: Sequence[int], form: ImageFormat, resize: Resize = "crop", crop: Sequence[int] | None = None
    ):
        self.source, self.rows, self.form, self.resize, self.crop = source, rows, form, resize, crop
        self.dtype = torch.uint8 if form.bits == 8 else torch.int32

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, channels, height, width)."""
        return (len(self.rows), self.form.channels, self.form.height, self.form.width)

    @property
    def bytes(self) -> int:
        """Size of all in memory."""
        n, *image = self.shape
        return n * torch.Size(image).numel() * self.dtype.itemsize

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
                raise ValueError(f"{self.source.place}: {name} was read at the start, and cannot be now: {error}") from error
        return x.reshape(*index.shape, *self.shape[1:])

    def read(self, row: int) -> Tensor:
        """Image `row` of the source, [C, H, W]. ImageError if it is damaged."""
        array = fit(self.source.read(row), self.form, self.resize, self.crop)
        return torch.from_numpy(array.astype("uint8" if self.form.bits == 8 else "int32")).permute(2, 0, 1)

    def load(self, threads: int = 1) -> tuple[Tensor, dict[int, str]]:
        """All in memory, without the damaged ones, and why those cannot be used."""
        damaged: dict[int, str] = {}
        x = torch.empty(self.shape, dtype=self.dtype)
        place = {row: k for k, row in enumerate(self.rows)}
        for row, image in _each(self.read, self.rows, damaged, "reading images", threads):
            x[place[row]] = image
        good = torch.tensor([row not in damaged for row in self.rows])
        return x[good] if damaged else x, damaged

    def checked(self, threads: int = 1) -> tuple["ImageSet", dict[int, str]]:
        """Those that can be read, and why the others cannot be used. Nothing is kept."""
        damaged: dict[int, str] = {}
        good = [row for row, _ in _each(lambda row: self.read(row).shape, self.rows, damaged, "checking images", threads)]
        return ImageSet(self.source, good, self.form, self.resize, self.crop), damaged


def _each(
    read: Callable[[int], T], rows: Sequence[int], damaged: dict[int, str], what: str, threads: int
) -> Iterator[tuple[int, T]]:
    """(row, read(row)) for all that can be read, by threads, with a bar if it takes long; the others go to `damaged`."""

    def some(chunk: Sequence[int]) -> list[tuple[int, Any, str | None]]:
        return [_attempt(read, row) for row in chunk]

    chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    bar = tqdm(total=len(rows), desc=what, unit=" images", delay=2, leave=False, dynamic_ncols=True, disable=None)
    with ThreadPoolExecutor(threads) as pool, bar:
        for done in map(some, chunks) if threads == 1 else pool.map(some, chunks):
            bar.update(len(done))
            for row, value, reason in done:
                if reason is None:
                    yield row, value
                else:
                    damaged[row] = reason


def _attempt(read: Callable[[int], T], row: int) -> tuple[int, T | None, str | None]:
    try:
        return row, read(row), None
    except ImageError as error:
        return row, None, str(error)


pass


@dataclass(frozen=True)
class ImageOptions:
    """What images are to become; see `pfgm.data.ImageDataModule`, but `memory` is in bytes."""

    size: Sequence[int] | None = None
    crop: Sequence[int] | None = None
    resize: Resize = "crop"
    channels: int | None = None
    labels: bool | str = False
    root: str | None = None
    skip_damaged: bool = False
    memory: float = 2**33


def collect(path: str, held_out: float | str, wanted: ImageOptions, seed: int) -> tuple[SampleSet, SampleSet, int]:
    """Training and held-out images, and their bits. `held_out` is a share, drawn by `seed` alone, or another path.

    ValueError or OSError if there are none, if some are damaged and not to be skipped, or if labels are missing.
    """
    sources = [open_source(path, wanted.root)]
    if isinstance(held_out, str):
        sources.append(open_source(held_out, wanted.root, "held_out"))
    surveys = [ImageSurvey.of(source) for source in sources]
    form = surveys[0].form(sources[0].place, wanted.size or wanted.crop, wanted.channels)
    labels = _labels(sources, wanted.labels)
    rows = [sorted(survey.forms) for survey in surveys]
    if not isinstance(held_out, str):
        rows = [[rows[0][k] for k in part] for part in split_rows(len(rows[0]), None, held_out, seed)]
        sources, labels = sources * 2, labels * 2
    sets = [ImageSet(source, part, form, wanted.resize, wanted.crop) for source, part in zip(sources, rows, strict=True)]
    in_memory = sum(images.bytes for images in sets) <= wanted.memory
    _announce(path, sum(source.ignored for source in dict.fromkeys(sources)), surveys, sets, in_memory)
    damaged = [(source, i, why) for source, survey in zip(sources, surveys, strict=False) for i, why in survey.damaged.items()]
    parts = []
    for images, label in zip(sets, labels, strict=True):
        x, bad = images.load(surveys[0].threads) if in_memory else images.checked(surveys[0].threads)
        damaged += [(images.source, row, why) for row, why in bad.items()]
        good = torch.tensor([row for row in images.rows if row not in bad], dtype=torch.long)
        parts.append(SampleSet(x, {} if label is None else {"label": label[good]}))
    for source in dict.fromkeys(sources):
        _report(source, {source.names[i]: why for one, i, why in damaged if one is source}, wanted.skip_damaged)
    return parts[0], parts[1], form.bits


def _labels(sources: Sequence[Source], labels: bool | str) -> list[Tensor | None]:
    """Classes of all images of each source, the same number for the same name. ValueError if there are none but asked for."""
    if not labels:
        return [None] * len(sources)
    found = []
    for source in sources:
        words = csv_labels(Path(labels), source.names) if isinstance(labels, str) else source.labels()
        if words is None or len(words) != len(source.names):
            raise ValueError(
                f"labels = {labels}: {source.place} has {len(words or ())} labels for {len(source.names)} images; put those of "
                "one class into a sub-folder of its name, add EDM's dataset.json, or give a CSV of files and labels"
            )
        found.append(words)
    numbers, names = numbered([word for words in found for word in words])
    rank_zero_info(f"{len(names)} classes: " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else ""))
    return list(numbers.split([len(words) for words in found]))


def _announce(path: str, ignored: int, surveys: Sequence[ImageSurvey], sets: Sequence[ImageSet], in_memory: bool) -> None:
    """What was found and what becomes of it, in a line or two."""
    train, held_out = sets
    _, channels, height, width = train.shape
    size = (train.bytes + held_out.bytes) / 1e9
    small = sum(form.height < height or form.width < width for survey in surveys for form in survey.forms.values())
    enlarged = f" ({small} smaller ones are enlarged)" if small and train.crop is None else ""
    others = f", {ignored} other files ignored" if ignored else ""
    rank_zero_info(
        f"{path}: {'; '.join(survey.kinds() for survey in surveys)}{others}. As {channels} x {height} x {width}{enlarged}: "
        f"{len(train)} for training, {len(held_out)} held out, {size:.3g} GB, "
        + ("in memory" if in_memory else "more than data.memory: read from the disk each time, by data.workers")
    )


def _report(source: Source, damaged: Mapping[str, str], skip: bool) -> None:
    """ValueError, or a warning if they are to be left out, that names the damaged images, the first of many."""
    if not damaged:
        return
    some = "; ".join(f"{name} ({why})" for name, why in sorted(damaged.items())[:5]) + ("; ..." if len(damaged) > 5 else "")
    text = f"{source.place}: {len(damaged)} of {len(source.names)} images cannot be used"
    if not skip:
        raise ValueError(f"{text}: {some}. Mend or remove them, or leave them out with data.skip_damaged = true")
    rank_zero_warn(f"{text} and are left out: {some}")
