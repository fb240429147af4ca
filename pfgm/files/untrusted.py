"""Files from strangers: what they claim to hold is looked at before a library opens them.

A file passes if reading it runs no code and takes memory in proportion to its own size: FREE bytes, or RATIO times as much as
it has.
"""

import math
import os
import pickle
import pickletools
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

FREE, RATIO = 2**26, 20
"""Bytes that any archive may unpack to, and how many times its own size; real data are compressed less."""
MAX_DESCRIPTION = 2**23
"""Bytes of what describes tensors: a pickle, a JSON text, a header."""
MAX_NODES, MAX_DEPTH = 10**6, 100
"""Of nested values, and of the steps of a pickle that makes them. Lists that hold each other many times are small in a file,
and endless to walk through."""

PICKLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
}
"""What a pickle of tensors and plain values names, besides dtypes and storages."""


PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
"""What they are then; sets and others are not used."""

UNREADABLE = (
    RuntimeError,  # of torch, and RecursionError
    pickle.UnpicklingError,
    EOFError,
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
)
"""What the libraries make of a damaged file."""


class RefusedError(ValueError):
    """A file that claims too much, or holds something other than numbers and plain values."""


@contextmanager
def open_zip(path: str | Path | BinaryIO, place: object) -> Iterator[zipfile.ZipFile]:
    """The zip archive at `path`. RefusedError, which calls it `place`, if it would unpack to far more than it is, or if two
    entries have one name; zipfile.BadZipFile if it is none."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename.lower() for entry in entries}
        if len(names) < len(entries):
            raise RefusedError(f"{place}: several entries have one name; pack it again")
        packed, total = _size(path), sum(entry.file_size for entry in entries)
        if total > max(FREE, RATIO * packed):
            raise RefusedError(
                f"{place} has {packed / 1e6:.3g} MB and would unpack to {total / 1e6:.3g} MB; if that is meant, unpack it "
                "yourself, or save without compression"
            )
        yield archive


def load_torch(path: Path, place: object) -> Any:
    """What `torch.save` wrote to `path`: tensors and plain values, nested, on the CPU. No code of the file is run.

    RefusedError for other objects, for tensors larger than their storage, compressed ones, or values nested without end; the
    errors of torch.load for damaged files.
    """
    with open_zip(path, place) as archive:
        _check_layout(path, archive.comment, place)
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise RefusedError(f"{place}: {entry.filename} is compressed, which torch.save never does")
        total = sum(entry.file_size for entry in archive.infolist())
        if total > os.path.getsize(path):
            raise RefusedError(f"{place}: its entries share their bytes, which torch.save never does")
        _check_pickle(archive, place)
    return _Copy(total, place).of(torch.load(path, map_location="cpu", weights_only=True))


def _check_layout(path: Path, comment: bytes, place: object) -> None:
    """RefusedError unless the archive begins with the file, and its table of contents is the one before its end.

    Of others torch may read another archive than zipfile, or a pickle.
    """
    end, long = os.path.getsize(path) - 22 - len(comment), 76
    with path.open("rb") as file:
        first = file.read(4)
        file.seek(max(0, end - long))
        last = file.read(min(end, long) + 22)
    *_, size, offset, _ = struct.unpack("<4s4H2LH", last[-22:])
    if last[-42:-38] == b"PK\6\7":  # of more than 4 GB: their sizes come before, where a locator says
        _, _, place64, _ = struct.unpack("<4sLQL", last[-42:-22])
        *_, size, offset = struct.unpack("<4sQ2H2L4Q", last[:56])
        end = end - long if place64 == end - long and last.startswith(b"PK\6\6") else -1
    if first != b"PK\3\4" or size + offset != end:
        raise RefusedError(f"{place} is a zip archive in something else, as torch.save never writes them")


def _check_pickle(archive: zipfile.ZipFile, place: object) -> None:
    """RefusedError unless the archive's pickles name nothing but tensors and plain values, and are of no more steps than those
    need."""
    steps = 0
    for entry in archive.infolist():
        if not entry.filename.lower().endswith(".pkl"):
            continue
        if entry.file_size > MAX_DESCRIPTION:
            raise RefusedError(f"{place}: {entry.filename} has {entry.file_size / 1e6:.3g} MB, far more than tensors need")
        for code, argument, _ in pickletools.genops(archive.read(entry)):
            steps += 1
            if steps > MAX_NODES:
                raise RefusedError(f"{place}: {entry.filename} makes more than {MAX_NODES} values, far more than tensors need")
            if code.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not _is_plain(argument):
                name = str(argument).replace(" ", ".") if argument else "an object"
                raise RefusedError(f"{place} holds {name}, no tensor or plain value; it was not read")


def _is_plain(name: Any) -> bool:
    module, _, kind = str(name).partition(" ")
    known = module == "torch" and (kind.endswith("Storage") or isinstance(getattr(torch, kind, None), torch.dtype))
    return known or name in PICKLED


class _Copy:
    """Copies nested values into plain containers: those of a pickle may have other methods than they seem to have.

    RefusedError for tensors that are larger than what is stored of them, `total` bytes in all, for too many values, and for
    others than tensors and plain ones.
    """

    def __init__(self, total: int, place: object):
        self.total, self.place, self.count = total, place, 0

    def of(self, value: Any, depth: int = 0) -> Any:
        self.count += 1
        if self.count > MAX_NODES or depth > MAX_DEPTH:
            raise RefusedError(f"{self.place}: its values are nested more than {MAX_DEPTH} deep, or are more than {MAX_NODES}")
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return {self.of(key, depth + 1): self.of(item, depth + 1) for key, item in dict.items(value)}
        if isinstance(value, torch.Size) or not isinstance(value, (list, tuple)):
            return self._plain(value)
        return type(value)(self.of(item, depth + 1) for item in value)

    def _tensor(self, value: Tensor) -> Tensor:
        plain = value.layout == torch.strided and not value.is_meta
        if not plain or value.numel() * value.itemsize > min(value.untyped_storage().nbytes(), self.total):
            raise RefusedError(f"{self.place}: a tensor {tuple(value.shape)} is larger than what is stored of it")
        return value

    def _plain(self, value: Any) -> Any:
        if type(value) not in PLAIN:
            raise RefusedError(f"{self.place} holds a {type(value).__name__}, no tensor or plain value")
        return value


def check_arrays(path: Path, place: object) -> None:
    """RefusedError unless each array of a .npz file is of numbers and as large as its header says."""
    with open_zip(path, place) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                _check_header(file, entry.file_size, f"{place}: {entry.filename}")


def _check_header(file: Any, size: int, place: str) -> None:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise RefusedError(f"{place} has numpy's format {version}, which is not for numbers; give plain arrays")
    check_claim(shape, dtype, size, place)


def check_claim(shape: tuple[int, ...], dtype: np.dtype, size: int, place: object) -> None:
    """RefusedError unless an array of that `shape` and `dtype` is of numbers and fits into `size` bytes."""
    if dtype.kind not in "biufc":
        raise RefusedError(f"{place} holds {dtype}, no numbers; give arrays of numbers")
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > size:
        raise RefusedError(f"{place} claims the shape {shape} of {dtype}, but has only {size} bytes; use another copy")


def check_safetensors(path: Path, place: object) -> None:
    """RefusedError if the header of a safetensors file is larger than any need."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_DESCRIPTION:
        raise RefusedError(f"{place} claims a header of {length / 1e6:.3g} MB; it is damaged, or made to be")


def read_text(path: Path, place: object) -> str:
    """A text file. RefusedError if it is longer than any description; OSError, UnicodeDecodeError."""
    return read_bytes(path, place, MAX_DESCRIPTION).decode()


def read_bytes(path: Path, place: object, most: int) -> bytes:
    """A file. RefusedError if it has more than `most` bytes."""
    size = os.path.getsize(path)
    if size > most or not is_regular_file(path):
        raise RefusedError(f"{place} has {size / 1e6:.3g} MB, or is no file; at most {most / 1e6:.3g} MB are read")
    return path.read_bytes()


def check_network(make: Callable[[], nn.Module], state: Mapping[str, Tensor], place: object) -> None:
    """RefusedError unless the module that `make` makes has exactly the tensors of `state`. It is made without memory, and no
    further than its tensors go."""
    made, most = 0, 1000 + 20 * len(state)

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise RefusedError(f"{place} describes a network of more parts than it has weights ({len(state)} tensors)")

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        with torch.device("meta"):
            module = make()
    finally:
        for hook in hooks:
            hook.remove()
    own = module.state_dict()
    beside = sum(buffer.numel() * buffer.itemsize for name, buffer in module.named_buffers() if name not in own)
    if beside > FREE:
        raise RefusedError(f"{place} describes a network with {beside / 1e6:.3g} MB beside its weights")
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise RefusedError(
            f"{place}: the weights do not match the network that it describes: {len(wrong)} of {len(expected)} tensors, such "
            f"as {name}, which is {found.get(name, 'missing')} in the file, {expected.get(name, 'missing')} in the network"
        )
    bad = [name for name, tensor in state.items() if not _is_finite(tensor, own[name].dtype)]
    if bad:
        raise RefusedError(f"{place}: {len(bad)} of its tensors, such as {bad[0]}, are not finite; use an earlier checkpoint")


def _is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether it is, as `dtype`, and real."""
    return not tensor.is_complex() and bool(torch.isfinite(tensor.to(dtype)).all())


def is_regular_file(path: str | Path) -> bool:
    """Whether it is a file with an end: no pipe, device or folder."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _size(path: str | Path | BinaryIO) -> int:
    if isinstance(path, (str, Path)):
        return os.path.getsize(path)
    place = path.tell()
    size = path.seek(0, os.SEEK_END)
    path.seek(place)
    return size


def first_line(error: Exception) -> str:
    """Of what it says."""
    return str(error).partition("\n")[0]
