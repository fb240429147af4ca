"""Preconditioning, the field network, the objectives and the networks."""

import dataclasses
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
from pfgm.theory.data_summary import DataSummary
from pfgm.theory.field import field_from_displacement, normalized_field, posterior_mean
from pfgm.theory.kernel import StudentTKernel
from pfgm.training.losses import DenoisingLoss, PoissonFieldLoss
from pfgm.training.noise import LogUniform, PoissonFlowNoise

F64 = torch.float64
STATISTICS = {"sigma_data": 0.5, "power_std": 0.06}
PAIR = (0.5, 0.06)


class Oracle(nn.Module):
    """A network that returns what makes the preconditioned output a given one."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x, c_noise, label=None):
        return self.answer(x, c_noise)


def test_preconditioning_is_edms_at_infinite_D():
    """c_skip, c_out, c_in, c_noise of EDM's table 1, with an affine network."""
    x, sigma, s = torch.randn(4, 3, dtype=F64), torch.tensor([0.01, 0.5, 2.0, 80.0], dtype=F64), 0.5
    net = Oracle(lambda x, c: 2 * x + c.to(x.dtype)[:, None])
    v = sigma[:, None]
    root = (v**2 + s**2).sqrt()
    expected = s**2 / root**2 * x + v * s / root * (2 * x / root + (v.log() / 4).float())
    assert torch.allclose(PreconditionedDenoiser(net, math.inf, **STATISTICS)(x, sigma), expected, rtol=1e-12)


@pytest.mark.parametrize("D", [0.5, 1.0, 4.0, 128.0])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0, 40.0])
def test_one_level_rules_the_whole_preconditioning(D, sigma):
    """c_skip, c_out and c_in are those of the level that c_noise tells the network, whose input is about 1 for every x."""
    x, seen = StudentTKernel(D).sample(0.5 * torch.randn(200, 64, dtype=F64), sigma, rng.generator(1)), []

    def denoise(value):
        def net(u, c):
            seen.append((u, (4 * c.double()).exp()))
            return torch.full_like(u, value)

        return PreconditionedDenoiser(Oracle(net), D, **STATISTICS)(x, sigma)

    zero_init, one = denoise(0.0), denoise(1.0)
    u, level = seen[0][0], seen[0][1][:, None]
    q = (level**2 + 0.25).sqrt()
    for mine, edm in ((u, x / q), (zero_init, 0.25 / q**2 * x), (one - zero_init, (0.5 * level / q).expand_as(x))):
        assert torch.allclose(mine, edm, rtol=1e-4, atol=1e-9)
    rms = norm(u) / 8
    assert 0.5 < float(rms.min()) < float(rms.max()) < 2


@pytest.mark.parametrize("N", [2, 64])
@pytest.mark.parametrize("D", [0.5, 1.0, 4.0, 128.0])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
def test_level_estimates_are_the_posteriors_means(D, sigma, N):
    """Over the posterior of the noise by scipy: an F prior of |x-y|²/(N sigma²), a normal likelihood of |x|²/N."""
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
def test_level_estimate_vanishes_with_sigma_and_is_the_hemisphere_far_away(D):
    kernel = StudentTKernel(D)
    images = 0.5 * torch.randn(50, 64, dtype=F64)
    images = images / norm(images).max() * 8 * 0.75
    tiny = torch.full((50,), 1e-4, dtype=F64)
    assert float(noise_level(images, tiny, kernel, PAIR).median()) < 4 * 1e-4 ** min(1.0, D / 2)
    far = kernel.sample(torch.zeros(50, 64, dtype=F64), 40.0, rng.generator(1))
    sigma = torch.full((50,), 40.0, dtype=F64)
    assert torch.allclose(noise_level(far, sigma, kernel, PAIR), kernel.effective_level(norm(far), sigma, 64), rtol=0.01)
    assert bool(torch.isfinite(noise_level(1e12 * images, sigma, kernel, PAIR)).all())


def test_level_estimate_is_sigma_at_infinite_D():
    sigma = torch.tensor([0.01, 3.0], dtype=F64)
    assert torch.equal(noise_level(torch.randn(2, 8), sigma, StudentTKernel(math.inf), PAIR), sigma)


@pytest.mark.parametrize("z", [0.01, 1.0, 30.0])
def test_field_denoiser_reads_a_true_field_as_the_true_denoised_point(z):
    """With a network that outputs the exact field of charges, the denoiser is their posterior mean."""
    charges = 0.5 * torch.randn(20, 8, generator=rng.generator(1), dtype=F64)
    x = StudentTKernel(1).sample(charges[:6], z, rng.generator(2))
    blank = FieldDenoiser(Oracle(lambda x, c: torch.zeros(6, 9, dtype=F64)), 5.0, **STATISTICS)
    unit = FieldDenoiser(Oracle(lambda x, c: torch.ones(6, 9, dtype=F64)), 5.0, **STATISTICS)
    answer = []
    for zero_init, one, target in zip(blank.field(x, z), unit.field(x, z), normalized_field(x, z, charges, 5.0), strict=True):
        answer.append(((target - zero_init) / (one - zero_init)).reshape(6, -1))
    exact = FieldDenoiser(Oracle(lambda x, c: torch.cat(answer, dim=1)), 5.0, **STATISTICS)
    assert torch.allclose(exact(x, z), posterior_mean(x, z, charges, 1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 5.0, 1000.0])
def test_zero_field_network_is_the_far_field_of_a_point_charge(gamma):
    x = 1e4 * nn.functional.normalize(torch.randn(6, 8, dtype=F64))
    denoiser = FieldDenoiser(Oracle(lambda x, c: torch.zeros(6, 9, dtype=F64)), gamma, **STATISTICS)
    z = torch.full((6,), 3e3, dtype=F64)
    for mine, exact in zip(denoiser.field(x, z), field_from_displacement(x, z, gamma), strict=True):
        assert torch.allclose(mine, exact, rtol=1e-3)


def summary(sigma_data, shape):
    return DataSummary(shape, sigma_data=sigma_data, norm=sigma_data * math.sqrt(math.prod(shape)), power_std=0.03)


def test_edm_loss_of_a_zero_network_on_matched_gaussian_data_is_one():
    y = 0.5 * torch.randn(200000, 4, generator=rng.generator(3), dtype=F64)
    loss, data = DenoisingLoss(), summary(0.5, (4,))
    denoiser = loss.make_denoiser(Oracle(lambda x, c: torch.zeros_like(x)), math.inf, data)
    assert float(loss(denoiser, y, data=data, generator=rng.generator(4)).mean()) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("D", [1.0, 16.0])
def test_loss_weighs_each_sample_by_its_own_level(D):
    """|denoise - y|² / (N c_out(level)²), written out; averaging over the batch before weighting would differ."""
    y, data = 0.5 * torch.randn(64, 6, dtype=F64), summary(0.5, (6,))
    loss = DenoisingLoss(LogUniform(0.1, 10))
    denoiser = loss.make_denoiser(Oracle(lambda x, c: x), D, data)
    g = rng.generator(5)
    sigma = loss.noise.sample(y, 0.5, g)
    x = StudentTKernel(D).sample(y, sigma, g)
    level2 = noise_level(x, sigma, StudentTKernel(D), (0.5, 0.03)).square()
    expected = (denoiser(x, sigma) - y).square().mean(1) * (level2 + 0.25) / (level2 * 0.25)
    assert torch.allclose(loss(denoiser, y, data=data, generator=rng.generator(5)), expected, rtol=1e-10)


def test_denoising_and_explicit_loss_differ_by_the_same_number_for_every_network():
    """Vincent's identity: L(y) - L(E[y|x]) does not depend on the network; three standard errors."""
    charges, data = 0.5 * torch.randn(8, 2, dtype=F64), summary(0.5, (2,))
    y = charges[torch.randint(8, (60000,), generator=rng.generator(6))]
    plain, explicit = DenoisingLoss(LogUniform(0.2, 4)), DenoisingLoss(LogUniform(0.2, 4), reference_size=8)
    gaps = []
    for answer in (torch.zeros_like, lambda x, c=None: torch.tanh(x) * 0.5):
        denoiser = plain.make_denoiser(Oracle(lambda x, c, f=answer: f(x)), 3.0, data)
        a = plain(denoiser, y, data=data, generator=rng.generator(7))
        b = explicit(denoiser, y, data=data, reference=charges, generator=rng.generator(7))
        gaps.append(a - b)
    difference = gaps[0] - gaps[1]
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / math.sqrt(len(y))
    assert float(gaps[0].mean()) > 0.1


def test_poisson_field_loss_compares_with_the_field_of_the_reference():
    y, data = 0.5 * torch.randn(10, 3, dtype=F64), summary(0.5, (3,))
    loss = PoissonFieldLoss(2.0, reference_size=10, noise=PoissonFlowNoise(M=150))
    denoiser = loss.make_denoiser(Oracle(lambda x, c: torch.zeros(10, 4, dtype=F64)), 1.0, data)
    x, z = loss.noise.perturb(y, data.norm, rng.generator(8))
    away = x - posterior_mean(x, z, y, 1.0)
    R = torch.hypot(norm(away), z)
    t_x, t_z = -math.sqrt(3) * away / (R + 2)[:, None], -math.sqrt(3) * z / (R + 2)
    v_x, v_z = denoiser.field(x, z)
    expected = ((v_x - t_x).square().sum(1) + (v_z - t_z).square()) / 4
    assert torch.allclose(loss(denoiser, y, data=data, reference=y, generator=rng.generator(8)), expected, rtol=1e-10)
    for mine, exact in zip(normalized_field(x, z, y, 2.0), (t_x, t_z), strict=True):
        assert torch.allclose(mine, exact)


class Clairvoyant(nn.Module):
    """The exact denoiser, and field, of two points, each a class of its own."""

    def __init__(self, D):
        super().__init__()
        self.kernel = StudentTKernel(D)

    def forward(self, x, sigma, *, label):
        return (2.0 * label - 1)[:, None].to(x.dtype)

    def denoise(self, x, sigma, *, label):
        return self(x, sigma, label=label), torch.ones(len(x), dtype=F64)

    def field(self, x, z, *, label):
        return field_from_displacement(x - self(x, z, label=label), z, 0.5)


@pytest.mark.parametrize(
    ("loss", "D"), [(DenoisingLoss(LogUniform(0.3, 10.0), reference_size=4), 8.0), (PoissonFieldLoss(0.5, 4), 1.0)]
)
def test_the_target_of_a_class_comes_from_its_own_charges(loss, D):
    """The exact class-conditional model has no loss; with charges of all classes it would."""
    y, label = torch.tensor([[-1.0], [1.0]], dtype=F64).repeat(50, 1), torch.tensor([0, 1]).repeat(50)
    settings = {"data": DataSummary.from_data(y, num_classes=2), "generator": rng.generator(1)}
    value = loss(Clairvoyant(D), y, label, reference=y[:4], reference_label=label[:4], **settings)
    assert float(value.max()) < 1e-12
    with pytest.raises(ValueError, match="reference_label = None"):
        loss(Clairvoyant(D), y, label, reference=y[:4], **settings)


@pytest.mark.parametrize("objective", [DenoisingLoss(), PoissonFieldLoss(2.0, 6)])
def test_labels_reach_the_network_in_training_and_in_denoising(objective):
    seen = []

    class Listener(Oracle):
        def forward(self, x, c_noise, label=None):
            seen.append(label)
            return torch.zeros(len(x), 3 + objective.extra_channels, dtype=F64)

    y, label, data = torch.randn(6, 3, dtype=F64), torch.arange(6), summary(0.5, (3,))
    denoiser = objective.make_denoiser(Listener(None), 1.0, data)
    objective(denoiser, y, label, data=data, reference=y, reference_label=label, generator=rng.generator(0))
    denoiser(y, 1.0, label=label)
    assert len(seen) == 2
    assert all(torch.equal(label, one) for one in seen)


def test_objectives_start_where_their_training_reaches():
    """By hand for CIFAR-10-like numbers: (1+tau)^M = (28²/(2 sqrt(3072) 1e-4))^.75."""
    data = dataclasses.replace(summary(0.5, (3, 32, 32)), norm=28.0)
    assert DenoisingLoss().recommended_sigma_max(data) == pytest.approx(40.0)
    by_hand = 0.01 * (28**2 / (2 * math.sqrt(3072) * 1e-4)) ** 0.75 * math.sqrt(2 / math.pi)
    assert PoissonFieldLoss().recommended_sigma_max(data) == pytest.approx(by_hand)
    for objective in (DenoisingLoss(), PoissonFieldLoss()):
        assert objective.make_denoiser(nn.Linear(1, 1), 1.0, data).statistics == (0.5, 0.03)


def test_poisson_field_loss_needs_D_one_and_charges():
    data = summary(0.5, (3,))
    with pytest.raises(ValueError, match="D = 2"):
        PoissonFieldLoss().make_denoiser(nn.Linear(1, 1), 2.0, data)
    with pytest.raises(ValueError, match="reference = None"):
        PoissonFieldLoss()(PoissonFieldLoss().make_denoiser(nn.Linear(1, 1), 1.0, data), torch.zeros(2, 3), data=data)
    with pytest.raises(ValueError, match="gamma = 0"):
        PoissonFieldLoss(gamma=0)
    with pytest.raises(ValueError, match="reference_size = -1"):
        DenoisingLoss(reference_size=-1)


def test_the_height_channel_of_a_picture_is_averaged():
    x, bumps = torch.randn(2, 3, 4, 5, dtype=F64), torch.randn(1, 1, 4, 5, dtype=F64)

    def v_z(extra):
        net = Oracle(lambda u, c: torch.cat([torch.zeros_like(u), extra.expand(2, 1, 4, 5)], dim=1))
        return FieldDenoiser(net, 5.0, **STATISTICS).field(x, 1.0)[1]

    assert torch.allclose(v_z(bumps), v_z(bumps.mean().expand(1, 1, 4, 5)))
    level = noise_level(x, torch.ones(2, dtype=F64), StudentTKernel(1.0), PAIR)
    share = v_z(torch.ones(1, 1, 4, 5, dtype=F64)) / v_z(torch.zeros(1, 1, 4, 5, dtype=F64)) - 1
    assert torch.allclose(share, 0.5 / (level**2 + 0.25).sqrt())


def test_wrong_networks_are_named():
    denoiser = PreconditionedDenoiser(TimeMLP((5,), extra_channels=1, width=8, depth=1), 1.0, **STATISTICS)
    with pytest.raises(ValueError, match="extra_channels = 0"):
        denoiser(torch.zeros(2, 5), 1.0)
