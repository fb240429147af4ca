"""Labels, conditions, guidance, measurements and discrete data as users of a flow meet them."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

import pfgm
from pfgm.flow.conditioning import check_conditioning
from pfgm.nn import TimeMLP, UNet
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.sampling.guidance import GuidedDenoiser
from pfgm.sampling.inverse import Mask, Measurement
from pfgm.theory.analytic import GaussianBlob
from pfgm.theory.data_summary import condition_key
from tests.helpers import FAST, conditional, flow_of, labelled, make_flow

CALLS = {"preset": "fast"}


def test_classifier_free_guidance_extrapolates_from_the_flow_without_labels():
    flow = labelled(scale=2.0)
    x, sigma = flow.sample(4, labels=[0, 1, 2, 0], **FAST).x, 0.7
    none, own = flow.denoise(x, sigma), flow.denoise(x, sigma, [0, 1, 2, 0])
    w = torch.tensor([1.0, 2.0, 0.5, 0.0])
    guided = flow.denoise(x, sigma, [0, 1, 2, 0], guidance=w)
    assert not torch.allclose(none, own, atol=1e-3)
    assert torch.allclose(guided, none + w[:, None, None, None] * (own - none), atol=1e-5)
    outside = flow.denoise(x, sigma, [0, 1, 2, 0], guidance=w, guidance_interval=(0.36, 9.0))  # model units: sigma is .35
    assert torch.equal(outside, own)


def test_guided_samples_do_not_depend_on_their_batch():
    flow, labels, w = labelled(), [0, 1, 2, 1, 0], [1.0, 2.0, 3.0, 1.5, 0.0]
    whole = flow.sample(5, labels=labels, guidance=w, **CALLS)
    parts = flow.sample(5, labels=labels, guidance=w, batch_size=2, **CALLS)
    assert torch.allclose(whole.x, parts.x, atol=1e-5)
    assert whole.calls == 12
    assert torch.allclose(whole.x[:1], flow.sample(1, labels=0, **CALLS).x, atol=1e-5), "a strength of 1 is none"
    assert flow.sample(2, labels=0, guidance=2, max_calls=7, **CALLS).calls <= 7
    with pytest.raises(ValueError, match="max_calls = 1 must be at least 2"):
        flow.sample(2, labels=0, guidance=2, max_calls=1)


def test_autoguidance_leads_away_from_the_guide_with_the_same_labels():
    flow, guide = labelled(), make_flow(classes=3, std=0.1)
    x = torch.randn(2, 1, 8, 8)
    one, other = flow.denoise(x, 1.0, 2), guide.denoise(x, 1.0, 2)
    assert torch.allclose(flow.denoise(x, 1.0, 2, guide=guide, guidance=1.5), other + 1.5 * (one - other), atol=1e-5)
    plain = make_flow()
    plain.summary.mean.copy_(flow.summary.mean)
    assert torch.allclose(flow.denoise(x, 1.0, 2, guide=plain, guidance=3.0), 3 * one - 2 * plain.denoise(x, 1.0), atol=1e-5), (
        "a guide without labels gets none"
    )


def test_a_classifier_is_asked_in_the_users_units():
    flow, seen = make_flow(scale=3.0), []

    def classifier(x, sigma):
        seen.append((x.detach(), sigma))
        return torch.stack([x.flatten(1).sum(1), 0 * sigma], 1)

    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    pulled = flow.denoise(x, 0.6, labels, classifier=classifier) - flow.denoise(x, 0.6)
    assert torch.allclose(seen[0][0], x, atol=1e-5)
    assert seen[0][1].tolist() == pytest.approx([0.6, 0.6])
    assert bool((pulled[0] > 0).all())
    assert bool((pulled[1] < 0).all())
    gradient = 1 - torch.sigmoid(x[0].sum())  # of log P(0 | x) in each pixel of the user's
    away = ((x - flow.denoise(x, 0.6))[0] / 3).double().square().sum()
    expected = 3 * (3 * gradient) * (away + 128 * 0.2**2) / (64 + 128 - 2)
    assert torch.allclose(pulled[0], expected.float().expand(1, 8, 8), rtol=1e-3)
    assert flow.sample(2, labels=labels, classifier=classifier, **CALLS).x.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (labelled, {"guidance": 2.0}, r"classifier-free guidance needs labels \(none given\)"),
        (labelled, {"labels": "abc"}, "labels = 'abc': expected a 64-bit integer"),
        (labelled, {"labels": True}, "labels = True: expected a 64-bit integer"),
        (labelled, {"labels": [1, None, 2]}, r"labels = \[1, None, 2\]: expected a 64-bit integer"),
        (labelled, {"labels": 1, "guidance": 1j}, "guidance = 1j: complex numbers"),
        (labelled, {"labels": 1, "guidance": 2.0, "guidance_interval": (None, 2)}, r"guidance_interval = \(None, 2\)"),
        (labelled, {"labels": 1, "guidance": 2.0, "guide": "path"}, "guide = 'path': expected a flow"),
        (make_flow, {"measurement": 3}, "measurement = 3: expected a pfgm.sampling.Measurement"),
        (conditional, {"condition": torch.tensor([1e300] * 3, dtype=torch.float64)}, "Pass finite numbers"),
        (lambda: make_flow(classes=3), {"labels": 1, "guidance": 2.0}, r"label_dropout > 0 \(this one: no\)"),
        (make_flow, {"guidance": 2.0}, "classifier-free guidance needs labels"),
        (labelled, {"labels": 1, "guidance": [1.0, 2.0]}, "guidance = .*one for each of the 3 samples"),
        (labelled, {"labels": 1, "guidance": math.nan}, "guidance = nan"),
        (labelled, {"labels": 1, "guidance_interval": (0.1, 1.0)}, "guidance = None: guide and guidance_interval need"),
        (labelled, {"labels": 1, "guidance": 2.0, "guidance_interval": (1.0, 0.1)}, r"guidance_interval = \(1.0, 0.1\)"),
        (make_flow, {"classifier": lambda x, s: x}, "labels = None: a classifier guides"),
        (labelled, {"classifier": lambda x, s: x}, "labels = None: a classifier guides"),
        (labelled, {"labels": 3}, r"labels = 3: this model's labels are the integers 0..2"),
        (make_flow, {"condition": torch.zeros(3)}, "trained without conditions"),
        (conditional, {}, r"condition = None: this model needs conditions: vector \(3,\)"),
        (conditional, {"condition": torch.zeros(2, 3)}, r"condition has shape \(2, 3\)\. .* for each of the 3 samples"),
        (conditional, {"condition": torch.full((3,), math.nan)}, "condition has shape"),
        (
            make_flow,
            {"measurement": Measurement(Mask(torch.ones(8, 8, dtype=torch.bool)), torch.zeros(64), 0.1)},
            r"known has shape \(8, 8\)",
        ),
        (make_flow, {"measurement": Measurement(lambda x: x[:, 0, 0], torch.zeros(9), 0.1)}, r"its operator returns \(8,\)"),
        (
            make_flow,
            {"measurement": Measurement(lambda x: x @ torch.zeros(3, 3), torch.zeros(9), 0.1)},
            "operator does not map",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_call(make, options, message):
    flow = make()
    flow.denoiser.forward = lambda *args: pytest.fail("the network was asked")
    with pytest.raises(ValueError, match=message):
        flow.sample(3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"D": 64.0}, "guide: it has D = 64, this flow D = 128"),
        ({"shape": (1, 4, 4)}, r"guide: its shape is \(1, 4, 4\)"),
        ({"scale": 2.0}, "guide: its scale is 2.0"),
        ({"classes": 4}, "guide: its num_classes is 4"),
    ],
)
def test_guides_of_other_data_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        labelled().sample(1, labels=0, guide=make_flow(**options), guidance=2.0)
    other = labelled()
    other.summary.mean += 1
    with pytest.raises(ValueError, match="guide: its mean"):
        labelled().sample(1, labels=0, guide=other, guidance=2.0)
    with pytest.raises(ValueError, match="guide, classifier: they exclude each other"):
        labelled().sample(1, labels=0, guide=labelled(), guidance=2.0, classifier=lambda x, s: x)


@pytest.mark.process
@pytest.mark.parametrize(
    ("shape", "condition_shape"), [((2,), (3,)), ((1, 6, 5), (3,)), ((1, 6, 5), (2, 3, 3)), ((2,), (1, 2, 2))]
)
def test_conditions_of_any_kind_reach_the_network_normalised(shape, condition_shape):
    channels = (condition_shape[0], *[1] * (len(condition_shape) - 1))
    mean, std = 5 * torch.ones(channels), 2 * torch.ones(channels)
    flow = conditional(shape, condition_shape, condition_stats={condition_key(condition_shape): (mean, std)})
    plain, c = conditional(shape, condition_shape), torch.randn(4, *condition_shape)
    one, other = flow.sample(4, condition=5 + 2 * c, **CALLS).x, plain.sample(4, condition=c, **CALLS).x
    assert torch.allclose(one, other, atol=1e-4)
    assert torch.allclose(flow.sample(4, condition=5 + 2 * c, batch_size=3, **CALLS).x, one, atol=1e-4)
    assert torch.allclose(flow.sample(4, condition=5 + 2 * c[1], **CALLS).x[1], one[1], atol=1e-4), "one for all"
    assert not torch.allclose(flow.sample(4, condition=c, **CALLS).x, one, atol=1e-2)
    assert flow.log_prob(one, condition=5 + 2 * c, exact=False, rtol=1e-2, atol=1e-2).shape == (4,)


def test_conditions_survive_an_export(tmp_path):
    flow = conditional(condition_stats={"vector": (torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))}).eval()
    flow.save_pretrained(tmp_path)
    again, c = pfgm.load(tmp_path), torch.randn(3)
    assert again.summary.conditions == {"vector": (3,)}
    assert torch.equal(again.sample(2, condition=c, **CALLS).x, flow.sample(2, condition=c, **CALLS).x)


def test_unet_refuses_conditions_that_are_neither_image_nor_vector():
    with pytest.raises(ValueError, match=r"condition_shapes = .*'image' must have 3 dimensions"):
        UNet((1, 8, 8), condition_shapes={"image": (3, 4)})


def test_measurements_are_in_the_users_units():
    """At D = inf and Gaussian data of scale s about a mean m: each known pixel has mean m + (b - m) s²/(s² + noise²)."""
    mean, scale, s = torch.tensor([1.0, -1.0, 0.5]), 4.0, 0.5
    flow = flow_of(GaussianBlob(s), shape=(3,), sigma_min=1e-3, sigma_max=80.0, mean=mean, scale=scale)
    measurement = Measurement(Mask(torch.tensor([True, True, False])), torch.tensor([6.0, -5.0]), noise=1.5)
    x = flow.sample(4000, measurement=measurement, batch_size=1500).x.double()
    shrink = (s * scale) ** 2 / ((s * scale) ** 2 + 1.5**2)
    expected = torch.tensor([4 + (6 - 4) * shrink, -4 + (-5 + 4) * shrink, 2.0])
    std = torch.tensor([math.sqrt(shrink) * 1.5, math.sqrt(shrink) * 1.5, s * scale])
    assert bool(((x.mean(0) - expected).abs() < 3 * std / math.sqrt(4000)).all())
    assert bool(((x.std(0) - std).abs() < 3 * std / math.sqrt(8000)).all())


def discrete(levels=5, **options):
    settings = {"value_range": (-1.0, 1.0), "levels": levels, "dequantized": True, "scale": 2.0} | options
    settings |= {"shape": (1,)} | options
    return flow_of(GaussianBlob(0.3), sigma_min=0.01, sigma_max=400.0, sigma_data=0.3, **settings)


def test_bits_per_dim_is_the_integral_over_the_gap():
    """-E log2(p(x + spacing (u - 1/2)) spacing), p normal of the user's scale, by scipy."""
    x, spacing = torch.tensor([[-1.0], [0.5]]), 0.5
    law = stats.norm(scale=2 * math.hypot(0.3, 0.01))
    bits = discrete().bits_per_dim(x.repeat(2000, 1), rtol=1e-4, atol=1e-4).reshape(-1, 2)
    for k in range(2):
        low = float(x[k]) - spacing / 2
        exact = -integrate.quad(lambda v: law.logpdf(v) / spacing, low, low + spacing)[0] / math.log(2) - math.log2(spacing)
        assert abs(float(bits[:, k].mean()) - exact) < 3 * float(bits[:, k].std()) / math.sqrt(2000)
        assert float(bits[:, k].std()) > 0.05


def test_bits_per_dim_are_a_mean_over_dimensions():
    """Independent dimensions: two of the same level have the bits of one, with other noise."""
    one = discrete().bits_per_dim(torch.full((3000, 1), 0.5), rtol=1e-3, atol=1e-3)
    two = discrete(shape=(2,)).bits_per_dim(torch.full((1500, 2), 0.5), rtol=1e-3, atol=1e-3)
    assert abs(float(one.mean() - two.mean())) < 3 * float(one.std()) * math.sqrt(2 / 3000)


def test_bits_per_dim_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match=r"trained without noise between them.*dequantize = true"):
        discrete(dequantized=False).bits_per_dim(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="data are continuous"):
        discrete(levels=0).bits_per_dim(torch.zeros(1, 1))


def test_guided_flows_have_trajectories_and_latents():
    flow = labelled()
    way = flow.trajectory([(0, 0), (0, 1)], 3, labels=[0, 1], guidance=2.0, batch_size=1, **CALLS)
    assert way.x.shape == (3, 2, 1, 8, 8)
    latent = flow.encode(torch.zeros(1, 1, 8, 8), labels=1, guidance=2.0, **CALLS)
    assert flow.decode(latent, labels=1, guidance=2.0, **CALLS).shape == (1, 1, 8, 8)
    assert isinstance(check_conditioning(flow, 1, 1, {"guidance": 2.0}).denoiser(), GuidedDenoiser)


def test_numpy_arrays_are_welcome_and_unknown_names_are_not():
    flow, x = labelled(), torch.randn(2, 1, 8, 8)
    assert torch.equal(flow.denoise(x.numpy(), 0.5, 1), flow.denoise(x, 0.5, 1))
    assert torch.equal(
        flow.vary(x.numpy(), 0.5, labels=np.array([1, 2], dtype=np.uint16), **CALLS).x,
        flow.vary(x, 0.5, labels=[1, 2], **CALLS).x,
    )
    mask = np.ones((1, 8, 8), dtype=bool)
    assert Measurement(Mask(mask), x.flatten(1).numpy(), 0.1).values.shape == (2, 64)
    for call in (
        lambda: flow.denoise(x, 0.5, labels=1),
        lambda: flow.sample(1, temperture=1.0),
        lambda: flow.encode(x, bogus=1),
    ):
        with pytest.raises(TypeError, match="is no option here; there are"):
            call()
    with pytest.raises(ValueError, match=r"x has samples of shape \(8, 8\)"):
        discrete().bits_per_dim(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"latent = Tensor \(2, 1, 8, 8\) torch\.float32: expected a Latent"):
        flow.decode(x)
    with pytest.raises(ValueError, match="a, b: 2 and 1 samples"):
        flow.interpolate(x, x[:1], 3)


@pytest.mark.process
def test_encoding_is_accurate_unless_a_solver_is_chosen():
    flow, x = labelled(), torch.randn(2, 1, 8, 8)
    accurate, guided = flow.encode(x, labels=1).t, flow.encode(x, labels=1, guidance=1.0).t
    assert torch.equal(accurate, guided), "conditioning does not change the solver"
    with pytest.raises(ValueError, match=r"temperature = 0\.5: only samples are drawn"):
        flow.encode(x, labels=1, temperature=0.5)


def test_what_a_classifier_or_operator_gives_is_checked():
    flow, x = make_flow(), torch.randn(2, 1, 8, 8)
    free = flow.denoise(x, 0.5, 1, classifier=lambda x, sigma: torch.zeros(2, 3))
    assert torch.allclose(free, flow.denoise(x, 0.5)), "one that ignores x pulls nowhere"
    with pytest.raises(ValueError, match="labels go up to 5, the classifier has 3 classes"):
        flow.denoise(x, 0.5, 5, classifier=lambda x, sigma: x.flatten(1)[:, :3])
    with pytest.raises(ValueError, match="classifier: the gradient"):
        flow.denoise(x, 0.5, 1, classifier=lambda x, sigma: x.flatten(1)[:, :3] * math.nan)
    for operator in (lambda x: x[:, 0, 0].detach(), lambda x: x[:, 0, 0] / 0):
        with pytest.raises(ValueError, match="operator: it gives NaN or infinity, or torch cannot differentiate it"):
            flow.denoise(x, 0.5, measurement=Measurement(operator, torch.zeros(8), 0.1))


def test_variations_are_those_of_the_model_in_any_units_and_batches():
    one, other = make_flow(scale=1.0), make_flow(scale=4.0)
    x = torch.randn(4, 1, 8, 8)
    v = one.vary(x, 0.8, seed=3, **CALLS).x
    assert torch.allclose(other.vary(4 * x, 3.2, seed=3, **CALLS).x, 4 * v, atol=1e-3)
    assert torch.allclose(one.vary(x, 0.8, seed=3, batch_size=2, **CALLS).x, v, atol=1e-5)
    assert not torch.allclose(one.vary(x, 0.8, seed=4, **CALLS).x, v, atol=1e-2)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'sigma_max'"):
        one.vary(x, 0.8, sigma_max=3.0)


def test_a_variation_of_a_gaussian_has_its_closed_form():
    """D = inf, data N(0, s²): x + level n flows to (x + level n) sqrt((s² + min²)/(s² + level²))."""
    flow = flow_of(GaussianBlob(0.5), shape=(2,), sigma_min=0.01, sigma_max=40.0)
    x = torch.tensor([[1.0, -2.0]]).repeat(3000, 1)
    v = flow.vary(x, 0.5, method="dopri5", rtol=1e-4, atol=1e-4, batch_size=3000).x.double()
    factor = math.sqrt((0.25 + 1e-4) / (0.25 + 0.25)) * 0.25 / (0.25 + 1e-4)
    assert torch.allclose(v.mean(0), factor * x[0].double(), atol=3 * 0.5 * factor / math.sqrt(3000))
    assert torch.allclose(v.std(0), torch.full((2,), 0.5 * factor, dtype=v.dtype), rtol=0.05)


@pytest.mark.process
def test_interpolation_goes_from_the_first_to_the_second():
    flow, a, b = make_flow(), torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    way = flow.interpolate(a, b, 3, rtol=1e-5, atol=1e-5, method="dopri5")
    assert torch.allclose(way[0], a, atol=3e-2)
    assert torch.allclose(way[2], b, atol=3e-2)


def both(**options):
    """A flow with labels and conditions."""
    torch.manual_seed(2)
    net = TimeMLP((2,), 3, 0, {"vector": (3,)}, width=8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    settings = {
        "sigma_min": 0.01,
        "sigma_max": 40.0,
        "num_classes": 3,
        "conditions": {"vector": (3,)},
        "unconditional": True,
    } | options
    return flow_of(PreconditionedDenoiser(net, 8.0, 0.5, 0.1), shape=(2,), **settings)


def test_labels_conditions_guidance_and_measurements_work_together():
    """Against the same denoisers combined by hand."""
    flow, guide, x, c = both(), both(condition_stats={}), torch.randn(4, 2), torch.randn(4, 3)
    for parameter in guide.denoiser.parameters():
        parameter.data *= 0.5
    label = torch.tensor([0, 1, 2, 0])

    def by_hand(model, label):
        return model.denoiser(x, torch.full((4,), 0.7), label=label, vector=c)

    own, none, weak = by_hand(flow, label), by_hand(flow, None), by_hand(guide, label)
    given = {"condition": c, "guidance": 2.0}
    free = flow.denoise(x, 0.7, label, **given)
    assert torch.allclose(free, none + 2 * (own - none), atol=1e-5)
    assert torch.allclose(flow.denoise(x, 0.7, label, guide=guide, **given), weak + 2 * (own - weak), atol=1e-5)
    all_known = Measurement(lambda x: x, torch.zeros(4, 2), 1e6)
    assert torch.allclose(flow.denoise(x, 0.7, label, measurement=all_known, **given), free, atol=1e-4), "knows next to nothing"

    def classifier(x, sigma):
        return torch.stack([x.sum(1), 0 * sigma, -x.sum(1)], 1)

    one = flow.denoise(x, 0.7, label, condition=c, classifier=classifier) - own
    three = flow.denoise(x, 0.7, label, classifier=classifier, condition=c, guidance=3.0) - own
    assert float(one.detach().abs().max()) > 1e-3
    assert torch.allclose(three, 3 * one, atol=1e-5)
    outside = {"guidance": 3.0, "guidance_interval": (0.8, 2.0)}
    assert torch.allclose(flow.denoise(x, 0.7, label, condition=c, classifier=classifier, **outside), own, atol=1e-6)
    other = both(condition_stats={"vector": (torch.ones(3), torch.ones(3))})
    with pytest.raises(ValueError, match="guide: its vector_mean"):
        flow.denoise(x, 0.7, label, guide=other, **given)


def test_a_guide_that_needs_labels_gets_them():
    with pytest.raises(ValueError, match="labels = None: the guide was trained with labels only"):
        labelled().sample(1, guide=make_flow(classes=3), guidance=2.0)


def test_one_number_of_each_sample_can_be_measured():
    flow = make_flow()
    x = flow.sample(2, measurement=Measurement(lambda x: x.flatten(1).mean(1), torch.tensor([0.3, 0.1]), 0.01)).x
    assert torch.allclose(x.flatten(1).mean(1), torch.tensor([0.3, 0.1]), atol=0.05)
    matrix = torch.randn(3, 64)
    double = Measurement(lambda x: x.flatten(1) @ matrix.T, torch.zeros(3, dtype=torch.float64), 0.1)
    assert flow.sample(1, measurement=double, **CALLS).x.dtype == torch.float32
    with pytest.raises(ValueError, match=r"for 2 samples\. Keep samples apart"):
        flow.sample(1, measurement=Measurement(lambda x: x.mean(0), torch.zeros(1, 8, 8), 0.1))
