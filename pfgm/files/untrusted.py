"""Files of unknown origin: their claims are checked before a library opens them.

Reading through this module runs no code of a file and takes memory in proportion to the file's size: FREE bytes, or RATIO times
what the file has. Anything else is refused with `RefusedError`. Everywhere, `place` is what messages call the file, such as
"path = a.npz".
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

FREE = 2**26  # bytes that any archive may unpack to
RATIO = 20  # or how many times its own size; real data are compressed less
MAX_DESCRIPTION = 2**23  # bytes of what describes tensors: a pickle, a JSON text, a header
# Nested values, and steps of the pickle that makes them. Lists that hold each other many times are small in a file but endless.
MAX_NODES, MAX_DEPTH = 10**6, 100

# What a pickle of tensors and plain values names, besides dtypes and storages, and the types of its plain values.
PICKLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
}
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)

# Errors that the libraries raise for damaged files.
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


class RefusedError(ValueError):
    """A file claims too much, or holds something other than numbers and plain values."""


@contextmanager
def open_zip(path: str | Path | BinaryIO, place: object) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive for reading.

    Raises:
        RefusedError: If it would unpack to far more than its own size, or two entries have one name.
        zipfile.BadZipFile: If it is not a zip archive.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise RefusedError(f"{place}: several entries have one name. Pack it again.")
        packed, total = _size(path), sum(entry.file_size for entry in entries)
        if total > max(FREE, RATIO * packed):
            raise RefusedError(
                f"{place} has {packed / 1e6:.3g} MB and would unpack to {total / 1e6:.3g} MB. If that is intended, unpack it "
                "yourself, or save without compression."
            )
        yield archive


def load_torch(path: Path, place: object) -> Any:
    """Load what `torch.save` wrote: tensors and plain values, nested, on the CPU.

    Raises:
        RefusedError: For other objects, tensors larger than their storage, compressed entries, or values nested without end.
        Exception: One of UNREADABLE if the file is damaged.
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


def load_numpy(path: Path, place: object) -> Any:
    """Load the array of a .npy file, or open a .npz file.

    Returns:
        An array, or a mapping from names to arrays that reads each on request.

    Raises:
        RefusedError: If an array is not of numbers, or larger than the file.
        Exception: One of UNREADABLE if the file is damaged.
    """
    if path.suffix == ".npz":
        with open_zip(path, place) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    _check_header(file, entry.file_size, f"{place}: {entry.filename}")
        return np.load(path, allow_pickle=False)
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # compares the array's size with the file's
    _check_claim(array.shape, array.dtype, path.stat().st_size, place)
    return np.array(array)


def check_safetensors(path: Path, place: object) -> None:
    """Raise RefusedError if the header of a safetensors file is longer than any description of tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_DESCRIPTION:
        raise RefusedError(f"{place} claims a header of {length / 1e6:.3g} MB. It is damaged, or was made to do harm.")


def read_text(path: Path, place: object) -> str:
    """Read a text file. Raise RefusedError if it is longer than any description of tensors."""
    return read_bytes(path, place, MAX_DESCRIPTION).decode()


def read_bytes(path: Path, place: object, limit: int) -> bytes:
    """Read a file. Raise RefusedError if it has more than `limit` bytes, or is a pipe, device or folder."""
    size = os.path.getsize(path)
    if size > limit or not is_regular_file(path):
        raise RefusedError(f"{place} has {size / 1e6:.3g} MB, or is not a file. The limit is {limit / 1e6:.3g} MB.")
    return path.read_bytes()


def check_network(make: Callable[[], nn.Module], state: Mapping[str, Tensor], place: object) -> None:
    """Check that a file's weights fit the network that it describes.

    The network is made without memory for its tensors, and no further than the number of stored tensors allows.

    Args:
        make: Makes the network.
        state: Its weights by name.
        place: What messages call the file.

    Raises:
        RefusedError: If the network has other tensors than `state` or large ones beside them, or if weights are not finite.
    """
    module = _make_without_memory(make, state, place)
    own = module.state_dict()
    beside = sum(buffer.numel() * buffer.itemsize for name, buffer in module.named_buffers() if name not in own)
    if beside > FREE:
        raise RefusedError(f"{place} describes a network with {beside / 1e6:.3g} MB beside its weights")
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    stored = {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    wrong = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
    if wrong:
        name = wrong[0]
        raise RefusedError(
            f"{place}: the weights do not match the network that it describes. {len(wrong)} of {len(expected)} tensors differ, "
            f"such as {name}: {stored.get(name, 'missing')} in the file, {expected.get(name, 'missing')} in the network"
        )
    bad = [name for name, tensor in state.items() if not _is_finite(tensor, own[name].dtype)]
    if bad:
        raise RefusedError(f"{place}: {len(bad)} of its tensors, such as {bad[0]}, are not finite. Use an earlier checkpoint.")


def is_regular_file(path: str | Path) -> bool:
    """Return whether `path` is a file with an end: no pipe, device or folder."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def first_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return str(error).partition("\n")[0]


def _check_layout(path: Path, comment: bytes, place: object) -> None:
    """Refuse a file unless the archive starts at its first byte and its table of contents ends just before its end record.

    In other files torch may find another archive than zipfile does, or a pickle.
    """
    end, long = os.path.getsize(path) - 22 - len(comment), 76
    with path.open("rb") as file:
        first = file.read(4)
        file.seek(max(0, end - long))
        last = file.read(min(end, long) + 22)
    *_, size, offset, _ = struct.unpack("<4s4H2LH", last[-22:])
    if last[-42:-38] == b"PK\6\7":  # over 4 GB: the sizes are in another record, to which a locator points
        _, _, place64, _ = struct.unpack("<4sLQL", last[-42:-22])
        *_, size, offset = struct.unpack("<4sQ2H2L4Q", last[:56])
        end = end - long if place64 == end - long and last.startswith(b"PK\6\6") else -1
    if first != b"PK\3\4" or size + offset != end:
        raise RefusedError(f"{place} is a zip archive in something else, which torch.save never writes")


def _check_pickle(archive: zipfile.ZipFile, place: object) -> None:
    """Refuse pickles that name anything but tensors and plain values, or that have more steps than those need."""
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
            if code.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not _is_allowed(argument):
                name = str(argument).replace(" ", ".") if argument else "an object"
                raise RefusedError(f"{place} holds {name}, which is no tensor or plain value. It was not read.")


def _is_allowed(name: Any) -> bool:
    module, _, kind = str(name).partition(" ")
    known = module == "torch" and (kind.endswith("Storage") or isinstance(getattr(torch, kind, None), torch.dtype))
    return known or name in PICKLED


class _Copy:
    """Copy nested values into plain containers, since those of a pickle may have other methods than they seem to have.

    Tensors may be as large as what is stored of them, `total` bytes at most.
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
            if type(value) not in PLAIN:
                raise RefusedError(f"{self.place} holds a {type(value).__name__}, which is no tensor or plain value")
            return value
        return type(value)(self.of(item, depth + 1) for item in value)

    def _tensor(self, value: Tensor) -> Tensor:
        plain = value.layout == torch.strided and not value.is_meta
        if not plain or value.numel() * value.itemsize > min(value.untyped_storage().nbytes(), self.total):
            raise RefusedError(f"{self.place}: a tensor {tuple(value.shape)} is larger than what is stored of it")
        return value


def _check_header(file: Any, size: int, place: str) -> None:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise RefusedError(f"{place} has numpy's format {version}, which is not for numbers. Save plain arrays.")
    _check_claim(shape, dtype, size, place)


def _check_claim(shape: tuple[int, ...], dtype: np.dtype, size: int, place: object) -> None:
    """Refuse an array that is not of numbers, or does not fit into `size` bytes."""
    if dtype.kind not in "biufc":
        raise RefusedError(f"{place} holds {dtype}, which are no numbers. Save arrays of numbers.")
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > size:
        raise RefusedError(f"{place} claims the shape {shape} of {dtype}, but has only {size} bytes. Use another copy.")


def _make_without_memory(make: Callable[[], nn.Module], state: Mapping[str, Tensor], place: object) -> nn.Module:
    count, limit = 0, 1000 + 20 * len(state)

    def check(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise RefusedError(f"{place} describes a network of more parts than it has weights ({len(state)} tensors)")

    hooks = [register_module_parameter_registration_hook(check), register_module_module_registration_hook(check)]
    try:
        with torch.device("meta"):
            return make()
    finally:
        for hook in hooks:
            hook.remove()


def _is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the tensor is real and stays finite in `dtype`."""
    return not tensor.is_complex() and bool(torch.isfinite(tensor.to(dtype)).all())


def _size(path: str | Path | BinaryIO) -> int:
    if isinstance(path, (str, Path)):
        return os.path.getsize(path)
    position = path.tell()
    size = path.seek(0, os.SEEK_END)
    path.seek(position)
    return size
