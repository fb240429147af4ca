"""Labels of images: from dataset.json, from the names of folders, from a CSV, and as numbers."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from pfgm.files.images import ImageError
from pfgm.files.untrusted import RefusedError, read_bytes

Labels = Sequence[str | int]
MAX_TABLE, PER_NAME = 2**24, 1000
"""Bytes that a table of labels may have, and how many more for each image."""


def numbered(labels: Labels) -> tuple[torch.Tensor, list[str]]:
    """Classes as numbers [n] from 0, and the names of those that occur.

    Whole numbers are taken as they are if most from 0 to the largest occur, else in their order; words in theirs.
    """
    words = [str(label).strip() for label in labels]
    whole = [word.removesuffix(".0") for word in words]
    if all(word.removeprefix("-").isdecimal() and word == str(int(word)) for word in whole):
        words, names = whole, sorted(set(whole), key=int)
        if int(names[0]) >= 0 and int(names[-1]) < 2 * len(names) + 10:
            return torch.tensor([int(word) for word in words]), names
    else:
        names = sorted(set(words))
    place = {name: k for k, name in enumerate(names)}
    return torch.tensor([place[word] for word in words]), names


def csv_labels(table: Path, names: Sequence[str]) -> Labels:
    """Labels of the images `names` from the first two columns, file and label, of a CSV file with or without a header.

    ValueError or OSError if it cannot be read, contradicts itself or lacks an image.
    """
    place = f"labels = {table}"
    if not table.is_file():
        raise FileNotFoundError(f"{place} does not exist or is no file; give a CSV of files and labels, true or false")
    try:
        text = read_bytes(table, place, _longest(names)).decode("utf-8-sig")
        rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
        return _in_order((_pair(row, place) for row in rows if row), names, place)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{place} cannot be read as CSV: {error}") from error


def _pair(row: Sequence[str], place: str) -> tuple[str, str]:
    if len(row) < 2 or not row[1].strip():
        raise ValueError(f"{place}: a row has no label; give two columns with a comma between, file and label")
    return row[0].strip(), row[1].strip()


def _longest(names: Sequence[str]) -> int:
    return MAX_TABLE + PER_NAME * len(names)


def table_or_folders(files: Sequence[str], names: Sequence[str], read: Callable[[str], bytes], place: str) -> Labels | None:
    """Labels of images: in the outermost dataset.json among the `files`, with names relative to it; else their sub-folders."""
    tables = [name for name in files if PurePosixPath(name).name == "dataset.json"]
    if not tables:
        return folder_labels(names)
    table = min(tables, key=lambda name: len(PurePosixPath(name).parts))
    try:
        text = read(table)
        if len(text) > _longest(names):
            raise RefusedError(f"it has {len(text) / 1e6:.3g} MB, far more than {len(names)} images need")
    except (ImageError, RefusedError, OSError) as error:
        raise ValueError(f"{place}: {table} cannot be read: {error}") from error
    parent = PurePosixPath(table).parent
    return edm_labels(text, names, f"{place}/{table}", "" if parent == PurePosixPath() else f"{parent}/")


def edm_labels(text: bytes, names: Sequence[str], place: str, folder: str = "") -> Labels | None:
    """Labels of EDM's dataset.json in `folder`: {"labels": [[name, class], ...]}, or null for none.

    ValueError for anything else.
    """
    try:
        pairs = json.loads(text)["labels"]
        found = None if pairs is None else [(f"{folder}{name}", label) for name, label in pairs]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{place} is not as EDM writes it, {{'labels': [[name, class], ...]}}: {error!r}") from error
    if found is None:
        return None
    if not all(isinstance(label, int) and not isinstance(label, bool) for _, label in found):
        raise ValueError(f"{place}: labels must be whole numbers, the classes")
    return _in_order(found, names, place)


def folder_labels(names: Sequence[str]) -> Labels | None:
    """The first folder of each name, after those that all have in common if more follow; None unless all have one."""
    parts = [PurePosixPath(name).parts for name in names]
    while all(len(part) > 2 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [part[0] for part in parts] if all(len(part) > 1 for part in parts) else None


def _in_order(found: Iterable[tuple[str, Any]], names: Sequence[str], place: str) -> Labels:
    table: dict[str, Any] = {}
    wanted = set(names)
    for name, label in ((str(PurePosixPath(name)), label) for name, label in found):
        if name in wanted and table.setdefault(name, label) != label:
            raise ValueError(f"{place} has two labels for {name}, {table[name]} and {label}; keep one")
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(
            f"{place} has no label for {len(missing)} of {len(names)} images, such as {missing[0]}; it must name them so"
        )
    return [table[name] for name in names]
