"""Whole files or none: a file is written beside its final path and moved there when complete."""

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PARTIAL = ".partial-"  # prefix of unfinished files; those of a killed process stay until `clear_partial`


@contextmanager
def atomic_write(path: str | Path, keep: str | Path | None = None) -> Iterator[Path]:
    """Replace a file by one that the block writes, once that is complete and on the disk.

    If the block fails, the new file is removed and what was at `path` stays unchanged.

    Args:
        path: The file to write.
        keep: Where to move what was at `path` before, if anything.

    Yields:
        A temporary path in the same folder, to be written by the block.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the message names `path`.
    """
    with atomic_write_all([path], keep) as (temporary,):
        yield temporary


@contextmanager
def atomic_write_all(paths: Sequence[str | Path], keep: str | Path | None = None) -> Iterator[list[Path]]:
    """Replace files that belong together, as `atomic_write` does one: all are on the disk before the first is replaced."""
    targets, temporaries = [Path(path) for path in paths], list[Path]()
    try:
        for path in targets:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{PARTIAL}{path.stem}-", suffix=path.suffix)
            os.close(handle)
            temporaries.append(Path(name))
        yield temporaries
        for temporary in temporaries:
            os.chmod(temporary, 0o666 & ~_umask())
            _sync(temporary)
        if keep is not None and targets[0].exists():
            _keep_as(targets[0], Path(keep))
        for temporary, path in zip(temporaries, targets, strict=True):
            os.replace(temporary, path)
        _sync(targets[0].parent)
    except OSError as error:
        names = ", ".join(map(str, targets))
        raise OSError(
            f"{names} cannot be written: {error.strerror or error}. What was there is unchanged; make room, or change folder"
        ) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def clear_partial(*folders: Path) -> None:
    """Remove the unfinished files of killed processes. No other process may be writing to `folders`."""
    for folder in folders:
        for path in folder.glob(f"{PARTIAL}*"):
            path.unlink(missing_ok=True)


def save_torch(path: Path, content: Any) -> None:
    """Save `content` with torch.save, and raise OSError if the disk is full."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's C++ writer does not tell the reason
        raise OSError(errno.ENOSPC, f"not all could be written ({str(error).partition(chr(10))[0]})") from error


def _keep_as(path: Path, other: Path) -> None:
    """Give `path` the name `other`. Where the file system has hard links it keeps its own name until it is replaced."""
    link = other.with_name(f"{PARTIAL}{other.name}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        os.replace(path, other)
    else:
        os.replace(link, other)


def _sync(path: Path) -> None:
    """Flush to the disk, so that not even a power cut leaves a name without its content."""
    if os.name == "nt" and path.is_dir():  # Windows cannot sync folders
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
