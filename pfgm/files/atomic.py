"""Files that are whole: written beside their place and moved there when complete, and stamped so that a flipped bit shows."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PARTIAL = ".partial-"
"""What the names of unfinished files begin with; those of a killed process stay until `clear_partial`."""

STAMP = b"pfgm-sha256:"
EMPTY_END = b"PK\x05\x06"
"""How the end of a zip archive begins, 22 bytes from the last if it has no comment."""


class DamagedError(ValueError):
    """A file is not, bit for bit, what was written."""


@contextmanager
def replacing(path: str | Path, keep: str | Path | None = None) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, on the disk, when the block ends, and vanishes if the block fails.

    What was at `path` is then at `keep`, if that is given. OSError, which names `path`, if the disk is full or cannot be
    written; all that was there is then unchanged.
    """
    with replacing_all([path], keep) as (temporary,):
        yield temporary


@contextmanager
def replacing_all(paths: Sequence[str | Path], keep: str | Path | None = None) -> Iterator[list[Path]]:
    """As `replacing`, for files that belong together: all are on the disk before the first takes its place."""
    places, temporaries = [Path(path) for path in paths], list[Path]()
    try:
        for path in places:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{PARTIAL}{path.stem}-", suffix=path.suffix)
            os.close(handle)
            temporaries.append(Path(name))
        yield temporaries
        for temporary in temporaries:
            os.chmod(temporary, 0o666 & ~_umask())
            _sync(temporary)
        if keep is not None and places[0].exists():
            _link(places[0], Path(keep))
        for temporary, path in zip(temporaries, places, strict=True):
            os.replace(temporary, path)
        _sync(places[0].parent)
    except OSError as error:
        names = ", ".join(map(str, places))
        raise OSError(
            f"{names} cannot be written: {error.strerror or error}. What was there is unchanged; make room, or change folder"
        ) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _link(path: Path, other: Path) -> None:
    """`path` as `other`, and until it is replaced under its own name as well, if the file system has links."""
    link = other.with_name(f"{PARTIAL}{other.name}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        os.replace(path, other)
    else:
        os.replace(link, other)


def clear_partial(*folders: Path) -> None:
    """Remove what killed processes left unfinished in `folders`, which no other may be writing to."""
    for folder in folders:
        for path in folder.glob(f"{PARTIAL}*"):
            path.unlink(missing_ok=True)


def save_torch(path: Path, content: Any) -> None:
    """`torch.save`. OSError if the disk is full."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # of torch's C++ writer, which keeps the reason to itself
        raise OSError(errno.ENOSPC, f"not all could be written ({str(error).partition(chr(10))[0]})") from error


def stamp(path: Path) -> None:
    """Add to the zip archive at `path`, as its comment, the SHA-256 of all the rest. ValueError if it has a comment."""
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


def check_stamp(path: Path) -> None:
    """DamagedError if the zip archive at `path` is not what was stamped, or no zip archive, or was stamped no longer whole."""
    length = len(STAMP) + 2 * hashlib.sha256().digest_size
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - length))
        end = file.read()
        if _uncommented(end[-22:]):
            return  # written by others
        if not end.startswith(STAMP):
            raise DamagedError(f"{path} is {'empty' if not size else 'truncated, altered or not a checkpoint'}")
        file.seek(0)
        total, rest = hashlib.sha256(), size - length
        while block := file.read(min(rest, 2**20)):
            total.update(block)
            rest -= len(block)
    if end != STAMP + total.hexdigest().encode():
        raise DamagedError(f"{path} has been altered: its bytes do not have the SHA-256 at its end")


def _uncommented(end: bytes) -> bool:
    """Whether these 22 bytes end a zip archive that has no comment."""
    return end.startswith(EMPTY_END) and end.endswith(b"\0\0")


def _sync(path: Path) -> None:
    """Have it on the disk, so that not even a power cut leaves a name without its content."""
    if os.name == "nt" and path.is_dir():  # which has no such thing for folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
