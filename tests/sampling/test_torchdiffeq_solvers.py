"""Methods of torchdiffeq: EDM's published loop, and the error of the worst sample."""

import itertools
import math

import torch

from pfgm.sampling.sampler import seed_pairs
from pfgm.theory.analytic import EmpiricalDenoiser
from pfgm.theory.kernel import StudentTKernel
from tests.helpers import F64, TIGHT, make_sampler


def test_edm_heun_is_the_published_loop():
    """Algorithm 1 of arXiv 2206.00364 without churn, eq. 5 for its levels, the last step to zero being an Euler step."""
    denoiser, n = EmpiricalDenoiser(torch.randn(20, 3, dtype=F64), math.inf), 7
    s = make_sampler(denoiser, StudentTKernel(math.inf), method="edm_heun", steps=n)
    x = s.prior(seed_pairs(4)).t * 40
    roots = [40 ** (1 / 7) + i / (n - 1) * (0.01 ** (1 / 7) - 40 ** (1 / 7)) for i in range(n)]
    levels = [root**7 for root in roots] + [0.0]
    for here, there in itertools.pairwise(levels):
        d = (x - denoiser(x, here)) / here
        euler = x + (there - here) * d
        x = euler if there == 0 else x + (there - here) * (d + (euler - denoiser(euler, there)) / there) / 2
    out = s.sample(4)
    assert out.calls == 2 * n - 1
    assert torch.allclose(out.x.double(), x, atol=1e-6)


def test_adaptive_methods_bound_the_worst_sample():
    """One hard sample among many easy ones: torchdiffeq's own norm, over the batch, would let it go wrong."""
    y = torch.tensor([[-0.5], [0.5]], dtype=F64)
    x = torch.full((400, 1), 30.0, dtype=F64)
    x[0] = 0.02
    loose = make_sampler(EmpiricalDenoiser(y, math.inf), StudentTKernel(math.inf), (1,), rtol=1e-4, atol=1e-4).integrate(
        x, 40.0, 0.05
    )
    exact = make_sampler(EmpiricalDenoiser(y, math.inf), StudentTKernel(math.inf), (1,), **TIGHT).integrate(x[:1], 40.0, 0.05)
    assert float((loose[0] - exact[0]).abs()) < 2e-3
