"""PFGM's field network sampled as published and as here, from one checkpoint in one run.

    python benchmarks/published_pfgm.py runs/digits/checkpoints/last.ckpt [--n 1000 --sets 3]

As published (arXiv 2209.11178, appendix B.2, and its CIFAR-10 settings): dopri5 at tolerance 1e-3, error control over the
whole batch, x over log z with dx/dlog z = z v_x / (v_z + 1e-5) from z_max down to 1e-3, where below z = 1 the distance to
the data is taken from v_x instead of v_z; start on the hyperplane z = z_max, radii clipped at 75 z_max sqrt(N/3072) (3000
for z_max = 40). "Same start, denoised" keeps all this but for the right-hand side, dx/dlog z = x - denoised by the inverse of
the field. Here: `flow.sample` with its presets. Distances are to the training digits, the same noise for all.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchdiffeq import odeint

import pfgm
from pfgm.core.tensors import expand, norm
from pfgm.data import Digits
from pfgm.evaluation.metrics import energy_distance
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.nn.preconditioning import FieldDenoiser

Z_MIN, Z_TRUSTED, GUARD, TOLERANCE = 1e-3, 1.0, 1e-5, 1e-3
Drift = Callable[[FieldDenoiser, Tensor, Tensor], Tensor]


def field_ratio(denoiser: FieldDenoiser, x: Tensor, z: Tensor) -> Tensor:
    """dx/dlog z from the two parts of the field."""
    v_x, v_z = denoiser.field(x, z)
    if z < Z_TRUSTED:
        N = x[0].numel()
        n = norm(v_x) / math.sqrt(N)
        R = ((denoiser.gamma * n / (1 - n)).square() + z**2).sqrt()
        v_z = -math.sqrt(N) * z / (R + denoiser.gamma)
    return expand(z / (v_z + GUARD), x) * v_x


def denoised_difference(denoiser: FieldDenoiser, x: Tensor, z: Tensor) -> Tensor:
    """dx/dlog z from the inverse of the field."""
    return x - denoiser(x, z)


def published(drift: Drift, flow: PoissonFlow, n: int, seed: int) -> tuple[Tensor, int]:
    """Samples and calls of the published sampler with the given drift."""
    latent = flow.sampler(start="hyperplane").prior([(seed, i) for i in range(n)])
    longest = 75 * (latent.t[0].numel() / 3072) ** 0.5
    x, calls = latent.t * expand((longest / norm(latent.t)).clamp(max=1), latent.t) * latent.level, 0

    def right_hand_side(log_z: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return drift(flow.denoiser, x.float(), log_z.exp().float()).double()

    t = torch.tensor([latent.level, Z_MIN], dtype=torch.float64).log()
    x = odeint(right_hand_side, x, t, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)[-1]
    return flow.summary.to_user(x.float()), calls


def here(preset: str, flow: PoissonFlow, n: int, seed: int) -> tuple[Tensor, int]:
    """Samples and calls of a preset."""
    out = flow.sample(n, seed=seed, batch_size=n, preset=preset)
    return out.x, out.calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--sets", type=int, default=3)
    arguments = parser.parse_args()
    flow, train = pfgm.load(arguments.checkpoint), Digits().train.x
    ways: dict[str, Callable[[PoissonFlow, int, int], tuple[Tensor, int]]] = {
        "as published": partial(published, field_ratio),
        "same start, denoised": partial(published, denoised_difference),
        "here, fast": partial(here, "fast"),
        "here, balanced": partial(here, "balanced"),
    }
    for name, draw in ways.items():
        distances, calls, began = [], [], time.perf_counter()
        for seed in range(arguments.sets):
            with torch.no_grad():
                x, count = draw(flow, arguments.n, seed)
            distances.append(energy_distance(x, train))
            calls.append(count)
        spread = statistics.stdev(distances) if len(distances) > 1 else math.nan
        print(f"{name:21} calls {calls}  energy distance {statistics.mean(distances):.4f} (sd {spread:.4f})", end="  ")
        print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
