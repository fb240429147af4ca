"""Labels of images, from EDM's dataset.json, a CSV file or the names of sub-folders, and their numbers as classes."""

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

TABLE_BYTES = 2**24  # bytes that a table of labels may have,
BYTES_PER_NAME = 1000  # and how many more for each image


def number_classes(labels: Labels) -> tuple[torch.Tensor, list[str]]:
    """Number the classes of images from 0.

    Whole numbers keep their values as long as the largest is below 2 n + 10 for n classes and none is negative. Others, such
    as years, are numbered in ascending order, and words in alphabetical order.

    Args:
        labels: One word or whole number for each image, as a source or a CSV file has them.

    Returns:
        The class of each image, int64 [n], and the names of the classes that occur.
    """
    words = [str(label).strip() for label in labels]
    whole = [word.removesuffix(".0") for word in words]
    if all(word.removeprefix("-").isdecimal() and word == str(int(word)) for word in whole):
        words, names = whole, sorted(set(whole), key=int)
        if int(names[0]) >= 0 and int(names[-1]) < 2 * len(names) + 10:
            return torch.tensor([int(word) for word in words]), names
    else:
        names = sorted(set(words))
    numbers = {name: k for k, name in enumerate(names)}
    return torch.tensor([numbers[word] for word in words]), names


def csv_labels(table: Path, names: Sequence[str]) -> Labels:
    """Read the labels of images from a CSV file.

    Args:
        table: The file, with or without a header; its first two columns are file and label.
        names: The names of the images.

    Returns:
        The label of each image, a word.

    Raises:
        ValueError: If the file cannot be read, contradicts itself or lacks an image.
        OSError: If there is no such file.
    """
    argument = f"labels = {table}"
    if not table.is_file():
        raise FileNotFoundError(f"{argument}: no such file. Give a CSV file with the columns file and label, true or false")
    try:
        text = read_bytes(table, argument, _max_bytes(names)).decode("utf-8-sig")
        rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
        return _in_order((_pair(row, argument) for row in rows if row), names, argument)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: not a CSV file ({error}). Save it as comma-separated text in UTF-8") from error


def _pair(row: Sequence[str], argument: str) -> tuple[str, str]:
    if len(row) < 2 or not row[1].strip():
        raise ValueError(f"{argument}: a row has no label. Give two columns separated by a comma, file and label")
    return row[0].strip(), row[1].strip()


def _max_bytes(names: Sequence[str]) -> int:
    return TABLE_BYTES + BYTES_PER_NAME * len(names)


def stored_labels(files: Sequence[str], names: Sequence[str], read: Callable[[str], bytes], argument: str) -> Labels | None:
    """Read the labels that come with a folder or an archive of images.

    They are in the outermost dataset.json, whose names are relative to it. Without one, sub-folders are classes.

    Args:
        files: The names of all files.
        names: The names of the images.
        read: Returns the content of a file by its name.
        argument: The argument that named the images, such as "path = photos"; messages begin with it.

    Returns:
        The label of each image, or None if there are none.

    Raises:
        ValueError: If dataset.json cannot be read, contradicts itself or lacks an image.
    """
    tables = [name for name in files if PurePosixPath(name).name == "dataset.json"]
    if not tables:
        return _folder_labels(names)
    table = min(tables, key=lambda name: len(PurePosixPath(name).parts))
    try:
        text = read(table)
        if len(text) > _max_bytes(names):
            raise RefusedError(f"it has {len(text) / 1e6:.3g} MB, far more than {len(names)} images need")
    except (ImageError, RefusedError, OSError) as error:
        raise ValueError(f"{argument}: {table} cannot be read ({error}). Remove it, or write it again") from error
    parent = PurePosixPath(table).parent
    return _edm_labels(text, names, f"{argument}/{table}", "" if parent == PurePosixPath() else f"{parent}/")


def _edm_labels(text: bytes, names: Sequence[str], argument: str, folder: str) -> Labels | None:
    """Parse EDM's dataset.json in `folder`: {"labels": [[name, class], ...]}, with null instead of the list for no labels."""
    try:
        pairs = json.loads(text)["labels"]
        rows = None if pairs is None else [(f"{folder}{name}", label) for name, label in pairs]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{argument}: not in EDM's format, {{'labels': [[name, class], ...]}} ({error!r})") from error
    if rows is None:
        return None
    if not all(isinstance(label, int) and not isinstance(label, bool) for _, label in rows):
        raise ValueError(f"{argument}: labels must be whole numbers, the classes")
    return _in_order(rows, names, argument)


def _folder_labels(names: Sequence[str]) -> Labels | None:
    """Return the first folder of each name, after those that all have in common if more follow, or None unless all have one."""
    paths = [PurePosixPath(name).parts for name in names]
    while all(len(path) > 2 for path in paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    return [path[0] for path in paths] if all(len(path) > 1 for path in paths) else None


def _in_order(rows: Iterable[tuple[str, Any]], names: Sequence[str], argument: str) -> Labels:
    """Return the label of each of `names` from `rows` of a table in any order."""
    table: dict[str, Any] = {}
    wanted = set(names)
    for name, label in ((str(PurePosixPath(name)), label) for name, label in rows):
        if name in wanted and table.setdefault(name, label) != label:
            raise ValueError(f"{argument}: two labels for {name}, {table[name]} and {label}. Keep one")
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(
            f"{argument}: no label for {len(missing)} of {len(names)} images, such as {missing[0]}. Add a row with that name"
        )
    return [table[name] for name in names]
