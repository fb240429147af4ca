"""PFGM's network sampled as published and as here, from one checkpoint in one run.

    python benchmarks/published_pfgm.py runs/digits/checkpoints/last.ckpt [--n 1000 --sets 1]

As published: dopri5 over log z at tolerance 1e-3, error control over the whole batch, from the hyperplane z = z_max, the
prior's radius clipped at 75 z_max sqrt(N/3072) (CIFAR-10: 3000 for z_max = 40). Here: the defaults of `flow.sample`.
Energy distance is to the training digits.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import pfgm
from pfgm import ode
from pfgm.data import Digits
from pfgm.flow import PoissonFlow
from pfgm.kernel import expand, norm
from pfgm.metrics import energy_distance


def whole_batch(error: Tensor) -> Tensor:
    """The norm that the published solver controls."""
    return error.square().mean().sqrt()


def published(flow: PoissonFlow, n: int, seed: int) -> tuple[Tensor, int]:
    """Samples and calls of the published sampler."""
    sampler = flow.sampler(method="dopri5", coordinates="log_sigma", start="hyperplane", rtol=1e-3, atol=1e-3)
    latent = sampler.prior([(seed, i) for i in range(n)])
    longest = 75 * (latent.t[0].numel() / 3072) ** 0.5
    latent.t = latent.t * expand((longest / norm(latent.t)).clamp(max=1), latent.t)
    x, ratio = sampler._lift(latent)
    denoise, own_norm = sampler._counted(None, n, torch.float32), ode.worst_sample
    ode.worst_sample = whole_batch
    try:
        x = sampler._solve(denoise, x, latent.level, flow.sigma_min, ratio)[0][-1]
    finally:
        ode.worst_sample = own_norm
    x = denoise(x, torch.tensor(flow.sigma_min), ratio)
    return flow.to_user(x.float()), denoise.calls


def here(flow: PoissonFlow, n: int, seed: int) -> tuple[Tensor, int]:
    """Samples and calls of the defaults."""
    out = flow.draw([(seed, i) for i in range(n)], batch_size=n)
    return out.x, out.calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--sets", type=int, default=1)
    arguments = parser.parse_args()
    flow, train = pfgm.load(arguments.checkpoint), Digits().train_x
    ways: dict[str, Callable[[PoissonFlow, int, int], tuple[Tensor, int]]] = {"as published": published, "here": here}
    for name, draw in ways.items():
        distances, calls, began = [], [], time.perf_counter()
        for seed in range(arguments.sets):
            with torch.no_grad():
                x, count = draw(flow, arguments.n, seed)
            distances.append(energy_distance(x, train))
            calls.append(count)
        spread = statistics.stdev(distances) if len(distances) > 1 else float("nan")
        print(f"{name:14} calls {max(calls):4d}  energy distance {statistics.mean(distances):.4f} (sd {spread:.4f})", end="  ")
        print(f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
