"""Digests show whether a file is, bit for bit, what was written."""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STAMP = b"pfgm-sha256:"  # precedes the digest in the comment of an archive
LENGTH = len(STAMP) + 64  # bytes of the comment
END = 22  # bytes of the end record of a zip archive without a comment


class DamagedError(ValueError):
    """A file is not, bit for bit, what was written."""


def append_digest(path: Path) -> None:
    """Append the SHA-256 of the zip archive at `path`, which has no comment, as its comment."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(LENGTH.to_bytes(2, "little"))
        file.seek(0)
        total = hashlib.file_digest(file, "sha256")
        file.write(STAMP + total.hexdigest().encode())


def verify_digest(path: Path) -> None:
    """Raise DamagedError unless the zip archive at `path` is, bit for bit, what was written.

    Archives of this package end in the SHA-256 of all their bytes. In others the CRC-32 of each entry is verified.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LENGTH))
        end = file.read()
        if end[-END:].startswith(b"PK\x05\x06") and end.endswith(b"\0\0"):  # an end record without a comment
            _verify_checksums(path)
            return
        if not end.startswith(STAMP):
            raise DamagedError(f"{path} is {'truncated, altered or not a checkpoint' if size else 'empty'}")
        file.seek(0)
        total, rest = hashlib.sha256(), size - LENGTH
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
