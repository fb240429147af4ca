"""Callbacks that change how training runs and what it shows, not what it computes."""

import functools

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from pfgm.data import DataModule
from pfgm.data.batches import SampleSet
from pfgm.nn import TimeMLP
from pfgm.training.callbacks import SampleGrid, Speed
from pfgm.training.ema import EMA
from pfgm.training.module import PFGM
from tests.helpers import digits, model, train_steps


@pytest.mark.process
def test_a_compiled_run_in_channels_last_has_the_same_weights(tmp_path, monkeypatch):
    """Names of weights stay, and validation runs uncompiled."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    data, weights, stances = digits(batch_size=8), [], []

    class Stance(pl.Callback):
        def on_validation_epoch_start(self, trainer, module):
            stances.append(torch._dynamo.eval_frame._stance.stance)

    for speed in (Speed(), Speed(compile=True, channels_last=True)):
        module = model(data)
        names = list(module.state_dict())
        options = {"limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 0, "check_val_every_n_epoch": None}
        weights.append(train_steps(data, module, 3, speed, EMA(half_life=0), Stance(), folder=tmp_path, **options))
        assert list(module.state_dict()) == names
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*weights, strict=True))
    assert stances[0] == "default"
    assert stances[-1] == "force_eager"
    assert module.flow.denoiser.net.first.weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_is_refused_for_vectors(tmp_path):
    data = DataModule(SampleSet(torch.randn(40, 3)), SampleSet(torch.randn(9, 3)), batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r"speed.channels_last = True: .* samples of shape \(3,\)"):
        train_steps(data, PFGM(TimeMLP((3,), width=8), data.summary), 1, Speed(channels_last=True), folder=tmp_path)


def test_a_negative_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="n = -1: "):
        SampleGrid(-1)
