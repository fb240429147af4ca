"""Long runs in little memory: python benchmarks/load.py

Draws 10,000 images to a folder by sample.py, killed twice on the way, and compares the files with those of an undisturbed draw;
trains a tiny network for 20,000 steps and watches memory, open files and processes. Ten minutes on two CPU cores.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from pfgm.theory.data_summary import DataSummary

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.faulty import kills
from benchmarks.faulty.draws import content
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.nn import UNet
from pfgm.nn.preconditioning import PreconditionedDenoiser


def start(program: str, words: list[str]) -> psutil.Popen:
    """A program of ours, silent."""
    command = [sys.executable, str(kills.ROOT / program), *words]
    return psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def export(folder: Path) -> Path:
    """A flow of 8 x 8 images with random weights."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), 0, 0, width=8, blocks=1)
    denoiser = PreconditionedDenoiser(net, 128.0, 0.5, 0.1)
    flow = PoissonFlow(denoiser, DataSummary((1, 8, 8), value_range=(-1.0, 1.0)), sigma_min=0.01, sigma_max=40.0)
    flow.save_pretrained(folder / "export")
    return folder / "export"


def draw(model: Path, out: Path, samples: int, stop_at: int | None = None) -> float:
    """Draw until the folder holds `stop_at` files, then kill; else to the end. Most memory in megabytes."""
    words = [str(model), f"--n={samples}", "--preset=fast", f"--out={out}", "--device=cpu"]
    process = start("sample.py", words)
    most = 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            most = max(most, process.memory_info().rss / 1e6)
        if stop_at is not None and out.exists() and len(list(out.iterdir())) > stop_at:
            process.kill()
        time.sleep(0.05)
    assert process.returncode == (0 if stop_at is None else -9), process.returncode
    return most


def drawing(folder: Path, samples: int) -> None:
    """The part on drawing."""
    model = export(folder)
    began = time.monotonic()
    few, whole = draw(model, folder / "few", 256), draw(model, folder / "whole", samples)
    seconds = time.monotonic() - began
    parts = [draw(model, folder / "parts", samples, samples * k // 3) for k in (1, 2)]
    parts.append(draw(model, folder / "parts", samples))
    a, b = (content(folder / name) for name in ("whole", "parts"))
    print(
        f"{samples} images: {'the same' if a == b else 'OTHER'} {len(b)} files after two kills; most memory {whole:.0f} MB "
        f"({max(parts):.0f} MB with kills, {few:.0f} MB for 256 images); {samples / seconds:.0f} images/s",
        flush=True,
    )


def training(folder: Path, steps: int) -> None:
    """The part on training."""
    words = [word for word in kills.command(folder / "run", "denoising", steps) if "every_n_steps" not in word]
    words += ["--trainer.log_every_n_steps=50", "--trainer.val_check_interval=1000", "--checkpoint.every_n_steps=500"]
    process = start("train.py", words)
    seen = {}
    marks = [steps // 10 * k for k in range(1, 11)]
    while process.poll() is None:
        step = kills.reached(folder / "run")
        if marks and step >= min(marks[0], steps - 200):
            with contextlib.suppress(psutil.Error):
                seen[step] = (process.memory_info().rss / 1e6, process.num_fds(), len(process.children(recursive=True)))
            marks.pop(0)
        time.sleep(0.1)
    assert process.returncode == 0
    print("| step | memory / MB | open files | processes started |\n|---|---|---|---|")
    for step, (memory, files, children) in seen.items():
        print(f"| {step} | {memory:.1f} | {files} | {children} |")
    first, last = (list(seen.values())[k][0] for k in (0, -1))
    print(f"memory grew by {100 * (last / first - 1):.2f} %", flush=True)


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=20_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        drawing(Path(name), given.samples)
        training(Path(name), given.steps)


if __name__ == "__main__":
    main()
