"""Averages of the weights against recursions written out by hand."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy

import pfgm
from pfgm.data import Toy
from pfgm.flow.loading import PREFIX
from pfgm.nn import TimeMLP
from pfgm.training.checkpointing import LastCheckpoint
from pfgm.training.ema import EMA, PowerAverages
from pfgm.training.losses import PoissonFieldLoss
from pfgm.training.module import PFGM
from tests.helpers import digits, last, model, train_steps


def test_old_weights_halve_within_the_half_life():
    """After the warm-up, for steps of any size; before, the half-life is a fraction of the images seen."""
    ema = EMA(half_life=1000, warmup=0.1)
    for images in (1, 10, 250):
        assert math.prod(ema.decay(50_000 + i, images) for i in range(0, 1000, images)) == pytest.approx(0.5)
    assert ema.decay(4000, 40) ** 10 == pytest.approx(0.5)
    assert ema.decay(0, 64) == EMA(half_life=0).decay(10**6, 64) == 0


def test_checkpoints_hold_the_average_and_the_raw_weights(tmp_path):
    """The average is computed here from the raw weights of each step."""
    raws = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            raws.append({k: v.clone() for k, v in module.state_dict().items()})

    data = Toy(size=200, batch_size=16)
    module = PFGM(TimeMLP((2,), 0, 1, width=8, depth=1), data.summary, PoissonFieldLoss(0.5, 100), D=1, lr=0.05, warmup_steps=0)
    callbacks = [EMA(half_life=40, warmup=0.5), Record(), LastCheckpoint()]
    train_steps(data, module, 6, *callbacks, folder=tmp_path, gradient_clip_val=None)
    average = dict(raws[0])
    for n, raw in enumerate(raws[1:], 1):
        decay = 0.5 ** (16 / min(40, 0.5 * 16 * n))
        average = {k: decay * average[k] + (1 - decay) * v for k, v in raw.items()}
    checkpoint, name = last(tmp_path), f"{PREFIX}denoiser.net.last.weight"
    assert torch.allclose(checkpoint["state_dict"][name], average[name], atol=1e-6)
    assert torch.equal(checkpoint["current_model_state"][name], raws[-1][name])
    assert not torch.allclose(average[name], raws[-1][name], atol=1e-4)
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.equal(pfgm.load(path).denoiser.net.last.weight, checkpoint["state_dict"][name])
    assert torch.equal(pfgm.load(path, ema=False).denoiser.net.last.weight, raws[-1][name])
    assert torch.equal(module.flow.denoiser.net.last.weight, checkpoint["state_dict"][name]), "fitting leaves the average"


def test_sharded_weights_are_refused():
    class Trainer:
        strategy = object.__new__(FSDPStrategy)

    with pytest.raises(ValueError, match="FSDPStrategy: weights that are sharded over devices cannot be averaged"):
        EMA().setup(Trainer(), None, "fit")


def test_averages_count_optimizer_steps_not_batches(tmp_path):
    """Four accumulated batches give the averages of one large batch, since their gradient is the same."""
    found = []
    for parts in (1, 4):
        averages, data = PowerAverages(every_n_steps=100), digits(batch_size=32 // parts)
        options = {"accumulate_grad_batches": parts, "precision": "64-true"}
        train_steps(data, model(data), 5, EMA(), averages, folder=tmp_path, **options)
        assert averages.step == 5
        found.append(averages.averages)
    for width, average in found[0].items():
        for name, value in average.items():
            assert torch.allclose(value, found[1][width][name], rtol=1e-6, atol=1e-9), name


def test_averages_of_a_bfloat16_model_are_in_float32(tmp_path):
    """In bfloat16, rounding would swallow the small updates of an average."""
    seen, averages = [], PowerAverages(every_n_steps=100)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            average = trainer.callbacks[0]._average_model
            seen.append((module.flow.denoiser.net.first.weight.dtype, {p.dtype for p in average.parameters()}))

    data = digits()
    train_steps(data, model(data), 2, EMA(), averages, Look(), folder=tmp_path, precision="bf16-true")
    assert seen[-1] == (torch.bfloat16, {torch.float32})
    assert {p.dtype for average in averages.averages.values() for p in average.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(half_life=math.nan), "half_life = nan, "),
        (lambda: EMA(warmup=0.0), "warmup = 0.0: "),
        (lambda: PowerAverages(-1), "every_n_steps = -1, "),
        (lambda: PowerAverages(sigma_rel=(0.1, 0.1)), r"sigma_rel = \(0.1, 0.1\): "),
        (lambda: PowerAverages(sigma_rel=()), r"sigma_rel = \(\): "),
        (lambda: PowerAverages(sigma_rel=(0.5,)), "sigma_rel = 0.5 "),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
