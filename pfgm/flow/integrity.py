"""Digests, which show that a file is bit for bit what was written."""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STAMP = b"pfgm-sha256:"  # precedes the digest in the comment of an archive
EMPTY_END = b"PK\x05\x06"  # begins the end record of a zip archive, the last 22 bytes of one without a comment


class DamagedError(ValueError):
    """A file is not, bit for bit, what was written."""


def append_digest(path: Path) -> None:
    """Append the SHA-256 of the zip archive at `path` as its comment. Raise ValueError if it has one."""
    with path.open("r+b") as file:
        file.seek(-22, os.SEEK_END)
        end = file.read()
        if not _uncommented(end):
            raise ValueError(f"{path} is no zip archive without a comment")
        length = len(STAMP) + 2 * hashlib.sha256().digest_size
        file.seek(-2, os.SEEK_END)
        file.write(length.to_bytes(2, "little"))
        file.seek(0)
        total = hashlib.file_digest(file, "sha256")
        file.seek(0, os.SEEK_END)
        file.write(STAMP + total.hexdigest().encode())


def verify_digest(path: Path) -> None:
    """Raise DamagedError unless the zip archive at `path` is, bit for bit, what was written.

    Archives of this package end in the SHA-256 of all their bytes. Of others the CRC-32 of each entry is verified.
    """
    length = len(STAMP) + 2 * hashlib.sha256().digest_size
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - length))
        end = file.read()
        if _uncommented(end[-22:]):
            _verify_checksums(path)
            return
        if not end.startswith(STAMP):
            raise DamagedError(f"{path} is {'empty' if not size else 'truncated, altered or not a checkpoint'}")
        file.seek(0)
        total, rest = hashlib.sha256(), size - length
        while block := file.read(min(rest, 2**20)):
            total.update(block)
            rest -= len(block)
    if end != STAMP + total.hexdigest().encode():
        raise DamagedError(f"{path} has been altered: its bytes do not have the SHA-256 at its end")


def _verify_checksums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        wrong = archive.testzip() if stored else None  # compressed entries are refused later, unread
    if wrong is not None:
        raise DamagedError(f"{path} has been altered: the checksum of its entry {wrong} is wrong")


def _uncommented(end: bytes) -> bool:
    """Return whether these 22 bytes end a zip archive without a comment."""
    return end.startswith(EMPTY_END) and end.endswith(b"\0\0")


def digest(content: Any) -> str:
    """Return the SHA-256 of nested mappings and sequences of tensors and plain values, whatever the order of the mappings."""
    total = hashlib.sha256()
    _update(total, "", content)
    return total.hexdigest()


def _update(total: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _update(total, f"{name}/{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _update(total, f"{name}/{i}", item)
    else:
        total.update(f"{name} {value!r}\n".encode())
