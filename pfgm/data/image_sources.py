"""Where images come from: folders, zip archives, array files, data sets of torchvision and of the Hugging Face hub.

A source knows the number, names, formats and labels of its images. It decodes an image only when asked for it. A new kind of
source is a class in `SOURCES`.
"""

import inspect
import io
import os
import struct
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from pfgm.data.labels import Labels, stored_labels
from pfgm.files.arrays import ARRAYS, raw_arrays
from pfgm.files.images import SUFFIXES, ImageError, ImageFormat, pixels, read_header, read_pixels
from pfgm.files.untrusted import FREE, UNREADABLE, first_line, is_regular_file, open_zip, read_bytes


class Source(ABC):
    """A set of images that are read one at a time, by number.

    Args:
        path: Where the images are, in a form that the class `accepts`.
        argument: The argument that `path` is the value of; messages begin with it.
        root: The folder of downloaded data, for classes with `has_root`.

    Attributes:
        names: The name of each image.
        ignored: Number of other files among the images.

    Raises:
        ValueError: If the path holds no images of this kind.
        OSError: If it cannot be read or downloaded.
    """

    usage: ClassVar[str]  # how such a path is written, for messages
    has_root: ClassVar[bool] = False
    names: Sequence[str]
    ignored: int = 0

    def __init__(self, path: str, argument: str = "path", root: str | None = None):
        self.path, self.argument, self.root = path, argument, root
        self.open()

    def __str__(self) -> str:
        return f"{self.argument} = {self.path}"

    @classmethod
    @abstractmethod
    def accepts(cls, path: str) -> bool:
        """Return whether `path` is of this kind."""

    @abstractmethod
    def open(self) -> None:
        """Set `names` and whatever the other methods need. Called once."""

    @abstractmethod
    def read(self, i: int) -> np.ndarray:
        """Return the pixels of image `i`, [height, width, 1 or 3] of uint8 or uint16. Raise ImageError if it is damaged."""

    def header(self, i: int) -> ImageFormat:
        """Return the format of image `i`. Raise ImageError if it is damaged."""
        height, width, channels = (array := self.read(i)).shape
        return ImageFormat(height, width, channels, 8 if array.dtype == np.uint8 else 16)

    @abstractmethod
    def labels(self) -> Labels | None:
        """Return the label of each image, or None if the source has no labels."""


class _EncodedFiles(Source):
    """A source whose images are encoded files."""

    @abstractmethod
    def file(self, i: int) -> Path | io.BytesIO: ...

    def header(self, i: int) -> ImageFormat:
        return read_header(self.file(i))

    def read(self, i: int) -> np.ndarray:
        return read_pixels(self.file(i))


class _FileTree(_EncodedFiles):
    """A tree of files with images among them, labelled by its dataset.json or by its folders."""

    def list_files(self, files: Iterable[str]) -> None:
        """Set names, leaving out hidden files and __MACOSX, which systems leave behind."""
        self.files = sorted(files)
        paths = [(name, PurePosixPath(name)) for name in self.files]
        self.names = [
            name
            for name, path in paths
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and "__MACOSX" not in path.parts
        ]
        self.ignored = sum(path.name != "dataset.json" for _, path in paths) - len(self.names)

    @abstractmethod
    def bytes_of(self, name: str) -> bytes: ...

    def labels(self) -> Labels | None:
        return stored_labels(self.files, self.names, self.bytes_of, str(self))


class Folder(_FileTree):
    """All images under a folder. Links are followed."""

    usage = "a folder of images"

    @classmethod
    def accepts(cls, path: str) -> bool:
        return bool(path) and Path(path).is_dir()

    def open(self) -> None:
        self.list_files(_walk(Path(self.path)))

    def file(self, i: int) -> Path:
        return Path(self.path, self.names[i])

    def bytes_of(self, name: str) -> bytes:
        return read_bytes(Path(self.path, name), name, FREE)


class Zip(_FileTree):
    """All images in a zip archive, which stays packed."""

    usage = "a .zip of them"

    @classmethod
    def accepts(cls, path: str) -> bool:
        return Path(path).suffix.lower() == ".zip" and Path(path).is_file()

    def open(self) -> None:
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._lock = threading.Lock()
        try:
            with open_zip(self.path, str(self)) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
            raise ValueError(f"{self}: not a zip archive, or an incomplete copy ({error}). Copy it again") from error
        self.list_files({name for name in names if not name.endswith("/")})

    def _archive(self) -> zipfile.ZipFile:
        """Open the archive once in each process: processes that share an open file share its position."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), zipfile.ZipFile(self.path))
            return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def file(self, i: int) -> io.BytesIO:
        return io.BytesIO(self.bytes_of(self.names[i]))

    def bytes_of(self, name: str) -> bytes:
        try:
            size = self._archive().getinfo(name).file_size
            if size > FREE:
                raise ImageError(f"it would unpack to {size / 1e6:.3g} MB")
            return self._archive().read(name)
        except ImageError:
            raise
        except Exception as error:  # a wrong checksum, a password, an unknown compression
            raise ImageError(f"{type(error).__name__}: {error}") from error


class ArrayFile(Source):
    """Images of one size in an array [n, C, H, W], [n, H, W, C] or [n, H, W] of 8 or 16 bits, with "labels" beside it."""

    usage = "a .npy, .npz or .pt file"

    @classmethod
    def accepts(cls, path: str) -> bool:
        return Path(path).suffix.lower() in ARRAYS and Path(path).is_file()

    def open(self) -> None:
        path = Path(self.path)
        arrays = {"x": self._mapped()} if path.suffix == ".npy" else raw_arrays(path, ["x"], ["labels"], self.argument)
        self.x, self._labels = self._channels_last(arrays["x"]), arrays.get("labels")
        self.names = [f"{path}[{i}]" for i in range(len(self.x))]

    def _mapped(self) -> np.ndarray:
        try:
            return np.load(self.path, mmap_mode="r", allow_pickle=False)
        except UNREADABLE as error:
            raise ValueError(f"{self}: cannot be read as an array ({type(error).__name__}). Copy it again") from error

    def _channels_last(self, x: np.ndarray) -> np.ndarray:
        x = x[:, None] if x.ndim == 3 else x
        if x.ndim != 4 or not (x.shape[1] in (1, 3) or x.shape[3] in (1, 3)) or not x.size:
            raise ValueError(
                f"{self}: the array has shape {x.shape}. Images are [n, C, H, W], [n, H, W, C] or [n, H, W] with 1 or 3 "
                "channels; pfgm.data.Arrays takes samples of any shape"
            )
        if x.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"{self}: the array has type {x.dtype}. Images are uint8 (0..255) or uint16 (0..65535); pfgm.data.Arrays takes "
                "other numbers, in their own units"
            )
        return np.moveaxis(x, 1, 3) if x.shape[1] in (1, 3) else x

    def read(self, i: int) -> np.ndarray:
        return np.asarray(self.x[i])

    def labels(self) -> Labels | None:
        return None if self._labels is None else self._labels.reshape(-1).tolist()


class Torchvision(Source):
    """A data set of torchvision with the argument `split` or `train`, downloaded to `root` (default: data) if necessary."""

    usage = "torchvision:NAME[:split]"
    has_root = True

    @classmethod
    def accepts(cls, path: str) -> bool:
        return path.startswith("torchvision:")

    def open(self) -> None:
        from torchvision import datasets

        _, name, split = (*self.path.split(":", 2), "")[:3]
        split, root = split or "train", self.root or "data"
        known = {key: set(inspect.signature(getattr(datasets, key)).parameters) for key in datasets.__all__}
        usable = sorted(key for key, has in known.items() if {"root", "download"} <= has and has & {"train", "split"})
        if name not in usable:
            raise ValueError(f"{self}: unknown data set. Choose one of {', '.join(usable)}")
        options: dict[str, Any] = {"train": split == "train"} if "train" in known[name] else {"split": split}
        if "train" in options and split not in ("train", "test"):
            raise ValueError(f"{self}: this data set has the splits train and test")
        try:
            self.data = getattr(datasets, name)(root, download=True, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self}: this data set has no split {split!r}, or needs more than a split ({first_line(error)})"
            ) from error
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"{self}: not in root = {root}, and the download failed ({error}). On a machine with a network run "
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


class HuggingFace(_EncodedFiles):
    """A data set of the Hugging Face hub, or a folder that its `load_dataset` can read, with one column of images."""

    usage = "huggingface:ID[:split]"

    @classmethod
    def accepts(cls, path: str) -> bool:
        return path.startswith("huggingface:")

    def open(self) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"{self}: needs the package datasets. Run pip install 'pfgm[huggingface]'") from error
        _, name, split = (*self.path.split(":", 2), "")[:3]
        try:
            data = datasets.load_dataset(name, split=split or "train")
        except (OSError, ValueError, IndexError) as error:
            raise OSError(
                f"{self}: cannot be loaded ({type(error).__name__}: {first_line(error)}). Offline it must be in the cache: "
                "load it once on a machine with a network, and copy the folder $HF_HOME here"
            ) from error
        images = [key for key, feature in data.features.items() if isinstance(feature, datasets.Image)]
        classes = [key for key, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(images) != 1:
            raise ValueError(f"{self}: {len(images)} of the columns {sorted(data.features)} are images. It needs exactly one")
        self.image, self.label = images[0], classes[0] if len(classes) == 1 else None
        self.data = data.cast_column(self.image, datasets.Image(decode=False))
        self.names = [f"{name}[{i}]" for i in range(len(data))]

    def file(self, i: int) -> io.BytesIO | Path:
        cell = self.data[i][self.image]
        return Path(cell["path"]) if cell["bytes"] is None else io.BytesIO(cell["bytes"])

    def labels(self) -> Labels | None:
        return None if self.label is None else list(self.data[self.label])


SOURCES: tuple[type[Source], ...] = (Folder, Zip, ArrayFile, Torchvision, HuggingFace)


def open_source(path: str, root: str | None = None, argument: str = "path") -> Source:
    """Open the images at `path` without decoding any.

    Args:
        path: A folder, a .zip, .npy, .npz or .pt file, torchvision:NAME[:split] or huggingface:ID[:split].
        root: The folder of torchvision's data sets, which are downloaded to it; default: data.
        argument: The argument that `path` is the value of; messages begin with it.

    Raises:
        ValueError: If there are no images, or a `root` for another source than torchvision.
        OSError: If there is no such path, or it cannot be read or downloaded.
    """
    kinds = [kind for kind in SOURCES if kind.accepts(path)]
    if root is not None and not any(kind.has_root for kind in kinds):
        raise ValueError(f"root = {root}: only torchvision's data sets use it. Leave it out for {argument} = {path}")
    if not kinds:
        *others, last = (kind.usage for kind in SOURCES)
        raise FileNotFoundError(
            f"{argument} = {path}: no such folder or file, or of another kind. Give {', '.join(others)} or {last}"
        )
    source = kinds[0](path, argument, root)
    if not len(source.names):
        raise ValueError(f"{source}: no images among {source.ignored} files. Their names must end in {', '.join(SUFFIXES)}")
    return source


def _walk(path: Path) -> Iterator[str]:
    """Yield the names of all files under `path`, relative to it, and under each linked folder once."""
    seen = set()
    for folder, below, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        paths = (Path(folder, file) for file in files)
        yield from (file.relative_to(path).as_posix() for file in paths if is_regular_file(file))
