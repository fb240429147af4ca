"""Files that are whole: written beside their place and moved there when complete, and stamped so that a flipped bit shows."""

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PARTIAL = ".partial-"
"""What the names of unfinished files begin with; those of a killed process stay until `clear_partial`."""


@contextmanager
def atomic_write(path: str | Path, keep: str | Path | None = None) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, on the disk, when the block ends, and vanishes if the block fails.

    What was at `path` is then at `keep`, if that is given. OSError, which names `path`, if the disk is full or cannot be
    written; all that was there is then unchanged.
    """
    with atomic_write_all([path], keep) as (temporary,):
        yield temporary


@contextmanager
def atomic_write_all(paths: Sequence[str | Path], keep: str | Path | None = None) -> Iterator[list[Path]]:
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
