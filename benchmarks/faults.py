"""Everything that can go wrong with a run, a file or an argument, tried often: python benchmarks/faults.py

Runs are killed and compared with runs that were not, checkpoints are damaged, hostile files are read, functions and commands
get bad arguments; all from a seed. Prints what was tried, and what became of it, as the table in the README; ten minutes
on two CPU cores.
"""

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.faulty import damage, draws, hostile_data, hostile_models, inputs, kills, lines, patience, strangers

Row = tuple[str, int, str]


def killed_runs(folder: Path, tries: int, seed: int) -> Iterator[Row]:
    """Chains of training runs, of each objective, and of two processes."""
    for objective in kills.OBJECTIVES:
        counts = kills.chain(folder / objective, objective, tries // len(kills.OBJECTIVES), seed)
        yield _chain(f"training runs killed ({objective})", counts)
    counts = kills.chain(folder / "ranks", "Poisson field", max(1, tries // 8), seed, ranks=2)
    what, tried, found = _chain("one of the two processes of a training run killed", counts)
    yield what, tried, f"{found}; {counts['waited']} others stopped that waited for one killed before it came"


def _chain(what: str, counts: Counter) -> Row:
    moments = ", ".join(f"{counts[moment]} {moment}" for moment in kills.MOMENTS)
    return (
        f"{what}: {moments}",
        counts["kills"],
        f"{counts['torn']} torn checkpoints, {counts['different'] + counts['failed']} of {counts['runs']} runs differ, "
        f"{counts['unexpected']} other exit codes; {counts['lost'] / counts['kills']:.1f} steps lost on average, "
        f"{counts['most lost']} at most (saved every 5)",
    )


def killed_draws(folder: Path, tries: int, seed: int) -> Iterator[Row]:
    """Draws to a folder, by one process and by two."""
    counts = draws.chain(folder / "draws", tries, seed)
    bad = counts["different"] + counts["failed"]
    yield "draws to a folder killed", counts["kills"], f"{counts['torn']} torn files, {bad} of {counts['draws']} folders differ"


def damaged(folder: Path, tries: int, seed: int) -> Iterator[Row]:
    """Checkpoints, damaged in each way in turn."""
    assert kills.finish(kills.command(folder / "good", "Poisson field", 20)) == 0
    good = folder / "good" / "checkpoints" / "last.ckpt"
    counts = damage.trial(good, folder, tries, seed, tuple(damage.HARMS))
    yield "checkpoints damaged", counts["tried"], f"{counts['tried'] - counts['named']} accepted or misnamed"


def hostile(folder: Path) -> Iterator[Row]:
    """All hostile files."""
    counts, most = Counter(), 0.0
    for file in (*hostile_models.corpus(), *hostile_data.corpus()):
        kind, text, memory = strangers.attempt(file, folder / "hostile")
        fine = kind == "refused" or (kind == "read" and file.harmless)
        counts.update({"tried": 1, "refused": kind == "refused", "bad": not fine, "executed": kind == "executed"})
        counts["wrote"] += kind == "wrote"
        most = max(most, memory)
        if not fine:
            print(f"{file.name}: {kind} {text}", file=sys.stderr)
    found = (
        f"{counts['executed']} executed, {counts['wrote']} wrote elsewhere, {counts['bad']} ended otherwise than refused or "
    )
    yield "hostile files read", counts["tried"], found + f"harmlessly read; {most:.0f} MB of memory at most"


def bad_inputs(folder: Path, tries: int, seed: int) -> Iterator[Row]:
    """Calls of functions, and command lines."""
    counts = inputs.functions(2 * tries // 3, seed, report=lambda text: print(text, file=sys.stderr))
    yield "calls with odd arguments", counts["tried"], _ends(counts, "result")
    counts = lines.command_lines(
        tries - 2 * tries // 3, seed, folder / "lines", report=lambda text: print(text, file=sys.stderr)
    )
    yield "command lines and configurations spoiled", counts["tried"], _ends(counts, "done")


def _ends(counts: Counter, fine: str) -> str:
    other = counts["tried"] - counts[fine] - counts["named"] - counts["at work"] - counts["of memory"]
    busy = f", {counts['at work']} at work after {patience.SECONDS} s" if counts["at work"] else ""
    full = f", {counts['of memory']} out of memory" if counts["of memory"] else ""
    return f"{counts[fine]} worked{busy}{full}, {counts['named']} errors that name the argument, {other} others"


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--damage", type=int, default=350)
    parser.add_argument("--inputs", type=int, default=2400)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| fault | tried | what became of it | seconds |\n|---|---|---|---|", flush=True)
        for rows in (
            killed_runs(folder, given.kills, given.seed),
            killed_draws(folder, given.kills // 3, given.seed),
            damaged(folder, given.damage, given.seed),
            hostile(folder),
            bad_inputs(folder, given.inputs, given.seed),
        ):
            began = time.monotonic()
            for what, tried, found in rows:
                print(f"| {what} | {tried} | {found} | {time.monotonic() - began:.0f} |", flush=True)
                began = time.monotonic()


if __name__ == "__main__":
    main()
