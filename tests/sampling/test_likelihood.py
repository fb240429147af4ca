"""Compare log-densities along the flow with closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from pfgm.sampling.likelihood import estimate_log_prob, log_prob
from pfgm.sampling.sampler import Sampler
from pfgm.theory.analytic import CauchyBlob, EmpiricalDenoiser, GaussianBlob, PointCharge
from pfgm.theory.kernel import StudentTKernel

F64 = torch.float64
INF = StudentTKernel(math.inf)
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def cauchy(x, scale):
    N = x.shape[1]
    return torch.tensor(stats.multivariate_t(loc=[0] * N, shape=scale**2, df=1).logpdf(x.numpy())).reshape(-1)


@pytest.mark.parametrize("N", [1, 2, 3, 6])
def test_density_of_cauchy_data(N):
    """The density at sigma_min is Cauchy of scale s + sigma_min. The prior neglects s, an error that falls as 1/sigma_max."""
    x, errors = StudentTKernel(1).sample(torch.zeros(200, N, dtype=F64), 0.31), []
    for sigma_max in (100.0, 1000.0):
        value = log_prob(CauchyBlob(0.3), StudentTKernel(1), x, sigma_min=0.01, sigma_max=sigma_max, **TIGHT)
        errors.append(float((value - cauchy(x, 0.31)).mean()))
    assert abs(errors[1]) < 5e-3 * N
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    at_once = log_prob(CauchyBlob(0.3), StudentTKernel(1), x, sigma_min=0.01, sigma_max=1e7, **TIGHT)
    assert torch.allclose(at_once, cauchy(x, 0.31), atol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (1, 3, 2)])
@pytest.mark.parametrize("sigma_data", [0.2, 0.7])
def test_density_of_gaussian_data(shape, sigma_data):
    x = 0.5 * torch.randn(50, *shape, dtype=F64)
    settings = {"sigma_min": 0.02, "sigma_max": 400.0, "sigma_data": sigma_data}
    value = log_prob(GaussianBlob(0.4), INF, x, **settings, **TIGHT)
    exact = torch.distributions.Normal(0.0, math.hypot(0.4, 0.02)).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(value, exact, atol=1e-5)


@pytest.mark.parametrize("D", [1.0, 8.0, math.inf])
def test_total_mass_on_the_line_is_one(D):
    charges = torch.tensor([[-0.6], [0.1], [0.9]], dtype=F64)
    kernel, x = StudentTKernel(D), torch.linspace(-40, 40, 4001, dtype=F64)[:, None]
    value = log_prob(EmpiricalDenoiser(charges, D), kernel, x, sigma_min=0.2, sigma_max=400.0, rtol=1e-6, atol=1e-6)
    tail = 2 * 0.2 / (math.pi * 40) if D == 1 else 0.0
    assert integrate.trapezoid(value.exp().numpy(), x[:, 0].numpy()) + tail == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("D", [1.0, 8.0, math.inf])
def test_total_mass_in_the_plane_is_one(D):
    """Integrate in polar coordinates, over r/(1 + r) by Gauss-Legendre, so that no tail is cut off."""
    charges = torch.tensor([[-0.6, 0.2], [0.1, -0.5], [0.9, 0.4]], dtype=F64)
    nodes, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(60))
    s, angle = (nodes + 1) / 2, torch.arange(40, dtype=F64) * 2 * math.pi / 40
    r, area = s / (1 - s), s / (1 - s) ** 3 * weights / 2 * 2 * math.pi / 40
    x = (r[:, None, None] * torch.stack([angle.cos(), angle.sin()], 1)).reshape(-1, 2)
    settings = {"sigma_min": 0.2, "sigma_max": 4000.0, "rtol": 1e-6, "atol": 1e-6}
    value = log_prob(EmpiricalDenoiser(charges, D), StudentTKernel(D), x, **settings)
    assert float((value.exp().reshape(60, 40).sum(1) * area).sum()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("D", [1.0, 8.0, math.inf])
def test_density_of_charges_is_a_mixture_of_kernels(D):
    charges, kernel = torch.randn(4, 3, dtype=F64), StudentTKernel(D)
    x = kernel.sample(charges[torch.arange(40) % 4], 0.3)
    value = log_prob(EmpiricalDenoiser(charges, D), kernel, x, sigma_min=0.3, sigma_max=3e4, rtol=1e-7, atol=1e-7)
    exact = torch.stack([kernel.log_prob(x, y.expand(40, 3), 0.3) for y in charges]).logsumexp(0) - math.log(4)
    assert torch.allclose(value, exact, atol=3e-4)


def test_density_of_a_denoiser_that_ignores_its_input():
    y = torch.zeros(2, dtype=F64)
    value = log_prob(PointCharge(y), StudentTKernel(4.0), torch.ones(3, 2, dtype=F64), sigma_min=0.5, sigma_max=50.0, **TIGHT)
    assert torch.allclose(value, StudentTKernel(4.0).log_prob(torch.ones(3, 2), y.expand(3, 2), 0.5), atol=1e-6)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_estimate_is_unbiased_and_its_standard_error_right(probe):
    charges, kernel, x = torch.randn(6, 4, dtype=F64), StudentTKernel(8.0), torch.randn(1, 4, dtype=F64).repeat(300, 1)
    settings = {"sigma_min": 0.3, "sigma_max": 60.0, "rtol": 1e-3, "atol": 1e-3, "probe": probe}
    exact = log_prob(EmpiricalDenoiser(charges, 8.0), kernel, x[:1], exact=True, **settings)
    out = estimate_log_prob(EmpiricalDenoiser(charges, 8.0), kernel, x, exact=False, probes=8, **settings)
    deviation = out.value - exact
    spread = float(deviation.std())
    assert spread > 0.05, "the field's divergence is not constant"
    assert abs(float(deviation.mean())) < 3 * spread / math.sqrt(300)
    assert float(out.error.square().mean().sqrt()) == pytest.approx(spread, rel=0.15)
    one = estimate_log_prob(EmpiricalDenoiser(charges, 8.0), kernel, x[:5], exact=False, probes=8, **settings)
    assert torch.allclose(one.value, out.value[:5], rtol=0.01), "the probes of a sample depend on its seed and index only"
    assert bool(estimate_log_prob(EmpiricalDenoiser(charges, 8.0), kernel, x[:2], exact=False, **settings).error.isnan().all())


def test_density_is_the_prior_times_the_determinant_of_the_flow():
    """Compute the determinant of the sampler's map by finite differences."""
    charges, kernel, x = torch.randn(5, 2, dtype=F64), StudentTKernel(3.0), torch.randn(1, 2, dtype=F64)
    denoiser, h = EmpiricalDenoiser(charges, 3.0), 1e-4
    flow = Sampler(denoiser, kernel, shape=(2,), sigma_min=0.3, sigma_max=60.0, method="dopri5", rtol=1e-10, atol=1e-10)
    steps = h * torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=F64)
    y = flow.integrate(x + steps, 0.3, 60.0)
    determinant = torch.stack([y[1] - y[2], y[3] - y[4]]).div(2 * h).det().abs().log()
    expected = kernel.log_prob(y[:1], torch.zeros(1, 2), 60.0) + determinant
    assert torch.allclose(log_prob(denoiser, kernel, x, sigma_min=0.3, sigma_max=60.0, **TIGHT), expected, atol=1e-5)


def test_differentiable_density_has_the_gradient_of_the_closed_form():
    x = torch.tensor([[0.3, -0.8]], dtype=F64, requires_grad=True)
    settings = {"sigma_min": 0.02, "sigma_max": 400.0, "rtol": 1e-6, "atol": 1e-6}
    value = log_prob(GaussianBlob(0.4), INF, x, differentiable=True, **settings)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert torch.allclose(gradient, -x / (0.4**2 + 0.02**2), rtol=1e-4)
    assert not log_prob(GaussianBlob(0.4), INF, x, **settings).requires_grad


def test_calls_count_network_evaluations_and_label_reaches_the_network():
    class Counting(nn.Module):
        count = 0

        def forward(self, x, sigma, label):
            assert label.tolist() == [1, 0]
            self.count += 1
            return torch.tanh(x.flip(1) + x)

    denoiser = Counting()
    settings = {"sigma_min": 0.1, "sigma_max": 10.0, "label": torch.tensor([1, 0]), "rtol": 1e-2, "atol": 1e-2}
    out = estimate_log_prob(denoiser, INF, torch.randn(2, 40), probes=3, **settings)
    assert out.calls == denoiser.count
    assert out.value.dtype == F64
    assert bool((out.error > 0).all()), "the trace is estimated in 40 dimensions"


def test_conditions_reach_the_denoiser_and_label_is_shorthand_for_one():
    label, vector, x = torch.tensor([1, 0]), torch.tensor([[0.5], [2.0]], dtype=F64), torch.randn(2, 3, dtype=F64)

    def denoiser(x, sigma, *, label, vector):
        return x * (label + 0.1 * vector[:, 0])[:, None] / 4

    settings = {"sigma_min": 0.1, "sigma_max": 10.0, "rtol": 1e-3, "atol": 1e-3}
    both = log_prob(denoiser, INF, x, label=label, conditions={"vector": vector}, **settings)
    assert torch.equal(both, log_prob(denoiser, INF, x, conditions={"label": label, "vector": vector}, **settings))
    assert not torch.allclose(both, log_prob(denoiser, INF, x, label=1 - label, conditions={"vector": vector}, **settings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes = 0: must be at least 1"),
        ({"probe": "sphere"}, "probe = 'sphere' is unknown. Choose one of rademacher, gaussian"),
        ({"method": "ab3"}, "method = 'ab3' is not adaptive"),
        ({"sigma_max": 0.01}, "sigma_min = 0.1, sigma_max = 0.01"),
        ({"sigma_data": -1.0}, "sigma_data = -1"),
        ({"rtol": 0.0}, "rtol = 0"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        log_prob(GaussianBlob(0.4), INF, torch.zeros(1, 2), **({"sigma_min": 0.1, "sigma_max": 10.0} | options))
