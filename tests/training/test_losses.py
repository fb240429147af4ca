"""Objectives: values in closed form, targets against the exact field, labels and charges."""

import math

import pytest
import torch
from torch import nn

from pfgm.core import rng
from pfgm.core.tensors import norm
from pfgm.nn.preconditioning import noise_level
from pfgm.theory.data_summary import DataSummary
from pfgm.theory.field import field_from_displacement, normalized_field, posterior_mean
from pfgm.theory.kernel import StudentTKernel
from pfgm.training.losses import Charges, DenoisingLoss, PoissonFieldLoss
from pfgm.training.noise import LogUniform, PoissonFlowNoise
from tests.helpers import F64, Answering


def summary_of(*shape, norm=None):
    """Summarise data of standard deviation 1/2."""
    return DataSummary(shape, sigma_data=0.5, norm=norm or 0.5 * math.sqrt(math.prod(shape)), power_std=0.03)


def test_edm_loss_of_a_zero_network_on_matched_gaussian_data_is_one():
    y = 0.5 * torch.randn(200000, 4, generator=rng.generator(3), dtype=F64)
    loss, summary = DenoisingLoss(), summary_of(4)
    denoiser = loss.make_denoiser(Answering(lambda x, c: torch.zeros_like(x)), math.inf, summary)
    assert float(loss(denoiser, y, {}, summary=summary, generator=rng.generator(4)).mean()) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("D", [1.0, 16.0])
def test_loss_weighs_each_sample_by_its_own_level(D):
    """The loss is |denoise - y|² / (N c_out(level)²). Averaging over the batch before weighting would differ."""
    y, summary = 0.5 * torch.randn(64, 6, dtype=F64), summary_of(6)
    loss = DenoisingLoss(LogUniform(0.1, 10))
    denoiser = loss.make_denoiser(Answering(lambda x, c: x), D, summary)
    g = rng.generator(5)
    sigma = loss.noise.sample(y, 0.5, g)
    x = StudentTKernel(D).sample(y, sigma, g)
    level2 = noise_level(x, sigma, StudentTKernel(D), (0.5, 0.03)).square()
    expected = (denoiser(x, sigma) - y).square().mean(1) * (level2 + 0.25) / (level2 * 0.25)
    assert torch.allclose(loss(denoiser, y, {}, summary=summary, generator=rng.generator(5)), expected, rtol=1e-10)


@pytest.mark.process
def test_denoising_and_explicit_loss_differ_by_the_same_number_for_every_network():
    """By Vincent's identity L(y) - L(E[y|x]) does not depend on the network; here up to three standard errors."""
    charges, summary = 0.5 * torch.randn(8, 2, dtype=F64), summary_of(2)
    y = charges[torch.randint(8, (60000,), generator=rng.generator(6))]
    plain, explicit = DenoisingLoss(LogUniform(0.2, 4)), DenoisingLoss(LogUniform(0.2, 4), reference_size=8)
    gaps = []
    for answer in (torch.zeros_like, lambda x, c=None: torch.tanh(x) * 0.5):
        denoiser = plain.make_denoiser(Answering(lambda x, c, f=answer: f(x)), 3.0, summary)
        a = plain(denoiser, y, {}, summary=summary, generator=rng.generator(7))
        b = explicit(denoiser, y, {}, summary=summary, charges=Charges(charges), generator=rng.generator(7))
        gaps.append(a - b)
    difference = gaps[0] - gaps[1]
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / math.sqrt(len(y))
    assert float(gaps[0].mean()) > 0.1


def test_poisson_field_loss_compares_with_the_field_of_the_charges():
    y, summary = 0.5 * torch.randn(10, 3, dtype=F64), summary_of(3)
    loss = PoissonFieldLoss(2.0, reference_size=10, noise=PoissonFlowNoise(M=150))
    denoiser = loss.make_denoiser(Answering(lambda x, c: torch.zeros(10, 4, dtype=F64)), 1.0, summary)
    x, z = loss.noise.perturb(y, summary.mean_norm, rng.generator(8))
    away = x - posterior_mean(x, z, y, 1.0)
    R = torch.hypot(norm(away), z)
    t_x, t_z = -math.sqrt(3) * away / (R + 2)[:, None], -math.sqrt(3) * z / (R + 2)
    v_x, v_z = denoiser.field(x, z)
    expected = ((v_x - t_x).square().sum(1) + (v_z - t_z).square()) / 4
    value = loss(denoiser, y, {}, summary=summary, charges=Charges(y), generator=rng.generator(8))
    assert torch.allclose(value, expected, rtol=1e-10)
    for mine, exact in zip(normalized_field(x, z, y, 2.0), (t_x, t_z), strict=True):
        assert torch.allclose(mine, exact)


class Clairvoyant(nn.Module):
    """Give the exact denoised point and the exact field of two points, each of its own class."""

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
def test_target_of_a_class_comes_from_its_own_charges(loss, D):
    """The exact class-conditional model has zero loss; with charges of all classes it would not."""
    y, label = torch.tensor([[-1.0], [1.0]], dtype=F64).repeat(50, 1), torch.tensor([0, 1]).repeat(50)
    settings = {"summary": DataSummary.from_data(y, num_classes=2), "generator": rng.generator(1)}
    value = loss(Clairvoyant(D), y, {"label": label}, charges=Charges(y[:4], label[:4]), **settings)
    assert float(value.max()) < 1e-12
    with pytest.raises(ValueError, match=r"charges.label = None"):
        loss(Clairvoyant(D), y, {"label": label}, charges=Charges(y[:4]), **settings)


@pytest.mark.parametrize("objective", [DenoisingLoss(), PoissonFieldLoss(2.0, 6)])
def test_labels_reach_the_network_in_training_and_in_denoising(objective):
    seen = []

    class Listener(Answering):
        def forward(self, x, c_noise, label=None):
            seen.append(label)
            return torch.zeros(len(x), 3 + objective.extra_channels, dtype=F64)

    y, label, summary = torch.randn(6, 3, dtype=F64), torch.arange(6), summary_of(3)
    denoiser = objective.make_denoiser(Listener(None), 1.0, summary)
    objective(denoiser, y, {"label": label}, summary=summary, charges=Charges(y, label), generator=rng.generator(0))
    denoiser(y, 1.0, label=label)
    assert len(seen) == 2
    assert all(torch.equal(label, one) for one in seen)


def test_flows_start_at_the_largest_noise_of_training():
    """For numbers like those of CIFAR-10, by hand: (1+tau)^M = (28²/(2 sqrt(3072) 1e-4))^.75."""
    summary = summary_of(3, 32, 32, norm=28.0)
    assert DenoisingLoss().recommended_sigma_max(summary) == pytest.approx(40.0)
    by_hand = 0.01 * (28**2 / (2 * math.sqrt(3072) * 1e-4)) ** 0.75 * math.sqrt(2 / math.pi)
    assert PoissonFieldLoss().recommended_sigma_max(summary) == pytest.approx(by_hand)
    for objective in (DenoisingLoss(), PoissonFieldLoss()):
        assert objective.make_denoiser(nn.Linear(1, 1), 1.0, summary).statistics == (0.5, 0.03)


def test_poisson_field_loss_needs_D_one_and_charges():
    summary = summary_of(3)
    with pytest.raises(ValueError, match="D = 2"):
        PoissonFieldLoss().make_denoiser(nn.Linear(1, 1), 2.0, summary)
    with pytest.raises(ValueError, match="charges = None"):
        PoissonFieldLoss()(
            PoissonFieldLoss().make_denoiser(nn.Linear(1, 1), 1.0, summary), torch.zeros(2, 3), {}, summary=summary
        )
    with pytest.raises(ValueError, match="gamma = 0"):
        PoissonFieldLoss(gamma=0)
    with pytest.raises(ValueError, match="reference_size = -1"):
        DenoisingLoss(reference_size=-1)
