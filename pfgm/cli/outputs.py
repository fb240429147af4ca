"""Samples on disk, as pictures or arrays: what can be written is known before any work is done."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pfgm.evaluation import plots
from pfgm.files.atomic import atomic_write, save_torch

ARRAYS = (".npz", ".pt")


def check_output(out: Path, shape: Sequence[int]) -> None:
    """Make the folder of `out` and make sure that it can be written and can hold samples of `shape`.

    `out` is a file .png (grid or scatter plot), .npz or .pt, or a folder of separate PNGs. ValueError or OSError otherwise.
    """
    if out.suffix and out.suffix not in (".png", *ARRAYS):
        raise ValueError(
            f"out = {out}: the ending {out.suffix!r} is unknown; use .png, .npz, .pt, or a folder for separate PNGs"
        )
    points = tuple(shape) == (2,) and out.suffix
    if out.suffix not in ARRAYS and not (plots.is_image(shape) or points):
        raise ValueError(f"out = {out}: samples of shape {tuple(shape)} are no images; use a file ending in .npz or .pt")
    if (out.suffix and out.is_dir()) or (not out.suffix and out.is_file()):
        raise ValueError(f"out = {out} is a {'folder' if out.is_dir() else 'file'}; choose another name")
    check_writable(out.parent if out.suffix else out, "out", out)


def check_folder(out: Path) -> None:
    """Make the folder `out`. ValueError or OSError if it is a file, or cannot be written."""
    if out.is_file():
        raise ValueError(f"out = {out} is a file; choose another name")
    check_writable(out, "out", out)


def check_writable(folder: Path, name: str, path: Path) -> None:
    """Make `folder`. OSError that names the argument `name` and its `path` if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{name} = {path} cannot be written: {error.strerror}; choose another folder") from error


def check_other_file(path: Path, *inputs: Path | None, name: str = "out") -> None:
    """ValueError, which calls `path` by `name`, if it is one of the `inputs`."""
    if any(one is not None and one.resolve() == path.resolve() for one in inputs):
        raise ValueError(f"{name} = {path} is also read; choose another name")


def check_columns(columns: int | None, out: Path, shape: Sequence[int]) -> None:
    """ValueError unless `columns` is None, or `out` a grid of images that can have so many."""
    if columns is not None and (columns < 1 or out.suffix != ".png" or not plots.is_image(shape)):
        raise ValueError(f"columns = {columns}, out = {out}: only a .png of images has columns, one at least; leave it out")


def check_array_output(out: Path) -> None:
    """ValueError or OSError unless `out` is an .npz or .pt file that can be written."""
    if out.suffix not in ARRAYS or out.is_dir():
        raise ValueError(f"out = {out}: give a file ending in {' or '.join(ARRAYS)}")
    check_writable(out.parent, "out", out)


def check_strip(out: Path, shape: Sequence[int]) -> None:
    """ValueError or OSError unless `out` is an array file, or a .png if samples of `shape` are images, that can be written."""
    if out.suffix not in (".png", *ARRAYS) or out.is_dir():
        raise ValueError(f"out = {out}: give a file ending in .png, .npz or .pt")
    if out.suffix == ".png" and not plots.is_image(shape):
        raise ValueError(f"out = {out}: samples of shape {tuple(shape)} are no images; use a file ending in .npz or .pt")
    check_writable(out.parent, "out", out)


def save_arrays(out: Path, arrays: dict[str, Tensor]) -> None:
    """Tensors by name as an .npz or .pt file."""
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in arrays.items()}
    with atomic_write(out) as temporary:
        if out.suffix == ".pt":
            save_torch(temporary, here)
        else:
            numbers: dict[str, Any] = {name: tensor.numpy() for name, tensor in here.items()}
            np.savez(temporary, **numbers)


def write_images(out: Path, x: Tensor, names: Sequence[str], value_range: plots.ValueRange, columns: int | None = None) -> None:
    """Samples `x` [n, ...] as one .png, a grid or scatter plot, or in a folder of PNGs with the given names."""
    if columns is not None:
        plots.save_grid(out, x, value_range, columns)
        return
    if out.suffix == ".png":
        plots.save_samples(out, x, value_range)
        return
    for name, image in zip(names, plots.to_bytes(x, value_range), strict=True):
        plots.save_image(out / f"{name}.png", image)


def write_strip(out: Path, x: Tensor, value_range: plots.ValueRange) -> None:
    """Samples [rows, columns, *shape] as a picture or, as "x", in an array file; see `check_strip`."""
    if out.suffix in ARRAYS:
        save_arrays(out, {"x": x})
    else:
        plots.save_grid(out, x.flatten(0, 1), value_range, columns=x.shape[1])
