"""From a path to training and held-out images: which can be used, in what form, with which labels, in memory or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from pfgm.images import Resize
from pfgm.imageset import ImageSet, Survey
from pfgm.sources import Source, csv_labels, numbered, open_source
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
    """Training and held-out images, and their bits. `held_out` is a share or another path.

    ValueError or OSError if there are none, if some are damaged and not to be skipped, or if labels are missing.
    """
    sources = [open_source(path, wanted.root)]
    if isinstance(held_out, str):
        sources.append(open_source(held_out, wanted.root, "held_out"))
    surveys = [Survey.of(source) for source in sources]
    form = surveys[0].form(sources[0].place, wanted.size or wanted.crop, wanted.channels)
    label = _labels(sources, wanted.labels, path)
    rows = [torch.tensor(sorted(survey.forms), dtype=torch.long) for survey in surveys]
    if not isinstance(held_out, str):
        known = None if label[0] is None else label[0][rows[0]]
        rows = [rows[0][torch.from_numpy(part)] for part in split_rows(len(rows[0]), known, held_out, seed)]
    sets = [ImageSet(sources[k % len(sources)], part.tolist(), form, wanted.resize, wanted.crop) for k, part in enumerate(rows)]
    fit = sum(images.bytes for images in sets) <= wanted.memory
    _announce(path, surveys, sets, fit)
    damaged = [
        (source.names[i], why) for source, survey in zip(sources, surveys, strict=True) for i, why in survey.damaged.items()
    ]
    parts = [_part(images, label[k % len(sources)], fit, damaged, surveys[0].threads) for k, images in enumerate(sets)]
    _report(path, damaged, sum(len(source.names) for source in sources), wanted.skip_damaged)
    return parts[0], parts[1], form.bits


def _labels(sources: Sequence[Source], labels: bool | str, path: str) -> list[Tensor | None]:
    """Classes of all images of each source, the same number for the same name. ValueError if there are none but asked for."""
    if not labels:
        return [None] * len(sources)
    found = [csv_labels(Path(labels), s.names) if isinstance(labels, str) else s.labels() for s in sources]
    if any(words is None for words in found):
        raise ValueError(
            f"labels = {labels}: path = {path} has none; put images of one class into a sub-folder of its name, add EDM's "
            "dataset.json, or give a CSV of files and labels"
        )
    numbers, names = numbered([word for words in found if words is not None for word in words])
    rank_zero_info(f"{len(names)} classes: " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else ""))
    return list(numbers.split([len(source.names) for source in sources]))


def _part(images: ImageSet, label: Tensor | None, fit: bool, damaged: list[tuple[str, str]], threads: int) -> Part:
    """The images that are whole, with their labels; the others go to `damaged`."""
    x, bad = images.load(threads) if fit else images.checked(threads)
    damaged += [(images.source.names[row], why) for row, why in bad.items()]
    good = torch.tensor([row for row in images.rows if row not in bad], dtype=torch.long)
    return Part(x, None if label is None else label[good])


def _announce(path: str, surveys: Sequence[Survey], sets: Sequence[ImageSet], fit: bool) -> None:
    """What was found and what becomes of it, in a line or two."""
    train, rest = sets
    _, channels, height, width = train.shape
    size = (train.bytes + rest.bytes) / 1e9
    small = sum(form.height < height or form.width < width for survey in surveys for form in survey.forms.values())
    enlarged = f" ({small} smaller ones are enlarged)" if small and train.crop is None else ""
    rank_zero_info(
        f"{path}: {'; '.join(survey.kinds() for survey in surveys)}. As {channels} x {height} x {width}{enlarged}: "
        f"{len(train)} for training, {len(rest)} held out, {size:.3g} GB, "
        + ("in memory" if fit else "more than data.memory: read from the disk each time, by data.workers")
    )


def _report(path: str, damaged: Sequence[tuple[str, str]], total: int, skip: bool) -> None:
    """ValueError, or a warning if they are to be left out, that names the damaged images, the first of many."""
    if not damaged:
        return
    some = "; ".join(f"{name} ({why})" for name, why in sorted(damaged)[:5]) + ("; ..." if len(damaged) > 5 else "")
    text = f"path = {path}: {len(damaged)} of {total} images cannot be used"
    if not skip:
        raise ValueError(f"{text}: {some}. Mend or remove them, or leave them out with data.skip_damaged = true")
    rank_zero_warn(f"{text} and are left out: {some}")
