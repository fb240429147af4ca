"""Guided denoisers against exact conditional ones."""

import math

import pytest
import torch
from torch import nn

from pfgm.sampling.guidance import ClassifierGuidedDenoiser, ConditionedDenoiser, GuidedDenoiser, cost
from pfgm.sampling.likelihood import log_prob
from pfgm.sampling.sampler import Sampler
from pfgm.theory.analytic import EmpiricalDenoiser, GaussianBlob, PointCharge
from pfgm.theory.field import posterior_mean
from pfgm.theory.kernel import StudentTKernel

F64 = torch.float64
N = 16
g = torch.Generator().manual_seed(4)
CHARGES = torch.randn(24, N, dtype=F64, generator=g)
CLASSES = torch.arange(24) % 3


def class_logits(D, r_of=None):
    """log P(c | x) up to a constant under D augmented dimensions; `r_of` maps sigma to r."""
    r_of = r_of or (lambda sigma: sigma * math.sqrt(D))

    def logits(x, sigma):
        square = (x[:, None] - CHARGES).square().sum(2)
        if math.isinf(D):
            log_weight = -square / (2 * sigma[:, None] ** 2)
        else:
            log_weight = -(N + D) / 2 * (square + r_of(sigma)[:, None] ** 2).log()
        return torch.stack([log_weight[:, c == CLASSES].logsumexp(1) for c in range(3)], 1)

    return logits


def noisy(D, sigma, n=300):
    """Points whose source is a charge of class 1."""
    own = CHARGES[CLASSES == 1]
    y = own[torch.arange(n) % len(own)]
    return StudentTKernel(D).sample(y, sigma, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("D", [3.5, 8.0, 32.0])
def test_the_identity_behind_classifier_guidance(D):
    """x - denoised_c = [P_{D-2} (x - denoised) - mean(|x-y|² + r²)/(N+D-2) ∇P_{D-2}] / P_D, all posteriors at one r."""
    x, sigma = noisy(D, 1.0).requires_grad_(), torch.ones(300, dtype=F64)
    r = sigma * math.sqrt(D)
    P = class_logits(D)(x, sigma).softmax(1)[:, 1]
    P_less = class_logits(D - 2, lambda s: r)(x, sigma).softmax(1)[:, 1]
    (gradient,) = torch.autograd.grad(P_less.sum(), x)
    square = (x[:, None] - CHARGES).square().sum(2) + (r**2)[:, None]
    weights = (-(N + D) / 2 * square.log()).softmax(1)
    mean = (weights * square).sum(1)
    away = x - posterior_mean(x, sigma, CHARGES, D)
    right = (P_less[:, None] * away - (mean / (N + D - 2))[:, None] * gradient) / P[:, None]
    left = x - posterior_mean(x, sigma, CHARGES[CLASSES == 1], D)
    assert torch.allclose(left, right, rtol=0, atol=1e-10)


def errors(D, sigma):
    """Mean distance to the exact conditional denoiser of guidance for this D, and of the sigma² rule."""
    x, label = noisy(D, sigma), torch.ones(300, dtype=torch.long)
    plain, exact = EmpiricalDenoiser(CHARGES, D), posterior_mean(x, sigma, CHARGES[CLASSES == 1], D)
    ours = ClassifierGuidedDenoiser(plain, class_logits(D), label, D)(x, sigma)
    point = x.clone().requires_grad_()
    level = torch.full((300,), sigma, dtype=F64)
    (gradient,) = torch.autograd.grad(class_logits(D)(point, level).log_softmax(1)[:, 1].sum(), point)
    usual = plain(x, sigma) + sigma**2 * gradient
    return [float((guess - exact).norm(dim=1).mean()) for guess in (ours, usual)]


def test_classifier_guidance_beats_the_sigma_squared_rule_at_finite_D():
    ratios = []
    for D in (8.0, 32.0):
        for sigma in (0.5, 1.0, 2.0, 4.0):
            ours, usual = errors(D, sigma)
            assert ours < usual, (D, sigma)
            ratios.append(ours / usual)
    assert sum(ratios) / len(ratios) <= 0.8


def test_classifier_guidance_is_bayes_rule_at_infinite_D():
    assert errors(math.inf, 1.0)[0] < 1e-10


def test_classifier_guidance_pulls_by_its_strength_inside_its_interval():
    x, label, plain = noisy(8.0, 1.0, 3), torch.ones(3, dtype=torch.long), EmpiricalDenoiser(CHARGES, 8.0)

    def pull(strength, interval=(0.0, math.inf)):
        return ClassifierGuidedDenoiser(plain, class_logits(8.0), label, 8.0, strength, interval)(x, 1.0) - plain(x, 1.0)

    assert torch.allclose(pull(3.0), 3 * pull(1.0))
    each = pull(torch.tensor([0.0, 1.0, 2.0]))
    assert torch.allclose(each, torch.tensor([[0.0], [1.0], [2.0]]) * pull(1.0))
    assert not pull(1.0, (1.1, 2.0)).any()
    assert torch.equal(pull(1.0, (1.0, 2.0)), pull(1.0))
    assert torch.equal(pull(1.0, (0.5, 1.0)), pull(1.0))
    with pytest.raises(ValueError, match=r"N = 1, D = 1"):
        ClassifierGuidedDenoiser(PointCharge(torch.zeros(1)), lambda x, s: torch.cat([x, -x], 1), label, 1.0)(x[:, :1], 1.0)
    with pytest.raises(ValueError, match=r"classifier returned shape \(3,\)"):
        ClassifierGuidedDenoiser(plain, lambda x, s: x[:, 0], label, 8.0)(x, 1.0)


class Remembering(nn.Module):
    """Denoises to a number, or to the label; keeps what it was asked."""

    def __init__(self, value):
        super().__init__()
        self.value, self.asked = value, []

    def forward(self, x, sigma, label=None, vector=None):
        self.asked.append((sigma, label, vector))
        return torch.full_like(x, self.value) if label is None else label[:, None] + torch.zeros_like(x)


def test_guidance_extrapolates_away_from_the_reference():
    x, label, one = torch.zeros(4, 2), torch.tensor([5, 6, 7, 8]), Remembering(3.0)
    guided = GuidedDenoiser(one, ConditionedDenoiser(one, drop=("label",)), torch.tensor([1.0, 0.0, 2.0, 4.0]))
    assert guided(x, 1.0, label=label)[:, 0].tolist() == [5, 3, 3 + 2 * 4, 3 + 4 * 5]
    assert [asked[1] is None for asked in one.asked] == [False, True]
    assert cost(guided) == cost(guided, torch.ones(4)) == 2


def test_the_reference_is_asked_only_where_it_counts():
    x, label = torch.zeros(3, 2), torch.tensor([5, 6, 7])
    own, reference = Remembering(0.0), Remembering(3.0)
    guided = GuidedDenoiser(own, ConditionedDenoiser(reference, drop=("label",)), 2.0, (0.5, 1.0))
    assert guided(x, torch.tensor([0.4, 0.5, 1.1]), label=label)[:, 0].tolist() == [5, 3 + 2 * 3, 7]
    assert guided(x, torch.tensor([0.4, 1.0, 1.1]), label=label)[:, 0].tolist() == [5, 3 + 2 * 3, 7], "both ends belong to it"
    own.asked.clear()
    reference.asked.clear()
    outside = torch.tensor([0.4, 0.49, 1.1])
    assert guided(x, outside, label=label)[:, 0].tolist() == [5, 6, 7]
    assert (len(own.asked), len(reference.asked)) == (1, 0)
    assert (cost(guided), cost(guided, outside), cost(guided, torch.tensor([0.4, 0.5]))) == (2, 1, 2)
    assert cost(GuidedDenoiser(own, reference, 1.0), outside) == 1
    with pytest.raises(ValueError, match=r"guidance_interval = \(2, 1\)"):
        GuidedDenoiser(own, reference, 2.0, (2, 1))


def test_calls_count_both_networks_and_max_calls_holds():
    charges = CHARGES[CLASSES == 1]
    guided = GuidedDenoiser(EmpiricalDenoiser(charges, 8.0), EmpiricalDenoiser(CHARGES, 8.0), 2.0, (0.1, 5.0))
    settings = {"shape": (N,), "sigma_min": 0.01, "sigma_max": 80.0, "method": "euler", "steps": 12}
    sampler = Sampler(guided, StudentTKernel(8), **settings)
    inside = sum(0.1 <= level <= 5.0 for level in sampler.plan[0][:-1])
    one = Sampler(guided, StudentTKernel(8), **settings, start="hyperplane").sample(2)  # all samples at one sigma
    assert 0 < inside < 12
    assert one.calls == 13 + inside
    for most in range(2, 16):
        assert sampler.sample(4, max_calls=most).calls <= most
    with pytest.raises(ValueError, match="max_calls = 1 must be at least 2"):
        sampler.sample(4, max_calls=1)


def test_guidance_makes_samples_of_the_class_more_typical():
    """Autoguidance: away from the denoiser of all charges, the shares of the charges of the class are kept."""
    own = CHARGES[CLASSES == 1]
    guided = GuidedDenoiser(EmpiricalDenoiser(own, 8.0), EmpiricalDenoiser(CHARGES, 8.0), 1.5)
    x = Sampler(guided, StudentTKernel(8), shape=(N,), sigma_min=0.01, sigma_max=80.0).sample(64).x.double()
    assert float(torch.cdist(x, own).min(1).values.max()) < 0.05


def test_a_bound_condition_reaches_the_network_in_the_dtype_of_its_samples():
    one, condition = Remembering(3.0), torch.ones(2, 7)
    bound = ConditionedDenoiser(one, {"vector": condition})
    bound(torch.zeros(2, 2, dtype=F64), 1.0)
    assert torch.equal(one.asked[0][2], condition.double())
    bound(torch.zeros(2, 2), 1.0, label=torch.tensor([1, 2]))
    assert one.asked[1][1].tolist() == [1, 2]


def test_the_density_under_a_classifier_is_that_of_its_flow():
    """N(0, 1) data at D = inf with the exact classifier of x_1 + noise > 0: p(x | label) = p(x) P(label | x)/P(label)."""
    normal = torch.distributions.Normal(0.0, 1.0)

    def classifier(x, sigma):
        # P(y_1 + noise of .5 > 0 | x): y_1 | x is normal with mean x_1/(1+s²) and variance s²/(1+s²)
        mean, variance = x[:, 0] / (1 + sigma**2), sigma**2 / (1 + sigma**2)
        z = mean / (variance + 0.25).sqrt()
        return torch.stack([normal.cdf(-z).log(), normal.cdf(z).log()], 1)

    x, label = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(3)), torch.ones(6, dtype=torch.long)
    denoiser = ClassifierGuidedDenoiser(GaussianBlob(1.0), classifier, label, math.inf)
    settings = {"sigma_min": 0.05, "sigma_max": 200.0, "sigma_data": 1.0, "rtol": 1e-6, "atol": 1e-6}
    value = log_prob(denoiser, StudentTKernel(math.inf), x, **settings)
    spread = math.sqrt(1 + 0.05**2)
    exact = torch.distributions.Normal(0.0, spread).log_prob(x).sum(1)
    exact = exact + classifier(x, torch.full((6,), 0.05, dtype=F64))[:, 1] - math.log(0.5)
    assert torch.allclose(value, exact, atol=2e-2), (value, exact)
