"""Where images come from: folders, zips, array files, torchvision's data sets, Hugging Face's.

A source knows its images by number, their names, forms and labels; nothing is decoded before it is asked for.
"""

import inspect
import io
import os
import struct
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pfgm.data.labels import Labels, table_or_folders
from pfgm.files.arrays import ARRAYS, raw_arrays
from pfgm.files.images import SUFFIXES, ImageError, ImageFormat, pixels, read_header, read_pixels
from pfgm.files.untrusted import FREE, UNREADABLE, first_line, is_regular_file, open_zip, read_bytes


class Source(ABC):
    """`names` of the images, how many other files lie among them (`ignored`), and the argument that gave it (`place`)."""

    place: str
    names: Sequence[str]
    ignored: int = 0

    @abstractmethod
    def read(self, i: int) -> np.ndarray:
        """The pixels of image `i`, see `pfgm.files.images`. ImageError if it is damaged."""

    def header(self, i: int) -> ImageFormat:
        """The form of image `i`. ImageError if it is damaged."""
        height, width, channels = (array := self.read(i)).shape
        return ImageFormat(height, width, channels, 8 if array.dtype == np.uint8 else 16)

    @abstractmethod
    def labels(self) -> Labels | None:
        """Of each image, as the source has them; None if it has none."""


def open_source(path: str, root: str | None = None, name: str = "path") -> Source:
    """The images at `path`: a folder, .zip, .npy, .npz or .pt file, torchvision:NAME[:split] or huggingface:ID[:split].

    Sets of torchvision are in the folder `root` (default: data), or downloaded to it. ValueError or OSError, which call the
    path `name`, if there are no images.
    """
    kind, _, rest = path.partition(":")
    if root is not None and kind != "torchvision":
        raise ValueError(f"root = {root}: only torchvision's data sets have one; leave it out for {name} = {path}")
    place, ending = f"{name} = {path}", Path(path).suffix.lower()
    if kind in ("torchvision", "huggingface"):
        key, _, split = rest.partition(":")
        source: Source = (
            Torchvision(key, split, root or "data", place) if kind == "torchvision" else HuggingFace(key, split, place)
        )
    elif path and Path(path).is_dir():
        source = Folder(Path(path))
    elif ending in (".zip", *ARRAYS) and Path(path).is_file():
        source = Zip(Path(path), place) if ending == ".zip" else ArrayFile(Path(path), place)
    else:
        raise FileNotFoundError(
            f"{place} does not exist, or is of another kind; give a folder of images, a .zip of them, a .npy, .npz or .pt "
            "file, torchvision:NAME or huggingface:ID"
        )
    source.place = place
    if not len(source.names):
        raise ValueError(f"{place} holds no images ({', '.join(SUFFIXES)}), but {source.ignored} other files")
    return source


class Folder(Source):
    """All images under a folder, through links too; see `table_or_folders` for labels."""

    def __init__(self, path: Path):
        self.path = path
        self.files = sorted(_walk(path))
        self.names, self.ignored = _images(self.files)

    def header(self, i: int) -> ImageFormat:
        return read_header(self.path / self.names[i])

    def read(self, i: int) -> np.ndarray:
        return read_pixels(self.path / self.names[i])

    def labels(self) -> Labels | None:
        return table_or_folders(self.files, self.names, lambda name: read_bytes(self.path / name, name, FREE), self.place)


class Zip(Source):
    """All images in a zip, read in place; labels as in a folder."""

    def __init__(self, path: Path, place: str):
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        self._lock = threading.Lock()
        try:
            with open_zip(path, place) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
            raise ValueError(f"{place} is no zip, or was not copied to its end ({error}); use another copy") from error
        self.files = sorted({name for name in names if not name.endswith("/")})
        self.names, self.ignored = _images(self.files)

    def _zip(self) -> zipfile.ZipFile:
        """Opened anew in each process: a file shared by two has one position."""
        with self._lock:
            if self._open is None or self._open[0] != os.getpid():
                self._open = (os.getpid(), zipfile.ZipFile(self.path))
            return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _bytes(self, name: str) -> bytes:
        try:
            size = self._zip().getinfo(name).file_size
            if size > FREE:
                raise ImageError(f"it would unpack to {size / 1e6:.3g} MB")
            return self._zip().read(name)
        except ImageError:
            raise
        except Exception as error:  # a wrong checksum, a password, an unknown compression
            raise ImageError(f"{type(error).__name__}: {error}") from error

    def header(self, i: int) -> ImageFormat:
        return read_header(io.BytesIO(self._bytes(self.names[i])))

    def read(self, i: int) -> np.ndarray:
        return read_pixels(io.BytesIO(self._bytes(self.names[i])))

    def labels(self) -> Labels | None:
        return table_or_folders(self.files, self.names, self._bytes, self.place)


class ArrayFile(Source):
    """Images of one size, [n, C, H, W], [n, H, W, C] or [n, H, W], of 8 or 16 bits; the array "labels" has their labels."""

    def __init__(self, path: Path, place: str):
        arrays = {"x": _mapped(path, place)} if path.suffix == ".npy" else raw_arrays(path, ["x"], ["labels"], _name(place))
        self.x, self._labels = _channels_last(arrays["x"], place), arrays.get("labels")
        self.names = [f"{path}[{i}]" for i in range(len(self.x))]

    def read(self, i: int) -> np.ndarray:
        return np.asarray(self.x[i])

    def labels(self) -> Labels | None:
        return None if self._labels is None else self._labels.reshape(-1).tolist()


class Torchvision(Source):
    """A data set of torchvision that has a `split` or knows training from test, downloaded to `root` if it is not there."""

    def __init__(self, name: str, split: str, root: str, place: str):
        from torchvision import datasets

        known = {key: set(inspect.signature(getattr(datasets, key)).parameters) for key in datasets.__all__}
        usable = sorted(key for key, has in known.items() if {"root", "download"} <= has and has & {"train", "split"})
        if name not in usable:
            raise ValueError(f"{place} is unknown; these can be used: {', '.join(usable)}")
        split = split or "train"
        part: dict[str, Any] = {"train": split == "train"} if "train" in known[name] else {"split": split}
        if "train" in part and split not in ("train", "test"):
            raise ValueError(f"{place}: this set has the splits train and test")
        try:
            self.data = getattr(datasets, name)(root, download=True, **part)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{place}: this set has no split {split!r}, or needs more than a split: {first_line(error)}"
            ) from error
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"{place} is not in root = {root}, and cannot be downloaded ({error}). On a machine with a network run "
                f"python -c 'from torchvision.datasets import {name}; {name}(\"{root}\", download=True)', and copy the folder"
            ) from error
        self.names = [f"{name}[{i}]" for i in range(len(self.data))]

    def read(self, i: int) -> np.ndarray:
        try:
            return pixels(self.data[i][0])
        except (OSError, SyntaxError, AttributeError) as error:  # AttributeError: a film or a tensor
            raise ImageError(f"{type(error).__name__}: {error}") from error

    def labels(self) -> Labels | None:
        values = getattr(self.data, "targets", getattr(self.data, "labels", None))
        return None if values is None else np.asarray(values).tolist()


class HuggingFace(Source):
    """A data set of the Hugging Face hub, or a folder that its `load_dataset` can read, with one column of images."""

    def __init__(self, name: str, split: str, place: str):
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"{place} needs the package datasets: pip install 'pfgm[huggingface]'") from error
        try:
            data = datasets.load_dataset(name, split=split or "train")
        except (OSError, ValueError, IndexError) as error:
            raise OSError(
                f"{place} cannot be loaded ({type(error).__name__}: {first_line(error)}). Offline it must be in the "
                "cache: load it once on a machine with a network, and copy the folder $HF_HOME here"
            ) from error
        images = [key for key, feature in data.features.items() if isinstance(feature, datasets.Image)]
        classes = [key for key, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(images) != 1:
            raise ValueError(f"{place} has {len(images)} columns of images among {sorted(data.features)}; it needs one")
        self.image, self.label = images[0], classes[0] if len(classes) == 1 else None
        self.data = data.cast_column(self.image, datasets.Image(decode=False))
        self.names = [f"{name}[{i}]" for i in range(len(data))]

    def _file(self, i: int) -> io.BytesIO | Path:
        cell = self.data[i][self.image]
        return Path(cell["path"]) if cell["bytes"] is None else io.BytesIO(cell["bytes"])

    def header(self, i: int) -> ImageFormat:
        return read_header(self._file(i))

    def read(self, i: int) -> np.ndarray:
        return read_pixels(self._file(i))

    def labels(self) -> Labels | None:
        return None if self.label is None else list(self.data[self.label])


def _walk(path: Path) -> Iterator[str]:
    """The names of all files under `path`, relative to it; linked folders too, each once."""
    seen = set()
    for folder, below, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        paths = (Path(folder, file) for file in files)
        yield from (file.relative_to(path).as_posix() for file in paths if is_regular_file(file))


def _name(place: str) -> str:
    """Of the argument."""
    return place.partition(" ")[0]


def _images(files: Sequence[str]) -> tuple[list[str], int]:
    """Names of images, and the number of other files; what systems leave about (.DS_Store, __MACOSX) counts as other."""
    paths = [(name, PurePosixPath(name)) for name in files]
    images = [
        name
        for name, path in paths
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and "__MACOSX" not in path.parts
    ]
    return images, sum(path.name != "dataset.json" for _, path in paths) - len(images)


def _mapped(path: Path, place: str) -> np.ndarray:
    """A .npy file as it lies on the disk."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE as error:
        raise ValueError(f"{place} cannot be read as an array ({type(error).__name__}); use another copy") from error


def _channels_last(x: np.ndarray, place: str) -> np.ndarray:
    """[n, H, W, C] of 8 or 16 bits. ValueError for what are no such images."""
    x = x[:, None] if x.ndim == 3 else x
    if x.ndim != 4 or not (x.shape[1] in (1, 3) or x.shape[3] in (1, 3)) or not x.size:
        raise ValueError(
            f"{place} holds {x.shape}; images are [n, C, H, W], [n, H, W, C] or [n, H, W] with 1 or 3 channels. "
            "pfgm.data.Arrays takes samples of any shape"
        )
    if x.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"{place} holds {x.dtype}; images are uint8 (0..255) or uint16 (0..65535). pfgm.data.Arrays takes other numbers, "
            "in their own units"
        )
    return np.moveaxis(x, 1, 3) if x.shape[1] in (1, 3) else x
