"""Locks of folders: one process writes, and others are told who it is."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pfgm.files.atomic import atomic_write

PATIENCE = 10.0
"""Seconds for which the children of a dead owner may still hold its lock."""


@contextmanager
def lock_folder(folder: str | Path, name: str = "run_dir", part: str = "") -> Iterator[None]:
    """Be the only process that writes to `folder`, which is made if needed, or to a `part` of it.

    BlockingIOError, which calls the folder `name` and says who has it, if another process does. The lock of a dead one is taken
    over. OSError if the folder cannot be written.
    """
    folder = Path(folder)
    lock, owner = FileLock(folder / f".lock{part}"), folder / f".owner{part}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0 if _alive(_told(owner)) else PATIENCE)
        with atomic_write(owner) as temporary:
            temporary.write_text(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    except Timeout:
        raise BlockingIOError(
            f"{name} = {folder} is in use by {_told(owner)}; wait for it, stop it, or give another folder"
        ) from None
    except OSError as error:
        lock.release()
        raise OSError(f"{name} = {folder} cannot be written: {error.strerror or error}; give another folder") from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()  # its file stays: who waits for it has it open, and would lock a file that is gone


def _told(owner: Path) -> str:
    """Who says to have the lock."""
    try:
        return owner.read_text(errors="replace") or "another process"
    except FileNotFoundError:
        return "another process"


def _alive(owner: str) -> bool:
    """Whether the process that `owner` describes may live: of other machines nothing is known."""
    words = owner.replace(",", "").split()
    here = len(words) > 3 and words[1].isdigit() and words[3] == platform.node()
    return not here or psutil.pid_exists(int(words[1]))
