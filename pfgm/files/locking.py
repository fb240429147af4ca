"""Locks of folders: one process writes, and the others learn which one."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pfgm.files.atomic import atomic_write

PATIENCE = 10.0  # seconds for which the children of a dead owner may still hold its lock


@contextmanager
def lock_folder(folder: str | Path, name: str = "run_dir", part: str = "") -> Iterator[None]:
    """Hold the lock of a folder during the block, so that no other process writes to it.

    The lock of a dead process is taken over.

    Args:
        folder: The folder, which is made if it does not exist.
        name: What the folder is called in error messages.
        part: A part of the folder that has a lock of its own.

    Raises:
        BlockingIOError: If another process holds the lock; the message says which.
        OSError: If the folder cannot be written.
    """
    folder = Path(folder)
    lock, owner = FileLock(folder / f".lock{part}"), folder / f".owner{part}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0 if _may_be_alive(_owner_text(owner)) else PATIENCE)
        with atomic_write(owner) as temporary:
            temporary.write_text(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    except Timeout:
        raise BlockingIOError(
            f"{name} = {folder} is in use by {_owner_text(owner)}; wait for it, stop it, or choose another folder"
        ) from None
    except OSError as error:
        lock.release()
        raise OSError(f"{name} = {folder} cannot be written: {error.strerror or error}. Choose another folder.") from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()  # its file stays: a waiting process has it open, and would lock a deleted file


def _owner_text(owner: Path) -> str:
    try:
        return owner.read_text(errors="replace") or "another process"
    except FileNotFoundError:
        return "another process"


def _may_be_alive(owner: str) -> bool:
    """Return whether the process that `owner` describes may be alive. Of other machines nothing is known."""
    words = owner.replace(",", "").split()
    here = len(words) > 3 and words[1].isdigit() and words[3] == platform.node()
    return not here or psutil.pid_exists(int(words[1]))
