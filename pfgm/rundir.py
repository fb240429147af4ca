"""The folder of a run: who writes to it, and where it is resumed from."""

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from pfgm.atomic import clear_partial, replacing
from pfgm.storage import LAST, PREVIOUS, CheckpointError, DamagedCheckpointError, read_checkpoint

DAMAGED = "damaged.ckpt"
"""What a last checkpoint that cannot be read is called from then on."""
PARTS = ("config.yaml", "metrics.csv", "loss.png", "grids", "averages", "checkpoints")
"""What a run writes."""
PATIENCE = 10.0
"""Seconds for which the children of a dead owner may still hold its lock."""


def checkpoint_path(run_dir: str | Path, name: str = LAST) -> Path:
    """The newest checkpoint of a run, or another."""
    return Path(run_dir) / "checkpoints" / name


@contextmanager
def held(folder: str | Path, name: str = "run_dir", part: str = "") -> Iterator[None]:
    """Be the only process that writes to `folder`, which is made if needed, or to a `part` of it.

    BlockingIOError, which calls the folder `name` and says who has it, if another process does. The lock of a dead one is taken
    over. OSError if the folder cannot be written.
    """
    folder = Path(folder)
    lock, owner = FileLock(folder / f".lock{part}"), folder / f".owner{part}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0 if _alive(_told(owner)) else PATIENCE)
        with replacing(owner) as temporary:
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


def clear(run_dir: str | Path) -> None:
    """Remove what killed processes left unfinished in a run that this process holds."""
    clear_partial(*(Path(run_dir) / name for name in ("", "checkpoints", "grids", "averages")))


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


def newest(run_dir: str | Path, mend: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Where a run is resumed: its last checkpoint, or the one before if that is damaged, and what it holds; None for a new run.

    A damaged one is said on stderr and, to `mend`, kept as damaged.ckpt. CheckpointError if none can be read.
    """
    last, previous = checkpoint_path(run_dir), checkpoint_path(run_dir, PREVIOUS)
    if not last.exists() and not previous.exists():
        return None
    try:
        return last, read_checkpoint(last)
    except (FileNotFoundError, DamagedCheckpointError) as error:
        try:
            found = previous, read_checkpoint(previous)
        except (FileNotFoundError, CheckpointError) as other:
            raise CheckpointError(
                f"run_dir = {run_dir} cannot be resumed: {error}; the one before: {other}. Restore one of them, or give "
                "another --run_dir"
            ) from error
        print(f"warning: {error}. Resuming from {previous} instead", file=sys.stderr)
    if mend and last.exists():
        os.replace(last, checkpoint_path(run_dir, DAMAGED))
    return found


def check_no_other_files(run_dir: str | Path) -> None:
    """FileExistsError if a new run would write over files of others; those of a run come after its first checkpoint."""
    found = [name for name in PARTS if (Path(run_dir) / name).exists()]
    if found and found != ["checkpoints"]:
        raise FileExistsError(
            f"run_dir = {run_dir} has {', '.join(found)} but no checkpoints/{LAST}; restore that, or give another --run_dir"
        )
