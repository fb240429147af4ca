"""Training runs, of one process or two, that are killed, resumed by the same command, and compared with one that was not."""

import contextlib
import csv
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.faulty.forks import forks
from pfgm.core.exits import LOST
from pfgm.files.atomic import PARTIAL
from pfgm.flow.checkpoints import CheckpointError, checkpoint_path, read_checkpoint
from pfgm.flow.integrity import digest

ROOT = Path(__file__).parent.parent.parent
COMMON = [
    "fit",
    "--config",
    str(ROOT / "configs" / "heart.yaml"),
    "--data.init_args.size=300",
    "--data.init_args.batch_size=32",
]
COMMON += ["--model.net.init_args.width=16", "--model.net.init_args.depth=1", "--grid.n=16", "--averages.every_n_steps=20"]
COMMON += ["--checkpoint.every_n_steps=5", "--trainer.val_check_interval=15", "--trainer.log_every_n_steps=1"]
COMMON += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
OBJECTIVES = {
    "Poisson field": [],
    "denoising": ["--model.loss=pfgm.training.DenoisingLoss", "--model.D=128"],
}
MOMENTS = ("at random", "while saving", "while drawing a grid", "signal")
GRACE, ENDLESS = 20.0, 1000
EXPECTED = {0, LOST} | {code for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1) for code in (-number, 128 + number)}
"""Exit codes of the processes of a run of which one was sent a signal, perhaps before it listened."""


def command(folder: Path, objective: str, steps: int) -> list[str]:
    """Of one run."""
    return [*COMMON, *OBJECTIVES[objective], f"--trainer.max_steps={steps}", f"--run_dir={folder}"]


def start(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> multiprocessing.Process:
    """train.py in a process of its own."""
    process = forks().Process(target=_train, args=(list(arguments), dict(environment or {})))
    process.start()
    return process


def _train(arguments: list[str], environment: dict[str, str]) -> None:
    import logging

    import torch

    from pfgm.cli import train

    os.environ.update(environment)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    sys.argv = ["train.py", *arguments]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train.run()


def launch(arguments: Sequence[str], ranks: int = 1) -> list[multiprocessing.Process]:
    """train.py on so many devices, each a process, as torchrun starts them."""
    if ranks == 1:
        return [start(arguments)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"TORCHELASTIC_RUN_ID": "1", "GROUP_RANK": "0"}
    words = [*arguments, f"--trainer.devices={ranks}", "--trainer.strategy=ddp"]
    return [start(words, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def finish(arguments: Sequence[str], ranks: int = 1) -> int:
    """The exit code of an undisturbed run, the largest of its processes."""
    return max(_ends(launch(arguments, ranks), None))


def _ends(processes: Sequence[multiprocessing.Process], patience: float | None) -> list[int]:
    """Exit codes; ENDLESS of a process that had to be killed after so many seconds, as torchrun would."""
    codes = []
    for process in processes:
        process.join(patience)
        codes.append(ENDLESS if process.exitcode is None else process.exitcode)
        process.kill()
    return codes


def kill(
    processes: Sequence[multiprocessing.Process], folder: Path, moment: str, chance: random.Random, length: float
) -> list[int]:
    """Send a signal to one of the `processes` at some `moment` of a run of about `length` seconds. Their exit codes."""
    process = chance.choice(processes)
    began, patience = time.monotonic(), chance.uniform(0, length)
    watched = {"while saving": folder / "checkpoints", "while drawing a grid": folder / "grids"}.get(moment)
    passed = chance.randrange(4)
    while process.is_alive():
        if watched is None and time.monotonic() - began > patience:
            break
        if watched is not None and any(watched.glob(f"{PARTIAL}*")):
            passed -= 1
            if passed < 0:
                time.sleep(chance.uniform(0, 0.01))
                break
            time.sleep(0.05)
        time.sleep(0.0005)
    number = chance.choice((signal.SIGTERM, signal.SIGUSR1)) if moment == "signal" else signal.SIGKILL
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
    return _ends(processes, GRACE)


def reached(folder: Path) -> int:
    """The last step that the log knows."""
    with contextlib.suppress(OSError, ValueError, KeyError), (folder / "metrics.csv").open(newline="") as file:
        return max((int(row["step"]) + bool(row["train_loss"]) for row in csv.DictReader(file)), default=0)
    return 0


PARTS = (
    "state_dict",
    "current_model_state",
    "averaging_state",
    "optimizer_states",
    "lr_schedulers",
    "global_step",
    "callbacks",
)


def fingerprint(folder: Path) -> dict[str, str]:
    """Of all that a run leaves: the bytes of its log, pictures and averages, the content of its last checkpoint."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".csv", ".png", ".safetensors")]
    last = read_checkpoint(checkpoint_path(folder))
    found = {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in files}
    return found | {part: digest(last[part]) for part in PARTS}


def chain(folder: Path, objective: str, kills: int, seed: int, steps: int = 60, ranks: int = 1) -> Counter:
    """Runs that are killed and resumed, `kills` times in all, each against one that was not; counts of what happened."""
    chance, counts = random.Random(seed), Counter()
    forks()
    began = time.monotonic()
    whole = folder / "whole"
    assert finish(command(whole, objective, steps), ranks) == 0
    length, expected = time.monotonic() - began, fingerprint(whole)
    while True:
        run = folder / f"run {counts['runs']}"
        if counts["kills"] < kills:
            moment, before = chance.choice(MOMENTS), reached(run)
            codes = kill(launch(command(run, objective, steps), ranks), run, moment, chance, length)
            if any(codes):
                waited = ranks > 1 and ENDLESS in codes and reached(run) == before  # for a process that never came
                odd = not set(codes) <= EXPECTED | ({ENDLESS} if waited else set())
                counts.update({"kills": 1, moment: 1, "unexpected": int(odd), "waited": int(waited)})
                if odd:
                    print(f"{run}, {moment}: exit codes {codes}", file=sys.stderr)
                _look(run, counts)
                continue
        counts["failed"] += finish(command(run, objective, steps), ranks) != 0
        counts["runs"] += 1
        counts["different"] += fingerprint(run) != expected
        if counts["kills"] >= kills:
            return counts


def _look(folder: Path, counts: Counter) -> None:
    """What a killed run left: torn checkpoints, lost steps."""
    path, step = checkpoint_path(folder), 0
    try:
        step = read_checkpoint(path)["global_step"] if path.exists() else 0
    except CheckpointError:
        counts["torn"] += 1
    lost = max(0, reached(folder) - step)
    counts["lost"] += lost
    counts["most lost"] = max(counts["most lost"], lost)
