"""Samples from files: arrays and images. No code in a file is run."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfgm.files.images import SUFFIXES, ImageError, ImageFormat, fit, read_pixels
from pfgm.files.untrusted import UNREADABLE, RefusedError, check_arrays, check_claim, is_regular_file, load_torch

ARRAYS = (".npy", ".npz", ".pt")


def read_samples(path: Path, labels: bool = False, conditions: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Samples [n, ...], and if asked for their "labels" [n] and "conditions" [n, ...], of a .npy, .npz or .pt file.

    Of one dimension, samples and conditions become [n, 1]. ValueError or OSError if something is missing or damaged.
    """
    needed = ["x"] + ["labels"] * labels + ["conditions"] * conditions
    arrays = load_arrays(path, needed)
    x, y, c = arrays["x"], arrays.get("labels"), arrays.get("conditions")
    if x.ndim == 0:
        raise ValueError(f"path = {path} holds a single number; give samples, [n, ...]")
    if y is not None and (y.shape != x.shape[:1] or y.is_floating_point() or (len(y) and int(y.min()) < 0)):
        raise ValueError(
            f"path = {path}: labels need one integer >= 0 for each of {len(x)} samples, got {tuple(y.shape)} {y.dtype}"
        )
    c = c if c is None or c.is_complex() else c.float()
    if c is not None and (c.shape[:1] != x.shape[:1] or not c.numel() or c.is_complex() or not bool(torch.isfinite(c).all())):
        raise ValueError(f"path = {path}: conditions need finite numbers for each of {len(x)} samples, got {tuple(c.shape)}")
    return _column(x), None if y is None else y.long(), None if c is None else _column(c)


def load_arrays(path: Path, needed: Sequence[str], optional: Sequence[str] = (), name: str = "path") -> dict[str, Tensor]:
    """As `raw_arrays`, as tensors of a type that torch can compute with."""
    arrays = raw_arrays(path, needed, optional, name)
    with _readable(path, name):
        return {key: _tensor(value) for key, value in arrays.items()}


def raw_arrays(path: Path, needed: Sequence[str], optional: Sequence[str] = (), name: str = "path") -> dict[str, np.ndarray]:
    """The arrays `needed` and, where they exist, `optional` of a .npy, .npz or .pt file, by name.

    A single array may have any name, it is the first that is needed. ValueError or OSError, which call the file `name`, if it
    is damaged or lacks one.
    """
    if path.suffix not in ARRAYS:
        raise ValueError(f"{name} = {path}: the ending {path.suffix!r} is unknown; use .npy, .npz or .pt")
    if not path.is_file():
        raise FileNotFoundError(f"{name} = {path} does not exist or is no file; give a .npy, .npz or .pt file")
    with _readable(path, name):
        content: Any = _opened(path, f"{name} = {path}")
        if not hasattr(content, "keys"):
            content = {needed[0]: content}
        names = {key: key for key in content}
    if len(names) == 1:
        names = {needed[0]: next(iter(names))}
    for key in needed:
        if key not in names:
            raise ValueError(f"{name} = {path} has no array {key!r}, only {sorted(map(str, names))}; add it to the file")
    with _readable(path, name):
        return {key: _array(content[names[key]]) for key in (*needed, *optional) if key in names}


def _opened(path: Path, place: str) -> Any:
    """An array, or some by name; RefusedError for files that claim too much or hold other things than numbers."""
    if path.suffix == ".pt":
        return load_torch(path, place)
    if path.suffix == ".npz":
        check_arrays(path, place)
        return np.load(path, allow_pickle=False)
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # which checks its size against the file's
    check_claim(array.shape, array.dtype, path.stat().st_size, place)
    return np.array(array)


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    """What goes wrong in the block as a ValueError without the libraries' own words, which advise to load pickles."""
    try:
        yield
    except RefusedError:
        raise
    except UNREADABLE as error:
        raise ValueError(
            f"{name} = {path} cannot be read as samples of one shape ({type(error).__name__}): give arrays of numbers, [n, ...]"
        ) from error


def _array(value: Any) -> np.ndarray:
    """Numbers, or a list of tensors of one shape."""
    value = torch.stack(list(value)) if isinstance(value, (list, tuple)) else value
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().resolve_conj().resolve_neg()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _tensor(value: np.ndarray) -> Tensor:
    """Unsigned integers of over 8 bits become longer signed ones: torch has no sums of them."""
    x = torch.as_tensor(value)
    return x.int() if x.dtype == torch.uint16 else x.long() if x.dtype in (torch.uint32, torch.uint64) else x


def _column(x: Tensor) -> Tensor:
    return x[:, None] if x.ndim == 1 else x


def read_images(path: Path, shape: Sequence[int], name: str = "path") -> Tensor:
    """An image file, or all those of a folder in the order of their names, as [n, *shape] in [0, 1]; grey or RGB by `shape`.

    8 and 16 bits. ValueError or OSError, which call the file `name`, if one is damaged or of another size.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{name} = {path}: samples of shape {tuple(shape)} are no images; give a .npy, .npz or .pt file")
    if not path.exists():
        raise FileNotFoundError(f"{name} = {path} does not exist; give an image, a folder of them, a .npy, .npz or .pt file")
    files = (
        sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and is_regular_file(file))
        if path.is_dir()
        else [path]
    )
    if not files or files[0].suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name} = {path}: give images ({', '.join(SUFFIXES)}), a folder of them, or a .npy, .npz or .pt file")
    return torch.stack([_read_image(file, shape, name) for file in files])


def read_inputs(path: Path, shape: Sequence[int], value_range: Sequence[float] | None, name: str, key: str = "x") -> Tensor:
    """Samples [n, *shape], in the units of a model whose black and white are `value_range`, from images or an array file.

    An array file holds them under `key`, or has one array in all, of one sample or many. ValueError or OSError, which call the
    file `name`, if they cannot be read, are not finite or of another shape.
    """
    if path.suffix in ARRAYS:
        x = load_arrays(path, [key], name=name)[key]
        x = x[:, None] if tuple(shape) == (1,) and x.ndim == 1 else x
        x = x[None] if x.ndim == len(shape) else x
        if tuple(x.shape[1:]) != tuple(shape) or not len(x) or x.is_complex() or not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"{name} = {path} holds {tuple(x.shape)} {x.dtype}; give finite numbers, {tuple(shape)} or [n, ...] of those"
            )
        return x if x.is_floating_point() else x.float()
    images = read_images(path, shape, name)
    if value_range is None:
        raise ValueError(f"{name} = {path}: this model's data have no black and white; give a .npy, .npz or .pt file")
    return value_range[0] + (value_range[1] - value_range[0]) * images


def _read_image(path: Path, shape: Sequence[int], name: str) -> Tensor:
    channels, height, width = shape
    try:
        array = read_pixels(path)
    except ImageError as error:
        raise ValueError(f"{name} = {path} cannot be used: {error}") from error
    if array.shape[:2] != (height, width):
        raise ValueError(
            f"{name} = {path} has {array.shape[1]} x {array.shape[0]} pixels, the model's {width} x {height}; resize it"
        )
    top = 255 if array.dtype == np.uint8 else 65535
    array = fit(array, ImageFormat(height, width, channels, 8 if top == 255 else 16))
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / top


def check_values(x: Tensor, value_range: tuple[float, float] | None, path: object) -> None:
    """ValueError for samples that are not finite, or outside `value_range`, or integers without one."""
    if x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"path = {path}: samples of type {x.dtype}; give real numbers")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"path = {path}: {int((~torch.isfinite(x)).sum())} values are NaN or infinite; remove them")
    if not x.is_floating_point() and value_range is None:
        raise ValueError(f"path = {path}: integers of type {x.dtype} need value_range, such as [0, 65535]")
    if value_range is not None:
        if not -math.inf < value_range[0] < value_range[1] < math.inf:
            raise ValueError(f"value_range = {value_range}: give two finite numbers, the first below the second")
        if len(x) and not value_range[0] <= float(x.min()) <= float(x.max()) <= value_range[1]:
            raise ValueError(f"path = {path}: values from {x.min()} to {x.max()} leave value_range = {value_range}")
