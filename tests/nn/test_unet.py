"""The U-Net: published sizes by hand, the forward pass written out, conditions, initialisation and compilation."""

import math
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from pfgm.nn import UNet
from pfgm.nn.blocks import Block
from tests.helpers import NCSNPP, ROOT, randomized

PUBLISHED = {"width": 128, "blocks": 4, "attention_levels": (1,), "head_channels": 256, "scale_shift": False}
PUBLISHED |= {"resblock_updown": True, "noise_features": 128}


@pytest.mark.parametrize("options", [{}, {"fourier_scale": 16.0}])
def test_output_depends_on_noise_level_and_label(options):
    net = randomized(UNet((1, 8, 8), 3, width=8, **options)).requires_grad_(False)
    x = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1)
    small = net(x, torch.log(torch.tensor([0.001, 0.002, 0.004, 0.008])) / 4)
    gaps = (small[1:] - small[:-1]).flatten(1).norm(dim=1)
    assert float(gaps.min()) > 0.01 * float(small.flatten(1).norm(dim=1).mean()), "small noise levels are resolved"
    labels = [net(x[:1], torch.zeros(1), label=label) for label in (None, torch.tensor([0]), torch.tensor([2]))]
    assert not torch.allclose(labels[0], labels[1])
    assert not torch.allclose(labels[1], labels[2])
    assert torch.equal(labels[0], net(x[:1], torch.zeros(1), label=torch.tensor([3]))), "no label is the last label"


def conv(c_in, c_out, size=3):
    return c_in * c_out * size**2 + c_out


def ddpmpp_parameters(multipliers, augmentation, width=128, blocks=4, attention_level=1):
    """Count the parameters of DDPM++ by hand, from the description in EDM's appendix F.1."""
    embedding = 4 * width

    def block(c_in, c_out, resampled=False, attention=False):
        total = 2 * c_in + conv(c_in, c_out) + embedding * c_out + c_out + 2 * c_out + conv(c_out, c_out)
        total += conv(c_in, c_out, 1) if c_in != c_out or resampled else 0
        return total + (2 * c_out + 4 * conv(c_out, c_out, 1) if attention else 0)

    total = conv(3, width) + width * embedding + embedding + embedding * embedding + embedding + augmentation * width
    channels, skips = width, [width]
    for level, multiplier in enumerate(multipliers):
        if level:
            total += block(channels, channels, resampled=True)
            skips.append(channels)
        for _ in range(blocks):
            total += block(channels, multiplier * width, attention=level == attention_level)
            channels = multiplier * width
            skips.append(channels)
    total += block(channels, channels, attention=True) + block(channels, channels)
    for level in reversed(range(len(multipliers))):
        for i in range(blocks + 1):
            out = multipliers[level] * width
            total += block(channels + skips.pop(), out, attention=level == attention_level and i == blocks)
            channels = out
        total += block(channels, channels, resampled=True) if level else 0
    return total + 2 * channels + conv(channels, 3)


@pytest.mark.parametrize(
    ("multipliers", "augmentation", "millions"),
    [((2, 2, 2), 9, 55.7), ((1, 2, 2, 2), 0, 61.8)],  # EDM's table 7; score_sde's DDPM++, which PFGM uses
)
def test_published_networks_have_their_number_of_parameters(multipliers, augmentation, millions):
    with torch.device("meta"):
        net = UNet((3, 32, 32), multipliers=multipliers, augmentation_size=augmentation, **PUBLISHED)
    count = sum(p.numel() for p in net.parameters())
    assert count == ddpmpp_parameters(multipliers, augmentation)
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("config", ["cifar10_pfgmpp.yaml", "cifar10_pfgm.yaml"])
def test_gradients_reach_every_parameter_of_the_published_networks(config):
    """The networks have a sixteenth of their width here."""
    arguments = yaml.safe_load((ROOT / "configs" / config).read_text())["model"]["net"]["init_args"] | {
        "width": 8,
        "dropout": 0.0,
    }
    net = randomized(UNet((3, 32, 32), **arguments))
    given = {"augmentation": torch.randn(2, 9)} if "augmentation_size" in arguments else {}
    net(torch.randn(2, 3, 32, 32), torch.tensor([-1.0, 0.5]), **given).square().mean().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())


def reference_block(block, x, embedding):
    """Evaluate a residual block from its weights, by its description."""
    weight = dict(block.named_parameters())

    def norm(h, name):
        groups = math.gcd(h.shape[1], min(32, h.shape[1] // 4))
        return F.group_norm(h, groups, weight[f"{name}.weight"], weight[f"{name}.bias"], eps=1e-6)

    def conv(h, name):
        return F.conv2d(h, weight[f"{name}.weight"], weight[f"{name}.bias"], padding=weight[f"{name}.weight"].shape[-1] // 2)

    h = conv(block.resample(F.silu(norm(x, "norm1"))), "conv1")
    m = F.linear(embedding, weight["modulation.weight"], weight["modulation.bias"])[:, :, None, None]
    width = h.shape[1]
    scaled = m.shape[1] == 2 * width
    h = norm(h, "norm2") * (1 + m[:, :width]) + m[:, width:] if scaled else norm(h + m, "norm2")
    x = block.resample(x)
    x = (conv(x, "skip") if "skip.weight" in weight else x) + conv(F.silu(h), "conv2")
    return x / math.sqrt(2) if block.attention is None else block.attention(x / math.sqrt(2))


@pytest.mark.parametrize("options", [{}, NCSNPP | {"scale_shift": False, "attention_levels": (1,)}])
def test_forward_pass_agrees_with_its_description(options):
    """Pad by the border, embed, go down with the input added again, through the middle, and up with skips."""
    net = randomized(UNet((2, 7, 13), 3, width=8, multipliers=(1, 2, 3), blocks=2, **options)).double().requires_grad_(False)
    x, c_noise, label = torch.randn(2, 2, 7, 13).double(), torch.tensor([-1.0, 0.7]).double(), torch.tensor([2, 0])
    count = net.embedding.features // 2
    if "fourier_scale" in options:
        frequencies = scipy.stats.halfnorm(scale=16).ppf((np.arange(count) + 0.5) / count)
    else:
        frequencies = np.geomspace(1 / 8, 8, count)
    phase = c_noise.numpy()[:, None] * 2 * np.pi * frequencies
    e = torch.tensor(np.concatenate([np.sin(phase), np.cos(phase)], axis=1)) + net.embedding.labels.weight[label]
    for i in (0, 2):
        e = F.silu(e @ net.embedding.mlp[i].weight.T + net.embedding.mlp[i].bias)
    rows, columns = [min(i, 6) for i in range(8)], [min(i, 12) for i in range(16)]
    padded = x[:, :, rows][:, :, :, columns]

    def between(layer, h):
        if isinstance(layer, Block):
            return reference_block(layer, h, e)
        return F.conv2d(layer.resample(h), layer.conv.weight, layer.conv.bias, padding=1)

    h = source = F.conv2d(padded, net.first.weight, net.first.bias, padding=1)
    source, skips, layers = padded, [h], list(net.down)
    for level in range(3):
        if level:
            h = between(layers.pop(0), h)
            if "residual_input" in options:
                path = net.inputs[str(3 * level - 1)]
                h = source = (h + path[1](F.conv2d(source, path[0].weight, path[0].bias, padding=1))) / math.sqrt(2)
            skips.append(h)
        for _ in range(2):
            assert (layers[0].attention is not None) == (level in options.get("attention_levels", ()))
            h = reference_block(layers.pop(0), h, e)
            skips.append(h)
    h = reference_block(net.middle[2], net.middle[1](reference_block(net.middle[0], h, e)), e)
    layers = list(net.up)
    for level in (2, 1, 0):
        for i in range(3):
            assert (layers[0].attention is not None) == (i == 2 and level in options.get("attention_levels", ()))
            h = reference_block(layers.pop(0), torch.cat([h, skips.pop()], dim=1), e)
        if level:
            h = between(layers.pop(0), h)
    groups = math.gcd(8, 2)
    h = F.silu(F.group_norm(h, groups, net.last[0].weight, net.last[0].bias, eps=1e-6))
    out = F.conv2d(h, net.last[2].weight, net.last[2].bias, padding=1)[:, :, :7, :13]
    assert torch.allclose(net(x, c_noise, label=label), out, rtol=1e-4, atol=1e-4 * float(out.abs().max()))


def test_image_conditions_are_resized_and_concatenated():
    """The network equals one without conditions that gets the resized image as further channels."""
    net = randomized(UNet((3, 7, 13), condition_shapes={"image": (2, 4, 4)}, width=8, **NCSNPP))
    plain = UNet((5, 7, 13), width=8, **NCSNPP)
    last = {name: torch.cat([value, value[:2]]) for name, value in net.state_dict().items() if name.startswith("last.2.")}
    plain.load_state_dict(net.state_dict() | last)
    x, c_noise, image = torch.randn(2, 3, 7, 13), torch.tensor([-1.0, 0.7]), torch.randn(2, 2, 4, 4)
    resized = F.interpolate(image, (7, 13), mode="bilinear", align_corners=False)
    out = net(x, c_noise, image=image)
    assert torch.allclose(out, plain(torch.cat([x, resized], dim=1), c_noise)[:, :3], rtol=1e-4, atol=1e-5)


def test_vector_conditions_join_the_embedding_like_a_label():
    """A vector v acts as a class with the embedding W v + b does; an image may come with it."""
    net = randomized(UNet((1, 8, 8), condition_shapes={"vector": (3,), "image": (1, 8, 8)}, width=8))
    plain = UNet((1, 8, 8), 2, condition_shapes={"image": (1, 8, 8)}, width=8)
    x, c_noise, vector, image = torch.randn(2, 1, 8, 8), torch.tensor([-1.0, 0.7]), torch.randn(2, 3), torch.randn(2, 1, 8, 8)
    state, linear = net.state_dict(), net.embedding.condition
    weights = {name: value for name, value in state.items() if not name.startswith("embedding.condition")}
    embedded = torch.cat([linear(vector), torch.zeros(1, 32)])
    plain.load_state_dict(weights | {"embedding.labels.weight": embedded.detach()})
    out = net(x, c_noise, vector=vector, image=image)
    assert torch.allclose(out, plain(x, c_noise, label=torch.tensor([0, 1]), image=image), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, net(x, c_noise, vector=vector.flip(0), image=image), atol=1e-2)


def test_residual_input_reaches_the_lower_levels():
    """When the first convolution is zero, the filtered input still arrives one level down."""
    for residual_input, arrives in ((True, True), (False, False)):
        net = UNet((1, 8, 8), width=8, blocks=1, residual_input=residual_input)
        randomized(net)
        for parameter in net.first.parameters():
            nn.init.zeros_(parameter)
        a, b = (net(torch.randn(1, 1, 8, 8), torch.zeros(1)) for _ in range(2))
        assert (not torch.allclose(a, b)) == arrives


def test_no_augmentation_is_the_zero_vector():
    net = randomized(UNet((1, 4, 4), width=8, augmentation_size=3)).requires_grad_(False)
    x, c_noise = torch.randn(2, 1, 4, 4), torch.zeros(2)
    assert torch.equal(net(x, c_noise), net(x, c_noise, augmentation=torch.zeros(2, 3)))
    assert not torch.allclose(net(x, c_noise), net(x, c_noise, augmentation=torch.ones(2, 3)))


def test_glorot_weights_have_edms_variances():
    torch.manual_seed(0)
    net = UNet((3, 8, 8), 5, width=32, glorot=True)
    weight = net.down[0].conv1.weight
    assert torch.isclose(weight.var(), torch.tensor(2 / (9 * (32 + 32))), rtol=0.05)
    assert (
        scipy.stats.kstest(weight.detach().flatten(), scipy.stats.uniform(-(c := math.sqrt(6 / 576)), 2 * c).cdf).pvalue > 1e-3
    )
    assert not bool(net.down[0].conv2.weight.any()), "residual branches start at zero"
    assert all(not bool(p.any()) for name, p in net.named_parameters() if name.endswith("bias") and "norm" not in name)
    qkv = net.middle[1].qkv.weight
    assert torch.isclose(qkv.var(), torch.tensor(0.2 * 2 / (64 + 3 * 64)), rtol=0.05), "EDM's smaller attention"
    assert torch.isclose(net.embedding.labels.weight.std(), torch.tensor(1.0), rtol=0.2), "labels keep their own distribution"


@pytest.mark.process
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # traced but not compiled further: seconds instead of a minute
        pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")]),
    ],
)
def test_compiled_network_has_the_same_outputs_and_gradients(backend):
    """The names of parameters stay as well, and the graph has no break."""
    net = randomized(UNet((1, 7, 9), 2, width=8, blocks=1, attention=False, **NCSNPP))
    x, c_noise, label = torch.randn(2, 1, 7, 9), torch.tensor([-1.0, 0.5]), torch.tensor([0, 2])
    eager, names = net(x, c_noise, label=label), list(net.state_dict())
    gradient = torch.autograd.grad(eager.square().sum(), list(net.parameters()))
    net.compile(backend=backend, fullgraph=True)
    compiled = net(x, c_noise, label=label)
    assert float((compiled - eager).detach().abs().max() / eager.detach().abs().max()) < 1e-5
    for a, b in zip(torch.autograd.grad(compiled.square().sum(), list(net.parameters())), gradient, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-3
    assert list(net.state_dict()) == names


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16)])
def test_bfloat16_autocast_stays_close_to_float32(shape):
    """The noise level is embedded in float32."""
    torch.manual_seed(0)
    net = UNet(shape, width=16, multipliers=(1, 2), blocks=1, fourier_scale=16.0)
    nn.init.normal_(net.last[-1].weight, std=0.05)
    x, c_noise = torch.randn(4, *shape), torch.tensor([-1.5, -0.5, 0.3, 1.0])
    exact = net(x, c_noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x, c_noise)
    assert float(((low - exact).norm() / exact.norm()).detach()) < 0.02


def test_invalid_arguments_are_named():
    for arguments, message in [
        ({"shape": (5,)}, "TimeMLP for vectors"),
        ({"shape": (1, 2, 3, 4, 5)}, r"shape = \(1, 2, 3, 4, 5\): UNet needs"),
        ({"attention_levels": (2,)}, r"attention_levels = \(2,\): the levels of multipliers are 0..1"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter = \(1, 2, 1\): give an even number"),
        ({"resample_filter": (1, -1)}, "of positive sum"),
        ({"noise_features": 31}, "noise_features = 31 must be an even number"),
        ({"fourier_scale": 0.0}, "fourier_scale = 0.0 must be"),
        ({"augmentation_size": -1}, "augmentation_size = -1 must not be negative"),
        ({"head_channels": 0}, "head_channels = 0"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"multipliers": ()}, "multipliers = 0"),
        ({"condition_shapes": {"image": (3, 4)}}, "condition_shapes = .*'image' must have 3 dimensions"),
    ]:
        with pytest.raises(ValueError, match=message):
            UNet(**{"shape": (1, 8, 8), **arguments})
