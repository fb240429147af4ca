"""Which noise level should rule the preconditioning of a heavy-tailed kernel? Trained networks, side by side.

    python benchmarks/heavy_tails.py --out heavy_tails.csv [--data digits student --D 1 4 64 2048 inf --seeds 0 1 2]

For every D and seed the same network is trained on the same batches with each of the LEVELS in place of sigma: in the
preconditioning of the network and in the weight of the loss. Then sets of 1000 samples are drawn in 10 calls, hemisphere
start for the digits, hyperplane start for the heavy-tailed vectors. Prints, for each, mean (standard deviation over seeds) of
the distances to the training data; writes one row for each training to the CSV. About a minute for each training.

"student" is 8 correlated coordinates of a multivariate Student-t with 3 degrees of freedom. Its Fréchet distance would be that
of a few outliers, so the third column is the largest difference of the distributions of |x| (Kolmogorov-Smirnov).
"""

import argparse
import csv
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from pfgm.data import DataModule, Digits
from pfgm.denoiser import Statistics, rms_level, typical_level
from pfgm.ema import EMA
from pfgm.flow import PoissonFlow
from pfgm.kernel import StudentTKernel, norm
from pfgm.loss import DenoisingLoss
from pfgm.metrics import energy_distance, frechet_distance
from pfgm.module import PFGM
from pfgm.nn import TimeMLP, UNet


def excess_level(x: Tensor, sigma: Tensor, kernel: StudentTKernel, statistics: Statistics) -> Tensor:
    """sigma, or what |x| exceeds the largest sample by, if that is more."""
    N, a = x[0].numel(), kernel.level_weight(x[0].numel())
    power = norm(x).square() / N - statistics[2] ** 2
    return (a * sigma.square() + (1 - a) * torch.maximum(sigma.square(), power)).sqrt()


def sigma_level(x: Tensor, sigma: Tensor, kernel: StudentTKernel, statistics: Statistics) -> Tensor:
    """sigma itself."""
    return sigma


LEVELS = {
    "sigma": (sigma_level, sigma_level),
    "excess": (excess_level, rms_level),
    "rms": (rms_level, rms_level),
    "typical": (typical_level, rms_level),
    "typical_weight": (typical_level, typical_level),
}
"""Of the network and of the weight of the loss: "sigma" is EDM's, "typical" this project's."""


class Vectors(DataModule):
    """Training and held-out vectors of `student`."""

    def __init__(self, size: int = 4096, seed: int = 0):
        super().__init__((student(size, 0), None), (student(size, 1), None), batch_size=256, seed=seed)


def student(n: int, seed: int) -> Tensor:
    """`n` vectors of a Student-t with 3 degrees of freedom whose coordinates have correlations of .8^|i-j|: [n, 8]."""
    g = np.random.default_rng(seed)
    covariance = 0.8 ** np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    normal, kappa = g.multivariate_normal(np.zeros(8), covariance, n), g.chisquare(3, (n, 1)) / 3
    return torch.tensor(normal / np.sqrt(kappa), dtype=torch.float32)


def train(name: str, D: float, levels: str, seed: int, steps: int) -> tuple[PoissonFlow, Tensor]:
    """A flow trained for `steps`, with its average weights, and the training data."""
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    data = Digits() if name == "digits" else Vectors()
    net = UNet(data.shape, width=16, multipliers=(1, 2), blocks=1) if name == "digits" else TimeMLP(data.shape, width=128)
    start = "hemisphere" if name == "digits" else "hyperplane"
    module = PFGM(net, data.summary, DenoisingLoss(), D=D, start=start, lr=2e-3, seed=seed)
    module.flow.denoiser.level, module.flow.denoiser.weight_level = LEVELS[levels]
    pl.Trainer(
        max_steps=steps,
        callbacks=[EMA(0.998)],
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(module, data)
    return module.flow.eval(), data.train_x


def measure(job: tuple[str, float, str, int, int]) -> tuple[float, float, float]:
    """Energy and Fréchet distance to the training data, and the distance of the distributions of |x|: means over 3 sets."""
    flow, x = train(*job)
    sets = [flow.sample(1000, seed=seed, batch_size=1000).x for seed in range(3)]
    norms = norm(x).numpy()
    distances = [(energy_distance(s, x), frechet_distance(s, x), ks_2samp(norm(s).numpy(), norms).statistic) for s in sets]
    return tuple(map(statistics.mean, zip(*distances, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("digits", "student"), default=["digits", "student"])
    parser.add_argument("--D", nargs="+", type=float, default=[1.0, 4.0, 64.0, 2048.0, math.inf])
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("heavy_tails.csv"))
    a = parser.parse_args()
    cases = [(d, D, levels) for d in a.data for D in a.D for levels in ([*a.levels] if math.isfinite(D) else ["sigma"])]
    jobs = [(*case, seed, a.steps) for case in cases for seed in a.seeds]
    print("| data | D | levels | energy distance | Fréchet distance | KS of norms |\n|---|---|---|---|---|---|")
    with ProcessPoolExecutor(a.workers) as pool, a.out.open("w", newline="") as file:
        results, rows = pool.map(measure, jobs), csv.writer(file)
        rows.writerow(("data", "D", "levels", "seed", "steps", "energy", "frechet", "ks"))
        for case in cases:
            table = [next(results) for _ in a.seeds]
            rows.writerows((*case, seed, a.steps, *row) for seed, row in zip(a.seeds, table, strict=True))
            file.flush()
            cells = [f"{statistics.mean(column):.4f} ({statistics.stdev(column):.4f})" for column in zip(*table, strict=True)]
            print(f"| {case[0]} | {case[1]:g} | {case[2]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
