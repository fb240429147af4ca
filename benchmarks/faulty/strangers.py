"""Reading hostile files, each in a process of its own, and looking at what it did."""

import contextlib
import logging
import os
import resource
import shutil
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.faulty.forks import forks
from benchmarks.faulty.hostile import CANARY, Hostile

PATIENCE = 60
"""Seconds that reading may take."""


def attempt(file: Hostile, folder: Path) -> tuple[str, str, float]:
    """What reading a hostile file ends in, in an emptied `folder`: "refused", "read", or what went wrong; what was said; and
    the most memory, in megabytes, that the process had."""
    shutil.rmtree(folder, ignore_errors=True)
    inner = folder / "work" / "below"
    inner.mkdir(parents=True)
    path = file.make(inner)
    mine, theirs = forks().Pipe()
    process = forks().Process(target=_read, args=(file.read, path, folder, theirs))
    process.start()
    theirs.close()
    kind, text, memory = "died", "", 0.0
    with contextlib.suppress(EOFError):
        kind, text, memory = mine.recv() if mine.poll(PATIENCE) else ("endless", "", 0.0)
    process.kill()
    process.join()
    return kind, text, memory


def _read(read: object, path: Path, folder: Path, out: Connection) -> None:
    """Working in the inner folder, so that a way out of it is seen."""
    logging.disable(logging.WARNING)
    os.chdir(folder / "work" / "below")
    before = set(_tree(folder))
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        kind, text = _outcome(read, path)
    new = set(_tree(folder)) - before
    if new:
        kind, text = "executed" if any(CANARY in name for name in new) else "wrote", str(sorted(new))
    out.send((kind, text, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _tree(folder: Path) -> Iterator[str]:
    yield from (str(path) for path in folder.rglob("*"))
    yield from (str(path) for path in Path("/tmp").glob("escaped*"))


def _outcome(read: object, path: Path) -> tuple[str, str]:
    try:
        read(path)
    except (ValueError, OSError) as error:  # what command lines say in one line
        return "refused", f"{type(error).__name__}: {error}"
    except BaseException as error:
        return type(error).__name__, str(error)
    return "read", ""
