"""TimeMLP; `test_network.py` shows that it meets the contract."""

import math

import torch
from torch.nn import functional as F

from pfgm.nn import TimeMLP
from tests.helpers import randomized


def test_forward_pass_agrees_with_its_description():
    """Flatten and concatenate sample, image and vector; normalise, scale, shift and transform in residual blocks."""
    net = randomized(TimeMLP((2, 3), 4, 1, {"vector": (3,), "image": (1, 2, 2)}, width=8, depth=2)).double()
    x, image, vector = (torch.randn(5, *shape).double() for shape in ((2, 3), (1, 2, 2), (3,)))
    c_noise, label = torch.linspace(-1, 1, 5).double(), torch.tensor([0, 1, 2, 3, 4])
    embedding = net.embedding(c_noise, label)
    h = net.first(torch.cat([x.reshape(5, 6), image.reshape(5, 4), vector], dim=1))
    for block in net.blocks:
        scale, shift = block.modulation(embedding).split(8, dim=1)
        u = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt() * (1 + scale) + shift
        first, _, second = block.layers
        h = (h + second(F.silu(first(u)))) / math.sqrt(2)
    expected = net.last(F.silu(h)).reshape(5, 3, 3)
    assert torch.allclose(net(x, c_noise, label=label, image=image, vector=vector), expected, rtol=1e-10)
