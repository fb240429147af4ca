"""Posteriors of linear measurements against the closed form of Gaussian data."""

import math

import pytest
import torch
from torch import nn

from pfgm.sampling.inverse import Mask, MeasuredDenoiser, Measurement, conjugate_residuals
from pfgm.sampling.sampler import Sampler
from pfgm.theory.analytic import EmpiricalDenoiser
from pfgm.theory.field import posterior_mean
from pfgm.theory.kernel import StudentTKernel

F64 = torch.float64
N, NOISE = 4, 0.3
g = torch.Generator().manual_seed(0)
ROOT = torch.randn(N, N, dtype=F64, generator=g)
C = ROOT @ ROOT.T / N + 0.2 * torch.eye(N, dtype=F64)
A = torch.randn(2, N, dtype=F64, generator=g)
B = torch.tensor([[0.7, -1.1]], dtype=F64)


class Gaussian(nn.Module):
    """E[y | x, sigma] of data N(0, C) at D = inf."""

    dtype = F64

    def forward(self, x, sigma, label=None):
        s = torch.as_tensor(sigma, dtype=F64).expand(len(x))[:, None, None] ** 2
        return torch.linalg.solve(C + s * torch.eye(N, dtype=F64), x[..., None])[..., 0] @ C


def measure(x):
    return x @ A.T + 0.4


def posterior(x=None, sigma=math.inf):
    """Mean and covariance of y given x = y + sigma n and b = A y + .4 + noise, from the sum of the precisions."""
    precision = torch.linalg.inv(C) + A.T @ A / NOISE**2 + torch.eye(N, dtype=F64) / sigma**2
    right = (B - 0.4) @ A / NOISE**2 + (0 if x is None else x / sigma**2)
    return torch.linalg.solve(precision, right.T).T, torch.linalg.inv(precision)


def measured(n, **options):
    return MeasuredDenoiser(Gaussian(), measure, B.expand(n, 2), NOISE, **options)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 40.0])
def test_gaussian_data_have_the_exact_conditional_denoiser(sigma):
    x = 3 * torch.randn(50, N, dtype=F64)
    assert torch.allclose(measured(50)(x, sigma), posterior(x, sigma)[0], rtol=0, atol=1e-8)
    each = torch.rand(50, dtype=F64) + sigma
    rows = torch.cat([posterior(x[i : i + 1], float(each[i]))[0] for i in range(50)])
    assert torch.allclose(measured(50)(x, each), rows, rtol=0, atol=1e-8)


def test_drawn_posterior_has_the_moments_of_the_closed_form():
    sampler = Sampler(measured(4000), StudentTKernel(math.inf), shape=(N,), sigma_min=1e-3, sigma_max=400.0, sigma_data=1.0)
    x = sampler.with_denoiser(measured(4000)).sample(4000).x.double()
    mean, covariance = posterior()
    error = x.mean(0) - mean[0]
    assert bool((error.abs() < 3 * (covariance.diagonal() / 4000).sqrt()).all())
    spread = torch.cov(x.T)
    variance = covariance.diagonal()
    standard_error = ((variance[:, None] * variance + covariance**2) / 4000).sqrt()
    assert bool(((spread - covariance).abs() < 3 * standard_error).all())


def test_an_exact_measurement_of_everything_is_the_answer():
    x, y = torch.randn(5, N, dtype=F64), torch.randn(5, N, dtype=F64)
    denoiser = MeasuredDenoiser(Gaussian(), lambda y: y, y, 1e-4)
    assert torch.allclose(denoiser(x, 1.0), y, atol=1e-6)


class StudentGaussian(nn.Module):
    """E[y | x, sigma] of data N(0, C) at finite D, or given b as well: the average over kappa of Gaussian answers."""

    dtype = F64

    def __init__(self, D, measured=False):
        super().__init__()
        self.D, self.measured = D, measured

    def forward(self, x, sigma, label=None):
        u = torch.linspace(-8, 8, 101, dtype=F64) * math.sqrt(2 / self.D)
        prior = self.D / 2 * (u - u.exp())
        log_weights, means = [], []
        for log_kappa in u:
            noise = sigma**2 / log_kappa.exp() * torch.eye(N, dtype=F64)
            joint = C + noise
            cross, value = C, x
            if self.measured:
                joint = torch.cat(
                    [torch.cat([joint, C @ A.T], 1), torch.cat([A @ C, A @ C @ A.T + NOISE**2 * torch.eye(2)], 1)]
                )
                cross, value = torch.cat([C, C @ A.T], 1), torch.cat([x, (B - 0.4).expand(len(x), 2)], 1)
            log_weights.append(
                torch.distributions.MultivariateNormal(torch.zeros(len(joint), dtype=F64), joint).log_prob(value)
            )
            means.append(value @ torch.linalg.solve(joint, cross.T))
        weights = (torch.stack(log_weights) + prior[:, None]).softmax(0)
        return (weights[..., None] * torch.stack(means)).sum(0)


def test_gaussian_data_at_finite_D_have_an_error_that_falls_as_one_over_D():
    x, sigma, errors = 2 * torch.randn(20, N, dtype=F64, generator=torch.Generator().manual_seed(5)), 1.0, []
    for D in (128.0, 1024.0):
        exact = StudentGaussian(D, measured=True)(x, sigma)
        guess = MeasuredDenoiser(StudentGaussian(D), measure, B.expand(20, 2), NOISE)(x, sigma)
        errors.append(float((guess - exact).square().mean().sqrt()))
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)


def test_far_from_gaussian_it_is_an_approximation_that_helps():
    """Charges at finite D: nearer to the exact posterior mean than the denoiser that ignores the measurement."""
    charges, D, sigma = torch.randn(40, N, dtype=F64, generator=torch.Generator().manual_seed(3)), 128.0, 0.7
    y = charges[torch.arange(200) % 40]
    x = StudentTKernel(D).sample(y, sigma, torch.Generator().manual_seed(1))
    b = measure(y) + NOISE * torch.randn(200, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    plain, errors = EmpiricalDenoiser(charges, D), []
    fit = -(b[:, None] - measure(charges)).square().sum(2) / (2 * NOISE**2)
    exact = torch.cat([posterior_mean(x[i : i + 1], sigma, charges, D, fit[i].softmax(0)) for i in range(200)])
    for guess in (MeasuredDenoiser(plain, measure, b, NOISE)(x, sigma), plain(x, sigma)):
        errors.append(float((guess - exact).norm(dim=1).mean()))
    assert errors[0] < 0.75 * errors[1]


def test_conjugate_residuals_solve_every_sample_and_stop_at_curvature():
    right, M = torch.randn(3, 4, dtype=F64), torch.stack([C, 5 * C, -C])
    u = conjugate_residuals(lambda v: torch.einsum("bij,bj->bi", M, v), right, 10)
    assert torch.allclose(u[:2], torch.linalg.solve(M[:2], right[:2]), atol=1e-8)
    assert not u[2].any(), "the matrix is negative there"
    low = conjugate_residuals(lambda v: 0.5 * v, right, 10, floor=1.0)
    assert not low.any(), "the matrix is below its floor"
    turn = torch.tensor([[0.3, 4.0], [-4.0, 0.3]], dtype=F64)
    once = conjugate_residuals(lambda v: v @ turn, right[:, :2], 1)
    many = conjugate_residuals(lambda v: v @ turn, right[:, :2], 30)
    residuals = [(right[:, :2] - u @ turn).norm(dim=1) for u in (once, many)]
    assert bool((residuals[1] <= residuals[0] + 1e-12).all()), "no step makes it worse, whatever the matrix"
    calls = []
    conjugate_residuals(lambda v: calls.append(1) or v, right, 10)
    assert len(calls) == 1


def test_measurements_cost_one_network_call():
    out = Sampler(measured(3), StudentTKernel(math.inf), shape=(N,), sigma_min=0.01, sigma_max=40.0, preset="fast").sample(3)
    assert out.calls == 6


def test_masks_and_measurements_say_what_is_wrong():
    mask = Mask(torch.tensor([[True, False], [False, True]]))
    assert mask(torch.arange(8.0).reshape(2, 2, 2)).tolist() == [[0, 3], [4, 7]]
    with pytest.raises(ValueError, match=r"known has shape \(2, 2\), samples \(3,\)"):
        mask(torch.zeros(1, 3))
    for bad in (torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="known: give booleans"):
            Mask(bad)
    for options, message in (({"noise": 0.0}, "noise"), ({"noise": 1.0, "iterations": 0}, "iterations = 0")):
        with pytest.raises(ValueError, match=message):
            Measurement(mask, torch.zeros(2, 2), **options)
    with pytest.raises(ValueError, match="values: some"):
        Measurement(mask, torch.tensor([math.nan]), 1.0)


def test_there_is_no_likelihood_under_a_measurement():
    with pytest.raises(ValueError, match="measurement: the denoiser under it has no derivative"):
        measured(2)(torch.zeros(2, N, dtype=F64, requires_grad=True), 1.0)
