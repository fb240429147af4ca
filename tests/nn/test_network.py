"""The contract of networks, for each at several sizes, and the embedding they share."""

import math

import pytest
import scipy.stats
import torch

from pfgm.nn import DiffusersUNet, TimeMLP, UNet
from pfgm.nn.network import Embedding
from tests.helpers import DIFFUSERS, NCSNPP, randomized

DDPMPP = {"scale_shift": False, "resblock_updown": True, "glorot": True, "augmentation_size": 9}
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
    (UNet, (2, 5, 6), {"width": 8, "condition_shapes": {"image": (3, 2, 2), "vector": (4,)}}),
    (TimeMLP, (5,), {"width": 8, "condition_shapes": {"image": (1, 2, 2), "vector": (4,)}}),
    (DiffusersUNet, (3, 5, 9), {"options": DIFFUSERS}),
]


@pytest.mark.parametrize(("network", "shape", "options"), NETWORKS)
@pytest.mark.parametrize(("classes", "extra"), [(0, 0), (4, 1)])
def test_networks_start_at_zero_and_have_gradients_everywhere(network, shape, options, classes, extra):
    """New networks return zeros of the right shape. Once no layer is zero, every parameter has a gradient."""
    net = network(shape, classes, extra, **options)
    x, c_noise, label = torch.randn(3, *shape), torch.tensor([-1.5, 0.0, 1.0]), torch.tensor([0, 1, 3]) if classes else None
    given = {key: torch.randn(3, *size) for key, size in options.get("condition_shapes", {}).items()}
    given |= {"augmentation": torch.randn(3, 9)} if "augmentation_size" in options else {}
    out = net(x, c_noise, label=label, **given)
    assert out.shape == (3, shape[0] + extra, *shape[1:])
    assert torch.equal(out, torch.zeros_like(out))
    randomized(net)(x, c_noise, label=label, **given).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())


def test_frequencies_are_quantiles_of_a_half_normal_or_geometric():
    frequencies = Embedding(8, features=256, fourier_scale=16.0).frequencies(torch.device("cpu")) / (2 * math.pi)
    assert scipy.stats.kstest(frequencies.numpy(), scipy.stats.halfnorm(scale=16).cdf).statistic < 0.005
    geometric = Embedding(8, features=32).frequencies(torch.device("cpu"))
    assert torch.allclose(geometric[1:] / geometric[:-1], torch.tensor(2.0 ** (6 / 15)))


@pytest.mark.parametrize(("network", "shape"), [(UNet, (1, 8, 8)), (TimeMLP, (5,))])
def test_unknown_conditions_are_refused(network, shape):
    with pytest.raises(ValueError, match="'depth' is not a condition of this network, which takes only image, vector"):
        network(shape, condition_shapes={"vector": (3,), "depth": (1, 8, 8)})
    with pytest.raises(ValueError, match=r"condition_shapes\['vector'\] = \(0,\): expected one integer >= 1"):
        network(shape, condition_shapes={"vector": (0,)})
