"""Samples from .npy, .npz and .pt files, and inputs of a model from these or from images. Reading runs no code of a file."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfgm.files.images import read_images
from pfgm.files.untrusted import UNREADABLE, RefusedError, load_numpy, load_torch

ARRAYS = (".npy", ".npz", ".pt")


def read_samples(path: Path, labels: bool = False, conditions: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Read samples from an array file.

    Args:
        path: A .npy, .npz or .pt file with an array "x", or with a single array.
        labels: Whether to read the array "labels" too, one integer >= 0 per sample.
        conditions: Whether to read the array "conditions" too, one per sample.

    Returns:
        Samples [n, ...], labels [n] in int64 or None, and conditions [n, ...] in float32 or None. Samples and conditions of
        one dimension become [n, 1].

    Raises:
        ValueError: If the file is damaged, or lacks an array that fits.
        FileNotFoundError: If there is no such file.
    """
    arrays = load_arrays(path, ["x"] + ["labels"] * labels + ["conditions"] * conditions)
    x, y, c = arrays["x"], arrays.get("labels"), arrays.get("conditions")
    if x.ndim == 0:
        raise ValueError(f"path = {path}: holds a single number. Pass samples [n, ...].")
    if y is not None and (y.shape != x.shape[:1] or y.is_floating_point() or (len(y) and int(y.min()) < 0)):
        raise ValueError(
            f"path = {path}: labels need one integer >= 0 for each of {len(x)} samples, got {tuple(y.shape)} {y.dtype}"
        )
    c = c if c is None or c.is_complex() else c.float()
    if c is not None and (c.shape[:1] != x.shape[:1] or not c.numel() or not _is_finite(c)):
        raise ValueError(f"path = {path}: conditions need finite numbers for each of {len(x)} samples, got {tuple(c.shape)}")
    return _column(x), None if y is None else y.long(), None if c is None else _column(c)


def read_inputs(path: Path, shape: Sequence[int], value_range: Sequence[float] | None, name: str, key: str = "x") -> Tensor:
    """Read inputs of a model from images or an array file.

    Args:
        path: An image, a folder of images (see `read_images`), or a .npy, .npz or .pt file. An array file holds one sample or
            many, under `key` or as its only array, in the units of the data.
        shape: The shape of a sample.
        value_range: The values (low, high) of black and white in the units of the data, None if these are not images.
        name: What `path` is called in error messages.
        key: The name of the array.

    Returns:
        Samples [n, *shape] in floating point, in the units of the data.

    Raises:
        ValueError: If the file is damaged, or its content is not finite or of another shape.
        FileNotFoundError: If `path` does not exist.
    """
    if path.suffix not in ARRAYS:
        images = read_images(path, shape, name)
        if value_range is None:
            raise ValueError(f"{name} = {path}: this model's data have no black and white. Pass a .npy, .npz or .pt file.")
        return value_range[0] + (value_range[1] - value_range[0]) * images
    x = load_arrays(path, [key], name=name)[key]
    x = _column(x) if tuple(shape) == (1,) else x
    x = x[None] if x.ndim == len(shape) else x
    if tuple(x.shape[1:]) != tuple(shape) or not len(x) or not _is_finite(x):
        raise ValueError(
            f"{name} = {path} holds {tuple(x.shape)} {x.dtype}: expected finite numbers {tuple(shape)}, or [n, ...] of those"
        )
    return x if x.is_floating_point() else x.float()


def load_arrays(path: Path, needed: Sequence[str], optional: Sequence[str] = (), name: str = "path") -> dict[str, Tensor]:
    """Read arrays as `raw_arrays` does, as tensors of a dtype that torch can compute with."""
    arrays = raw_arrays(path, needed, optional, name)
    with _readable(path, name):
        return {key: _tensor(value) for key, value in arrays.items()}


def raw_arrays(path: Path, needed: Sequence[str], optional: Sequence[str] = (), name: str = "path") -> dict[str, np.ndarray]:
    """Read arrays from a .npy, .npz or .pt file.

    Args:
        path: The file. If it holds a single array, this may have any name and is the first of `needed`.
        needed: Names of arrays that the file must hold.
        optional: Names of arrays that are read if the file holds them.
        name: What `path` is called in error messages.

    Returns:
        The arrays by name.

    Raises:
        ValueError: If the file is damaged, refused, or lacks an array.
        FileNotFoundError: If there is no such file.
    """
    if path.suffix not in ARRAYS:
        raise ValueError(f"{name} = {path}: unknown suffix {path.suffix!r}. Use .npy, .npz or .pt.")
    if not path.is_file():
        raise FileNotFoundError(f"{name} = {path} does not exist or is not a file. Pass a .npy, .npz or .pt file.")
    with _readable(path, name):
        content: Any = (load_torch if path.suffix == ".pt" else load_numpy)(path, f"{name} = {path}")
        if not hasattr(content, "keys"):
            content = {needed[0]: content}
        names = {key: key for key in content}
    if len(names) == 1:
        names = {needed[0]: next(iter(names))}
    for key in needed:
        if key not in names:
            raise ValueError(f"{name} = {path} has no array {key!r}, only {sorted(map(str, names))}. Add it to the file.")
    with _readable(path, name):
        return {key: _array(content[names[key]]) for key in (*needed, *optional) if key in names}


def check_values(x: Tensor, value_range: tuple[float, float] | None, path: object) -> None:
    """Raise ValueError unless samples are real, finite, and within `value_range`, which integers must have."""
    if x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"path = {path}: samples of dtype {x.dtype}. Pass real numbers.")
    if x.is_floating_point() and not _is_finite(x):
        raise ValueError(f"path = {path}: {int((~torch.isfinite(x)).sum())} values are NaN or infinite. Remove those samples.")
    if not x.is_floating_point() and value_range is None:
        raise ValueError(f"path = {path}: integers of dtype {x.dtype} need value_range, such as [0, 65535]")
    if value_range is not None:
        if not -math.inf < value_range[0] < value_range[1] < math.inf:
            raise ValueError(f"value_range = {value_range}: expected two finite numbers, the first below the second")
        if len(x) and not value_range[0] <= float(x.min()) <= float(x.max()) <= value_range[1]:
            raise ValueError(f"path = {path}: values from {x.min()} to {x.max()} leave value_range = {value_range}")


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    """Replace the libraries' errors, whose words advise to load pickles, by ValueError."""
    try:
        yield
    except RefusedError:
        raise
    except UNREADABLE as error:
        raise ValueError(
            f"{name} = {path} cannot be read as samples of one shape ({type(error).__name__}). Pass arrays of numbers [n, ...]."
        ) from error


def _is_finite(x: Tensor) -> bool:
    return not x.is_complex() and bool(torch.isfinite(x).all())


def _array(value: Any) -> np.ndarray:
    value = torch.stack(list(value)) if isinstance(value, (list, tuple)) else value  # tensors of one shape
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().resolve_conj().resolve_neg()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _tensor(value: np.ndarray) -> Tensor:
    """Convert to a tensor; unsigned integers of over 8 bits, for which torch has no sums, become longer signed ones."""
    x = torch.as_tensor(value)
    return x.int() if x.dtype == torch.uint16 else x.long() if x.dtype in (torch.uint32, torch.uint64) else x


def _column(x: Tensor) -> Tensor:
    return x[:, None] if x.ndim == 1 else x
