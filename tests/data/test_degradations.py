"""Degradations: their conditions, shapes and limits."""

import pytest
import torch

from pfgm.data import Digits
from pfgm.data.degradations import AddNoise, Downsample, Grey


def test_conditions_are_block_means_luma_and_noise_of_the_std():
    x = torch.randn(2, 3, 6, 4)
    blocks = x.reshape(2, 3, 3, 2, 2, 2).mean((3, 5))
    assert torch.allclose(Downsample(2)(x), blocks, atol=1e-6)
    assert Downsample(2).shape((3, 6, 4)) == blocks.shape[1:] == (3, 3, 2)
    assert torch.allclose(Grey()(x), (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None])
    assert Grey().shape((3, 6, 4)) == (1, 6, 4)
    noise = AddNoise(0.3)(torch.zeros(2000, 2), torch.Generator().manual_seed(0))
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05)
    assert AddNoise(0.3).shape((2,)) == (2,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Downsample(1), "factor = 1 must be a whole number"),
        (lambda: Digits(degrade=Downsample(3)), "factor = 3 does not divide 8 x 8"),
        (lambda: Digits(degrade=Grey()), "channels = 1: Grey needs images with 3 channels"),
        (lambda: Downsample(2).shape((4,)), r"shape = \(4,\): this degradation needs images"),
        (lambda: Downsample(2.0), "factor = 2.0: expected a 64-bit integer"),
        (lambda: AddNoise(-1), "std = -1"),
    ],
)
def test_degradations_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
