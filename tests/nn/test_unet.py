"""Networks: the contract at every size, published sizes by hand, filters against scipy, attention against its formula."""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from pfgm.nn import DiffusersUNet, TimeMLP, UNet
from pfgm.nn.blocks import Attention, Block, Resample, group_norm, pad
from pfgm.nn.network import Embedding

NCSNPP = {"resblock_updown": True, "resample_filter": (1, 3, 3, 1), "residual_input": True, "fourier_scale": 16.0}
DDPMPP = {"scale_shift": False, "resblock_updown": True, "glorot": True, "augmentation_size": 9}
SMALL = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "norm_num_groups": 4}
SMALL |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}

NETWORKS = [
    (TimeMLP, (5,), {"width": 16, "depth": 2}),
    (TimeMLP, (2, 3), {"width": 16, "depth": 1}),
    (UNet, (1, 8, 8), {"width": 8}),
    (UNet, (3, 7, 13), {"width": 8, "multipliers": (1, 2, 2), "attention_levels": (0, 2)}),
    (UNet, (2, 1, 1), {"width": 8}),
    (UNet, (1, 1, 1), {"width": 8, "multipliers": (1, 1, 2), **NCSNPP}),
    (UNet, (3, 7, 13), {"width": 8, "multipliers": (1, 2, 2), **NCSNPP, **DDPMPP}),
    (UNet, (2, 13), {"width": 8, "multipliers": (1, 2, 2), "attention": False, **NCSNPP}),
    (UNet, (1, 5, 6, 3), {"width": 8, "blocks": 1, "attention_levels": (1,), **NCSNPP}),
    (DiffusersUNet, (3, 5, 9), {"options": SMALL}),
]


def randomized(net):
    """`net` with nothing left at zero."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize(("network", "shape", "options"), NETWORKS)
@pytest.mark.parametrize(("classes", "extra"), [(0, 0), (4, 1)])
def test_networks_keep_the_contract(network, shape, options, classes, extra):
    """Shape, zero output at the start, and, once the last layers are not zero, a gradient for every parameter."""
    net = network(shape, classes, extra, **options)
    x, c_noise, label = torch.randn(3, *shape), torch.tensor([-1.5, 0.0, 1.0]), torch.tensor([0, 1, 3]) if classes else None
    given = {"augmentation": torch.randn(3, 9)} if "augmentation_size" in options else {}
    out = net(x, c_noise, label=label, **given)
    assert out.shape == (3, shape[0] + extra, *shape[1:])
    assert torch.equal(out, torch.zeros_like(out))
    randomized(net)(x, c_noise, label=label, **given).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())


@pytest.mark.parametrize("options", [{}, {"fourier_scale": 16.0}])
def test_networks_tell_noise_levels_and_labels_apart(options):
    net = randomized(UNet((1, 8, 8), 3, width=8, **options)).requires_grad_(False)
    x = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1)
    small = net(x, torch.log(torch.tensor([0.001, 0.002, 0.004, 0.008])) / 4)
    gaps = (small[1:] - small[:-1]).flatten(1).norm(dim=1)
    assert float(gaps.min()) > 0.01 * float(small.flatten(1).norm(dim=1).mean()), "small noise levels are resolved"
    labels = [net(x[:1], torch.zeros(1), label=label) for label in (None, torch.tensor([0]), torch.tensor([2]))]
    assert not torch.allclose(labels[0], labels[1])
    assert not torch.allclose(labels[1], labels[2])
    assert torch.equal(labels[0], net(x[:1], torch.zeros(1), label=torch.tensor([3]))), "no label is the last label"


def test_diffusers_networks_tell_noise_levels_and_labels_apart():
    net = randomized(DiffusersUNet((1, 8, 8), 3, options=SMALL)).requires_grad_(False)
    x = torch.randn(1, 1, 8, 8)
    outs = [net(x, torch.full((1,), c), label=torch.tensor([k])) for c, k in ((-1.5, 0), (-1.4, 0), (-1.4, 1), (-1.4, 3))]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(outs))
    assert torch.equal(outs[3], net(x, torch.full((1,), -1.4)))


def conv(c_in, c_out, size=3):
    return c_in * c_out * size**2 + c_out


def ddpmpp_parameters(multipliers, augmentation, width=128, blocks=4, attention_level=1):
    """The number of parameters of DDPM++, counted by hand from the description in EDM's appendix F.1."""
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


PUBLISHED = {"width": 128, "blocks": 4, "attention_levels": (1,), "head_channels": 256, "scale_shift": False}
PUBLISHED |= {"resblock_updown": True, "noise_features": 128}


@pytest.mark.parametrize(
    ("multipliers", "augmentation", "millions"),
    [((2, 2, 2), 9, 55.7), ((1, 2, 2, 2), 0, 61.8)],  # EDM's table 7; score_sde's DDPM++, which PFGM uses
)
def test_published_networks_have_their_size(multipliers, augmentation, millions):
    with torch.device("meta"):
        net = UNet((3, 32, 32), multipliers=multipliers, augmentation_size=augmentation, **PUBLISHED)
    count = sum(p.numel() for p in net.parameters())
    assert count == ddpmpp_parameters(multipliers, augmentation)
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("config", ["cifar10_pfgmpp.yaml", "cifar10_pfgm.yaml"])
def test_gradients_reach_every_parameter_of_the_published_networks(config):
    """At a sixteenth of their width."""
    path = Path(__file__).parent.parent.parent / "configs" / config
    arguments = yaml.safe_load(path.read_text())["model"]["net"]["init_args"] | {"width": 8, "dropout": 0.0}
    net = randomized(UNet((3, 32, 32), **arguments))
    given = {"augmentation": torch.randn(2, 9)} if "augmentation_size" in arguments else {}
    net(torch.randn(2, 3, 32, 32), torch.tensor([-1.0, 0.5]), **given).square().mean().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 5, 5, 2, 1)])
@pytest.mark.parametrize("shape", [(12,), (8, 10), (4, 6, 8)])
def test_resampling_is_scipys(taps, shape):
    """Down: filter and take every other value; up: put zeros in between and filter; nothing is moved by half a pixel."""
    x = np.random.default_rng(0).standard_normal(shape)
    kernel = np.ones([1] * len(shape))
    for axis in range(len(shape)):
        kernel = kernel * np.expand_dims(np.array(taps) / np.sum(taps), [i for i in range(len(shape)) if i != axis])
    full, half = scipy.signal.convolve(x, kernel, mode="full"), len(taps) // 2
    down = full[tuple(slice(half, half + n, 2) for n in shape)]
    spread = np.zeros([2 * n for n in shape])
    spread[tuple(slice(None, None, 2) for _ in shape)] = x
    up = scipy.signal.convolve(spread, kernel * 2 ** len(shape), mode="full")
    up = up[tuple(slice(half - 1, half - 1 + 2 * n) for n in shape)]
    batch = torch.tensor(np.stack([x, -2 * x]), dtype=torch.float64)[None]
    for is_up, expected in ((False, down), (True, up)):
        out = Resample(len(shape), is_up, taps)(batch)[0].numpy()
        assert np.allclose(out, np.stack([expected, -2 * expected]), atol=1e-7), is_up


def test_attention_is_its_formula():
    """softmax(q k / sqrt(d)) v for each head, over all positions, added to the input; sqrt(1/2) keeps the variance."""
    attention, x = randomized(Attention(2, 8, 4)), torch.randn(2, 8, 3, 5)
    flat = attention.norm(x).flatten(2)
    qkv = torch.einsum("oc,bcp->bop", attention.qkv.weight[:, :, 0, 0], flat) + attention.qkv.bias[:, None]
    q, k, v = qkv.reshape(2, 3, 2, 4, 15).unbind(1)
    weights = torch.softmax(torch.einsum("bhcp,bhcq->bhpq", q, k) / 2, dim=-1)
    mixed = torch.einsum("bhpq,bhcq->bhcp", weights, v).reshape(2, 8, 15)
    out = torch.einsum("oc,bcp->bop", attention.out.weight[:, :, 0, 0], mixed) + attention.out.bias[:, None]
    assert torch.allclose(attention(x).flatten(2), (x.flatten(2) + out) * math.sqrt(0.5), atol=1e-5)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_blocks_of_no_effect_pass_their_input_on(scale_shift):
    """At the start a block is its skip, over sqrt(2); a resampling one, the resampled and projected skip."""
    x, embedding = torch.randn(2, 8, 4, 6), torch.randn(2, 16)
    common = {"embedding": 16, "dropout": 0.0, "scale_shift": scale_shift}
    assert torch.equal(Block(2, 8, 8, **common)(x, embedding), x * math.sqrt(0.5))
    block = Block(2, 8, 8, **common, resample=Resample(2, False, (1, 3, 3, 1)))
    projected = torch.einsum("oc,bchw->bohw", block.skip.weight[:, :, 0, 0], block.resample(x)) + block.skip.bias[:, None, None]
    assert torch.allclose(block(x, embedding), projected * math.sqrt(0.5), atol=1e-6)


def test_scaling_by_the_embedding_is_not_adding_it():
    """With `scale_shift` the second normalisation is multiplied; without, a shift equal over a group is normalised away."""
    x, block = torch.randn(2, 8, 4, 4), {}
    for scale_shift in (True, False):
        block[scale_shift] = randomized(Block(2, 8, 8, embedding=4, dropout=0.0, scale_shift=scale_shift))
        nn.init.zeros_(block[scale_shift].modulation.weight)
        nn.init.ones_(block[scale_shift].modulation.bias)
    with torch.no_grad():
        one, zero_init = torch.ones(2, 4), torch.zeros(2, 4)
        assert torch.allclose(block[False](x, one), block[False](x, zero_init))
        added = block[False](x, one)
        nn.init.constant_(block[False].modulation.bias, 5.0)
        assert torch.allclose(block[False](x, one), added, atol=1e-5), "all channels of a group move together"
        scaled = block[True](x, one)
        nn.init.constant_(block[True].modulation.bias, 5.0)
        assert not torch.allclose(block[True](x, one), scaled, atol=0.1)


def reference_block(block, x, embedding):
    """A residual block from its weights, as its description says."""
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
def test_the_network_is_its_description(options):
    """Forward pass written out: padded by the border, embedded, down with the input added again, middle, up with skips."""
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


def test_groups_have_four_channels_at_least():
    assert [group_norm(channels).num_groups for channels in (2, 6, 8, 96, 128, 384)] == [1, 1, 2, 24, 32, 32]


def test_residual_input_reaches_the_lower_levels():
    """With the first convolution cut off, the input still arrives one level down, filtered."""
    for residual_input, arrives in ((True, True), (False, False)):
        net = UNet((1, 8, 8), width=8, blocks=1, residual_input=residual_input)
        randomized(net)
        for parameter in net.first.parameters():
            nn.init.zeros_(parameter)
        a, b = (net(torch.randn(1, 1, 8, 8), torch.zeros(1)) for _ in range(2))
        assert (not torch.allclose(a, b)) == arrives


def test_fourier_frequencies_are_quantiles_of_a_half_normal():
    frequencies = Embedding(8, features=256, fourier_scale=16.0).frequencies(torch.device("cpu")) / (2 * math.pi)
    assert scipy.stats.kstest(frequencies.numpy(), scipy.stats.halfnorm(scale=16).cdf).statistic < 0.005
    geometric = Embedding(8, features=32).frequencies(torch.device("cpu"))
    assert torch.allclose(geometric[1:] / geometric[:-1], torch.tensor(2.0 ** (6 / 15)))


def test_no_augmentation_is_the_zero_vector():
    net = randomized(UNet((1, 4, 4), width=8, augmentation_size=3)).requires_grad_(False)
    x, c_noise = torch.randn(2, 1, 4, 4), torch.zeros(2)
    assert torch.equal(net(x, c_noise), net(x, c_noise, augmentation=torch.zeros(2, 3)))
    assert not torch.allclose(net(x, c_noise), net(x, c_noise, augmentation=torch.ones(2, 3)))


def test_glorot_weights_have_its_variance():
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
    assert torch.isclose(net.embedding.labels.weight.std(), torch.tensor(1.0), rtol=0.2), "labels keep their own law"


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # traced, but not translated: seconds instead of a minute
        pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")]),
    ],
)
def test_compiled_networks_are_the_same_function(backend):
    """The same outputs, gradients and names of parameters, without a break in the graph."""
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


def test_padding_compiles_for_sizes_that_vary():
    compiled = torch.compile(pad, backend="aot_eager", dynamic=True, fullgraph=True)
    for shape in ((1, 2, 7, 9), (3, 2, 5, 12), (1, 1, 4, 4)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x, 4), pad(x, 4))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16)])
def test_networks_run_in_bfloat16_autocast(shape):
    """Close to float32, with the noise level embedded in float32."""
    torch.manual_seed(0)
    net = UNet(shape, width=16, multipliers=(1, 2), blocks=1, fourier_scale=16.0)
    nn.init.normal_(net.last[-1].weight, std=0.05)
    x, c_noise = torch.randn(4, *shape), torch.tensor([-1.5, -0.5, 0.3, 1.0])
    exact = net(x, c_noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x, c_noise)
    assert float(((low - exact).norm() / exact.norm()).detach()) < 0.02


def test_wrong_arguments_of_networks_are_named():
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
    for arguments, message in [
        ({"shape": (5,)}, r"shape = \(5,\): DiffusersUNet"),
        (
            {"condition_shapes": {"vector": (3,)}},
            "'vector' is not a condition of this network, which takes none",
        ),
        ({"options": {"wide": 3}}, "options = .*UNet2DModel refuses them: .*wide"),
    ]:
        with pytest.raises(ValueError, match=message):
            DiffusersUNet(**{"shape": (1, 8, 8), **arguments})
