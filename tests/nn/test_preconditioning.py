"""Preconditioning against EDM, noise levels against scipy's integrals, field networks against the exact field."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from pfgm.core import rng
from pfgm.core.tensors import norm
from pfgm.nn import TimeMLP
from pfgm.nn.preconditioning import FieldDenoiser, PreconditionedDenoiser, noise_level
from pfgm.theory.field import field_from_displacement, normalized_field, posterior_mean
from pfgm.theory.kernel import StudentTKernel
from tests.helpers import F64, Answering

STATISTICS = {"sigma_data": 0.5, "power_std": 0.06}
PAIR = (0.5, 0.06)


def test_preconditioning_at_infinite_D_is_edms():
    """An affine network shows c_skip, c_out, c_in and c_noise of EDM's table 1."""
    x, sigma, s = torch.randn(4, 3, dtype=F64), torch.tensor([0.01, 0.5, 2.0, 80.0], dtype=F64), 0.5
    net = Answering(lambda x, c: 2 * x + c.to(x.dtype)[:, None])
    v = sigma[:, None]
    root = (v**2 + s**2).sqrt()
    expected = s**2 / root**2 * x + v * s / root * (2 * x / root + (v.log() / 4).float())
    assert torch.allclose(PreconditionedDenoiser(net, math.inf, **STATISTICS)(x, sigma), expected, rtol=1e-12)


@pytest.mark.parametrize("D", [0.5, 1.0, 4.0, 128.0])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0, 40.0])
def test_all_coefficients_belong_to_the_level_the_network_sees(D, sigma):
    """c_skip, c_out and c_in belong to the level in c_noise, and the input of the network is about 1 for every x."""
    x, seen = StudentTKernel(D).sample(0.5 * torch.randn(200, 64, dtype=F64), sigma, rng.generator(1)), []

    def denoise(value):
        def net(u, c):
            seen.append((u, (4 * c.double()).exp()))
            return torch.full_like(u, value)

        return PreconditionedDenoiser(Answering(net), D, **STATISTICS)(x, sigma)

    zero, one = denoise(0.0), denoise(1.0)
    u, level = seen[0][0], seen[0][1][:, None]
    q = (level**2 + 0.25).sqrt()
    for mine, edm in ((u, x / q), (zero, 0.25 / q**2 * x), (one - zero, (0.5 * level / q).expand_as(x))):
        assert torch.allclose(mine, edm, rtol=1e-4, atol=1e-9)
    rms = norm(u) / 8
    assert 0.5 < float(rms.min()) < float(rms.max()) < 2


@pytest.mark.parametrize("N", [2, 64])
@pytest.mark.parametrize("D", [0.5, 1.0, 4.0, 128.0])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
def test_level_is_the_posterior_mean_of_the_noise(D, sigma, N):
    """Integrate the posterior with scipy: an F prior of |x-y|²/(N sigma²), a normal likelihood of |x|²/N."""
    s2, power_std = 0.25, 0.06
    x = StudentTKernel(D).sample(0.5 * torch.randn(20, N, dtype=F64), sigma, rng.generator(1))
    rms = noise_level(x, torch.full((20,), sigma, dtype=F64), StudentTKernel(D), (0.5, power_std))
    power = x.square().mean(1).numpy()
    near = np.linspace(-8, 8, 4001)[None] * np.sqrt(power_std**2 + 4 * s2 * power[:, None] / N) + power[:, None] - s2
    wide = np.exp(np.linspace(np.log(sigma**2) - 12, np.log(sigma**2) + 24, 20001))[None].repeat(20, 0)
    v = np.sort(np.concatenate([wide, np.maximum(near, 1e-9)], axis=1), axis=1)
    spread = np.sqrt(power_std**2 + 4 * s2 * v / N)
    w = stats.f(N, D).pdf(v / sigma**2) * stats.norm(v + s2, spread).pdf(power[:, None])
    level2, mass = (D * sigma**2 + N * v) / (N + D), np.trapezoid(w, v, axis=1)
    assert rms.numpy() == pytest.approx(np.sqrt(np.trapezoid(w * level2, v, axis=1) / mass), rel=3e-3)


@pytest.mark.parametrize("D", [0.5, 1.0, 4.0, 128.0])
def test_level_vanishes_with_sigma_and_is_the_hemispheres_far_away(D):
    kernel = StudentTKernel(D)
    images = 0.5 * torch.randn(50, 64, dtype=F64)
    images = images / norm(images).max() * 8 * 0.75
    tiny = torch.full((50,), 1e-4, dtype=F64)
    assert float(noise_level(images, tiny, kernel, PAIR).median()) < 4 * 1e-4 ** min(1.0, D / 2)
    far = kernel.sample(torch.zeros(50, 64, dtype=F64), 40.0, rng.generator(1))
    sigma = torch.full((50,), 40.0, dtype=F64)
    assert torch.allclose(noise_level(far, sigma, kernel, PAIR), kernel.effective_level(norm(far), sigma, 64), rtol=0.01)
    assert bool(torch.isfinite(noise_level(1e12 * images, sigma, kernel, PAIR)).all())


def test_level_is_sigma_at_infinite_D():
    sigma = torch.tensor([0.01, 3.0], dtype=F64)
    assert torch.equal(noise_level(torch.randn(2, 8), sigma, StudentTKernel(math.inf), PAIR), sigma)


@pytest.mark.parametrize("z", [0.01, 1.0, 30.0])
def test_exact_field_gives_the_exact_denoised_point(z):
    """If the network outputs the exact field of charges, the denoiser is their posterior mean."""
    charges = 0.5 * torch.randn(20, 8, generator=rng.generator(1), dtype=F64)
    x = StudentTKernel(1).sample(charges[:6], z, rng.generator(2))
    blank = FieldDenoiser(Answering(lambda x, c: torch.zeros(6, 9, dtype=F64)), 5.0, **STATISTICS)
    unit = FieldDenoiser(Answering(lambda x, c: torch.ones(6, 9, dtype=F64)), 5.0, **STATISTICS)
    answer = []
    for zero, one, target in zip(blank.field(x, z), unit.field(x, z), normalized_field(x, z, charges, 5.0), strict=True):
        answer.append(((target - zero) / (one - zero)).reshape(6, -1))
    exact = FieldDenoiser(Answering(lambda x, c: torch.cat(answer, dim=1)), 5.0, **STATISTICS)
    assert torch.allclose(exact(x, z), posterior_mean(x, z, charges, 1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 5.0, 1000.0])
def test_zero_network_is_the_far_field_of_a_point_charge(gamma):
    x = 1e4 * nn.functional.normalize(torch.randn(6, 8, dtype=F64))
    denoiser = FieldDenoiser(Answering(lambda x, c: torch.zeros(6, 9, dtype=F64)), gamma, **STATISTICS)
    z = torch.full((6,), 3e3, dtype=F64)
    for mine, exact in zip(denoiser.field(x, z), field_from_displacement(x, z, gamma), strict=True):
        assert torch.allclose(mine, exact, rtol=1e-3)


def test_extra_channel_of_an_image_is_averaged():
    x, bumps = torch.randn(2, 3, 4, 5, dtype=F64), torch.randn(1, 1, 4, 5, dtype=F64)

    def v_z(extra):
        net = Answering(lambda u, c: torch.cat([torch.zeros_like(u), extra.expand(2, 1, 4, 5)], dim=1))
        return FieldDenoiser(net, 5.0, **STATISTICS).field(x, 1.0)[1]

    assert torch.allclose(v_z(bumps), v_z(bumps.mean().expand(1, 1, 4, 5)))
    level = noise_level(x, torch.ones(2, dtype=F64), StudentTKernel(1.0), PAIR)
    share = v_z(torch.ones(1, 1, 4, 5, dtype=F64)) / v_z(torch.zeros(1, 1, 4, 5, dtype=F64)) - 1
    assert torch.allclose(share, 0.5 / (level**2 + 0.25).sqrt())


def test_network_with_wrong_output_shape_is_refused():
    denoiser = PreconditionedDenoiser(TimeMLP((5,), extra_channels=1, width=8, depth=1), 1.0, **STATISTICS)
    with pytest.raises(ValueError, match="extra_channels = 0"):
        denoiser(torch.zeros(2, 5), 1.0)


@pytest.mark.parametrize("kind", [PreconditionedDenoiser, FieldDenoiser])
def test_conditions_of_any_name_reach_the_network_in_its_dtype(kind):
    seen = {}

    class Net(Answering):
        def forward(self, x, c_noise, **conditions):
            seen.update(x=x, c_noise=c_noise, **conditions)
            return torch.zeros(len(x), x.shape[1] + (kind is FieldDenoiser), dtype=x.dtype)

    denoiser, label, depth = kind(Net(None).bfloat16(), 1.0, **STATISTICS), torch.tensor([1, 0]), torch.randn(2, 4)
    out = denoiser(torch.randn(2, 3), 0.5, label=label, depth=depth, vector=None)
    assert {key: value.dtype for key, value in seen.items()} == {
        "x": torch.bfloat16,
        "c_noise": torch.float32,
        "label": torch.int64,
        "depth": torch.bfloat16,
    }
    assert torch.equal(seen["label"], label)
    assert torch.equal(seen["depth"], depth.bfloat16())
    assert out.dtype == torch.float32
