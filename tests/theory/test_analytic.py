"""Compare the exact denoisers with quadrature and with the kernel."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from pfgm.core import rng
from pfgm.core.tensors import norm
from pfgm.theory.analytic import CauchyBlob, EmpiricalDenoiser, GaussianBlob, PointCharge, UniformSegment
from pfgm.theory.field import posterior_mean
from pfgm.theory.kernel import StudentTKernel

F64 = torch.float64


def posterior_by_quadrature(density, x, sigma, D):
    """Compute E[y | x] in one dimension from the data density and the kernel."""
    kernel = stats.t(D, scale=sigma) if math.isfinite(D) else stats.norm(scale=sigma)
    moments = [
        integrate.quad(
            lambda y, k=k: y**k * density(y) * kernel.pdf(x - y),
            -12,
            12,
            points=(0, x - 3 * sigma, x, x + 3 * sigma),
            limit=5000,
        )[0]
        for k in (0, 1)
    ]
    return moments[1] / moments[0]


@pytest.mark.parametrize("x", [0.3, 4.0])
@pytest.mark.parametrize("sigma", [0.1, 1.0])
@pytest.mark.parametrize("D", [0.5, 1, 7, math.inf])
def test_gaussian_blob_equals_the_posterior_mean_by_quadrature(x, sigma, D):
    denoised = GaussianBlob(0.7, D)(torch.tensor([[x]], dtype=F64), sigma)
    assert float(denoised) == pytest.approx(posterior_by_quadrature(stats.norm(scale=0.7).pdf, x, sigma, D), rel=1e-6)


def test_gaussian_blob_approaches_the_closed_form_as_one_over_D():
    x = torch.randn(5, 4, dtype=F64)
    exact = GaussianBlob(0.7)(x, 0.5)
    assert torch.allclose(exact, x * 0.49 / (0.49 + 0.25), rtol=1e-14)
    errors = [float((GaussianBlob(0.7, D)(x, 0.5) - exact).norm()) for D in (1e4, 2e4, 4e4, 8e4)]
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([2, 2, 2], abs=0.01)


def test_gaussian_blob_is_finite_for_any_x_and_D():
    for D in (0.5, 1e3, 1e9):
        x = torch.tensor([[1e-9, 0.0], [1e6, 1e6]], dtype=F64)
        assert bool(torch.isfinite(GaussianBlob(0.7, D)(x, 1e-3)).all())


@pytest.mark.parametrize("N", [1, 3])
def test_cauchy_blob_equals_the_posterior_mean_of_its_samples(N):
    """Compare with the empirical posterior mean, which uses other code."""
    charges = torch.tensor(stats.cauchy.ppf((np.arange(200000) + 0.5) / 200000))[:, None] * 0.5
    if N == 1:
        x = torch.tensor([[0.3], [2.0]], dtype=F64)
        assert torch.allclose(CauchyBlob(0.5)(x, 0.4), posterior_mean(x, 0.4, charges, 1.0), rtol=1e-4)
    else:
        y = StudentTKernel(1).sample(torch.zeros(400000, N, dtype=F64), 0.5, torch.Generator().manual_seed(0))
        x = torch.full((1, N), 0.4, dtype=F64)
        assert torch.allclose(CauchyBlob(0.5)(x, 0.4), posterior_mean(x, 0.4, y, 1.0), rtol=0.03)


def test_empirical_denoiser_is_the_posterior_mean_and_ignores_conditions():
    charges, x = torch.randn(6, 1, 2, dtype=F64), torch.randn(3, 1, 2, dtype=F64)
    weights = torch.rand(6)
    module = EmpiricalDenoiser(charges, 3.0, weights)
    assert torch.equal(module(x, 0.5, label=torch.zeros(3)), posterior_mean(x, 0.5, charges, 3.0, weights))


def test_point_charge_is_the_empirical_denoiser_of_one_point():
    charges, x = torch.randn(1, 1, 2, dtype=F64), torch.randn(3, 1, 2, dtype=F64)
    assert torch.allclose(PointCharge(charges[0])(x, 0.5), EmpiricalDenoiser(charges, 3.0)(x, 0.5))


def test_scale_must_be_positive():
    with pytest.raises(ValueError, match="scale = 0"):
        CauchyBlob(0)


@pytest.mark.parametrize(
    ("N", "D", "sigma", "rms"), [(16, 3.0, 0.5, 0.4), (64, 1.0, 2.0, 1.0), (64, 1.0, 10.0, 0.01), (3072, 128.0, 40.0, 5.0)]
)
def test_gaussian_blob_equals_quadrature_in_many_dimensions(N, D, sigma, rms):
    """Compare with scipy's quadrature over log kappa, also where |x| is far below its typical value."""

    def log_density(u):
        v = 0.49 + sigma**2 * math.exp(-u)
        return D / 2 * (u - math.exp(u)) - N / 2 * math.log(v) - N * rms**2 / (2 * v)

    def mean(k):
        def integrand(u):
            return math.exp(log_density(u) - log_density(top)) * (0.49 / (0.49 + sigma**2 * math.exp(-u))) ** k

        return integrate.quad(integrand, top - 30, top + 6, points=[top], limit=1000)[0]

    grid = np.linspace(-15, 15, 3001)
    top = grid[np.argmax([log_density(u) for u in grid])]
    x = torch.full((1, N), rms, dtype=F64)
    assert float(GaussianBlob(0.7, D)(x, sigma)[0, 0]) == pytest.approx(rms * mean(1) / mean(0), rel=1e-6)


def test_uniform_segment_is_accurate_far_away():
    """Compare on the axis with ∫ y/(x-y)² dy / ∫ 1/(x-y)² dy = x - (x²-1)/2 log((x+1)/(x-1)) = 2/(3x) + 2/(15x³) + ..."""
    for x, z in ((1e3, 1e-3), (1e4, 0.01), (-1e3, 1e-3)):
        exact = 2 / (3 * x) + 2 / (15 * x**3)
        assert float(UniformSegment()(torch.tensor([[x]], dtype=F64), z)) == pytest.approx(exact, rel=1e-6)


def test_perturbed_cauchy_data_is_cauchy_with_the_sum_of_scales():
    y = StudentTKernel(1).sample(torch.zeros(20000, 3, dtype=F64), 0.4, rng.generator(11))
    x = StudentTKernel(1).sample(y, 0.9, rng.generator(12))
    assert stats.kstest((norm(x) / 1.3).square().numpy(), stats.betaprime(1.5, 0.5).cdf).pvalue > 1e-3
