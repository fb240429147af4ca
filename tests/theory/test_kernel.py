"""Compare the Student-t kernel with scipy's density and with the laws of radius and direction."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pfgm.core import rng
from pfgm.core.tensors import norm
from pfgm.theory.kernel import StudentTKernel

F64 = torch.float64


@pytest.mark.parametrize("D", [0.5, 1, 2.5, 99, 101, 2048])
@pytest.mark.parametrize("N", [1, 3, 7])
def test_log_prob_equals_scipys_multivariate_t(D, N):
    x, y = 3 * torch.randn(4, N, dtype=F64), torch.randn(4, N, dtype=F64)
    expected = [stats.multivariate_t(b.numpy(), 0.49 * np.eye(N), df=D).logpdf(a.numpy()) for a, b in zip(x, y, strict=True)]
    assert StudentTKernel(D).log_prob(x, y, 0.7).numpy() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_log_prob_approaches_the_gaussian_as_one_over_D():
    x, y = torch.randn(4, 3, 5, dtype=F64), torch.zeros(4, 3, 5, dtype=F64)
    gauss = torch.distributions.Normal(*torch.tensor([0.0, 0.7], dtype=F64)).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(StudentTKernel(math.inf).log_prob(x, y, 0.7), gauss, rtol=1e-13)
    errors = [(StudentTKernel(D).log_prob(x, y, 0.7) - gauss).abs().max() * D for D in (1e6, 1e8, 1e10)]
    assert max(errors) / min(errors) < 1.01, "the distance to the Gaussian falls as 1/D"


def test_log_prob_takes_one_sigma_per_sample():
    x, y, sigma = torch.randn(3, 2, dtype=F64), torch.zeros(3, 2, dtype=F64), torch.tensor([0.1, 1.0, 10.0])
    one_by_one = [StudentTKernel(3).log_prob(x[i : i + 1], y[i : i + 1], float(sigma[i])) for i in range(3)]
    assert torch.allclose(StudentTKernel(3).log_prob(x, y, sigma), torch.cat(one_by_one))


@pytest.mark.parametrize("D", [0.5, 1, 3, 128, 1e8])
@pytest.mark.parametrize(("N", "n"), [(2, 4000), (64, 4000), (3072, 1500), (196608, 60)])
def test_squared_radius_is_beta_prime(D, N, n):
    x = StudentTKernel(D).sample(torch.zeros(n, N), 0.3, rng.generator(1))
    ratio = (norm(x) / 0.3).square() / D
    assert stats.kstest(ratio.numpy(), stats.betaprime(N / 2, D / 2).cdf).pvalue > 1e-3


def test_direction_is_uniform_and_independent_of_the_radius():
    x = StudentTKernel(1).sample(torch.zeros(20000, 3, dtype=F64), 1.0, rng.generator(2))
    radius = norm(x)
    cosine = (x[:, 0] / radius).numpy()
    assert stats.kstest(cosine, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    far = (radius > radius.median()).numpy()
    assert stats.ks_2samp(cosine[far], cosine[~far]).pvalue > 1e-3


def test_infinite_D_adds_exactly_gaussian_noise():
    y = torch.randn(5, 2, 3)
    expected = y + 0.3 * torch.randn(5, 2, 3, generator=rng.generator(7))
    assert torch.equal(StudentTKernel(math.inf).sample(y, 0.3, rng.generator(7)), expected)


def test_per_sample_generators_make_samples_independent_of_the_batch():
    kernel, y = StudentTKernel(1), torch.randn(6, 4)
    together = kernel.sample(y, 1.0, [rng.generator(0, i) for i in range(6)])
    alone = kernel.sample(y[3:4], 1.0, [rng.generator(0, 3)])
    assert torch.equal(together[3:4], alone)
    with pytest.raises(ValueError, match="2 generators for 6 samples"):
        kernel.sample(y, 1.0, [rng.generator(0), rng.generator(1)])


def renoised_radius(D, N, gaussian=False):
    kernel, y = StudentTKernel(D), torch.zeros(20000, N, dtype=F64)
    x = kernel.sample(y, 0.5, rng.generator(3))
    law = StudentTKernel(math.inf) if gaussian else kernel
    x = law.renoise(x, y, 0.5, 2.0, rng.generator(4))
    return (norm(x) / 2).square().numpy()


@pytest.mark.parametrize("D", [0.5, 1, 3, 64])
def test_renoising_from_the_source_keeps_the_law_but_gaussian_churn_does_not(D):
    law = stats.betaprime(8, D / 2, scale=D).cdf
    assert stats.kstest(renoised_radius(D, 16), law).pvalue > 1e-3
    assert stats.kstest(renoised_radius(D, 16, gaussian=True), law).pvalue < 1e-3


def test_renoising_at_infinite_D_adds_variances():
    assert stats.kstest(renoised_radius(math.inf, 16), stats.chi2(16).cdf).pvalue > 1e-3
    with pytest.raises(ValueError, match="sigma = 2"):
        StudentTKernel(1).renoise(torch.zeros(1, 2), torch.zeros(1, 2), 2.0, 1.0)


@pytest.mark.parametrize("D", [1, 3.5, 50])
def test_effective_level_is_sigma_over_the_root_of_mean_kappa(D):
    """Compute E[kappa | x, y] by quadrature over the chi² prior and the Gaussian likelihood."""
    N, sigma, distance = 5, 0.7, 1.9
    u = np.linspace(-40, 8, 200001)
    log_w = stats.chi2.logpdf(D * np.exp(u), D) + u + N / 2 * u - np.exp(u) * distance**2 / (2 * sigma**2)
    w = np.exp(log_w - log_w.max())
    expected = sigma / math.sqrt((w * np.exp(u)).sum() / w.sum())
    level = StudentTKernel(D).effective_level(torch.tensor([distance]), torch.tensor([sigma]), N)
    assert float(level) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -1.0, torch.tensor([1.0, 0.0])])
def test_log_prob_requires_positive_sigma(sigma):
    with pytest.raises(ValueError, match=r"sigma = .*only for sigma > 0"):
        StudentTKernel(1).log_prob(torch.zeros(2, 2), torch.zeros(2, 2), sigma)


@pytest.mark.parametrize("D", [0.49, -1, 0, math.nan, "three", 10**400])
def test_D_out_of_range_is_rejected(D):
    with pytest.raises(ValueError, match=f"D = {D!r}|D = {D}"):
        StudentTKernel(D)


def test_D_accepts_text():
    assert math.inf == StudentTKernel("inf").D


def test_shapes_must_agree():
    x, wrong = torch.zeros(3, 4), torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"^y .*\(3, 5\)"):
        StudentTKernel(2).log_prob(x, wrong, 1.0)
    with pytest.raises(ValueError, match=r"^source .*\(3, 5\)"):
        StudentTKernel(2).renoise(x, wrong, 1.0, 2.0)
