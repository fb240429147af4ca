"""Added noise keeps the kernel's law on every kind of plan, and is EDM's at D = inf."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from pfgm.core import rng
from pfgm.core.tensors import expand, norm, per_sample
from pfgm.sampling.sampler import Sampler, seed_pairs
from pfgm.sampling.stochastic import churn, restart
from pfgm.theory.analytic import EmpiricalDenoiser, PointCharge
from pfgm.theory.kernel import StudentTKernel

F64, N = torch.float64, 6
PLANS = [
    {"method": "rk4", "steps": 12, "s_churn": 4.0},
    {"method": "edm_heun", "steps": 6, "s_churn": 3.0, "s_tmin": 0.02, "s_tmax": 30.0},
    {"method": "ab3", "steps": 24, "restart": [(0.1, 2.0, 2), (2.0, 20.0, 1)]},
    {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4, "restart": [(0.1, 2.0, 3)]},
]


class GaussianNoise(StudentTKernel):
    """Lifts with Gaussian noise at every D, as the published sampler of PFGM++ does."""

    def renoise(self, x, source, sigma, sigma_next, generator=None):
        low, high = per_sample(sigma, x), per_sample(sigma_next, x)
        return x + expand((high.square() - low.square()).sqrt(), x) * rng.normal(x.shape, generator, like=x)


def sampler(denoiser, kernel, shape=(N,), **options):
    return Sampler(denoiser, kernel, shape=shape, sigma_min=0.01, sigma_max=40.0, start="hyperplane", **options)


def radius_p_value(kernel, plan):
    """Test |x - y|²/r² at the end of `plan` around one charge, whose flow keeps its law, beta prime."""
    y = torch.randn(N, dtype=F64)
    s = sampler(PointCharge(y), kernel, **plan)
    end = s.trajectory(seed_pairs(1500, 1), 2)
    ratio = (norm(end.x[-1] - y) / end.sigma[-1]).square() / kernel.D
    assert float(end.sigma[-1].max()) == pytest.approx(s.plan[-1][-1])
    return stats.kstest(ratio.numpy(), stats.betaprime(N / 2, kernel.D / 2).cdf).pvalue


@pytest.mark.process
@pytest.mark.parametrize("D", [1.0, 4.0])
@pytest.mark.parametrize("plan", PLANS)
def test_added_noise_keeps_the_kernels_law_and_gaussian_noise_would_not(plan, D):
    assert radius_p_value(StudentTKernel(D), plan) > 1e-3
    assert radius_p_value(GaussianNoise(D), plan) < 1e-6


def test_churn_at_infinite_D_is_edms_loop():
    """Algorithm 2 of arXiv 2206.00364 with S_noise = 1."""
    denoiser, n, pairs = EmpiricalDenoiser(torch.randn(20, N, dtype=F64), math.inf), 7, seed_pairs(4)
    s_churn, s_tmin, s_tmax = 2.0, 0.05, 50.0
    s = sampler(denoiser, StudentTKernel(math.inf), method="edm_heun", steps=n, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax)
    x = s.prior(pairs).t * 40
    roots = [40 ** (1 / 7) + i / (n - 1) * (0.01 ** (1 / 7) - 40 ** (1 / 7)) for i in range(n)]
    levels = [root**7 for root in roots] + [0.0]
    for i, (here, there) in enumerate(itertools.pairwise(levels)):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= here <= s_tmax else 0.0
        high = here * (1 + gamma)
        if gamma:
            noise = rng.normal(x.shape, [rng.generator(*pair, 0, i, 1) for pair in pairs], like=x)
            x = x + math.sqrt(high**2 - here**2) * noise
        d = (x - denoiser(x, high)) / high
        euler = x + (there - high) * d
        x = euler if there == 0 else x + (there - high) * (d + (euler - denoiser(euler, there)) / there) / 2
    out = s.sample(4)
    assert torch.allclose(out.x.double(), x, atol=1e-6)
    assert out.calls == 2 * n - 1, "at D = inf the source need not be known"


def test_lifts_use_the_sigma_and_the_source_of_each_sample(monkeypatch):
    """On hemispheres sigma = level/ratio differs between samples."""
    seen, denoiser = [], EmpiricalDenoiser(torch.randn(20, N, dtype=F64), 2.0)
    monkeypatch.setattr(StudentTKernel, "renoise", lambda self, *arguments: seen.append(arguments[:4]) or arguments[0])
    options = {"method": "euler", "steps": 3, "s_churn": 1.0}
    s = Sampler(denoiser, StudentTKernel(2.0), shape=(N,), sigma_min=0.01, sigma_max=40.0, **options)
    s.sample(4)
    ratio = ((2.0 + s.prior(seed_pairs(4)).t.square().sum(1)) / (2.0 + N)).sqrt()
    for (x, source, sigma, sigma_next), before, run in zip(seen, [40.0, *[run[-1] for run in s.plan]], s.plan, strict=False):
        assert torch.allclose(source, denoiser(x, sigma))
        assert torch.allclose(sigma * ratio, torch.full((4,), before, dtype=F64))
        assert torch.allclose(sigma_next * ratio, torch.full((4,), run[0], dtype=F64))
    assert len(seen) == 4


def test_plans_pass_the_published_levels():
    assert churn([8.0, 4.0, 2.0, 1.0], 1.0, 1.5, 5.0) == [[8.0, 4.0], [5.0, 2.0], [2.5, 1.0], [1.0]]
    assert churn([8.0, 1.0], 100.0, 0.0, math.inf)[0][0] == 8 * math.sqrt(2), "published bound of gamma"
    levels = [16.0, 8.0, 4.0, 2.0, 1.0]
    assert [pytest.approx(run) for run in restart(levels, [(2.0, 8.0, 2)])] == [
        [16.0, 8.0, 4.0, 2.0],
        [8.0, 4.0, 2.0],
        [8.0, 4.0, 2.0, 1.0],
    ]
    off_grid = restart(levels, [(1.0, 3.0, 1), (2.0, 12.0, 1)])
    assert [(run[0], run[-1]) for run in off_grid] == [(16.0, 2.0), (12.0, 1.0), (3.0, 1.0)]
    assert [len(run) for run in off_grid] == [4, 5, 3]
    assert off_grid[1][1:-1] == pytest.approx([12 ** (1 - k / 4) for k in (1, 2, 3)]), "even steps of log(level), as the grid's"
    assert len(restart(levels, [(1.0, 2.6, 1)])[1]) == 2, "1.4 steps are one"
    assert len(restart(levels, [(2.0, 8.0, 3.0)])) == 4
    assert restart(levels, np.array([(1.0, 3.0, 1), (2.0, 12.0, 1)])) == off_grid
    assert restart([16.0, 1.0], [(2.0, 8.0, 1)]) == [[16.0, 2.0], [8.0, 1.0]]


@pytest.mark.parametrize(("D", "lifts"), [(8.0, 1), (math.inf, 0)])
def test_stochastic_draws_depend_on_the_seed_alone_and_count_calls_of_lifts(D, lifts):
    denoiser = EmpiricalDenoiser(torch.randn(20, N, dtype=F64), D)
    s = sampler(denoiser, StudentTKernel(D), method="heun2", steps=5, s_churn=2.0)
    out = s.sample(6, seed=3)
    assert out.calls == 2 * 5 + 6 * lifts + 1
    assert torch.allclose(s.draw([(3, 4), (3, 1)]).x, out.x[[4, 1]], atol=1e-6)
    assert not torch.allclose(sampler(denoiser, StudentTKernel(D), method="heun2", steps=5).sample(6, seed=3).x, out.x)
    again = sampler(denoiser, StudentTKernel(D), method="ab3", steps=8, restart=[(0.2, 2.0, 1)]).sample(6)
    assert again.calls == again.accepted + 2 + lifts + 1, "each of two runs has a step of two calls"


@pytest.mark.parametrize(("D", "most"), [*((2.0, most) for most in range(1, 14)), (math.inf, 1), (math.inf, 3), (math.inf, 6)])
def test_max_calls_ends_a_draw_with_noise_anywhere(D, most):
    denoiser = EmpiricalDenoiser(torch.randn(20, N, dtype=F64), D)
    out = sampler(denoiser, StudentTKernel(D), method="euler", steps=6, s_churn=2.0).sample(3, max_calls=most)
    assert (out.calls, out.complete) == (most, False)
    assert bool(torch.isfinite(out.x).all())


@pytest.mark.parametrize("most", [2, 4, 7, 9])
def test_no_run_follows_one_that_ran_out_of_calls(most):
    """A further run would begin at a level that noise has raised."""
    seen = []

    def denoiser(x, sigma, label=None):
        seen.append((x, sigma))
        return 0.5 * x

    options = {"method": "ab3", "steps": 3, "restart": [(0.2, 2.0, 2)]}
    out = sampler(denoiser, StudentTKernel(math.inf), **options).sample(2, max_calls=most)
    assert (out.calls, out.complete, out.error) == (most, False, None)
    levels = [float(sigma[0]) for _, sigma in seen]
    assert levels[-1] <= min(levels[:-1]), "what is denoised is the lowest state reached, not one that noise has lifted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_churn": 1.0}, r"s_churn = 1\.0: .*ab3 does not have them\. Choose method euler"),
        ({"s_churn": 1.0, "rtol": 0.1}, "bosh3 does not have them"),
        ({"s_churn": -1.0}, r"s_churn = -1\.0 must be a finite number"),
        ({"s_churn": 1.0, "method": "euler", "steps": 3, "s_tmin": 2.0, "s_tmax": 1.0}, r"s_tmin = 2\.0, s_tmax = 1\.0"),
        ({"s_tmin": 2.0}, r"s_tmin = 2\.0, .*without s_churn"),
        ({"restart": [(0.1, 50.0, 1)]}, r"restart has \[0\.1, 50\.0, 1\]: give t_min, t_max and K with 0\.0\d+ <= t_min"),
        ({"restart": [(0.011, 0.02, 1)]}, r"restart has \[0\.011, 0\.02, 1\]"),
        ({"restart": [(2.0, 1.0, 1)]}, "restart has"),
        ({"restart": [(1.0, 2.0, 0)]}, "restart has"),
        ({"restart": [(1.0, 2.0)]}, r"restart = \[\(1\.0, 2\.0\)\]: expected"),
        ({"restart": [(1.0, 2.0, 1)], "s_churn": 1.0, "method": "euler", "steps": 3}, "give one of them"),
    ],
)
def test_invalid_plans_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(PointCharge(torch.zeros(N)), StudentTKernel(1), **options)


def test_maps_refuse_added_noise():
    s = sampler(PointCharge(torch.zeros(N)), StudentTKernel(1), restart=[(1.0, 2.0, 1)])
    for flow_map in (s.encode, lambda x: s.integrate(x, 1.0, 2.0), lambda x: s.decode(s.prior(seed_pairs(2)))):
        with pytest.raises(ValueError, match="only samples have noise added"):
            flow_map(torch.zeros(2, N))
