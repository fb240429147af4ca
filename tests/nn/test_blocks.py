"""Blocks of the U-Net: filters against scipy, attention and residual blocks against their formulas."""

import math

import numpy as np
import pytest
import scipy.signal
import torch
from torch import nn

from pfgm.nn.blocks import Attention, Block, Resample, group_norm, pad
from tests.helpers import randomized


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 5, 5, 2, 1)])
@pytest.mark.parametrize("shape", [(12,), (8, 10), (4, 6, 8)])
def test_resampling_agrees_with_scipy(taps, shape):
    """Down: filter and keep every other value. Up: insert zeros and filter. Neither shifts the signal by half a pixel."""
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


def test_attention_is_softmax_of_queries_and_keys():
    """Each head adds softmax(q k / sqrt(d)) v over all positions to the input; sqrt(1/2) keeps the variance."""
    attention, x = randomized(Attention(2, 8, 4)), torch.randn(2, 8, 3, 5)
    flat = attention.norm(x).flatten(2)
    qkv = torch.einsum("oc,bcp->bop", attention.qkv.weight[:, :, 0, 0], flat) + attention.qkv.bias[:, None]
    q, k, v = qkv.reshape(2, 3, 2, 4, 15).unbind(1)
    weights = torch.softmax(torch.einsum("bhcp,bhcq->bhpq", q, k) / 2, dim=-1)
    mixed = torch.einsum("bhpq,bhcq->bhcp", weights, v).reshape(2, 8, 15)
    out = torch.einsum("oc,bcp->bop", attention.out.weight[:, :, 0, 0], mixed) + attention.out.bias[:, None]
    assert torch.allclose(attention(x).flatten(2), (x.flatten(2) + out) * math.sqrt(0.5), atol=1e-5)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_new_blocks_return_their_skip_over_sqrt_two(scale_shift):
    """The skip of a resampling block is resampled and projected."""
    x, embedding = torch.randn(2, 8, 4, 6), torch.randn(2, 16)
    common = {"embedding": 16, "dropout": 0.0, "scale_shift": scale_shift}
    assert torch.equal(Block(2, 8, 8, **common)(x, embedding), x * math.sqrt(0.5))
    block = Block(2, 8, 8, **common, resample=Resample(2, False, (1, 3, 3, 1)))
    projected = torch.einsum("oc,bchw->bohw", block.skip.weight[:, :, 0, 0], block.resample(x)) + block.skip.bias[:, None, None]
    assert torch.allclose(block(x, embedding), projected * math.sqrt(0.5), atol=1e-6)


def test_embedding_scales_features_only_with_scale_shift():
    """Without `scale_shift` the normalisation removes a shift that is equal over a group."""
    x, block = torch.randn(2, 8, 4, 4), {}
    for scale_shift in (True, False):
        block[scale_shift] = randomized(Block(2, 8, 8, embedding=4, dropout=0.0, scale_shift=scale_shift))
        nn.init.zeros_(block[scale_shift].modulation.weight)
        nn.init.ones_(block[scale_shift].modulation.bias)
    with torch.no_grad():
        one, zero = torch.ones(2, 4), torch.zeros(2, 4)
        assert torch.allclose(block[False](x, one), block[False](x, zero))
        added = block[False](x, one)
        nn.init.constant_(block[False].modulation.bias, 5.0)
        assert torch.allclose(block[False](x, one), added, atol=1e-5), "all channels of a group move together"
        scaled = block[True](x, one)
        nn.init.constant_(block[True].modulation.bias, 5.0)
        assert not torch.allclose(block[True](x, one), scaled, atol=0.1)


def test_groups_have_at_least_four_channels():
    assert [group_norm(channels).num_groups for channels in (2, 6, 8, 96, 128, 384)] == [1, 1, 2, 24, 32, 32]


@pytest.mark.process
def test_padding_compiles_for_dynamic_sizes():
    compiled = torch.compile(pad, backend="aot_eager", dynamic=True, fullgraph=True)
    for shape in ((1, 2, 7, 9), (3, 2, 5, 12), (1, 1, 4, 4)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x, 4), pad(x, 4))
