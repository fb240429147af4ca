"""From a path to training and held-out images: which can be used, in what form, with which labels, in memory or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from pfgm.files.images import Resize
from pfgm.imageset import ImageSet, Survey
from pfgm.labels import csv_labels, numbered
from pfgm.sources import Source, open_source
from pfgm.stream import Part, split_rows


@dataclass(frozen=True)
class Wanted:
    """What images are to become; see `pfgm.data.ImageDataModule`, but `memory` is in bytes."""

    size: Sequence[int] | None = None
    crop: Sequence[int] | None = None
    resize: Resize = "crop"
    channels: int | None = None
    labels: bool | str = False
    root: str | None = None
    skip_damaged: bool = False
    memory: float = 2**33


def collect(path: str, held_out: float | str, wanted: Wanted, seed: int) -> tuple[Part, Part, int]:
    """Training and held-out images, and their bits. `held_out` is a share, drawn by `seed` alone, or another path.

    ValueError or OSError if there are none, if some are damaged and not to be skipped, or if labels are missing.
    """
    sources = [open_source(path, wanted.root)]
    if isinstance(held_out, str):
        sources.append(open_source(held_out, wanted.root, "held_out"))
    surveys = [Survey.of(source) for source in sources]
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
        parts.append(Part(x, None if label is None else label[good]))
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


def _announce(path: str, ignored: int, surveys: Sequence[Survey], sets: Sequence[ImageSet], in_memory: bool) -> None:
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
