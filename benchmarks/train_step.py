"""Time of a whole training step over the time of the bare network's.

    python benchmarks/train_step.py                                     # two minutes on two CPU cores
    python benchmarks/train_step.py --size cifar10 --batch 512 --precision bf16-mixed --compile --channels_last

The whole step is what `train.py fit` runs between two checkpoints: data, flips, noise, target, loss, backward, clipping,
optimizer, average and logging, by Lightning. The bare one is a copy of the same network, in the same precision, compiled alike:
forward on a constant input, backward and Adam. Both run in turn in one process, `--group` steps at a time; the median over
`--pairs` of the ratios is printed, for PFGM++ (D = 128) and PFGM (2048 charges), with images per second and the peak memory of
the whole step (of the process on a CPU).
`--plain` puts the same network in float32, uncompiled, beside it: the way research code runs.
"""

import argparse
import contextlib
import copy
import logging
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from pfgm.data import DataModule
from pfgm.data.batches import SampleSet
from pfgm.nn import UNet
from pfgm.training.callbacks import Speed
from pfgm.training.csv_logger import MetricsLogger
from pfgm.training.ema import EMA
from pfgm.training.losses import DenoisingLoss, PoissonFieldLoss
from pfgm.training.module import PFGM

SIZES: dict[str, dict[str, Any]] = {
    "small": {"width": 64, "multipliers": (1, 2, 2), "blocks": 2, "attention_levels": (1,)},
    "cifar10": {"width": 128, "multipliers": (2, 2, 2), "blocks": 4, "attention_levels": (1,), "head_channels": 256}
    | {"scale_shift": False, "resblock_updown": True, "noise_features": 128, "dropout": 0.13, "glorot": True},
}
OBJECTIVES = {"PFGM++": (DenoisingLoss(), 128.0), "PFGM": (PoissonFieldLoss(5.0, 2048), 1.0)}


@dataclass(frozen=True)
class Row:
    objective: str
    size: str
    batch: int
    precision: str
    compile: bool
    channels_last: bool
    pairs: int
    group: int


class Pairs(pl.Callback):
    """Times groups of whole steps, each followed by as many bare ones; the first group of each warms up."""

    def __init__(self, row: Row):
        self.row, self.times, self.peak = row, [], 0.0

    def clock(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = self.clock(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.row.group:
            return
        device = pl_module.device
        whole = self.clock(device) - self.began
        if not self.times:
            self.peak = self.peak_memory(device)
            self.bare = bare_step(pl_module, self.row)
            for _ in range(self.row.group):
                self.bare()
        began = self.clock(device)
        for _ in range(self.row.group):
            self.bare()
        self.times.append((whole / self.row.group, (self.clock(device) - began) / self.row.group))
        self.began = self.clock(device)

    def peak_memory(self, device: torch.device) -> float:
        """In bytes, before there is a bare network."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bare_step(module: Any, row: Row) -> Any:
    """Forward, backward and optimizer step of a copy of the network of `module`, as a function."""
    net = copy.deepcopy(module.flow.denoiser.net)
    if row.compile:
        net.compile()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    x, c_noise = torch.randn(row.batch, *module.flow.shape, device=module.device), torch.zeros(row.batch, device=module.device)
    low = torch.autocast(module.device.type, torch.bfloat16) if row.precision == "bf16-mixed" else contextlib.nullcontext()

    def step() -> None:
        optimizer.zero_grad()
        with low:
            loss = net(x, c_noise).float().square().mean()
        loss.backward()
        optimizer.step()

    return step


def measure(row: Row) -> str:
    """One row of the table, in a process of its own."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    images = SampleSet(torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8))
    data = DataModule(images, images, batch_size=row.batch, seed=0, scale=127.5, value_range=(0.0, 255.0), flip=True)
    loss, D = OBJECTIVES[row.objective]
    net = UNet(data.shape, extra_channels=loss.extra_channels, **SIZES[row.size])
    pairs = Pairs(row)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=-1,
            max_steps=row.group * (row.pairs + 1),
            precision=row.precision,
            accelerator="auto",
            devices=1,
            benchmark=True,
            gradient_clip_val=1.0,
            log_every_n_steps=row.group,
            limit_val_batches=0,
            logger=MetricsLogger(folder),
            callbacks=[Speed(compile=row.compile, channels_last=row.channels_last), EMA(), pairs],
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(PFGM(net, data.summary, loss, D=D, lr=1e-4), data)
    whole, bare = (statistics.median(part) for part in zip(*pairs.times[1:], strict=True))
    ratio = statistics.median(a / b for a, b in pairs.times[1:])
    name = f"{row.objective}, {sum(p.numel() for p in net.parameters() if isinstance(p, nn.Parameter)) / 1e6:.1f}M"
    how = ", ".join([row.precision, *(flag for flag in ("compile", "channels_last") if getattr(row, flag))])
    speed = f"{row.batch / whole:.0f} images/s, {pairs.peak / 2**30:.2f} GiB"
    return f"| {name}, batch {row.batch} | {how} | {1e3 * whole:.1f} ms | {1e3 * bare:.1f} ms | {ratio:.3f} | {speed} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--objective", choices=OBJECTIVES, nargs="*", default=list(OBJECTIVES))
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--plain", action="store_true", help="also in float32, uncompiled, in the usual layout")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--group", type=int, default=2, help="steps between two looks at the clock; more on a GPU")
    given = vars(parser.parse_args())
    objectives, plain = given.pop("objective"), given.pop("plain")
    print("| network | how | whole step | bare step | ratio | whole step |\n|---|---|---|---|---|---|", flush=True)
    for objective in objectives:
        row = Row(objective=objective, **given)
        rows = [row, replace(row, precision="32-true", compile=False, channels_last=False)] if plain else [row]
        for one in rows:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                print(process.submit(measure, one).result(), flush=True)


if __name__ == "__main__":
    main()
