"""Training from the command line: resuming bit for bit, refusing mismatches, loading what was trained."""

import csv
import json
import math
import shutil
import subprocess
import sys
from argparse import ArgumentError

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

import pfgm
from pfgm.cli import train
from pfgm.core import rng
from pfgm.data import Arrays, Digits, Toy
from pfgm.data.batches import Batch, HeldOutBatches, SampleSet, TrainingStream, stream_indices
from pfgm.nn import TimeMLP, UNet
from pfgm.theory.data_summary import DataSummary
from pfgm.training.losses import DenoisingLoss
from pfgm.training.module import PFGM
from pfgm.training.nonfinite import NonFiniteLoss
from tests.helpers import ROOT, SMALL, TOY, fit, last

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def log_rows(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_tensors(a, b):
    """All tensors of two nested structures are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    return not isinstance(a, (list, tuple)) or all(same_tensors(x, y) for x, y in zip(a, b, strict=True))


def tiny_cifar10(folder):
    """A file like that of CIFAR-10, and options for a run on it that a CPU can do."""
    x = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=rng.generator(0))
    np.savez(folder / "cifar10.npz", x=x.numpy(), labels=np.arange(40) % 10)
    options = ["--model.net.init_args.width=8", "--model.net.init_args.blocks=1", "--data.init_args.held_out=0.1"]
    options += ["--data.init_args.batch_size=4", "--trainer.precision=32-true", "--speed.compile=false"]
    return [f"--data.init_args.path={folder / 'cifar10.npz'}", *options]


@pytest.mark.parametrize(("config", "millions"), [("cifar10_pfgmpp.yaml", 55.7), ("cifar10_pfgm.yaml", 61.8)])
def test_configs_of_published_networks_have_their_size(config, millions):
    arguments = yaml.safe_load((ROOT / "configs" / config).read_text())["model"]["net"]["init_args"]
    with torch.device("meta"):
        net = UNet((3, 32, 32), **arguments)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


LARGE = {"folder.yaml", "ffhq64.yaml", "celeba64.yaml", "church256.yaml"}  # see test_images.py


@pytest.mark.process
@pytest.mark.parametrize("config", [name for name in CONFIGS if name not in LARGE])
def test_every_config_fits_two_steps_and_samples(config, tmp_path):
    base = ["--config", str(ROOT / "configs" / config), *SMALL]
    if "cifar10" in config:
        base += tiny_cifar10(tmp_path)
    trained = fit(tmp_path, "--trainer.max_steps=2", "--trainer.val_check_interval=2", base=base)
    assert trained.trainer.global_step == 2
    flow = pfgm.load(tmp_path / "checkpoints" / "last.ckpt")
    assert flow.kernel.D == trained.model.flow.kernel.D
    condition = {key: torch.zeros(shape) for key, shape in flow.summary.conditions.items()} or None
    assert flow.sample(2, condition=condition).x.shape == (2, *flow.shape)
    assert {"config.yaml", "loss.png", "metrics.csv", "checkpoints", "grids"} <= {p.name for p in tmp_path.iterdir()}
    rows = log_rows(tmp_path)
    assert any(row["val_loss"] for row in rows)
    assert all(float(row["lr"]) > 0 and float(row["grad_norm"]) > 0 for row in rows if row["train_loss"])
    assert sum(bool(row["train_loss"]) for row in rows) == 2


@pytest.mark.process
@pytest.mark.parametrize("stop", [3, 7])
def test_resuming_equals_not_stopping(stop, tmp_path):
    """300 samples in batches of 32: step 7 is in the middle of a pass. Validation falls between, and after, the stops."""
    options = ["--trainer.val_check_interval=5", "--checkpoint.every_n_steps=100"]
    fit(tmp_path / "a", "--trainer.max_steps=12", *options)
    fit(tmp_path / "b", f"--trainer.max_steps={stop}", *options)
    fit(tmp_path / "b", "--trainer.max_steps=12", *options)
    a, b = last(tmp_path / "a"), last(tmp_path / "b")
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert same_tensors(a[part], b[part]), part
    assert a["global_step"] == b["global_step"] == 12
    logs = [[(r["step"], r["train_loss"], r["val_loss"]) for r in log_rows(tmp_path / x)] for x in "ab"]
    assert logs[0] == logs[1]


def test_a_run_that_went_past_its_checkpoint_is_continued_from_it(tmp_path):
    fit(tmp_path / "a", "--trainer.max_steps=10", "--checkpoint.every_n_steps=4")
    fit(tmp_path / "b", "--trainer.max_steps=4")
    shutil.copy(tmp_path / "a" / "metrics.csv", tmp_path / "b" / "metrics.csv")
    fit(tmp_path / "b", "--trainer.max_steps=10", "--checkpoint.every_n_steps=4")
    assert same_tensors(last(tmp_path / "a")["state_dict"], last(tmp_path / "b")["state_dict"])
    steps = [[int(r["step"]) for r in log_rows(tmp_path / x) if r["train_loss"]] for x in "ab"]
    assert steps[0] == steps[1]


def test_a_run_that_died_early_starts_again_with_the_same_command(tmp_path, monkeypatch):
    whole = PFGM.training_step

    def die(self, batch, index):
        if self.global_step == 2:
            raise KeyboardInterrupt
        return whole(self, batch, index)

    fit(tmp_path / "a", "--trainer.max_steps=4")
    monkeypatch.setattr(PFGM, "training_step", die)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "b", "--trainer.max_steps=4")
    monkeypatch.setattr(PFGM, "training_step", whole)
    assert last(tmp_path / "b")["global_step"] in (0, 2)
    fit(tmp_path / "b", "--trainer.max_steps=4")
    assert same_tensors(last(tmp_path / "a")["state_dict"], last(tmp_path / "b")["state_dict"])
    logs = [[(r["step"], r["train_loss"]) for r in log_rows(tmp_path / x) if r["train_loss"]] for x in "ab"]
    assert logs[0] == logs[1]


def test_more_processes_than_cores_are_refused():
    settings = {"max_steps": 1, "val_check_interval": 5, "accumulate_grad_batches": 1, "accelerator": "cpu"}
    for devices in (9999, "9999"):
        with pytest.raises(ValueError, match=r"trainer\.devices = 9999"):
            train.check_trainer(settings | {"devices": devices}, fitting=True)
    train.check_trainer(settings | {"devices": "auto"}, fitting=True)


@pytest.mark.process
def test_a_new_process_draws_the_same_samples(tmp_path):
    trained = fit(tmp_path, "--trainer.max_steps=3")
    here = trained.model.flow.eval().sample(5, seed=1, method="midpoint", steps=4).x
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    command = [sys.executable, "sample.py", str(checkpoint), "--n=5", "--seed=1", "--method=midpoint", "--steps=4"]
    subprocess.run([*command, "--out", str(tmp_path / "x.npz")], check=True, cwd=ROOT, capture_output=True)
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.allclose(arrays["x"], here.numpy(), atol=1e-6)
    loaded = PFGM.load_from_checkpoint(checkpoint).flow.eval().sample(5, seed=1, method="midpoint", steps=4).x
    assert torch.allclose(loaded, here, atol=1e-6)


class Spy(DenoisingLoss):
    """Remembers what it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, denoiser, y, conditions, *, charges, generator, **others):
        noise = generator.generator.initial_seed(), generator.first
        self.seen.append((y, conditions["label"], charges.y, charges.label, noise))
        return y.sum(1)


def test_the_objective_gets_centred_data_labels_and_noise_of_its_own():
    x, label, spy = 100 + 10 * torch.randn(40, 2), torch.arange(40) % 3, Spy()
    model = PFGM(TimeMLP((2,), 3, width=8, depth=1), DataSummary.from_data(x, scale=20.0, num_classes=3), spy, D=2, seed=4)
    charges = SampleSet(x, {"label": label})
    for stream, step, first in ((2, 0, 0), (2, 1, 0), (2, 0, 8), (3, 0, 0), (3, 8, 0), (2, 0, 0)):
        model._loss(Batch(x[:8], {"label": label[:8]}, step, (first, 16), charges=charges), stream)
    centred = (x - x.mean(0)) / 20
    for y, y_label, reference, reference_label, _ in spy.seen:
        assert torch.allclose(y, centred[:8], atol=1e-5)
        assert torch.allclose(reference, centred, atol=1e-5)
        assert torch.equal(y_label, label[:8])
        assert torch.equal(reference_label, label)
    seeds = [seen[-1] for seen in spy.seen]
    assert len(set(seeds)) == 5
    assert seeds[0] == seeds[-1]


def test_the_learning_rate_warms_up():
    model = PFGM(TimeMLP((2,), width=8, depth=1), DataSummary.from_data(torch.randn(9, 2)), lr=0.1, warmup_steps=4)
    parts, rates = model.configure_optimizers(), []
    for _ in range(7):
        rates.append(parts["optimizer"].param_groups[0]["lr"])
        parts["optimizer"].step()
        parts["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])


@pytest.mark.process
@pytest.mark.parametrize("config", ["digits.yaml", "digits_pfgmpp.yaml"])
def test_classes_are_trained_drawn_and_evaluated(config, tmp_path):
    base = ["--config", str(ROOT / "configs" / config), *SMALL, "--data.init_args.labels=true", "--model.net.init_args.width=8"]
    fit(tmp_path, "--trainer.max_steps=2", "--trainer.val_check_interval=2", base=base)
    train.main(["test", *base, "--run_dir", str(tmp_path), "--evaluation.n=30", "--evaluation.sets=2"])
    values = json.loads((tmp_path / "test.json").read_text())["samples against training data"]["energy"]
    assert values[0] != values[1], "each set has its own seed"
    flow = pfgm.load(tmp_path / "checkpoints" / "last.ckpt")
    assert flow.sample(3, labels=[1, 2, 9]).x.shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="class-conditional"):
        flow.sample(3)


def test_held_out_batches_and_steps_have_their_own_randomness():
    x = torch.arange(100.0)[:, None]
    held_out = HeldOutBatches(SampleSet(x), batch_size=30, seed=0, reference_size=0)
    assert [held_out[i].step for i in range(4)] == [0, 30, 60, 90]
    assert [held_out[i].rows for i in range(4)] == [(0, 30), (0, 30), (0, 30), (0, 10)]
    stream = TrainingStream(SampleSet(x), batch_size=8, seed=0, start=0, rank=0, world=1, reference_size=50)
    batches = [stream.batch(step) for step in (0, 13)]
    a, b = (set(v.charges.x.flatten().tolist()) - set(v.x.flatten().tolist()) for v in batches)
    assert len(a & b) < 40


@pytest.mark.process
def test_resuming_with_other_settings_is_refused_and_names_them(tmp_path):
    fit(tmp_path, "--trainer.max_steps=2")
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes(), (tmp_path / "config.yaml").read_bytes()
    for change, message in (
        ("--model.loss.init_args.gamma=2", r"model\.loss\.gamma: 0\.5 -> 2"),
        ("--model.net.init_args.width=8", r"model\.net\.width: 16 -> 8"),
        ("--data.init_args.name=rings", r"data\.name: heart -> rings"),
        ("--model.lr=0.5", r"model\.lr"),
        ("--seed_everything=5", r"model\.seed: 0 -> 5"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            fit(tmp_path, "--trainer.max_steps=4", change)
        assert "--run_dir" in str(error.value)
    assert before == ((tmp_path / "checkpoints" / "last.ckpt").read_bytes(), (tmp_path / "config.yaml").read_bytes())


def test_a_run_starts_from_other_weights(tmp_path):
    old = fit(tmp_path / "old", "--trainer.max_steps=3").model.flow.denoiser.state_dict()
    new = fit(
        tmp_path / "new",
        "--trainer.max_steps=1",
        "--model.lr=1e-12",
        "--init_from",
        str(tmp_path / "old" / "checkpoints" / "last.ckpt"),
    )
    assert all(torch.allclose(value, old[name]) for name, value in new.model.flow.denoiser.state_dict().items())
    with pytest.raises(ValueError, match="init_from"):
        fit(
            tmp_path / "c",
            "--trainer.max_steps=1",
            "--model.net.init_args.width=8",
            "--init_from",
            str(tmp_path / "old" / "checkpoints" / "last.ckpt"),
        )


@pytest.mark.filterwarnings("ignore:.* steps were skipped so far")
def test_training_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    fit(tmp_path, "--trainer.max_steps=2")
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    whole = PFGM._loss
    monkeypatch.setattr(
        PFGM, "_loss", lambda self, batch, stream: whole(self, batch, stream) * (math.nan if self.global_step > 2 else 1)
    )
    with pytest.raises(NonFiniteLoss, match=r"last 32 steps, to step 34.*loss nan .*The last checkpoint precedes"):
        fit(tmp_path, "--trainer.max_steps=60")
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before


def test_evaluation_prints_its_table_and_leaves_the_run_alone(tmp_path, capsys):
    fit(tmp_path, "--trainer.max_steps=2")
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.csv", "config.yaml", "checkpoints/last.ckpt")}
    train.main(["test", *TOY, "--run_dir", str(tmp_path), "--evaluation.n=50", "--evaluation.sets=2"])
    assert "2 sets of 50 samples" in capsys.readouterr().out
    assert (tmp_path / "test.json").exists()
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    with pytest.raises(FileNotFoundError, match="run fit first"):
        train.main(["test", *TOY, "--run_dir", str(tmp_path / "none")])


def test_files_of_others_are_not_written_over(tmp_path):
    fit(tmp_path / "a", "--trainer.max_steps=2")
    (tmp_path / "a" / "checkpoints" / "last.ckpt").rename(tmp_path / "kept.ckpt")
    (tmp_path / "a" / "checkpoints" / "previous.ckpt").unlink()
    before = (tmp_path / "a" / "metrics.csv").read_bytes()
    with pytest.raises(FileExistsError, match=r"has config\.yaml, metrics\.csv.* but no checkpoints/last\.ckpt"):
        fit(tmp_path / "a", "--trainer.max_steps=2")
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == before
    shutil.copy(tmp_path / "kept.ckpt", tmp_path / "a" / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="holds a run already"):
        fit(tmp_path / "a", "--trainer.max_steps=2", "--init_from", str(tmp_path / "kept.ckpt"))


@pytest.mark.process
@pytest.mark.parametrize("text", ["inf", ".inf", "Infinity", ".Inf"])
def test_infinite_D_may_be_written_in_each_usual_way(text, tmp_path):
    base = ["--config", str(ROOT / "configs" / "digits_pfgmpp.yaml"), *SMALL, f"--model.D={text}"]
    trained = fit(tmp_path, "--trainer.max_steps=1", "--model.net.init_args.width=8", base=base)
    assert math.inf == trained.model.flow.kernel.D
    assert math.inf == pfgm.load(tmp_path / "checkpoints" / "last.ckpt").kernel.D


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.D=0.1"], "D = 0.1"),
        (["--model.D=.nan"], "D = nan"),
        (["--model.D=2"], "D = 2"),
        (["--model.sigma_min=50"], "sigma_min = 50"),
        (["--model.lr=-1"], "lr = -1"),
        (["--trainer.max_steps=-1"], "max_steps = -1"),
        (["--ema.half_life=-1"], "half_life = -1"),
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val = -1"),
        (["--ema.warmup=0"], "warmup = 0"),
        (["--data.init_args.batch_size=0"], "batch_size = 0"),
        (["--init_from=none.ckpt"], r"none\.ckpt does not exist"),
        (["--model.data_norm=0"], "data_norm = 0"),
        (["--model.sigma_data=-1", "--model.sigma_min=0.01"], "sigma_data = -1"),
        (["--model.net.init_args.depth=-1"], "depth = -1"),
        (["--trainer.val_check_interval=0"], "val_check_interval = 0"),
        (["--run_dir="], "run_dir is empty"),
    ],
)
def test_bad_training_arguments_are_named_before_any_work(arguments, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        fit(tmp_path / "run", "--trainer.max_steps=1", *arguments)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model.colour=1"], "colour"),
        (["--model.start=sphere"], "sphere"),
        (["--data.class_path=pfgm.data.Nothing"], "Nothing"),
        (["--data.init_args.name=circle"], "circle"),
    ],
)
def test_unknown_keys_are_refused(arguments, word, tmp_path):
    with pytest.raises(ArgumentError, match=word):
        fit(tmp_path / "run", "--trainer.max_steps=1", *arguments)


def test_every_pass_of_the_stream_is_a_permutation_and_ranks_share_it():
    whole = stream_indices(0, 30, 10, seed=4)
    for k in range(3):
        assert sorted(whole[10 * k : 10 * k + 10].tolist()) == list(range(10))
    assert not torch.equal(whole[:10], whole[10:20])
    x = torch.arange(10.0)[:, None]
    one = TrainingStream(SampleSet(x), batch_size=4, seed=4, start=0, rank=0, world=1, reference_size=0)
    two = [TrainingStream(SampleSet(x), batch_size=2, seed=4, start=0, rank=r, world=2, reference_size=0) for r in (0, 1)]
    for step in (0, 3):
        assert torch.equal(one.batch(step).x, torch.cat([t.batch(step).x for t in two]))
    assert torch.equal(next(iter(one)).x, one.batch(0).x)


def test_reference_charges_contain_the_batch_and_do_not_repeat():
    x = torch.arange(100.0)[:, None]
    for size, length in ((20, 20), (3, 8), (1000, 100)):
        batch = TrainingStream(SampleSet(x), batch_size=8, seed=0, start=0, rank=0, world=1, reference_size=size).batch(5)
        reference = batch.charges.x.flatten().tolist()
        assert len(reference) == len(set(reference)) == length
        assert set(batch.x.flatten().tolist()) <= set(reference)


def test_digits_are_split_at_random_with_each_class_in_proportion():
    data = Digits(labels=True, seed=3)
    assert (len(data.train.x), len(data.held_out.x), data.shape, data.num_classes) == (1437, 360, (1, 8, 8), 10)
    assert data.held_out.label.bincount().min() >= 34
    assert float(data.train.x.min()) == -1
    assert float(data.train.x.max()) == 1
    assert not torch.equal(Digits(seed=3).train.x, Digits(seed=4).train.x)
    assert Digits().num_classes == 0


def test_arrays_of_each_kind_train_in_their_own_units(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (40, 1, 6, 6)).astype(np.uint8)
    np.savez(tmp_path / "grey.npz", x=grey, labels=np.arange(40) % 4)
    data = Arrays(tmp_path / "grey.npz", labels=True)
    assert (data.shape, data.num_classes, data.summary.scale) == ((1, 6, 6), 4, 127.5)
    volts = 1000 * torch.randn(50, 7) + 5000
    torch.save({"x": volts}, tmp_path / "volts.pt")
    data = Arrays(tmp_path / "volts.pt")
    assert data.summary.sigma_data == pytest.approx(0.5)
    model = PFGM(TimeMLP((7,), width=8, depth=1), data.summary)
    x = model.flow.sample(200).x
    assert 4500 < float(x.mean()) < 5500
    np.save(tmp_path / "wide.npy", np.arange(40, dtype=np.uint16).reshape(20, 2) * 1000)
    assert Arrays(tmp_path / "wide.npy", value_range=(0, 65535)).summary.scale == 32767.5
    np.save(tmp_path / "line.npy", np.linspace(0.0, 1.0, 30))
    assert Arrays(tmp_path / "line.npy").shape == (1,)


def save(folder, array, **more):
    np.savez(folder / "a.npz", x=array, **more)
    return {"path": folder / "a.npz"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: {"path": d / "none.npy"}, "does not exist"),
        (lambda d: {"path": d / "a.csv"}, "unknown suffix '.csv'"),
        (lambda d: save(d, np.zeros((0, 3))), "0 samples"),
        (lambda d: save(d, np.ones((9, 3))), "all 8 samples are equal"),
        (lambda d: save(d, np.float64(3)), "a single number"),
        (lambda d: save(d, np.arange(9.0), labels=np.arange(9) * 10**12) | {"labels": True}, "labels go up to|cannot be split"),
        (lambda d: save(d, np.arange(9.0)) | {"value_range": (-math.inf, math.inf)}, "two finite numbers"),
        (lambda d: save(d, np.array([[1.0, np.nan]] * 9)), "9 values are NaN"),
        (lambda d: save(d, np.arange(9)[:, None]), "need value_range"),
        (lambda d: save(d, np.arange(9)[:, None]) | {"value_range": (0, 5)}, r"0 to 8 leave value_range"),
        (lambda d: save(d, np.arange(9.0)[:, None]) | {"value_range": (5, 0)}, "value_range"),
        (lambda d: save(d, np.array([np.zeros(2), np.zeros(3)], dtype=object)), r"x\.npy holds object, which are no numbers"),
        (lambda d: save(d, np.arange(9.0)) | {"labels": True}, "no array 'labels'"),
        (lambda d: save(d, np.arange(9.0), labels=-np.arange(9)) | {"labels": True}, "labels need one integer >= 0"),
        (lambda d: save(d, np.arange(9.0)) | {"held_out": 1.5}, "held_out = 1.5"),
        (lambda d: save(d, np.ones((9, 3), dtype=complex)), "complex"),
    ],
)
def test_bad_data_is_named(make, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        Arrays(**make(tmp_path))


def test_toys_have_a_size_near_one():
    for name in ("rings", "gaussians", "swiss_roll", "heart"):
        data = Toy(name=name, size=500)
        assert 0.3 < data.summary.sigma_data < 1.0
        assert data.shape == (2,)
    with pytest.raises(ValueError, match="name = 'circle'"):
        Toy(name="circle")


def test_networks_made_in_python_load_without_arguments(tmp_path):
    data = Digits()
    model = PFGM(UNet((1, 8, 8), width=8), data.summary, D=math.inf, sigma_max=20.0, sigma_data=0.6)
    trainer = pl.Trainer(
        max_steps=1,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    flow = pfgm.load(tmp_path / "x.ckpt")
    assert (flow.sigma_max, flow.summary.sigma_data, flow.kernel.D) == (20.0, 0.6, math.inf)
    again = PFGM.load_from_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(again.flow.sample(2).x, flow.sample(2).x)
