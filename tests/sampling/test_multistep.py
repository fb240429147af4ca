"""Multistep methods: exact on polynomials, and equal to their published loops."""

import itertools
import math

import pytest
import torch
from scipy import integrate

from pfgm.sampling.multistep import AdamsBashforth, DPMSolver
from pfgm.sampling.sampler import seed_pairs
from pfgm.theory.analytic import EmpiricalDenoiser
from pfgm.theory.kernel import StudentTKernel
from tests.helpers import F64, make_sampler


def test_dpm_solver_2m_is_the_published_loop():
    """Replay algorithm 2 of arXiv 2211.01095 with alpha = 1 and lambda = -log(sigma)."""
    denoiser, levels = EmpiricalDenoiser(torch.randn(20, 3, dtype=F64), math.inf), [40.0, 11.0, 3.0, 1.4, 0.2, 0.01]
    s = make_sampler(denoiser, StudentTKernel(math.inf), method="dpmpp_2m", grid=levels)
    start = x = s.prior(seed_pairs(4)).t * 40
    before = h_before = None
    for here, there in itertools.pairwise(levels):
        h, now = math.log(here / there), denoiser(x, here)
        guess = now if before is None else (1 + h / (2 * h_before)) * now - h / (2 * h_before) * before
        x, before, h_before = there / here * x - math.expm1(-h) * guess, now, h
    assert torch.allclose(s.integrate(start, 40.0, 0.01), x, atol=1e-10)


def test_multistep_methods_integrate_polynomials_exactly():
    """Integrate a polynomial of time alone, of the highest degree for which the first step is exact as well."""
    times = [0.0, 0.4, 0.5, 1.3, 1.35, 2.0]
    for order, degree in ((2, 0), (3, 1)):
        steps = AdamsBashforth(order)(lambda t, u, d=degree: torch.tensor([[t**d]]), torch.zeros(1, 1), times)
        ends = [state.flatten() for state, _ in steps]
        exact = [t ** (degree + 1) / (degree + 1) for t in times[1:]]
        assert torch.allclose(torch.cat(ends), torch.tensor(exact), atol=1e-6)


def test_dpm_solver_3m_integrates_the_parabola_through_three_denoised_points():
    """Take one step after two that only fill the memory. The published Euler start keeps the whole method at order 2."""
    times = [1.2, 0.9, 0.1, -0.6]
    states = [state for state, _ in DPMSolver(3)(lambda t, x: x - t**2, torch.zeros(1, dtype=F64), times)]
    integral = integrate.quad(lambda t: math.exp(times[3] - t) * t**2, times[2], times[3])[0]
    assert float(states[2]) == pytest.approx(math.exp(times[3] - times[2]) * float(states[1]) - integral, abs=1e-12)
