"""Time, memory and accuracy of the large-batch target against the direct form, in one run.

    python benchmarks/field_target.py [--B 128 --L 4096 --N 3072]

The direct form builds the B x L x N tensor of differences; row by row does the same arithmetic one point at a time. Each form
runs in a process of its own, so that its peak of extra memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pfgm.core import rng
from pfgm.core.tensors import norm
from pfgm.theory.field import posterior_mean
from pfgm.theory.kernel import StudentTKernel

SIGMAS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 40.0)


def direct(x: Tensor, sigma: Tensor, charges: Tensor, D: float) -> Tensor:
    """The posterior mean as published: one B x L x N tensor."""
    distance2 = (x[:, None] - charges).square().sum(2)
    w = torch.softmax(-(x.shape[1] + D) / 2 * torch.log(distance2 + (D * sigma.square())[:, None]), dim=1)
    return (w[:, :, None] * charges).sum(1)


def by_rows(x: Tensor, sigma: Tensor, charges: Tensor, D: float) -> Tensor:
    """The same arithmetic for one point at a time."""
    return torch.cat([direct(x[i : i + 1], sigma[i : i + 1], charges, D) for i in range(len(x))])


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "posterior_mean": posterior_mean,
    "rows": by_rows,
    "direct": direct,
}


def measure(form: str, B: int, L: int, N: int, D: float) -> dict[str, float]:
    """Best of several runs, in seconds, and the growth of the peak resident size, in MB."""
    charges = torch.rand(L, N, generator=rng.generator(0)) * 2 - 1
    sigma = torch.full((B,), 0.5)
    x = StudentTKernel(D).sample(charges[:B], sigma, rng.generator(1))
    torch.randn(64, 64) @ torch.randn(64, 64)
    FORMS[form](x[:1], sigma[:1], charges[:8], D)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(1 if form == "direct" else 5):
        began = time.perf_counter()
        FORMS[form](x, sigma, charges, D)
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds), "MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def worst_error(charges: Tensor, D: float, sigma: float) -> float:
    """max |target - float64 target| / |x - denoised| for float32 input."""
    x = StudentTKernel(D).sample(charges[:64], sigma, rng.generator(2))
    exact = by_rows(x.double(), torch.full((len(x),), sigma, dtype=torch.float64), charges.double(), D)
    return float((norm(posterior_mean(x, sigma, charges, D).double() - exact) / norm(x.double() - exact)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("B", 128), ("L", 4096), ("N", 3072)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--D", type=float, default=1.0)
    sizes = parser.parse_args()
    if sizes.form:
        print(json.dumps(measure(sizes.form, sizes.B, sizes.L, sizes.N, sizes.D)))
        return
    print(f"B = {sizes.B}, L = {sizes.L}, N = {sizes.N}, {torch.get_num_threads()} threads")
    for D in (1.0, 128.0):
        command = [
            sys.executable,
            __file__,
            *(f"--{k}={v}" for k, v in (("B", sizes.B), ("L", sizes.L), ("N", sizes.N), ("D", D))),
        ]
        results = {
            form: json.loads(subprocess.run([*command, f"--form={form}"], check=True, capture_output=True).stdout)
            for form in FORMS
        }
        mine = results["posterior_mean"]["seconds"]
        for form, result in results.items():
            print(f"D = {D:<4g} {form:15} {result['seconds']:8.3f} s {result['seconds'] / mine:8.1f} x {result['MB']:9.0f} MB")
    digits = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    sets = {
        "digits": torch.cat([digits, digits[:200] + 1e-4]),
        "random": torch.rand(1500, sizes.N, generator=rng.generator(3)) * 2 - 1,
    }
    for name, charges in sets.items():
        for D in (1.0, 128.0):
            errors = ", ".join(f"{sigma:g}: {worst_error(charges, D, sigma):.1e}" for sigma in SIGMAS)
            print(f"worst relative error, {name}, D = {D:g}, at sigma {errors}")


if __name__ == "__main__":
    main()
