"""The registry of methods: every property that an entry states is measured."""

import itertools
import math

import pytest
import torch
from scipy import stats

from pfgm.sampling.methods import BOTH, METHODS, Method, Problem, on_grid, register, rms
from pfgm.sampling.sampler import seed_pairs
from pfgm.theory.analytic import CauchyBlob, EmpiricalDenoiser, GaussianBlob
from tests.helpers import F64, make_sampler

# Straight lines leave the published methods without error on the Cauchy blob; the Euler start of dpmpp_3m keeps it at order 2.
MEASURED = [(name, blob) for name in ("euler", "midpoint", "heun2", "rk4", "ab2", "ab3") for blob in (CauchyBlob, GaussianBlob)]
MEASURED += [("dpmpp_2m", GaussianBlob), ("edm_heun", GaussianBlob)]


def uneven(n, start=3.0, end=0.3):
    """Return the levels of n steps that shrink and grow by turns."""
    share = [(i + 0.2 * (i % 2)) / n for i in range(n)] + [1.0]
    return [(start**0.2 + t * (end**0.2 - start**0.2)) ** 5 for t in share]


@pytest.mark.parametrize("grid", ["uniform", "paced", "rho", uneven])
@pytest.mark.parametrize(("method", "blob"), MEASURED)
def test_fixed_methods_converge_at_their_order(method, grid, blob):
    """Choose sigma_data other than the blob's scale, so that the right-hand side is not trivial."""
    x = torch.ones(1, 2, dtype=F64)
    law = (0.4 + 0.3) / (0.4 + 3.0) if blob is CauchyBlob else math.sqrt((0.16 + 0.09) / (0.16 + 9.0))
    counts, errors = (32, 64, 128) if method == "rk4" else (128, 256, 512), []
    for n in counts:
        options = {"grid": grid(n)} if callable(grid) else {"grid": grid, "steps": n}
        run = make_sampler(blob(0.4), shape=(2,), method=method, **options)
        errors.append(float((run.integrate(x, 3.0, 0.3) - law * x).norm()))
    slope = stats.linregress([math.log(n) for n in counts], [math.log(e) for e in errors]).slope
    assert -slope == pytest.approx(METHODS[method].order, abs=0.15)


@pytest.mark.parametrize("method", ["midpoint", "ab3", "dpmpp_2m"])
def test_requested_states_include_those_of_the_steps(method):
    """Ask for as many points as the grid has levels, for the ends alone, and for points between."""
    denoiser, pairs = EmpiricalDenoiser(torch.randn(20, 3, dtype=F64), 1.0), seed_pairs(4)
    s = make_sampler(denoiser, method=method, steps=6, grid="uniform")
    whole, ends, fine = (s.trajectory(pairs, points).x for points in (7, 2, 13))
    assert torch.allclose(ends, whole[[0, -1]])
    assert torch.allclose(fine[::2], whole)


@pytest.mark.parametrize("sign", [1, -1])
def test_states_between_the_steps_are_interpolated_linearly(sign):
    """Step along the parabola t², so that interpolation differs from it and from the ends."""

    def parabola(slope, state, times):
        yield from ((torch.full_like(state, time**2), None) for time in times[1:])

    times, seen = [0.0, 1.0 * sign, 3.0 * sign], []
    at = sign * torch.tensor([0.0, 0.25, 1.0, 1.5, 2.5, 3.0], dtype=F64)
    problem = Problem(lambda t, u: u, torch.zeros(1, 1, dtype=F64), times, at, lambda t, u: seen.append((t, float(u))))
    states, stats = on_grid(parabola)(problem)
    assert states.flatten().tolist() == pytest.approx([0.0, 0.25, 1.0, 3.0, 7.0, 9.0])
    assert seen == [(1.0 * sign, 1.0), (3.0 * sign, 9.0)]
    assert (stats.accepted, stats.error) == (2, None)


def test_a_registered_method_is_available_everywhere(monkeypatch):
    """Register Ralston's method of order 2, with Euler's as the method of lower order."""

    def ralston(slope, state, times):
        for start, end in itertools.pairwise(times):
            first = slope(start, state)
            second = slope(start + 2 / 3 * (end - start), state + 2 / 3 * (end - start) * first)
            lower, state = state + (end - start) * first, state + (end - start) * (first + 3 * second) / 4
            yield state, lower

    monkeypatch.setitem(METHODS, "ralston", None)  # removed again after the test
    register(Method("ralston", 2, BOTH, on_grid(ralston), grid="rho", one_step=True))
    denoiser, x = EmpiricalDenoiser(torch.randn(20, 3, dtype=F64), 1.0), torch.randn(4, 3, dtype=F64)
    exact = make_sampler(denoiser, method="dopri5", rtol=1e-9, atol=1e-9).integrate(x, 3.0, 0.3)
    errors = [
        float((make_sampler(denoiser, method="ralston", steps=n).integrate(x, 3.0, 0.3) - exact).norm()) for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)
    out = make_sampler(denoiser, method="ralston", steps=5).sample(3)
    assert (out.calls, out.accepted, out.error.shape) == (11, 5, (3,))
    assert make_sampler(denoiser, method="ralston", steps=5, s_churn=1.0).sample(3).calls > 11
    with pytest.raises(ValueError, match=r"unknown\. Choose one of .*ralston"):
        make_sampler(denoiser, method="none")


def test_the_norm_of_errors_is_the_root_mean_square_of_each_sample():
    assert rms(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist() == pytest.approx([math.sqrt(12.5), math.sqrt(0.5)])
