"""Solvers, coordinates and the sampler against flows known in closed form."""

import itertools
import math

import pytest
import torch
from scipy import integrate, stats

from pfgm.core import rng
from pfgm.core.tensors import norm
from pfgm.sampling import ode, runge_kutta, solvers
from pfgm.sampling.latents import Latent
from pfgm.sampling.multistep import adams_bashforth, dpm_solver
from pfgm.sampling.sampler import Sampler, seed_pairs
from pfgm.theory.analytic import CauchyBlob, EmpiricalDenoiser, GaussianBlob, PointCharge
from pfgm.theory.kernel import StudentTKernel

F64 = torch.float64
TIGHT = {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}
KERNEL = StudentTKernel(1)


def sampler(denoiser, kernel=KERNEL, shape=(3,), sigma_min=0.01, sigma_max=40.0, **options):
    return Sampler(denoiser, kernel, shape=shape, sigma_min=sigma_min, sigma_max=sigma_max, **options)


@pytest.mark.parametrize("coordinates", ["angle", "log_sigma"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_lines_to_a_point_charge_are_straight(coordinates, method):
    y, x = torch.randn(3, dtype=F64), 30 * torch.randn(4, 3, dtype=F64)
    s = sampler(PointCharge(y), method=method, coordinates=coordinates, rtol=1e-9, atol=1e-9)
    assert torch.allclose(s.integrate(x, 40.0, 0.01), y + (x - y) * 0.01 / 40, atol=1e-7)
    assert torch.allclose(s.integrate(x, 0.5, 40.0), y + (x - y) * 80, atol=1e-5)


@pytest.mark.parametrize("coordinates", ["angle", "log_sigma"])
@pytest.mark.parametrize(
    ("denoiser", "ratio"),
    [
        (CauchyBlob(0.3), lambda a, b: (0.3 + b) / (0.3 + a)),
        (GaussianBlob(0.3), lambda a, b: math.sqrt((0.09 + b * b) / (0.09 + a * a))),
    ],
)
def test_flows_of_blobs(denoiser, ratio, coordinates):
    x = torch.randn(4, 3, dtype=F64)
    s = sampler(denoiser, coordinates=coordinates, sigma_data=0.7, **TIGHT)
    assert torch.allclose(s.integrate(x, 5.0, 0.02), x * ratio(5.0, 0.02), atol=1e-7)
    assert torch.allclose(s.integrate(x, 0.02, 5.0), x * ratio(0.02, 5.0), atol=1e-6)


def test_stream_function_is_constant_along_lines():
    """N = D = 1: Σ p_i arg(x - y_i + i z) does not change on the way down."""
    y, p = torch.tensor([[-0.6], [0.1], [0.9]], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    x = torch.linspace(-3, 3, 12, dtype=F64)[:, None]

    def stream(x, z):
        return (p * torch.atan2(torch.full_like(x, z), x - y.T)).sum(1)

    for coordinates in ("angle", "log_sigma"):
        s = sampler(EmpiricalDenoiser(y, 1.0, p), coordinates=coordinates, **TIGHT)
        assert torch.allclose(stream(s.integrate(x, 2.0, 0.05), 0.05), stream(x, 2.0), atol=1e-7)


ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4, "ab2": 2, "ab3": 3}
PUBLISHED = {"dpmpp_2m": 2, "edm_heun": 2}


def uneven(n, start=3.0, end=0.3):
    """n steps that shrink and grow by turns."""
    share = [(i + 0.2 * (i % 2)) / n for i in range(n)] + [1.0]
    return [(start**0.2 + t * (end**0.2 - start**0.2)) ** 5 for t in share]


@pytest.mark.parametrize("grid", ["uniform", "paced", "rho", uneven])
@pytest.mark.parametrize(
    ("method", "blob"), [(m, b) for m in ORDERS for b in (CauchyBlob, GaussianBlob)] + [(m, GaussianBlob) for m in PUBLISHED]
)
def test_fixed_methods_converge_at_their_order(method, grid, blob):
    """sigma_data differs from the blob's scale, so that the right-hand side is not trivial. The published methods have
    no error on the Cauchy blob, whose lines are straight."""
    x = torch.ones(1, 2, dtype=F64)
    law = (0.4 + 0.3) / (0.4 + 3.0) if blob is CauchyBlob else math.sqrt((0.16 + 0.09) / (0.16 + 9.0))
    counts, errors = (32, 64, 128) if method == "rk4" else (128, 256, 512), []
    for n in counts:
        options = {"grid": grid(n)} if callable(grid) else {"grid": grid, "steps": n}
        run = sampler(blob(0.4), shape=(2,), method=method, **options)
        errors.append(float((run.integrate(x, 3.0, 0.3) - law * x).norm()))
    slope = stats.linregress([math.log(n) for n in counts], [math.log(e) for e in errors]).slope
    assert -slope == pytest.approx((ORDERS | PUBLISHED)[method], abs=0.15)


@pytest.mark.parametrize("method", [*PUBLISHED, "dpmpp_3m"])
def test_published_methods_are_exact_on_straight_lines(method):
    y, x = torch.randn(3, dtype=F64), 30 * torch.randn(4, 3, dtype=F64)
    s = sampler(PointCharge(y), method=method, steps=5)
    assert torch.allclose(s.integrate(x, 40.0, 0.01), y + (x - y) * 0.01 / 40, atol=1e-12)
    assert torch.allclose(s.integrate(x, 0.5, 40.0), y + (x - y) * 80, atol=1e-9)


def test_edm_heun_is_the_published_loop():
    """Algorithm 1 of arXiv 2206.00364 without churn, eq. 5 for its levels, the last step to zero being an Euler step."""
    denoiser, n = EmpiricalDenoiser(torch.randn(20, 3, dtype=F64), math.inf), 7
    s = sampler(denoiser, StudentTKernel(math.inf), method="edm_heun", steps=n)
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


def test_dpm_solver_2m_is_the_published_loop():
    """Algorithm 2 of arXiv 2211.01095 with alpha = 1, lambda = -log(sigma)."""
    denoiser, levels = EmpiricalDenoiser(torch.randn(20, 3, dtype=F64), math.inf), [40.0, 11.0, 3.0, 1.4, 0.2, 0.01]
    s = sampler(denoiser, StudentTKernel(math.inf), method="dpmpp_2m", grid=levels)
    start = x = s.prior(seed_pairs(4)).t * 40
    before = h_before = None
    for here, there in itertools.pairwise(levels):
        h, now = math.log(here / there), denoiser(x, here)
        guess = now if before is None else (1 + h / (2 * h_before)) * now - h / (2 * h_before) * before
        x, before, h_before = there / here * x - math.expm1(-h) * guess, now, h
    assert torch.allclose(s.integrate(start, 40.0, 0.01), x, atol=1e-10)


def test_multistep_methods_integrate_polynomials_exactly():
    """A slope that is a polynomial of time alone, of the highest degree whose start is exact as well."""
    times = [0.0, 0.4, 0.5, 1.3, 1.35, 2.0]
    for order, degree in ((2, 0), (3, 1)):
        steps = adams_bashforth(lambda t, u, d=degree: torch.tensor([[t**d]]), torch.zeros(1, 1), times, order)
        ends = [state.flatten() for state, _ in steps]
        exact = [t ** (degree + 1) / (degree + 1) for t in times[1:]]
        assert torch.allclose(torch.cat(ends), torch.tensor(exact), atol=1e-6)


def test_dpm_solver_3m_integrates_the_parabola_through_three_denoised_points():
    """One step after two others, which only fill its memory. (Its published Euler start keeps the whole at order 2.)"""
    times = [1.2, 0.9, 0.1, -0.6]
    states = [state for state, _ in dpm_solver(lambda t, x: x - t**2, torch.zeros(1, dtype=F64), times, 3)]
    integral = integrate.quad(lambda t: math.exp(times[3] - t) * t**2, times[2], times[3])[0]
    assert float(states[2]) == pytest.approx(math.exp(times[3] - times[2]) * float(states[1]) - integral, abs=1e-12)


def test_draws_on_the_uniform_grid_leave_a_third_of_a_step_to_denoising():
    seen = []
    sampler(CauchyBlob(0.3), method="euler", steps=6, sigma_data=0.5).sample(2, on_call=lambda *call: seen.append(call))
    theta = [math.atan(level / 0.5) for _, level in seen]
    assert theta[-1] == pytest.approx((theta[0] - theta[1]) / 3)
    seen.clear()
    sampler(CauchyBlob(0.3), method="euler", steps=400).sample(2, on_call=lambda *call: seen.append(call))
    assert seen[-1][1] == 0.01, "never below sigma_min"
    seen.clear()
    sampler(CauchyBlob(0.3), grid=[40.0, 2.0, 0.2]).sample(2, on_call=lambda *call: seen.append(call))
    assert [level for _, level in seen][-1] == 0.2


@pytest.mark.parametrize("method", ["midpoint", "ab3", "dpmpp_2m"])
def test_the_way_passes_through_the_states_of_its_steps(method):
    """With as many points as the grid has levels, with the ends alone, and with points between."""
    denoiser, pairs = EmpiricalDenoiser(torch.randn(20, 3, dtype=F64), 1.0), seed_pairs(4)
    s = sampler(denoiser, method=method, steps=6, grid="uniform")
    whole, ends, fine = (s.trajectory(pairs, points).x for points in (7, 2, 13))
    assert torch.allclose(ends, whole[[0, -1]])
    assert torch.allclose(fine[::2], whole)


def test_grids_of_ones_own_fit_the_way_in_both_directions():
    x = torch.randn(4, 3, dtype=F64)
    s = sampler(CauchyBlob(0.3), method="midpoint", grid=[5.0, 2.0, 1.0, 0.5, 0.2])
    up = sampler(CauchyBlob(0.3), **TIGHT).integrate(x, 0.01, 5.0)
    assert torch.allclose(s.integrate(x, 0.01, 5.0), up, rtol=0.05), "one more step to the end"
    with pytest.raises(ValueError, match="grid begins at 5; this way begins at 40"):
        s.sample(2)
    with pytest.raises(ValueError, match=r"grid ends at 0\.2; this way ends at 0.3"):
        s.integrate(x, 5.0, 0.3)


@pytest.mark.parametrize("D", [1.0, 8.0, math.inf])
def test_unequal_charges_get_their_shares(D):
    """Landing fractions of charges .2, .5, .3, started on the hemisphere: three standard errors."""
    y, p, n = torch.tensor([[-0.7, 0.1], [0.0, -0.4], [0.5, 0.6]], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64), 3000
    y = y - p @ y
    s = sampler(EmpiricalDenoiser(y, D, p), StudentTKernel(D), (2,), 0.01, 100.0, method="dopri5", rtol=1e-3, atol=1e-3)
    x = s.sample(n).x
    landed = torch.cdist(x.double(), y).argmin(1).bincount(minlength=3) / n
    assert float(((landed - p).abs() / (p * (1 - p) / n).sqrt()).max()) < 3


@pytest.mark.parametrize("D", [0.5, 1, 3, 64, math.inf])
def test_prior_lies_on_the_hemisphere_and_has_the_kernels_directions(D):
    kernel, n = StudentTKernel(D), 4000
    s = sampler(PointCharge(torch.zeros(8)), kernel, (8,))
    latent = s.prior(seed_pairs(n))
    x, ratio = s._lift(latent)
    sigma = 40.0 / ratio
    assert torch.allclose(kernel.effective_level(norm(x), sigma, 8), torch.full((n,), 40.0, dtype=F64))
    law = stats.betaprime(4, D / 2, scale=D).cdf if math.isfinite(D) else stats.chi2(8).cdf
    assert stats.kstest((norm(x) / sigma).square().numpy(), law).pvalue > 1e-3
    plane = sampler(PointCharge(torch.zeros(8)), kernel, (8,), start="hyperplane")
    x, ratio = plane._lift(plane.prior(seed_pairs(n)))
    assert torch.equal(ratio, torch.ones(n, dtype=F64))
    assert stats.kstest((norm(x) / 40).square().numpy(), law).pvalue > 1e-3


@pytest.mark.parametrize("D", [1, 128])
def test_hemisphere_start_of_a_blob_gives_the_blob(D):
    """N = 1, 64: the shared clock, the ratio and the final denoising must all agree for the spread to be right."""
    for N in (1, 64):
        charges = 0.5 * torch.randn(200, N, generator=rng.generator(3), dtype=F64)
        charges = charges - charges.mean(0)
        s = sampler(EmpiricalDenoiser(charges, D), StudentTKernel(D), (N,), 0.01, 80.0, rtol=1e-2, atol=1e-2)
        x = s.sample(200).x.double()
        mine = torch.cdist(x, charges).min(1).values
        assert float(mine.median()) < 0.02, "samples land on charges"
        assert stats.ks_2samp(norm(x).numpy(), norm(charges).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("start", ["hemisphere", "hyperplane"])
def test_samples_of_a_blob_are_its_flow_and_a_last_denoising_at_their_own_sigma(start):
    """x_0 = sigma_0 t flows to x_0 (s + sigma)/(s + sigma_0), and is denoised to x s/(s + sigma) = x_0 s/(s + sigma_0)."""
    N, s, top, bottom, pairs = 3, 0.4, 30.0, 0.5, seed_pairs(20, 3)
    run = sampler(CauchyBlob(s), sigma_min=bottom, sigma_max=top, start=start, **TIGHT)
    like = torch.empty(0, dtype=F64)
    t = torch.cat([KERNEL.direction((1, N), [rng.generator(*pair)], like=like) for pair in pairs])
    sigma_0 = top / ((1 + t.square().sum(1)) / (N + 1)).sqrt() if start == "hemisphere" else torch.full((20,), top, dtype=F64)
    sigma = bottom * sigma_0 / top
    assert torch.allclose(run.sample(20, seed=3).x.double(), (sigma_0 * s / (s + sigma_0))[:, None] * t, rtol=1e-5, atol=1e-6)
    decoded = run.decode(run.prior(pairs))
    assert torch.allclose(decoded, (sigma_0 * (s + sigma) / (s + sigma_0))[:, None] * t, rtol=1e-5, atol=1e-6)
    way = run.trajectory(pairs, 4)
    assert torch.allclose(way.sigma[-1], sigma)
    assert torch.allclose(way.x, ((s + way.sigma) * (sigma_0 / (s + sigma_0)))[..., None] * t, rtol=1e-5, atol=1e-6)
    assert torch.allclose(way.denoised, way.x * (s / (s + way.sigma))[..., None], rtol=1e-5, atol=1e-6)


def test_samples_of_many_seeds_are_their_first():
    s = sampler(CauchyBlob(0.3), method="euler", steps=3)
    both = s.sample(seeds=[4, 9]).x
    assert torch.allclose(both, torch.cat([s.sample(1, seed=4).x, s.sample(1, seed=9).x]), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"method": "midpoint", "steps": 5}, {"method": "edm_heun", "steps": 5}])
def test_the_flow_has_no_scale_of_its_own(options):
    """All that has a unit times 7: the samples of a coarse grid are times 7."""

    def draw(c):
        settings = {"sigma_min": 0.02 * c, "sigma_max": 20.0 * c, "sigma_data": 0.5 * c}
        return sampler(CauchyBlob(0.4 * c), **settings, **options).sample(4).x

    assert torch.allclose(draw(7.0), 7 * draw(1.0), rtol=1e-4)


def test_the_state_is_float64_and_tolerances_keep_their_names():
    x = torch.randn(4, 3, dtype=F64)
    fine = sampler(CauchyBlob(0.3), method="dopri8", rtol=1e-12, atol=1e-12).integrate(x, 5.0, 0.02)
    assert torch.allclose(fine, x * 0.32 / 5.3, rtol=1e-10, atol=0)
    made = solvers.make_solver(rtol=1e-3, atol=1e-6)
    assert (made.rtol, made.atol) == (1e-3, 1e-6)
    assert solvers.make_solver(rtol=1e-3).atol == solvers.ATOL == 0.05
    assert runge_kutta.rms(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist() == pytest.approx([math.sqrt(12.5), math.sqrt(0.5)])


def test_decode_starts_where_the_latent_says():
    t = torch.randn(4, 3, dtype=F64)
    decoded = sampler(CauchyBlob(0.3), **TIGHT).decode(Latent(t, 7.0, "plane"))
    assert torch.allclose(decoded, 7.0 * t * 0.31 / 7.3, rtol=1e-6)


def test_labels_reach_the_denoiser_on_every_way():
    seen = []

    def denoiser(x, sigma, label):
        seen.append(label.tolist())
        return 0 * x

    s, label, x = sampler(denoiser, method="euler", steps=1), [3, 1], torch.ones(2, 3, dtype=F64)
    s.decode(s.encode(x, label), label)
    s.integrate(x, 1.0, 2.0, label)
    s.trajectory(seed_pairs(2), 2, label)
    s.sample(2, labels=label)
    assert seen == [[3, 1]] * 8


def test_calls_are_counted_exactly_and_include_the_last_denoising():
    count = 0

    def denoiser(x, sigma, label=None):
        nonlocal count
        count += 1
        return 0.5 * x

    for options, calls in (
        ({"method": "euler", "steps": 7}, 8),
        ({"method": "midpoint", "steps": 4}, 9),
        ({"method": "rk4", "steps": 2}, 9),
        ({"method": "ab2", "steps": 9}, 10),
        ({"method": "ab3", "steps": 8}, 10),
        ({"method": "dpmpp_3m", "steps": 9}, 10),
        ({"method": "edm_heun", "steps": 9}, 17),
        ({"preset": "fast"}, 6),
        ({"preset": "balanced"}, 10),
        ({}, 10),
    ):
        count = 0
        out = sampler(denoiser, **options).sample(3)
        assert out.calls == count == calls
        assert out.rejected == 0 < out.accepted
    count, seen = 0, []
    out = sampler(denoiser, rtol=1e-3).sample(3, on_call=lambda calls, level: seen.append((calls, level)))
    assert out.calls == 2 + 3 * (out.accepted + out.rejected), "one call to begin, three a step of bosh3, one to denoise"
    assert out.calls == count == len(seen)
    assert [c for c, _ in seen] == list(range(1, count + 1))
    assert max(level for _, level in seen) == pytest.approx(40.0)
    assert seen[-1][1] == pytest.approx(0.01)
    assert min(level for _, level in seen) >= 0.01 * (1 - 1e-9), "adaptive steps must not pass the end"


def test_adaptive_methods_bound_the_worst_sample():
    """One hard sample among many easy ones: torchdiffeq's own norm, over the batch, would let it go wrong."""
    y = torch.tensor([[-0.5], [0.5]], dtype=F64)
    x = torch.full((400, 1), 30.0, dtype=F64)
    x[0] = 0.02
    loose = sampler(EmpiricalDenoiser(y, math.inf), StudentTKernel(math.inf), (1,), rtol=1e-4, atol=1e-4).integrate(
        x, 40.0, 0.05
    )
    exact = sampler(EmpiricalDenoiser(y, math.inf), StudentTKernel(math.inf), (1,), **TIGHT).integrate(x[:1], 40.0, 0.05)
    assert float((loose[0] - exact[0]).abs()) < 2e-3


def test_samples_depend_on_their_seed_alone_on_fixed_grids():
    charges = torch.randn(20, 3)
    s = sampler(EmpiricalDenoiser(charges, 1), method="midpoint", steps=8)
    x = s.sample(10, seed=5).x
    assert x.dtype == torch.float32
    assert torch.allclose(s.draw([(5, 3), (5, 7)]).x, x[[3, 7]], atol=1e-6)
    assert torch.allclose(s.sample(seeds=torch.tensor([5, 9])).x[:1], x[:1], atol=1e-6)
    assert not torch.allclose(s.sample(10, seed=6).x, x)
    assert s.sample(0).x.shape == (0, 3)


@pytest.mark.parametrize("D", [1, math.inf])
def test_encode_and_decode_are_inverse(D):
    charges, x = torch.randn(20, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    s = sampler(EmpiricalDenoiser(charges, D), StudentTKernel(D), sigma_min=0.5, **TIGHT)
    latent = s.encode(x)
    assert (latent.surface, latent.level) == ("plane", 40.0)
    assert torch.allclose(s.decode(latent), x, atol=1e-5)
    with pytest.raises(ValueError, match="surface = 'sphere'"):
        Latent(latent.t, 40.0, "sphere")


def test_sample_is_decode_of_the_prior_and_a_last_denoising():
    denoiser = EmpiricalDenoiser(torch.randn(20, 3, dtype=F64), 1.0)
    s = sampler(denoiser, method="midpoint", steps=20, grid="rho")
    latent = s.prior(seed_pairs(4))
    _, ratio = s._lift(latent)
    decoded = s.decode(latent)
    assert torch.allclose(denoiser(decoded, 0.01 / ratio), s.sample(4).x.double(), atol=1e-4)
    way = s.trajectory(seed_pairs(4), 5)
    assert torch.allclose(way.x[-1], decoded, atol=1e-4)
    assert torch.allclose(way.sigma[-1] * ratio, torch.full((4,), 0.01, dtype=F64))
    assert torch.allclose(way.sigma[0] * ratio, torch.full((4,), 40.0, dtype=F64))


def test_networks_get_the_dtype_of_their_parameters():
    class Net(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=dtype))

        def forward(self, x, sigma, label=None):
            assert x.dtype == sigma.dtype == self.scale.dtype
            return self.scale * x

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert sampler(Net(dtype)).sample(2).x.dtype == dtype


def test_labels_reach_the_denoiser():
    def denoiser(x, sigma, label):
        return label.to(x.dtype)[:, None].expand_as(x)

    x = sampler(denoiser).sample(3, labels=[0, 4, 2]).x
    assert torch.allclose(x, torch.tensor([[0.0], [4.0], [2.0]]).expand(3, 3))
    with pytest.raises(ValueError, match="labels has shape"):
        sampler(denoiser).sample(3, labels=[1])


def test_a_network_that_returns_nan_is_reported_as_such():
    def denoiser(x, sigma, label=None):
        return torch.where(sigma[:, None] < 1.0, torch.nan, 0.5 * x)

    with pytest.raises(ode.SolverError, match=r"NaN or infinity for .* of 4 samples at level .* \(call"):
        sampler(denoiser).sample(4)


def test_a_tolerance_that_cannot_be_met_is_reported_with_advice(monkeypatch):
    monkeypatch.setattr(solvers, "MAX_STEPS", 50)

    def denoiser(x, sigma, label=None):
        return torch.rand_like(x)

    with pytest.raises(ode.SolverError, match="raise rtol and atol"):
        sampler(denoiser, rtol=1e-12, atol=1e-12).sample(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk45"}, "method = 'rk45' is unknown; choose one of dopri5"),
        ({"method": "ab2", "steps": 5, "coordinates": "log_sigma"}, "ab2 exists in angle coordinates only"),
        ({"method": "dpmpp_2m", "steps": 5, "coordinates": "angle"}, "dpmpp_2m exists in log_sigma coordinates only"),
        ({"method": "edm_heun", "steps": 1}, "steps = 1: edm_heun needs 2"),
        ({"preset": "best"}, "preset = 'best' is unknown; choose one of fast, balanced, reference"),
        ({"preset": "fast", "steps": 3}, "leave out either preset or steps"),
        ({"grid": "cosine", "steps": 3}, "grid = 'cosine' is unknown"),
        ({"grid": [40.0, 1.0], "steps": 3}, "steps = 3: the given grid of 2 levels"),
        ({"grid": [40.0]}, "at least two levels"),
        ({"grid": [40.0, 50.0]}, "falling"),
        ({"grid": [40.0, 0.0]}, "positive"),
        ({"grid": [math.inf, 1.0]}, "finite"),
        ({"grid": "rho", "method": "dopri5"}, "chooses its own steps"),
        ({"coordinates": "z"}, "coordinates = 'z' is unknown"),
        ({"start": "sphere"}, "start = 'sphere' is unknown"),
        ({"sigma_min": 40.0}, "sigma_min = 40.0"),
        ({"sigma_min": math.nan}, "sigma_min = nan"),
        ({"sigma_min": 9e-31}, r"sigma_min = 9e-31, .* from 1e-30 to 1e30"),
        ({"sigma_max": 2e30}, r"sigma_max = 2e\+30"),
        ({"sigma_max": math.inf}, "sigma_max = inf"),
        ({"sigma_data": 0.0}, "sigma_data = 0"),
        ({"method": "euler"}, "steps = None"),
        ({"method": "euler", "steps": 0}, "steps = 0"),
        ({"method": "euler", "steps": 3, "rtol": 0.1}, "has fixed steps"),
        ({"method": "adaptive_heun", "steps": 3}, "steps = 3"),
        ({"steps": 0}, "steps = 0"),
        ({"rtol": -1.0}, "rtol = -1"),
        ({"atol": math.nan}, "atol = nan"),
    ],
)
def test_bad_settings_are_named_before_any_call(options, message):
    def never(*args):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=message):
        sampler(never, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a number"),
        ({"n": 2, "seeds": [1]}, "either"),
        ({"n": -1}, "n = -1: expected"),
        ({"n": 1, "seed": -2}, "seed = -2: expected"),
        ({"n": 0, "seed": -2}, "seed = -2: expected"),
        ({"seeds": [1, -3]}, "-3"),
        ({"seeds": [1], "seed": 2}, "either"),
        ({"n": 2.5}, r"n = 2\.5: expected an integer"),
        ({"seeds": [1.5]}, r"seeds = 1\.5: expected an integer"),
        ({"n": 1, "seed": 2**32}, r"seed = 4294967296: .* to 2\^32 - 1"),
    ],
)
def test_bad_numbers_and_seeds_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler(PointCharge(torch.zeros(3))).sample(**arguments)
