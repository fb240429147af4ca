"""Draws to a folder that are killed, repeated by the same command, and compared with one that was not."""

import contextlib
import multiprocessing
import os
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.faulty.forks import forks
from benchmarks.faulty.hostile import flow

SAMPLES, SIZE = 400, 16


def command(folder: Path, out: Path, share: str = "1/1", samples: int = SAMPLES, size: int = SIZE) -> list[str]:
    """Of a draw of a small flow."""
    words = [str(folder / "export"), f"--n={samples}", f"--batch_size={size}", "--preset=fast", "--device=cpu"]
    return [*words, f"--out={out}", f"--share={share}"]


def start(words: list[str]) -> multiprocessing.Process:
    """sample.py in a process of its own."""
    process = forks().Process(target=_draw, args=(words,))
    process.start()
    return process


def _draw(words: list[str]) -> None:
    import torch

    from pfgm.cli import main

    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        main.sample(words)


def finish(words: list[str]) -> tuple[int, float]:
    """Exit code and seconds of an undisturbed draw."""
    began, process = time.monotonic(), start(words)
    process.join()
    return process.exitcode or 0, time.monotonic() - began


def content(folder: Path) -> dict[str, bytes]:
    """Of all files, also those that should not be there; of locks only an unused file stays."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def chain(folder: Path, kills: int, seed: int) -> Counter:
    """Folders drawn by one process or by two, that are killed `kills` times in all, each against one drawn at a stretch."""
    chance, counts = random.Random(seed), Counter()
    folder.mkdir(parents=True)
    flow().save_pretrained(folder / "export")
    forks()
    code, length = finish(command(folder, folder / "whole"))
    assert code == 0
    expected = content(folder / "whole")
    while counts["kills"] < kills:
        out, shares = folder / f"draw {counts['draws']}", chance.choice((["1/1"], ["1/2", "2/2"]))
        for _ in range(chance.randrange(1, 6)):
            running = [start(command(folder, out, share)) for share in shares]
            time.sleep(chance.uniform(0, length / len(shares)))
            for process in running:
                counts["kills"] += process.is_alive()
                process.kill()
                process.join()
            counts["torn"] += _torn(out)
        codes = [finish(command(folder, out, share))[0] for share in shares]
        counts["draws"] += 1
        counts["failed"] += any(codes)
        counts["different"] += content(out) != expected
    return counts


def _torn(folder: Path) -> int:
    """Files under a final name that are not whole."""
    torn = 0
    for path in folder.glob("0*.npy"):
        try:
            np.load(path)
        except ValueError:
            torn += 1
    return torn
