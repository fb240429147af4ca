"""The adapter of diffusers' U-Net; `test_network.py` shows that it meets the contract."""

import itertools

import pytest
import torch

from pfgm.nn import DiffusersUNet
from tests.helpers import DIFFUSERS, randomized


def test_output_depends_on_noise_level_and_label():
    net = randomized(DiffusersUNet((1, 8, 8), 3, options=DIFFUSERS)).requires_grad_(False)
    x = torch.randn(1, 1, 8, 8)
    outs = [net(x, torch.full((1,), c), label=torch.tensor([k])) for c, k in ((-1.5, 0), (-1.4, 0), (-1.4, 1), (-1.4, 3))]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(outs))
    assert torch.equal(outs[3], net(x, torch.full((1,), -1.4)))


def test_invalid_arguments_are_named():
    for arguments, message in [
        ({"shape": (5,)}, r"shape = \(5,\): DiffusersUNet"),
        ({"condition_shapes": {"vector": (3,)}}, "'vector' is not a condition of this network, which takes none"),
        ({"options": {"wide": 3}}, "options = .*UNet2DModel refuses them: .*wide"),
    ]:
        with pytest.raises(ValueError, match=message):
            DiffusersUNet(**{"shape": (1, 8, 8), **arguments})
