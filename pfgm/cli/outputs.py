"""Check and write output files: which endings can hold which samples, and how samples become pictures or arrays."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pfgm.evaluation import plots
from pfgm.files.atomic import atomic_write, save_torch

ARRAYS = (".npz", ".pt")
IMAGES, PICTURES, ANY = "images (1 or 3, H, W)", "images (1 or 3, H, W) and points (2,)", "samples of any shape"

# The samples that each kind of output can hold, by its ending. "" is a folder with one file per sample.
LATENTS = {".npz": ANY, ".pt": ANY}
STRIP = {".png": IMAGES, **LATENTS}
SAMPLES = {".png": PICTURES, **LATENTS, "": IMAGES}
SAMPLE_FOLDER = {"": ANY}
TRAJECTORY = {".png": PICTURES, ".gif": PICTURES, ".npz": ANY}


def check_output(
    path: Path, endings: Mapping[str, str], shape: Sequence[int], *, name: str = "out", others: Sequence[Path | None] = ()
) -> None:
    """Check that samples can be written to `path`, and make its folder."""
    check_name(path, endings, shape, name=name, others=others)
    check_writable(path.parent if path.suffix else path, name, path)


def check_name(
    path: Path, endings: Mapping[str, str], shape: Sequence[int], *, name: str = "out", others: Sequence[Path | None] = ()
) -> None:
    """Check that `path` names an output for samples of `shape`, without touching the disk.

    Args:
        path: File or folder to write.
        endings: What it can hold by its ending, such as `SAMPLES`.
        shape: Shape of one sample.
        name: Argument to name in errors.
        others: Files of other arguments, which must not be the same.

    Raises:
        ValueError: If the ending is not supported, cannot hold these samples, or `path` names something else.
    """
    ending = path.suffix or "a folder"
    if path.suffix not in endings:
        supported = ", ".join(other or "a folder" for other in endings)
        raise ValueError(f"{name} = {path}: {ending} is not supported here. Use one of {supported}.")
    content = endings[path.suffix]
    if content != ANY and not (plots.is_image(shape) or (content == PICTURES and tuple(shape) == (2,))):
        arrays = " or ".join(other for other in endings if endings[other] == ANY)
        raise ValueError(f"{name} = {path}: {ending} holds only {content}, not samples of shape {tuple(shape)}. Use {arrays}.")
    if path.is_dir() if path.suffix else path.is_file():
        raise ValueError(f"{name} = {path} is a {'folder' if path.suffix else 'file'}. Choose another name.")
    if any(other is not None and other.resolve() == path.resolve() for other in others):
        raise ValueError(f"{name} = {path}: another argument names this file too. Choose another name.")


def check_writable(folder: Path, name: str, path: Path) -> None:
    """Make `folder`; raise OSError that calls `path` by the argument `name` if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{name} = {path} cannot be written: {error.strerror}. Choose another folder.") from error


def check_columns(columns: int | None, out: Path, shape: Sequence[int]) -> None:
    """Raise ValueError if `columns` is given for anything but a grid of images, or is not positive."""
    if columns is not None and (columns < 1 or out.suffix != ".png" or not plots.is_image(shape)):
        raise ValueError(f"columns = {columns}, out = {out}: only a .png of images has columns, at least one. Leave it out.")


def save_arrays(out: Path, arrays: Mapping[str, Tensor]) -> None:
    """Write named tensors to an .npz or .pt file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in arrays.items()}
    with atomic_write(out) as temporary:
        if out.suffix == ".pt":
            save_torch(temporary, tensors)
        else:
            numpy_arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            np.savez(temporary, **numpy_arrays)


def write_images(out: Path, x: Tensor, names: Sequence[str], value_range: plots.ValueRange, columns: int | None = None) -> None:
    """Write samples [n, ...] to one .png, a grid or scatter plot, or to a folder of PNG files with these names."""
    if columns is not None:
        plots.save_grid(out, x, value_range, columns)
    elif out.suffix == ".png":
        plots.save_samples(out, x, value_range)
    else:
        for name, image in zip(names, plots.to_bytes(x, value_range), strict=True):
            plots.save_image(out / f"{name}.png", image)


def write_strip(out: Path, x: Tensor, value_range: plots.ValueRange) -> None:
    """Write samples [rows, columns, *shape] to a picture with these rows and columns, or as "x" to an array file."""
    if out.suffix in ARRAYS:
        save_arrays(out, {"x": x})
    else:
        plots.save_grid(out, x.flatten(0, 1), value_range, columns=x.shape[1])
