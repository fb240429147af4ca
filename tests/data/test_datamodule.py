"""Data modules: conditions, dequantisation, labels that are dropped."""

import dataclasses
import json
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import pfgm
from pfgm.cli import train
from pfgm.core import rng
from pfgm.data import Arrays, Digits, Toy
from pfgm.data.batches import Batch, HeldOutBatches, Preparation, SampleSet, TrainingStream, stream_indices
from pfgm.data.degradations import Downsample
from pfgm.flow import checkpoints
from pfgm.nn import TimeMLP
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.theory.data_summary import DataSummary
from pfgm.training.checkpointing import LastCheckpoint
from pfgm.training.ema import EMA
from pfgm.training.losses import Charges, DenoisingLoss, PoissonFieldLoss
from pfgm.training.module import PFGM
from tests.helpers import ROOT, SMALL, fit, last, train_steps

SUPERRES = ["--config", str(ROOT / "configs" / "digits_superres.yaml"), *SMALL, "--model.net.init_args.width=8"]


def stream(part, preparation, **options):
    settings = {"batch_size": 8, "seed": 3, "start": 0, "rank": 0, "world": 1, "reference_size": 0}
    return TrainingStream(part, preparation, **(settings | options))


def test_dequantisation_fills_the_gaps_evenly_and_anew_each_step():
    levels = torch.randint(17, (2000, 3), generator=torch.Generator().manual_seed(0)).float() / 8 - 1
    noisy = stream(SampleSet(levels), Preparation(width=0.125), batch_size=2000)
    first, second = (noisy.batch(step).x for step in (0, 1))
    assert bool((first - (first * 8).round() / 8).abs().max() <= 0.0625)
    noise = stream(SampleSet(torch.zeros(2000, 3)), Preparation(width=0.125), batch_size=2000).batch(0).x
    assert torch.allclose(noise.flatten().sort().values, torch.linspace(-0.0625, 0.0625, 6000), atol=4e-3), "uniform"
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    assert torch.equal(noisy.batch(1).x, second)
    zeros = SampleSet(torch.zeros(2000, 3))
    ranks = [stream(zeros, Preparation(width=1.0), batch_size=50, rank=rank, world=2).batch(0).x for rank in (0, 1)]
    assert not torch.equal(*(x.flatten().sort().values for x in ranks)), "each rank has its own"


@pytest.mark.parametrize("size", [20, 1000])
def test_dequantised_charges_contain_the_dequantised_batch(size):
    x = torch.arange(100.0)[:, None]
    batch = stream(SampleSet(x, {"label": torch.arange(100)}), Preparation(width=1.0), reference_size=size).batch(5)
    label = batch.conditions["label"]
    where = (batch.charges.label == label[:, None]).int().argmax(1)
    assert torch.equal(batch.charges.x[where], batch.x)
    assert torch.equal(batch.x.round()[:, 0].long(), label)
    held_out = HeldOutBatches(SampleSet(x), Preparation(width=1.0), batch_size=30, seed=0, reference_size=size)[1]
    assert set(held_out.x.flatten().tolist()) <= set(held_out.charges.x.flatten().tolist())
    assert held_out.x.round().flatten().tolist() == list(range(30, 60))


def test_held_out_noise_is_the_same_every_time_and_differs_between_batches():
    held_out = HeldOutBatches(SampleSet(torch.zeros(60, 4)), Preparation(width=1.0), batch_size=30, seed=0, reference_size=0)
    assert torch.equal(held_out[0].x, held_out[0].x)
    assert not torch.equal(held_out[0].x, held_out[1].x)


def test_conditions_follow_their_samples_and_are_made_before_dequantisation():
    x = torch.randint(17, (100, 1, 8, 8)).float()
    batch = stream(SampleSet(x), Preparation(Downsample(4), 1.0), batch_size=100).batch(2)
    assert torch.allclose(batch.conditions["image"], torch.nn.functional.avg_pool2d(batch.x.round(), 4))
    stored = stream(SampleSet(x, {"vector": x.flatten(1)[:, :3]}), Preparation()).batch(7)
    assert torch.equal(stored.conditions["vector"], stored.x.flatten(1)[:, :3])


def test_the_summary_knows_levels_and_conditions():
    data = Digits(degrade=Downsample(2), dequantize=True)
    summary, plain = data.summary, Digits().summary
    assert (summary.levels, summary.dequantized, summary.conditions) == (17, True, {"image": (1, 4, 4)})
    assert (plain.levels, plain.dequantized, plain.conditions) == (17, False, {})
    low = torch.nn.functional.avg_pool2d(data.train.x, 2)
    assert float(summary.image_mean) == pytest.approx(float(low.mean()), rel=1e-5)
    assert float(summary.image_std) == pytest.approx(float(low.std()), rel=1e-3)
    assert summary.sigma_data**2 - plain.sigma_data**2 == pytest.approx(0.125**2 / 12, rel=0.2)
    flat = DataSummary.from_data(
        torch.randn(1437, 2), conditions={"image": torch.full((1437, 1, 4, 4), 0.1, dtype=torch.float64)}
    )
    assert float(flat.image_std) == 1, "whatever rounding makes of it"
    each = DataSummary.from_data(
        torch.randn(9, 2), conditions={"vector": torch.stack([torch.arange(9.0), torch.full((9,), 4.0)], 1)}
    )
    assert each.vector_mean.tolist() == [4, 4]
    assert each.vector_std.tolist() == pytest.approx([math.sqrt(60 / 9), 1]), "a constant is left alone"


def test_levels_of_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(200, dtype=np.uint8).reshape(50, 4))
    data = Arrays(tmp_path / "a.npy", dequantize=True)
    assert (data.summary.levels, data.preparation.width) == (256, 1.0)
    assert data.prepared(data.train).x.is_floating_point()
    np.save(tmp_path / "b.npy", np.arange(200).reshape(50, 4))
    assert Arrays(tmp_path / "b.npy", value_range=(0, 400)).summary.levels == 401
    with pytest.raises(ValueError, match=r"value_range = \(0, 400.5\): the data are integers"):
        Arrays(tmp_path / "b.npy", value_range=(0, 400.5))
    np.save(tmp_path / "c.npy", np.random.default_rng(0).random((50, 4)))
    with pytest.raises(ValueError, match="dequantize = True: this data is continuous"):
        Arrays(tmp_path / "c.npy", dequantize=True)


def test_arrays_with_conditions_of_their_own_train_and_draw(tmp_path):
    c = np.random.default_rng(0).normal(3.0, 2.0, (60, 2))
    np.savez(tmp_path / "a.npz", x=np.stack([c.sum(1), c[:, 0]], 1), conditions=c)
    base = ["--data=pfgm.data.Arrays", f"--data.path={tmp_path}/a.npz", "--data.conditions=true", "--model.net=pfgm.nn.TimeMLP"]
    base += ["--model.net.init_args.width=16", *SMALL]
    fit(tmp_path / "run", "--trainer.max_steps=2", base=base)
    flow = pfgm.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert flow.summary.conditions == {"vector": (2,)}
    assert float((flow.summary.vector_mean - torch.tensor(c).mean(0)).abs().max()) < 0.5
    assert flow.sample(2, condition=torch.tensor([3.0, 1.0])).x.shape == (2, 2)
    np.savez(tmp_path / "b.npz", x=c, y=c)
    with pytest.raises(ValueError, match="has no array 'conditions'"):
        Arrays(tmp_path / "b.npz", conditions=True)
    np.savez(tmp_path / "b.npz", x=c, conditions=c[:5])
    with pytest.raises(ValueError, match="conditions need finite numbers for each of 60 samples"):
        Arrays(tmp_path / "b.npz", conditions=True)
    with pytest.raises(ValueError, match="conditions = True, degrade: both make conditions"):
        Arrays(tmp_path / "a.npz", conditions=True, degrade=Downsample())


@pytest.mark.process
def test_super_resolution_runs_from_its_config_through_test(tmp_path, capsys):
    fit(tmp_path, "--trainer.max_steps=2", "--trainer.val_check_interval=2", base=SUPERRES)
    assert (tmp_path / "grids" / "00000002.png").exists()
    train.main(["test", *SUPERRES, "--run_dir", str(tmp_path), "--evaluation.n=20", "--evaluation.sets=1"])
    assert "17 levels of this model's data are points" in capsys.readouterr().out


@pytest.mark.process
def test_bits_per_dim_of_held_out_digits_are_reported(tmp_path, capsys):
    base = [*SUPERRES, "--data.init_args.dequantize=true", "--evaluation.n=20", "--evaluation.likelihood=8"]
    fit(tmp_path, "--trainer.max_steps=2", base=base)
    train.main(["test", *base, "--run_dir", str(tmp_path), "--evaluation.sets=1"])
    mean, error = json.loads((tmp_path / "test.json").read_text())["bits/dim"]
    assert f"held-out bits/dim {mean:.3f} ({error:.3f})" in capsys.readouterr().out
    data = Digits(degrade=Downsample(2), dequantize=True)
    part = data.held_out[torch.randperm(360, generator=rng.generator(0))[:8]]
    condition = data.prepared(part).conditions["image"]
    flow = pfgm.load(tmp_path / "checkpoints" / "last.ckpt")
    bits = flow.bits_per_dim(part.x, condition=condition, rtol=1e-3, atol=1e-3)
    assert mean == pytest.approx(float(bits.mean()), rel=1e-3)
    assert error == pytest.approx(float(bits.std()) / math.sqrt(8), rel=1e-2)


def test_labels_are_dropped_in_training_only_and_in_their_share():
    seen = []

    class Spy(DenoisingLoss):
        def __call__(self, denoiser, y, conditions, **options):
            seen.append(conditions["label"])
            return y.flatten(1).sum(1)

    data = DataSummary.from_data(torch.randn(50, 2), num_classes=3)
    module = PFGM(TimeMLP((2,), 3, width=8), data, Spy(), label_dropout=0.25)
    label = torch.arange(2000) % 3
    batch = Batch(torch.randn(2000, 2), {"label": label}, 0, (0, 2000))
    module._loss(batch, rng.TRAINING)
    module._loss(dataclasses.replace(batch, step=1), rng.TRAINING)
    module._loss(batch, rng.VALIDATION)
    kept = seen[0] == label
    assert float(kept.double().mean()) == pytest.approx(0.75, abs=0.03)
    assert set(seen[0][~kept].tolist()) == {3}
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], label)
    assert module.flow.unconditional
    assert not PFGM(TimeMLP((2,), 3, width=8), data).flow.unconditional


def test_without_a_label_the_target_comes_from_all_charges():
    y = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    denoiser = PreconditionedDenoiser(TimeMLP((1,), 2, width=8).double(), 8.0, 1.0, 0.1)
    data, loss = DataSummary.from_data(y, num_classes=2), DenoisingLoss(reference_size=2)
    charges = Charges(y, torch.tensor([0, 1]))

    def value(conditions):
        return loss(denoiser, y, conditions, summary=data, charges=charges, generator=rng.generator(0))

    none, plain, own = (value(one) for one in ({"label": torch.tensor([2, 2])}, {}, {"label": torch.tensor([0, 1])}))
    assert torch.equal(none, plain)
    assert not torch.allclose(own, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_dropout": 1.0}, "label_dropout = 1.0"),
        ({"label_dropout": 0.1}, "num_classes = 0: give a share"),
        ({"loss": PoissonFieldLoss(0.5, 64), "D": 1}, "PoissonFieldLoss with reference_size = 64 takes its target from many"),
        ({"loss": DenoisingLoss(reference_size=64)}, "DenoisingLoss with reference_size = 64"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, message):
    data = DataSummary.from_data(torch.randn(50, 2), conditions={"vector": torch.randn(50, 3)})
    net = TimeMLP((2,), 0, int(options.get("D") == 1), {"vector": (3,)}, width=8)
    with pytest.raises(ValueError, match=message):
        PFGM(net, data, **options)


@pytest.mark.process
def test_runs_of_versions_without_an_argument_resume(tmp_path):
    """What is missing in a checkpoint counts as the default: other values are other settings."""
    base = ["--config", str(ROOT / "configs" / "digits_conditional.yaml"), *SMALL, "--model.net.init_args.width=8"]
    fit(tmp_path, "--trainer.max_steps=1", "--model.label_dropout=0", base=base)
    old = last(tmp_path)
    del old["hyper_parameters"]["label_dropout"], old["hyper_parameters"]["data"]["init_args"]["levels"]
    del old[checkpoints.KEY]["data"]["init_args"]["dequantize"], old["hyper_parameters"]["net"]["init_args"]["condition_shapes"]
    checkpoints.describe(old, old[checkpoints.KEY]["flow"], old[checkpoints.KEY]["data"])
    torch.save(old, tmp_path / "checkpoints" / "last.ckpt")
    for change, message in (
        ("--model.label_dropout=0.1", r"model\.label_dropout: 0\.0 -> 0\.1"),
        ("--data.init_args.dequantize=true", r"data\.dequantize: False -> True"),
        ("--data.init_args.degrade=pfgm.data.Downsample", r"data\.degrade"),
        ("--model.loss.init_args.noise=pfgm.training.LogUniform", r"model\.loss\.noise"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, "--trainer.max_steps=2", "--model.label_dropout=0", change, base=base)
    assert fit(tmp_path, "--trainer.max_steps=2", "--model.label_dropout=0", base=base).trainer.global_step == 2


def test_toys_are_continuous():
    assert Toy(size=50).summary.levels == 0


@pytest.mark.process
def test_a_vector_condition_is_learned(tmp_path):
    """x = (c - 50)/4 + small noise: samples under a condition are where it says."""
    g = np.random.default_rng(0)
    c = g.normal(50.0, 8.0, size=(2000, 1))
    np.savez(tmp_path / "a.npz", x=(c - 50) / 4 + 0.1 * g.normal(size=(2000, 1)), conditions=c)
    base = ["--data=pfgm.data.Arrays", f"--data.path={tmp_path}/a.npz", "--data.conditions=true", "--model.net=pfgm.nn.TimeMLP"]
    base += ["--model.net.init_args.width=32", "--model.net.init_args.depth=2", "--model.lr=3e-3", "--ema.warmup=0.08", *SMALL]
    fit(tmp_path / "run", "--trainer.max_steps=400", "--trainer.log_every_n_steps=100", base=base)
    flow = pfgm.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for value in (-1.0, 1.0):
        x = flow.sample(400, condition=torch.tensor([50 + 8 * value])).x
        assert float(x.median()) == pytest.approx(2 * value, abs=0.1)
        assert float((x.quantile(0.84) - x.quantile(0.16)) / 2) < 0.3


def test_flipped_images_are_mirrored_half_of_the_time_in_training_only(tmp_path):
    x = torch.randint(0, 256, (400, 3, 2, 4), dtype=torch.uint8)
    np.save(tmp_path / "x.npy", x.numpy())
    data = Arrays(tmp_path / "x.npy", batch_size=400, flip=True)
    out = Preparation(flip=True)(SampleSet(data.train.x), rng.generator(2)).x
    same, mirrored = ((out == other).flatten(1).all(1) for other in (data.train.x, data.train.x.flip(3)))
    assert bool((same ^ mirrored).all())
    assert 0.4 < float(mirrored.double().mean()) < 0.6
    assert out.dtype == torch.uint8
    assert data.augmentation.flip
    assert not data.preparation.flip
    assert torch.equal(data.prepared(data.held_out).x, data.held_out.x)
    np.save(tmp_path / "v.npy", x.flatten(1).numpy())
    with pytest.raises(ValueError, match=r"flip = True: it mirrors images, not samples of shape \(24,\)"):
        Arrays(tmp_path / "v.npy", flip=True)
    np.savez(tmp_path / "c.npz", x=x.numpy(), conditions=np.ones((400, 2)))
    with pytest.raises(ValueError, match="flip = True: the conditions of the file"):
        Arrays(tmp_path / "c.npz", conditions=True, flip=True)


def test_summaries_of_large_data_are_made_in_blocks(monkeypatch):
    x = 3 + torch.randn(50, 2, 3, 4)
    whole = DataSummary.from_data(x, scale=2.0)
    monkeypatch.setattr("pfgm.theory.data_summary.BLOCK_BYTES", 8 * 24 * 7)
    blocks = DataSummary.from_data(x, scale=2.0)
    assert torch.allclose(blocks.mean, (x / 2).mean(0), atol=1e-6)
    for name in ("sigma_data", "norm", "power_std"):
        assert getattr(blocks, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    centred = (x.double() / 2 - (x.double() / 2).mean(0)).flatten(1).numpy()
    assert blocks.sigma_data == pytest.approx(centred.std(), rel=1e-6)
    assert blocks.power_std == pytest.approx((centred**2).mean(1).std(), rel=1e-6)


def test_a_batch_is_no_sequence():
    """Python would iterate over any object that has items, and slices never run out."""
    batch = Batch(torch.zeros(2, 3), {}, 0, (0, 2))
    with pytest.raises(TypeError, match="not iterable"):
        iter(batch)
    assert len(batch.single(1)) == 1


class Record(pl.Callback):
    """Keep steps, rows and losses of the training batches of a run."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append((batch.step, batch.rows, batch.index.tolist(), float(outputs["loss"]), trainer.global_step))


def recorded(folder, *stops, **options):
    """Train to each of the steps `stops`, resuming, and return what `Record` has seen and the weights."""
    record, path = Record(), folder / "checkpoints" / "last.ckpt"
    for stop in stops:
        data = Toy(size=200, batch_size=8)
        torch.manual_seed(0)
        module = PFGM(TimeMLP(data.shape, width=8, depth=1), data.summary)
        weights = train_steps(data, module, stop, EMA(), LastCheckpoint(2), record, folder=folder, resume=path, **options)
    return record.seen, [w.tolist() for w in weights]


EPOCHS = {"limit_train_batches": 4, "accumulate_grad_batches": 2}


@pytest.mark.process
@pytest.mark.parametrize("stops", [(7,), (4, 7), (3, 7), (1, 5, 7)])
@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 2},
        {"limit_train_batches": 3},
        EPOCHS,
        {**EPOCHS, "limit_val_batches": 1},
        {"limit_train_batches": 2, "limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"limit_train_batches": 2, "reload_dataloaders_every_n_epochs": 1},
    ],
)
def test_training_is_a_function_of_the_step_whatever_an_epoch_is(options, stops, tmp_path):
    parts = {"accumulate_grad_batches": options.get("accumulate_grad_batches", 1)}
    assert recorded(tmp_path / "epochs", *stops, **options) == recorded(tmp_path / "one", 7, **parts)


@pytest.mark.parametrize("stops", [(6,), (3, 6)])
def test_overfitted_batches_repeat_their_samples_with_fresh_noise(stops, tmp_path):
    seen, _ = recorded(tmp_path / "one", *stops, overfit_batches=2)
    first = stream_indices(0, 16, 200, 0).tolist()
    assert [index for _, _, index, _, _ in seen] == [first[:8], first[8:]] * 3
    assert [step for step, *_ in seen] == list(range(6))
    x = SampleSet(torch.zeros(100, 3))
    still = stream(x, Preparation(width=1.0), repeat_batches=1)
    assert torch.equal(still.batch(0).index, still.batch(5).index)
    assert not torch.equal(still.batch(0).x, still.batch(5).x)
    devices = [stream(x, Preparation(), repeat_batches=1, rank=rank, world=2) for rank in (0, 1)]
    indices = [[one.batch(step).index.tolist() for step in (0, 3)] for one in devices]
    assert indices[0][0] == indices[0][1] != indices[1][0] == indices[1][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 3, "max_steps": -1}, r"trainer.max_epochs = 3: the stream .* Pass trainer.max_steps instead, or"),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, r"limit_train_batches = 3, .* Pass a multiple of 2"),
        ({"overfit_batches": 1, "accumulate_grad_batches": 2}, r"overfit_batches = 1, .* an epoch would end within"),
    ],
)
def test_epochs_that_cannot_end_at_a_step_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recorded(tmp_path, 2, **options)
