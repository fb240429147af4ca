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
from torch import Tensor, nn

from pfgm.core.tensors import expand, norm, per_sample
from pfgm.data import DataModule, Digits
from pfgm.data.batches import SampleSet
from pfgm.evaluation.metrics import energy_distance, frechet_distance
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.nn import TimeMLP, UNet
from pfgm.nn.preconditioning import PreconditionedDenoiser, noise_level, preconditioning
from pfgm.theory.data_summary import DataSummary
from pfgm.theory.kernel import StudentTKernel
from pfgm.training.ema import EMA
from pfgm.training.losses import DenoisingLoss
from pfgm.training.module import PFGM

Statistics = tuple[float, float, float]
"""sigma_data, power_std and the largest |y|/sqrt(N) of the data."""


def excess_level(x: Tensor, sigma: Tensor, kernel: StudentTKernel, data: Statistics) -> Tensor:
    """sigma, or what |x| exceeds the largest sample by, if that is more."""
    N, a = x[0].numel(), kernel.level_weight(x[0].numel())
    power = norm(x).square() / N - data[2] ** 2
    return (a * sigma.square() + (1 - a) * torch.maximum(sigma.square(), power)).sqrt()


def typical_level(x: Tensor, sigma: Tensor, kernel: StudentTKernel, data: Statistics) -> Tensor:
    """A median-like estimate: sigma, or |x|²/N - sigma_data² with the weight of its certainty; -> sigma as sigma -> 0."""
    sigma_data, power_std, max_rms = data
    N = x[0].numel()
    a, power, prior = kernel.level_weight(N), norm(x).square() / N, sigma.square()
    if a == 1:
        return sigma
    scale = torch.maximum(prior, power - max_rms**2)
    variance = (power_std**2 + 4 * sigma_data**2 * scale / N) * (1 + kernel.D / 2)
    weight = 1 / (1 + variance / scale.square())
    return (a * prior + (1 - a) * torch.lerp(prior, (power - sigma_data**2).clamp(min=0), weight)).sqrt()


def rms_level(x: Tensor, sigma: Tensor, kernel: StudentTKernel, data: Statistics) -> Tensor:
    """The project's."""
    return noise_level(x, sigma, kernel, data[:2])


def sigma_level(x: Tensor, sigma: Tensor, kernel: StudentTKernel, data: Statistics) -> Tensor:
    """sigma itself, as in EDM and PFGM++."""
    return sigma


LEVELS = {
    "sigma": (sigma_level, sigma_level),
    "excess": (excess_level, rms_level),
    "rms": (rms_level, rms_level),
    "typical": (typical_level, rms_level),
    "typical_weight": (typical_level, typical_level),
}
"""Of the network and of the weight of the loss."""


class Variant(PreconditionedDenoiser):
    """The denoiser with two of the LEVELS."""

    def __init__(self, net: nn.Module, D: float, sigma_data: float, power_std: float, max_rms: float, levels: str):
        super().__init__(net, D, sigma_data, power_std)
        self.data, self.levels = (sigma_data, power_std, max_rms), LEVELS[levels]

    def denoise(self, x: Tensor, sigma: float | Tensor, **conditions: Tensor | None) -> tuple[Tensor, Tensor]:
        """As PreconditionedDenoiser.denoise."""
        level, weight = (estimate(x, per_sample(sigma, x), self.kernel, self.data) for estimate in self.levels)
        skip, out = preconditioning(level, self.sigma_data)
        c_in = (level.square() + self.sigma_data**2).rsqrt()
        F = self.net(expand(c_in, x) * x, (level.log() / 4).to(x.dtype))
        return expand(skip, x) * x + expand(out, x) * F, preconditioning(weight, self.sigma_data)[1]


class VariantLoss(DenoisingLoss):
    """The objective of a Variant."""

    def __init__(self, levels: str, max_rms: float):
        super().__init__()
        self.variant, self.max_rms = levels, max_rms

    def make_denoiser(self, net: nn.Module, D: float, data: DataSummary) -> Variant:
        """The denoiser that it trains."""
        return Variant(net, D, data.sigma_data, data.power_std, self.max_rms, self.variant)


class Vectors(DataModule):
    """Training and held-out vectors of `student`."""

    def __init__(self, size: int = 4096, seed: int = 0):
        super().__init__(SampleSet(student(size, 0)), SampleSet(student(size, 1)), batch_size=256, seed=seed)


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
    max_rms = float(norm(data.train.x - data.summary.mean).max()) / math.sqrt(math.prod(data.shape))
    module = PFGM(net, data.summary, VariantLoss(levels, max_rms), D=D, start=start, lr=2e-3, seed=seed)
    pl.Trainer(
        max_steps=steps,
        callbacks=[EMA(warmup=0.08)],
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(module, data)
    return module.flow.eval(), data.train.x


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
            spread = statistics.stdev if len(table) > 1 else lambda column: math.nan
            cells = [f"{statistics.mean(column):.4f} ({spread(column):.4f})" for column in zip(*table, strict=True)]
            print(f"| {case[0]} | {case[1]:g} | {case[2]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
