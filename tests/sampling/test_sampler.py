"""The sampler: its prior, its samples, its maps and its accounting."""

import math

import pytest
import torch
from scipy import stats

from pfgm.core import rng
from pfgm.core.tensors import norm
from pfgm.sampling.latents import Latent
from pfgm.sampling.sampler import Samples, seed_pairs
from pfgm.theory.analytic import CauchyBlob, EmpiricalDenoiser, PointCharge
from pfgm.theory.kernel import StudentTKernel
from tests.helpers import F64, TIGHT, make_sampler


@pytest.mark.parametrize("D", [1.0, 8.0, math.inf])
def test_unequal_charges_get_their_shares(D):
    """Compare landing fractions with the charges .2, .5, .3 to three standard errors, started on the hemisphere."""
    y, p, n = torch.tensor([[-0.7, 0.1], [0.0, -0.4], [0.5, 0.6]], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64), 3000
    y = y - p @ y
    s = make_sampler(EmpiricalDenoiser(y, D, p), StudentTKernel(D), (2,), 0.01, 100.0, method="dopri5", rtol=1e-3, atol=1e-3)
    x = s.sample(n).x
    landed = torch.cdist(x.double(), y).argmin(1).bincount(minlength=3) / n
    assert float(((landed - p).abs() / (p * (1 - p) / n).sqrt()).max()) < 3


@pytest.mark.parametrize("D", [0.5, 1, 3, 64, math.inf])
def test_prior_lies_on_the_hemisphere_and_has_the_kernels_directions(D):
    kernel, n = StudentTKernel(D), 4000
    s = make_sampler(PointCharge(torch.zeros(8)), kernel, (8,))
    start = s.trajectory(seed_pairs(n), 2)
    x, sigma = start.x[0], start.sigma[0]
    assert torch.allclose(kernel.effective_level(norm(x), sigma, 8), torch.full((n,), 40.0, dtype=F64))
    law = stats.betaprime(4, D / 2, scale=D).cdf if math.isfinite(D) else stats.chi2(8).cdf
    assert stats.kstest((norm(x) / sigma).square().numpy(), law).pvalue > 1e-3
    plane = make_sampler(PointCharge(torch.zeros(8)), kernel, (8,), start="hyperplane")
    start = plane.trajectory(seed_pairs(n), 2)
    assert torch.equal(start.sigma[0], torch.full((n,), 40.0, dtype=F64))
    assert stats.kstest((norm(start.x[0]) / 40).square().numpy(), law).pvalue > 1e-3


@pytest.mark.parametrize("D", [1, 128])
def test_hemisphere_start_of_a_blob_gives_the_blob(D):
    """The spread is right only if the shared clock, the ratio and the final denoising agree."""
    for N in (1, 64):
        charges = 0.5 * torch.randn(200, N, generator=rng.generator(3), dtype=F64)
        charges = charges - charges.mean(0)
        s = make_sampler(EmpiricalDenoiser(charges, D), StudentTKernel(D), (N,), 0.01, 80.0, rtol=1e-2, atol=1e-2)
        x = s.sample(200).x.double()
        mine = torch.cdist(x, charges).min(1).values
        assert float(mine.median()) < 0.02, "samples land on charges"
        assert stats.ks_2samp(norm(x).numpy(), norm(charges).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("start", ["hemisphere", "hyperplane"])
def test_samples_of_a_blob_are_its_flow_and_a_final_denoising_at_each_own_sigma(start):
    """x_0 = sigma_0 t flows to x_0 (s + sigma)/(s + sigma_0), and is denoised to x s/(s + sigma) = x_0 s/(s + sigma_0)."""
    N, s, top, bottom, pairs = 3, 0.4, 30.0, 0.5, seed_pairs(20, 3)
    run = make_sampler(CauchyBlob(s), sigma_min=bottom, sigma_max=top, start=start, **TIGHT)
    like = torch.empty(0, dtype=F64)
    t = torch.cat([StudentTKernel(1).direction((1, N), [rng.generator(*pair)], like=like) for pair in pairs])
    sigma_0 = top / ((1 + t.square().sum(1)) / (N + 1)).sqrt() if start == "hemisphere" else torch.full((20,), top, dtype=F64)
    sigma = bottom * sigma_0 / top
    assert torch.allclose(run.sample(20, seed=3).x.double(), (sigma_0 * s / (s + sigma_0))[:, None] * t, rtol=1e-5, atol=1e-6)
    decoded = run.decode(run.prior(pairs))
    assert torch.allclose(decoded, (sigma_0 * (s + sigma) / (s + sigma_0))[:, None] * t, rtol=1e-5, atol=1e-6)
    steps = run.trajectory(pairs, 4)
    assert torch.allclose(steps.sigma[-1], sigma)
    assert torch.allclose(steps.x, ((s + steps.sigma) * (sigma_0 / (s + sigma_0)))[..., None] * t, rtol=1e-5, atol=1e-6)
    assert torch.allclose(steps.denoised, steps.x * (s / (s + steps.sigma))[..., None], rtol=1e-5, atol=1e-6)


def test_seeds_give_the_first_sample_of_each():
    s = make_sampler(CauchyBlob(0.3), method="euler", steps=3)
    both = s.sample(seeds=[4, 9]).x
    assert torch.allclose(both, torch.cat([s.sample(1, seed=4).x, s.sample(1, seed=9).x]), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"method": "midpoint", "steps": 5}, {"method": "edm_heun", "steps": 5}])
def test_samples_scale_with_the_units(options):
    """Multiply everything that has a unit by 7: the samples of a coarse grid are 7 times as large."""

    def draw(c):
        settings = {"sigma_min": 0.02 * c, "sigma_max": 20.0 * c, "sigma_data": 0.5 * c}
        return make_sampler(CauchyBlob(0.4 * c), **settings, **options).sample(4).x

    assert torch.allclose(draw(7.0), 7 * draw(1.0), rtol=1e-4)


def test_decode_starts_at_the_level_of_the_latent():
    t = torch.randn(4, 3, dtype=F64)
    decoded = make_sampler(CauchyBlob(0.3), **TIGHT).decode(Latent(t, 7.0, "plane"))
    assert torch.allclose(decoded, 7.0 * t * 0.31 / 7.3, rtol=1e-6)


def test_conditions_reach_the_denoiser_from_every_method():
    seen = []

    def denoiser(x, sigma, label):
        seen.append(label.tolist())
        return 0 * x

    s, x = make_sampler(denoiser, method="euler", steps=1), torch.ones(2, 3, dtype=F64)
    conditions = {"label": torch.tensor([3, 1])}
    s.decode(s.encode(x, conditions), conditions)
    s.integrate(x, 1.0, 2.0, conditions)
    s.trajectory(seed_pairs(2), 2, conditions)
    s.sample(2, labels=[3, 1])
    assert seen == [[3, 1]] * 8


def test_calls_are_counted_exactly_and_include_the_final_denoising():
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
        out = make_sampler(denoiser, **options).sample(3)
        assert out.calls == count == calls
        assert out.rejected == 0 < out.accepted
    count, seen = 0, []
    out = make_sampler(denoiser, rtol=1e-3).sample(3, on_call=lambda calls, level: seen.append((calls, level)))
    assert out.calls == 2 + 3 * (out.accepted + out.rejected), "one call to begin, three a step of bosh3, one to denoise"
    assert out.calls == count == len(seen)
    assert [c for c, _ in seen] == list(range(1, count + 1))
    assert max(level for _, level in seen) == pytest.approx(40.0)
    assert seen[-1][1] == pytest.approx(0.01)
    assert min(level for _, level in seen) >= 0.01 * (1 - 1e-9), "adaptive steps must not pass the end"


def test_samples_depend_on_their_seed_alone_on_fixed_grids():
    charges = torch.randn(20, 3)
    s = make_sampler(EmpiricalDenoiser(charges, 1), method="midpoint", steps=8)
    x = s.sample(10, seed=5).x
    assert x.dtype == torch.float32
    assert torch.allclose(s.draw([(5, 3), (5, 7)]).x, x[[3, 7]], atol=1e-6)
    assert torch.allclose(s.sample(seeds=torch.tensor([5, 9])).x[:1], x[:1], atol=1e-6)
    assert not torch.allclose(s.sample(10, seed=6).x, x)
    assert s.sample(0).x.shape == (0, 3)


@pytest.mark.parametrize("D", [1, math.inf])
def test_encode_and_decode_are_inverse(D):
    charges, x = torch.randn(20, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    s = make_sampler(EmpiricalDenoiser(charges, D), StudentTKernel(D), sigma_min=0.5, **TIGHT)
    latent = s.encode(x)
    assert (latent.surface, latent.level) == ("plane", 40.0)
    assert torch.allclose(s.decode(latent), x, atol=1e-5)
    with pytest.raises(ValueError, match="surface = 'sphere'"):
        Latent(latent.t, 40.0, "sphere")


def test_sample_is_decode_of_the_prior_and_a_final_denoising():
    denoiser = EmpiricalDenoiser(torch.randn(20, 3, dtype=F64), 1.0)
    s = make_sampler(denoiser, method="midpoint", steps=20, grid="rho")
    latent = s.prior(seed_pairs(4))
    ratio = ((1 + latent.t.square().sum(1)) / 4).sqrt()
    decoded = s.decode(latent)
    assert torch.allclose(denoiser(decoded, 0.01 / ratio), s.sample(4).x.double(), atol=1e-4)
    trajectory = s.trajectory(seed_pairs(4), 5)
    assert torch.allclose(trajectory.x[-1], decoded, atol=1e-4)
    assert torch.allclose(trajectory.sigma[-1] * ratio, torch.full((4,), 0.01, dtype=F64))
    assert torch.allclose(trajectory.sigma[0] * ratio, torch.full((4,), 40.0, dtype=F64))


def test_labels_reach_the_denoiser():
    def denoiser(x, sigma, label):
        return label.to(x.dtype)[:, None].expand_as(x)

    x = make_sampler(denoiser).sample(3, labels=[0, 4, 2]).x
    assert torch.allclose(x, torch.tensor([[0.0], [4.0], [2.0]]).expand(3, 3))
    with pytest.raises(ValueError, match="labels has shape"):
        make_sampler(denoiser).sample(3, labels=[1])


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
        ({"seeds": [1.5]}, r"seeds = 1\.5: expected"),
        ({"n": 1, "seed": 2**32}, r"seed = 4294967296: .* to 2\^32 - 1"),
    ],
)
def test_invalid_numbers_and_seeds_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(PointCharge(torch.zeros(3))).sample(**arguments)


def test_joined_samples_cost_what_the_dearest_batch_cost_and_all_their_time():
    one = Samples(torch.zeros(2, 3), 10, 1.0, 8, 2, torch.tensor([0.1, 0.2]))
    other = Samples(torch.ones(1, 3), 6, 2.5, 9, 0, torch.tensor([0.3]), complete=False)
    both = Samples.joined([one, other])
    assert (both.calls, both.seconds, both.accepted, both.rejected, both.complete) == (10, 3.5, 9, 2, False)
    assert torch.equal(both.x, torch.cat([one.x, other.x]))
    assert torch.equal(both.error, torch.tensor([0.1, 0.2, 0.3]))
    assert Samples.joined([one, Samples(torch.ones(1, 3), 6, 2.5)]).error is None
