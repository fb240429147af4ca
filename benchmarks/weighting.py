"""Training options side by side on digits, over seeds: learned log-variance, and the width of the average of the weights.

    python benchmarks/weighting.py [--seeds 0 1 2] [--steps 1000] [--folder runs/weighting]

Each seed (of the split, the first weights, the order and the noise) trains configs/digits_pfgmpp.yaml with and without
`log_variance`, keeping power-function averages. Printed are Fréchet (raw pixels) and energy distance of 3 x 1000 samples to the
training data, and the held-out loss, as means over the seeds with the standard deviation: for both, with the usual average,
and for averages of several widths, reconstructed after training.
"""

import argparse
import contextlib
import io
import math
import statistics
from pathlib import Path

import torch

import pfgm
from pfgm.cli import train as train_cli
from pfgm.core import rng
from pfgm.data import Digits
from pfgm.evaluation import metrics
from pfgm.flow import posthoc_ema
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.training.losses import DenoisingLoss

CONFIG = Path(__file__).parent.parent / "configs" / "digits_pfgmpp.yaml"
WIDTHS = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2)


def train(folder: Path, seed: int, steps: int, log_variance: bool) -> None:
    """A run in `folder`, unless it is there."""
    arguments = [
        "--config",
        str(CONFIG),
        "--run_dir",
        str(folder),
        "--seed_everything",
        str(seed),
        "--trainer.max_steps",
        str(steps),
    ]
    arguments += ["--model.loss.init_args.log_variance", str(log_variance), "--grid.n", "0", "--averages.every_n_steps", "50"]
    with contextlib.redirect_stderr(io.StringIO()):
        train_cli.main(["fit", *arguments, "--trainer.enable_progress_bar", "false"])


@torch.no_grad()
def measure(flow: PoissonFlow, data: Digits) -> tuple[float, float, float]:
    """Fréchet distance, energy distance and held-out loss, each the mean of three sets of noise."""
    sets = [flow.sample(1000, seed=seed).x for seed in range(3)]
    y, loss = flow.to_model(data.held_out.x), DenoisingLoss()
    losses = [float(loss(flow.denoiser, y, {}, summary=data.summary, generator=rng.generator(9, k)).mean()) for k in range(20)]
    distances = [[f(x, data.train.x) for x in sets] for f in (metrics.frechet_distance, metrics.energy_distance)]
    return statistics.mean(distances[0]), statistics.mean(distances[1]), statistics.mean(losses)


def row(name: str, values: list[tuple[float, float, float]]) -> str:
    """Format means and standard deviations over the seeds as a row of the table."""
    spread = statistics.stdev if len(values) > 1 else lambda v: math.nan
    cells = [f"{statistics.mean(v):.4f} ({spread(v):.4f})" for v in zip(*values, strict=True)]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/weighting"))
    given = parser.parse_args()
    values: dict[str, list[tuple[float, float, float]]] = {}
    for seed in given.seeds:
        data = Digits(seed=seed)
        for name, learned in (("as usual", False), ("learned log-variance", True)):
            folder = given.folder / f"{seed}-{'learned' if learned else 'usual'}"
            train(folder, seed, given.steps, learned)
            flow = pfgm.load(folder / "checkpoints" / "last.ckpt")
            values.setdefault(name, []).append(measure(flow, data))
            if not learned:
                for width in WIDTHS:
                    weights, _, _ = posthoc_ema.reconstruct(folder, width)
                    flow.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
                    values.setdefault(f"average of width {width}", []).append(measure(flow, data))
    print("| training | Fréchet | energy distance | held-out loss |\n|---|---|---|---|")
    for name, of_seeds in values.items():
        print(row(name, of_seeds))


if __name__ == "__main__":
    main()
