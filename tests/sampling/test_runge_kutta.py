"""Compare per-sample steps with scipy's tableaux, with flows in closed form and with samples alone in a batch."""

import math

import pytest
import torch
from scipy import integrate

from pfgm.nn import UNet
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.sampling import ode
from pfgm.sampling.methods import Problem
from pfgm.sampling.runge_kutta import TABLEAUS, integrate_per_sample
from pfgm.sampling.sampler import Sampler, seed_pairs
from pfgm.theory.analytic import CauchyBlob, EmpiricalDenoiser, PointCharge
from pfgm.theory.kernel import StudentTKernel

F64 = torch.float64


def sampler(denoiser, D=1.0, shape=(3,), **options):
    return Sampler(denoiser, StudentTKernel(D), shape=shape, sigma_min=0.01, sigma_max=40.0, **options)


@pytest.mark.parametrize(("name", "oracle"), [("bosh3", integrate.RK23), ("dopri5", integrate.RK45)])
def test_tableaux_equal_scipys(name, oracle):
    tableau, stages = TABLEAUS[name], oracle.n_stages
    rows = [[*oracle.A[i, :i]] for i in range(1, stages)] + [[*oracle.B]]
    assert [pytest.approx(row, abs=1e-15) for row in rows] == [list(row) for row in tableau.rows]
    assert [abs(e) for e in tableau.error] == pytest.approx([abs(e) for e in oracle.E], abs=1e-15)
    assert sum(tableau.error) == pytest.approx(0, abs=1e-15)
    assert tableau.order == oracle.order


def test_adaptive_heun_is_the_heun_euler_tableau():
    """The error estimate is the difference of Heun and Euler, (k2 - k1) h/2."""
    tableau = TABLEAUS["adaptive_heun"]
    assert (tableau.order, [list(row) for row in tableau.rows]) == (2, [[1.0], [0.5, 0.5]])
    assert list(tableau.error) == [0.5 - 1, 0.5, 0]


@pytest.mark.process
@pytest.mark.parametrize("coordinates", ["angle", "log_sigma"])
@pytest.mark.parametrize(("method", "tolerance"), [("bosh3", 1e-9), ("dopri5", 1e-10), ("adaptive_heun", 1e-6)])
def test_lines_to_a_point_charge_are_straight(method, tolerance, coordinates):
    y, x = torch.randn(3, dtype=F64), torch.tensor([30.0, 1.0, 0.1], dtype=F64)[:, None] * torch.randn(3, 3, dtype=F64)
    options = {"method": method, "coordinates": coordinates, "rtol": tolerance, "atol": tolerance, "independent": True}
    s = sampler(PointCharge(y), **options)
    accuracy = 1e-7 if tolerance < 1e-6 else 1e-4
    assert torch.allclose(s.integrate(x, 40.0, 0.01), y + (x - y) * 0.01 / 40, atol=accuracy)
    assert torch.allclose(s.integrate(x, 0.5, 40.0), y + (x - y) * 80, atol=100 * accuracy)


def test_states_between_steps_follow_the_flow():
    s = sampler(CauchyBlob(0.3), method="bosh3", rtol=1e-8, atol=1e-8, independent=True)
    path = s.trajectory(seed_pairs(5), 9)
    law = (0.3 + path.sigma) / (0.3 + path.sigma[0])
    assert torch.allclose(path.x, path.x[0] * law[..., None], rtol=1e-5, atol=1e-6)


def two_charges(n=40):
    """Return a denoiser of two charges and n starts, from those near the separatrix to those far from it."""
    x = torch.logspace(-2, 1.5, n, dtype=F64)[:, None]
    return EmpiricalDenoiser(torch.tensor([[-0.5], [0.5]], dtype=F64), math.inf), x


def test_result_of_a_sample_does_not_depend_on_its_batch():
    denoiser, x = two_charges()
    loose = {"method": "bosh3", "rtol": 0.02, "atol": 0.02}
    each, shared = (sampler(denoiser, math.inf, (1,), independent=i, **loose) for i in (True, False))
    together = each.integrate(x, 40.0, 0.05)
    assert torch.equal(each.integrate(x, 40.0, 40.0), x)
    assert torch.allclose(each.integrate(x[:1], 40.0, 0.05), together[:1], atol=1e-10)
    assert torch.allclose(each.integrate(x[5:7], 40.0, 0.05), together[5:7], atol=1e-10)
    assert torch.allclose(each.integrate(x.flip(0), 40.0, 0.05), together.flip(0), atol=1e-10)
    coupled = shared.integrate(x, 40.0, 0.05)
    assert float((shared.integrate(x[5:7], 40.0, 0.05) - coupled[5:7]).abs().max()) > 1e-5, "shared steps couple the samples"


def replay(slope, state, tolerance, h):
    """Apply the published controller to a scalar: time, size, acceptance and error of each attempted step, and the end."""
    time, before, tried = 0.0, 1.0, []
    while time < 1:
        h = min(h, 1 - time)
        k = [slope(time, state)]
        for c, row in zip(integrate.RK23.C[1:], integrate.RK23.A[1:], strict=True):
            k.append(slope(time + c * h, state + h * sum(a * b for a, b in zip(row, k, strict=False))))
        after = state + h * sum(b * v for b, v in zip(integrate.RK23.B, k, strict=True))
        k.append(slope(time + h, after))
        gap = abs(h * sum(e * v for e, v in zip(integrate.RK23.E, k, strict=True)))
        error = gap / (tolerance + tolerance * max(abs(state), abs(after)))
        good = error <= 1
        tried.append((time, h, good, gap))
        factor = 0.9 * error ** (-0.7 / 3) * before ** (0.4 / 3)
        if good:
            time, state, before = (1.0 if time + h > 1 - 1e-12 else time + h), after, max(error, 1e-4)
        h *= min(max(factor, 0.2), 2.0 if good else 1.0)
    return tried, state


@pytest.mark.parametrize(("tolerance", "first_step"), [(1e-3, 0.2), (1e-4, 0.9), (1e-4, 0.01)])
def test_step_sizes_follow_the_published_controller(tolerance, first_step):
    """Use a sharp bump of the slope, so that steps are rejected, shrink and grow again."""

    def bump(t, y):
        return 30 * math.exp(-(((t - 0.6) / 0.03) ** 2)) + 3 - y

    tried, end = replay(bump, 0.0, tolerance, first_step)
    assert any(not good for _, _, good, _ in tried)

    def slope(t, state):
        return torch.tensor([[bump(float(t), float(state))]], dtype=F64)

    seen, ends = [], [0.0, 1.0]
    state, at = torch.zeros(1, 1, dtype=F64), torch.tensor(ends, dtype=F64)
    problem = Problem(slope, state, ends, at, lambda t, state: seen.append(float(t)), tolerance, tolerance, first_step, 1000)
    states, stats = integrate_per_sample(TABLEAUS["bosh3"], problem)
    times = [time + h if good else time for time, h, good, _ in tried]
    assert seen == pytest.approx(times)
    assert float(states[-1]) == pytest.approx(end)
    assert (stats.accepted, stats.rejected) == (sum(t[2] for t in tried), sum(not t[2] for t in tried))
    assert float(stats.error) == pytest.approx(sum(gap for _, _, good, gap in tried if good))


def test_steps_are_counted_per_sample():
    denoiser, x = two_charges(3)

    def slope(t, state):
        level = 40 ** (1 - t) * 0.05**t
        return -math.log(40 / 0.05) * (state - denoiser(state, level))

    def integrate_steps(state):
        """Return the statistics, the times [steps, B] after each step, and the steps that each sample accepts and rejects."""
        seen, ends = [], [0.0, 1.0]
        at = torch.tensor(ends, dtype=F64)
        problem = Problem(slope, state, ends, at, lambda t, state: seen.append(t), 1e-3, 1e-3, 0.05, 1000)
        stats = integrate_per_sample(TABLEAUS["bosh3"], problem)[1]
        after = torch.stack(seen)
        before = torch.cat([torch.zeros(1, len(state), dtype=F64), after[:-1]])
        moved = after > before
        return stats, after, moved.sum(0).tolist(), (~moved & (before < 1)).sum(0).tolist()

    stats, times, accepted, rejected = integrate_steps(x)
    alone = [integrate_steps(row[None])[0] for row in x]
    assert accepted == [one.accepted for one in alone]
    assert rejected == [one.rejected for one in alone]
    assert (stats.accepted, stats.rejected) == (max(accepted), max(rejected))
    assert len(set(accepted)) > 1
    assert len(times) == max(a + r for a, r in zip(accepted, rejected, strict=True))
    assert torch.equal(times[-1], torch.ones(3, dtype=F64))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3},
        {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3, "independent": True},
        {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2, "coordinates": "log_sigma"},
        {"method": "ab3", "steps": 12},
        {"method": "ab2", "steps": 12},
        {"method": "dpmpp_2m", "steps": 20},
        {"method": "dpmpp_3m", "steps": 20},
    ],
)
def test_estimated_errors_have_the_right_size(options):
    """Compare with the true errors of 200 samples: most are below the estimate, and within a factor of 300 of it."""
    tight = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}
    if options["method"].startswith("ab"):  # compare at the level where its grid ends
        level = sampler(CauchyBlob(0.3), **options).last_level
        tight = {"method": "rk4", "grid": [40 * (level / 40) ** (i / 400) for i in range(401)]}
    exact = sampler(CauchyBlob(0.3), **tight).sample(200).x.double()
    out = sampler(CauchyBlob(0.3), **options).sample(200)
    ratio = out.error / (out.x - exact).square().mean(1).sqrt()
    assert out.error.shape == (200,)
    assert 1 < float(ratio.median()) < 300
    assert float(ratio.quantile(0.05)) > 0.5


@pytest.mark.parametrize("method", ["ab3", "bosh3"])
def test_estimated_errors_have_the_units_of_x(method):
    options = {"method": method} | ({"steps": 6} if method == "ab3" else {"rtol": 0.05, "atol": 0.05})

    def error(c):
        settings = {"shape": (3,), "sigma_min": 0.01 * c, "sigma_max": 40.0 * c, "sigma_data": 0.5 * c}
        return Sampler(CauchyBlob(0.3 * c), StudentTKernel(1.0), **settings, **options).sample(5).error

    assert torch.allclose(error(20.0), 20 * error(1.0), rtol=0.1)


def test_samples_report_the_steps_of_the_slowest_sample():
    denoiser = EmpiricalDenoiser(torch.randn(5, 3, dtype=F64), 1.0)
    s = sampler(denoiser, method="bosh3", rtol=1e-3, atol=1e-3, independent=True)
    alone = [s.draw([(0, i)]) for i in range(6)]
    together = s.sample(6)
    assert together.accepted == max(one.accepted for one in alone) > min(one.accepted for one in alone)
    assert together.rejected == max(one.rejected for one in alone)


def test_exceptions_of_the_network_pass_through():
    def denoiser(x, sigma, label=None):
        raise AssertionError("of the network")

    with pytest.raises(AssertionError, match="of the network"):
        sampler(denoiser, rtol=0.1).sample(2)


def test_fixed_runge_kutta_steps_have_no_error_estimate():
    assert sampler(CauchyBlob(0.3), method="midpoint", steps=5).sample(3).error is None


@pytest.mark.parametrize("independent", [True, False])
def test_unreachable_tolerance_raises_an_error_with_advice(monkeypatch, independent):
    monkeypatch.setattr(ode, "MAX_STEPS", 50)
    s = sampler(lambda x, sigma, label=None: torch.rand_like(x), rtol=1e-12, atol=1e-12, independent=independent)
    with pytest.raises(ode.SolverError, match=r"bosh3 could not meet its tolerance at level \d.* after \d+ calls .*Raise rtol"):
        s.sample(2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "heun2", "steps": 6},
        {"method": "dpmpp_3m", "steps": 9},
        {"method": "bosh3", "rtol": 0.01, "atol": 0.01},
        {"method": "bosh3", "rtol": 0.01, "atol": 0.01, "independent": True},
    ],
)
@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_max_calls_denoises_the_last_state(options, most):
    levels = []
    s = sampler(CauchyBlob(0.3), **options)
    out = s.sample(4, max_calls=most, on_call=lambda calls, level: levels.append(level))
    whole = s.sample(4)
    assert (out.calls, out.complete, whole.complete) == (most, False, True)
    assert s.sample(4, max_calls=whole.calls).complete
    t = s.prior(seed_pairs(4)).t
    assert bool(torch.isfinite(out.x).all())
    ratio = ((1 + t.square().sum(1)) / 4).sqrt()[:, None]
    start = 40 / ratio * t * 0.3 / (0.3 + 40 / ratio)
    assert torch.allclose(out.x.double(), start, rtol=1e-5 if most == 1 else 0.3), "denoising ends the trajectory"
    assert out.error is None
    assert out.accepted < whole.accepted
    if options.get("method") != "heun2":
        assert levels[-1] <= levels[-2:][0] * (1 + 1e-9)


@pytest.mark.process
@pytest.mark.parametrize("D", [1.0, math.inf])
def test_network_samples_on_fixed_grids_depend_on_their_seed_only(D):
    """Vary batch size, members and order; results in float32 on the CPU agree to 1e-6."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), width=16, multipliers=(1, 2), blocks=1)
    torch.nn.init.normal_(net.last[-1].weight, std=0.02)
    s = sampler(PreconditionedDenoiser(net, D, 0.5, 0.06).eval(), D, (1, 8, 8))
    pairs = seed_pairs(9)
    x = s.draw(pairs).x
    assert float(x.std()) > 0.1
    assert torch.allclose(torch.cat([s.draw([pair]).x for pair in pairs]), x, atol=1e-6, rtol=0)
    assert torch.allclose(s.draw(pairs[::-1]).x.flip(0), x, atol=1e-6, rtol=0)
    assert torch.allclose(torch.cat([s.draw(pairs[:4]).x, s.draw(pairs[4:]).x]), x, atol=1e-6, rtol=0)
