"""Encoding and what is done with latents, on held-out digits: round trips, interpolation, temperature, variations.

    python benchmarks/editing.py runs/digits/checkpoints/last.ckpt runs/digits_pfgmpp/checkpoints/last.ckpt

Distances are in the units of the digits (-1 to 1); energy distances are to the training digits (held-out digits have -.0050).
--pictures folder writes strips of the first checkpoint there.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import pfgm
from pfgm.core.tensors import expand, norm
from pfgm.data import Digits
from pfgm.evaluation import plots
from pfgm.evaluation.metrics import energy_distance
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.latents import Latent, interpolate

TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)
LEVELS = (0.1, 0.3, 0.5, 0.8, 1.5, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--n", type=int, default=360, help="held-out digits, at most 360")
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    data = Digits()
    x, train = data.held_out.x[: arguments.n], data.train.x
    for k, path in enumerate(arguments.checkpoints):
        flow = pfgm.load(path)
        print(f"\n{path}: D = {flow.kernel.D:g}")
        round_trip(flow, x)
        middles(flow, x, train)
        print("temperature: energy distance of 3 x 1000 samples (sd)")
        print(" | ".join(f"{t}: {over_seeds(flow, t, train)}" for t in TEMPERATURES))
        print("variations at level: distance to the image, energy distance")
        varied = {level: flow.vary(x, level).x for level in LEVELS}
        print(
            " | ".join(f"{a}: {rms(v - x).mean():.3f}, {energy_distance(v, train):.4f}" for a, v in varied.items()), flush=True
        )
        if arguments.pictures and not k:
            strip = torch.cat([flow.sample(10, temperature=t).x for t in TEMPERATURES])
            plots.save_grid(arguments.pictures / "temperature.png", strip, flow.summary.value_range, columns=10)


def rms(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).mean(1).sqrt()


def round_trip(flow: PoissonFlow, x: Tensor) -> None:
    settings = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}
    error = rms(flow.decode(flow.encode(x, **settings), **settings) - x)
    print(f"round trip at tolerance 1e-5: median {error.median():.1e}, 90 % {error.quantile(0.9):.1e}, worst {error.max():.1e}")


def middles(flow: PoissonFlow, x: Tensor, train: Tensor) -> None:
    """Half way between pairs of digits: on the great circle of directions, and on that of the augmented hemisphere."""
    half = len(x) // 2
    a, b = flow.encode(x[:half]), flow.encode(x[half : 2 * half])
    circle = flow.decode(interpolate(a, b, 3)[1])
    lengths = [(norm(v.t).square() + min(flow.kernel.D, 1e12)).rsqrt() for v in (a, b)]
    share = expand(lengths[0] / (lengths[0] + lengths[1]), a.t)
    line = flow.decode(Latent(share * a.t + (1 - share) * b.t, a.level, a.surface))
    distances = [energy_distance(v, train) for v in (circle, line)]
    print("half way: energy distance {:.4f}, by the straight line {:.4f}".format(*distances))


def over_seeds(flow: PoissonFlow, temperature: float, train: Tensor) -> str:
    values = [energy_distance(flow.sample(1000, seed=s, temperature=temperature).x, train) for s in range(3)]
    each = torch.tensor(values)
    return f"{each.mean():.4f} ({each.std():.4f})"


if __name__ == "__main__":
    main()
