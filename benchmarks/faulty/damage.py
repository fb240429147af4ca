"""Checkpoints that are damaged in every way, and whether that is seen."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pfgm
from pfgm.flow import checkpoints
from pfgm.flow.checkpoints import CheckpointError, DamagedCheckpointError
from pfgm.training.module import PFGM


def truncate(path: Path, chance: random.Random) -> None:
    """Somewhere."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(1, len(content))])


def cut_end(path: Path, chance: random.Random) -> None:
    """By a few bytes, as after a full disk."""
    path.write_bytes(path.read_bytes()[: -chance.randrange(1, 100)])


def flip(path: Path, chance: random.Random) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def empty(path: Path, chance: random.Random) -> None:
    """All gone but the name."""
    path.write_bytes(b"")


def zeros(path: Path, chance: random.Random) -> None:
    """A block of the disk that was never written."""
    content = bytearray(path.read_bytes())
    while True:
        first = chance.randrange(len(content))
        block = slice(first, min(len(content), first + 512))
        if any(content[block]):
            content[block] = bytes(block.stop - block.start)
            path.write_bytes(content)
            return


def swap(path: Path, chance: random.Random) -> None:
    """Two blocks."""
    content, size = bytearray(path.read_bytes()), 512
    blocks = range(len(content) // size)
    while True:
        a, b = (slice(size * k, size * (k + 1)) for k in chance.sample(blocks, 2))
        if content[a] != content[b]:
            content[a], content[b] = content[b], content[a]
            path.write_bytes(content)
            return


def insert(path: Path, chance: random.Random) -> None:
    """A few bytes too many."""
    content = path.read_bytes()
    place = chance.randrange(len(content) + 1)
    path.write_bytes(content[:place] + chance.randbytes(chance.randrange(1, 9)) + content[place:])


HARMS: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": truncate,
    "end cut off": cut_end,
    "bit flipped": flip,
    "empty": empty,
    "block lost": zeros,
    "blocks swapped": swap,
    "bytes inserted": insert,
}


def attempt(path: Path) -> str:
    """What reading it says: named, or what went wrong."""
    kinds = []
    for read in (checkpoints.read_checkpoint, pfgm.load, PFGM.load_from_checkpoint):
        try:
            read(path)
            kinds.append("accepted")
        except DamagedCheckpointError as error:
            kinds.append("named" if str(path) in str(error) else "not named")
        except CheckpointError:
            kinds.append("not called damaged")
        except Exception as error:
            kinds.append(type(error).__name__)
    return next((kind for kind in kinds if kind != "named"), "named")


def trial(good: Path, folder: Path, tries: int, seed: int, harms: tuple[str, ...] = ("bit flipped",)) -> Counter:
    """Counts of what `tries` damaged copies of the checkpoint `good` are read as."""
    chance, counts = random.Random(seed), Counter()
    path = folder / "damaged.ckpt"
    for k in range(tries):
        path.write_bytes(good.read_bytes())
        HARMS[harms[k % len(harms)]](path, chance)
        counts["tried"] += 1
        counts[attempt(path)] += 1
    return counts
