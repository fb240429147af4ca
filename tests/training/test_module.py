"""The training step: the same gradient in any parts, nothing waited for, nothing not finite let into the weights."""

import itertools
import math
import re

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pfgm.core import rng
from pfgm.data import DataModule
from pfgm.data.batches import Batch, SampleSet, TrainingStream
from pfgm.data.degradations import AddNoise
from pfgm.flow.checkpoints import checkpoint_path
from pfgm.nn import TimeMLP
from pfgm.theory.field import normalized_field, poisson_field, posterior_mean
from pfgm.theory.kernel import StudentTKernel
from pfgm.training.checkpointing import LastCheckpoint
from pfgm.training.ema import EMA, PowerAverages
from pfgm.training.module import PFGM
from pfgm.training.noise import PoissonFlowNoise
from pfgm.training.nonfinite import NonFiniteLoss, SkippedSteps
from tests.helpers import OBJECTIVES, digits, model, train_steps


class Log(pl.loggers.Logger):
    """Puts (step, values) into a list."""

    name, version = "log", ""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def log_hyperparams(self, *args):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


@pytest.mark.process
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accumulated_batches_have_the_gradient_of_a_large_one(objective, tmp_path):
    """Data, noise, dropped labels, charges, clipping, average and what is logged: in four parts of 8 as in one of 32."""
    weights, rows = [], []
    for size, parts in ((32, 1), (8, 4)):
        data = digits(batch_size=size, dequantize=True)
        module, ema = model(data, objective, label_dropout=0.3), EMA(half_life=40, warmup=10)
        rows.append([])
        options = {"accumulate_grad_batches": parts, "precision": "64-true", "logger": Log(rows[-1])}
        weights.append(train_steps(data, module, 4, ema, folder=tmp_path, **options))
    before = [p.detach() for p in model(data, objective, label_dropout=0.3).double().parameters()]
    moved = max(float((a - b).abs().max()) for a, b in zip(weights[0], before, strict=True))
    differ = max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))
    assert moved > 1e-3
    assert differ < 1e-6, "Adam's first steps divide by the gradient and show its rounding"
    for (step, one), (other, many) in zip(*rows, strict=True):
        assert step == other
        assert many == pytest.approx(one, rel=1e-5)


def test_ranks_share_out_what_a_large_batch_has():
    """Samples, conditions and charges of two ranks with two batches each are those of one process."""
    part = SampleSet(torch.randn(300, 1, 2, 2), {"label": torch.arange(300) % 3})
    data = DataModule(part, part, batch_size=8, seed=5, degrade=AddNoise(std=0.5))
    common = {"samples": part, "preparation": data.preparation, "seed": 5, "start": 0}
    for size in (0, 100):
        whole = TrainingStream(**common, batch_size=32, reference_size=size).batch(7)
        parts = [
            TrainingStream(**common, batch_size=8, reference_size=size, rank=rank, world=2, accumulate=2).batch(7, i)
            for i in (0, 1)
            for rank in (0, 1)
        ]
        assert torch.equal(whole.x, torch.cat([p.x for p in parts]))
        for key in ("label", "image"):
            assert torch.equal(whole.conditions[key], torch.cat([p.conditions[key] for p in parts]))
        assert [p.rows for p in parts] == [(0, 32), (8, 32), (16, 32), (24, 32)]
        if size:
            assert all(torch.equal(p.charges.x, whole.charges.x) for p in parts)


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_parts_of_a_batch_get_their_rows_of_its_noise(D):
    y, kernel = torch.zeros(12, 5), StudentTKernel(D)
    whole = kernel.sample(y, 1.0, rng.generator(3))
    parts = [kernel.sample(y[:4], 1.0, rng.Rows(rng.generator(3), first, 12)) for first in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts))
    with pytest.raises(ValueError, match="no rows for 4 samples"):
        kernel.sample(y[:4], 1.0, rng.Rows(rng.generator(3), 10, 12))


class Waits(TorchDispatchMode):
    """Counts operations for whose result a host would have to wait for its accelerator."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "unique2", "_unique2", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen, self.total = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.total += 1
        if name in self.NAMES:
            self.seen.append(name)
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen.append("index by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_training_step_waits_for_nothing(objective):
    """Noise, target, loss, gradient, clipping, optimizer and average read no value back."""
    data = digits()
    module, ema = model(data, objective, label_dropout=0.1), EMA()
    stream = TrainingStream(data.train, batch_size=32, seed=0, start=0, reference_size=module.reference_size)
    module._trainer = trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    optimizer = module.configure_optimizers()["optimizer"]
    trainer.strategy._lightning_module = module
    ema.setup(trainer, module, "fit")
    for step in (0, 1):
        batch = stream.batch(step)
        with Waits() as waits:
            module.training_step(batch, step).backward()
            module.check_finite = lambda: None  # which a CPU, where nothing is to be waited for, calls each time
            module.configure_gradient_clipping(optimizer, 1.0)
            optimizer.step()
            trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed += 1
            ema.on_train_batch_end(trainer, module, None, batch, step)
        assert waits.total > 100
        assert waits.seen == [], step
    with Waits() as waits:
        bool(torch.ones(3).sum() > 0)
        torch.arange(3)[torch.tensor([True, False, True])]
    assert waits.seen == ["_local_scalar_dense", "index by a mask"]


@pytest.mark.filterwarnings("ignore:.* steps were skipped so far")
def test_a_step_that_is_not_finite_changes_no_weight(tmp_path, monkeypatch):
    """Neither does its gradient alone; it is counted, and Adam does not count it."""
    for which in ("loss", "gradient"):
        data, whole, weights = digits(), PFGM._loss, []
        module = model(data)

        def loss(self, batch, stream, which=which, whole=whole):
            value = whole(self, batch, stream)
            if batch.step not in (2, 3):
                return value
            bias = self.flow.denoiser.net.last[-1].bias
            return value * math.nan if which == "loss" else value + (bias - bias.detach()).sum().abs().sqrt()

        class Record(pl.Callback):
            def on_train_batch_end(self, trainer, module, *args, seen=weights):
                seen.append([p.detach().clone() for p in module.parameters()])

        monkeypatch.setattr(PFGM, "_loss", loss)
        monkeypatch.setattr(PFGM, "check_finite", lambda self: None)
        train_steps(data, module, 6, Record(), folder=tmp_path)
        monkeypatch.undo()
        same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(weights)]
        assert same == [False, True, True, False, False]
        assert module._skips.state == [2, 0]
        assert {int(state["step"]) for state in module.optimizers(False).state.values()} == {4}


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.* steps were skipped so far")
@pytest.mark.parametrize("objective", ["PFGM", "PFGM++"])
@pytest.mark.parametrize(("what", "place"), [("loss", 20), ("loss", 4), ("gradient", 20)])
def test_training_that_only_skips_stops_and_names_sample_and_level(objective, what, place, tmp_path, monkeypatch):
    """32 samples in two parts of 16: one of the second part, or of the first, is bad in each step from step 2 on."""
    whole, data = PFGM._loss, digits(batch_size=16)
    data.train = data.train[slice(0, 32)]
    size = OBJECTIVES[objective]["loss"].reference_size
    batch = TrainingStream(data.train, batch_size=32, seed=0, start=0, reference_size=size).batch(4)
    bad = int(batch.index[place])

    def loss(self, batch, stream):
        values, bias = whole(self, batch, stream), self.flow.denoiser.net.last[-1].bias
        if bad not in batch.index or batch.step < 2:
            return values
        if what == "gradient":
            return values + (bias - bias.detach()).sum().abs().sqrt()
        return torch.where(batch.index == bad, math.nan, values)

    module = model(data, objective)
    monkeypatch.setattr(PFGM, "_loss", loss)
    monkeypatch.setattr("pfgm.training.module.MAX_SKIPPED", 3)
    with pytest.raises(NonFiniteLoss) as error:
        train_steps(data, module, 9, folder=tmp_path, accumulate_grad_batches=2)
    assert module._skips.state == [3, 3]
    assert f"in the last 3 steps, to step 4, which were skipped. At step 4 sample {bad} of the training data" in str(
        error.value
    )
    drawn = []
    owner, name = (PoissonFlowNoise, "perturb") if objective == "PFGM" else (StudentTKernel, "sample")
    draw = getattr(owner, name)

    def record(self, y, sigma, generator):
        out = draw(self, y, sigma, generator)
        drawn.append(out[1] if objective == "PFGM" else sigma)
        return out

    monkeypatch.setattr(owner, name, record)
    whole(module, batch, rng.TRAINING)
    level = float(re.search(r"at noise level (\S+) ", str(error.value))[1])
    assert level == pytest.approx(float(drawn[0][place]), rel=1e-3)


@pytest.mark.filterwarnings("ignore:1 of 2 steps were skipped so far")
def test_a_run_that_is_resumed_keeps_the_count_of_skipped_steps(tmp_path, monkeypatch):
    whole, data, rows = PFGM._loss, digits(), []
    monkeypatch.setattr(PFGM, "_loss", lambda self, b, s: whole(self, b, s) * (math.nan if b.step in (1, 2, 4) else 1))
    options = {"max_epochs": -1, "log_every_n_steps": 1, "limit_val_batches": 0, "enable_progress_bar": False}
    options |= {"accelerator": "cpu", "default_root_dir": tmp_path, "logger": Log(rows)}
    for steps, path, message in ((3, None, "2 of 3 steps"), (6, tmp_path / "checkpoints" / "last.ckpt", "3 of 5 steps")):
        trainer = pl.Trainer(**options, max_steps=steps, callbacks=[LastCheckpoint()])
        with pytest.warns(UserWarning, match=f"{message} were skipped so far"):
            trainer.fit(model(data), data, ckpt_path=path, weights_only=True)
    assert [(step, values["skipped"]) for step, values in rows] == [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (5, 3)]


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_field_and_kernel_are_never_computed_in_less_than_float32(D):
    """Neither autocast nor TF32, which the user may have switched on for the network, reaches them."""
    y, x = torch.randn(50, 6), torch.randn(20, 6)
    sigma = torch.rand(20) + 0.1
    kernel = StudentTKernel(D)

    def all_of_them():
        found = [posterior_mean(x, sigma, y, D), kernel.sample(x, sigma, rng.generator(1)), kernel.log_prob(x, y[:20], sigma)]
        found.append(kernel.renoise(x, y[:20], sigma, sigma + 0.1, rng.generator(2)))
        if D == 1:
            found += [*normalized_field(x, sigma, y, 0.1), *poisson_field(x, sigma, y, 1.0)]
        return found

    exact = all_of_them()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == torch.bfloat16
            rough = all_of_them()
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(exact, rough, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_gradients_are_clipped_and_their_norm_is_logged(tmp_path):
    """Against torch's own functions, by norm and by value."""
    data = digits()

    class Check(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.raw = [p.grad.clone() for p in module.parameters()]

        def on_before_zero_grad(self, trainer, module, optimizer):
            if hasattr(self, "raw"):
                parameters = [nn.Parameter(g) for g in self.raw]
                for p, g in zip(parameters, self.raw, strict=True):
                    p.grad = g.clone()
                norm = nn.utils.clip_grad_norm_(parameters, 0.01)
                assert float(norm) > 0.01
                if trainer.gradient_clip_algorithm == "value":
                    for p, g in zip(parameters, self.raw, strict=True):
                        p.grad = g.clamp(-0.01, 0.01)
                for p, q in zip(parameters, module.parameters(), strict=True):
                    assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-9)
                self.norms.append(float(norm))

        def on_train_batch_end(self, trainer, module, outputs, *args):
            self.losses.append(float(outputs["loss"]))

    for algorithm in ("norm", "value"):
        check, rows = Check(), []
        check.norms, check.losses = [], []
        options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm, "logger": Log(rows), "log_every_n_steps": 2}
        train_steps(data, model(data, lr=0.5), 5, check, folder=tmp_path, **options)
        assert [step for step, _ in rows] == [1, 3]
        for step, values in rows:
            expected = {"train_loss": check.losses[step], "lr": 0.5, "grad_norm": check.norms[step], "skipped": 0}
            assert values == pytest.approx(expected)


def test_callbacks_and_models_may_be_used_for_a_second_fit(tmp_path):
    """Nothing is left of the first: averages start anew, and a step that was not finite is forgotten."""
    data = digits()
    ema, averages = EMA(half_life=0), PowerAverages(every_n_steps=100)
    train_steps(data, model(data), 5, ema, averages, folder=tmp_path)
    module = model(data)
    module._skips = SkippedSteps((3, 3))
    before = [p.detach().clone() for p in module.parameters()]
    after = train_steps(data, module, 3, ema, averages, folder=tmp_path)
    assert max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) > 1e-4
    assert averages.step == 3
    assert module._skips.state == [0, 0]
    assert sorted(p.name for p in (tmp_path / "averages").iterdir()) == ["00000003.safetensors", "00000005.safetensors"]


def test_parts_of_a_batch_drop_units_of_their_own():
    data = digits(batch_size=8)
    module = model(data, net={"dropout": 0.5})
    seeds = []
    stream = TrainingStream(data.train, batch_size=8, seed=0, start=0, accumulate=2, reference_size=0)
    for step, i in ((0, 0), (0, 1), (1, 0), (0, 0)):
        module.training_step(stream.batch(step, i), 0)
        seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 3
    assert seeds[0] == seeds[3]


@pytest.mark.process
@pytest.mark.parametrize("parts", [(4, 4), (4, 2)])
def test_a_run_stopped_between_two_parts_of_a_batch_is_resumed_at_a_step(parts, tmp_path):
    """Batches are taken up where the last optimizer step left them, also if a step has another number of them then."""
    seen, path = [], tmp_path / "checkpoints" / "last.ckpt"

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((batch.step, batch.rows[0] // 8, trainer.global_step))
            trainer.should_stop = len(seen) == 14

    for accumulate in parts:
        data = digits(batch_size=8)
        options = {"max_epochs": -1, "max_steps": 5, "logger": False, "enable_progress_bar": False, "limit_val_batches": 0}
        options |= {"accelerator": "cpu", "enable_model_summary": False, "accumulate_grad_batches": accumulate}
        trainer = pl.Trainer(**options, callbacks=[EMA(), LastCheckpoint(2), Stop()], default_root_dir=tmp_path)
        trainer.fit(model(data), data, ckpt_path=path if path.exists() else None, weights_only=True)
    first = [(step, i, step + (i == 3)) for step in range(4) for i in range(4)][:14]
    rest = [(step, i, step + (i == parts[1] - 1)) for step in (3, 4) for i in range(parts[1])]
    assert seen == first + rest


def test_dropout_is_a_function_of_the_step(tmp_path):
    """A run that is stopped and resumed drops the same units as one that is not."""
    data, weights = digits(), []
    for stops in ((6,), (3, 6)):
        folder = tmp_path / str(len(stops))
        for steps in stops:
            module = model(data, net={"dropout": 0.3})
            torch.rand(len(stops) * 7)
            last = train_steps(data, module, steps, EMA(), LastCheckpoint(), folder=folder, resume=checkpoint_path(folder))
        weights.append(last)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.process
@pytest.mark.parametrize("objective", ["PFGM", "PFGM++"])
def test_bfloat16_training_is_finite_and_as_good_as_float32(objective, tmp_path):
    """100 steps on the same data and noise: the losses of the last 50 within 2 %."""
    data, losses = digits(batch_size=8), {}

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *args):
            losses.setdefault(trainer.precision, []).append(float(outputs["loss"]))

    for precision in ("32-true", "bf16-mixed"):
        module = model(data, objective)
        weights = train_steps(data, module, 100, EMA(), Record(), folder=tmp_path, precision=precision)
        assert all(bool(torch.isfinite(w).all()) and w.dtype == torch.float32 for w in weights)
    full, low = (sum(losses[precision][50:]) for precision in ("32-true", "bf16-mixed"))
    assert abs(low / full - 1) < 0.02
    assert losses["bf16-mixed"] != losses["32-true"]


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # its first step is one that is skipped
@pytest.mark.parametrize("objective", ["PFGM", "PFGM++"])
def test_float16_skips_what_overflows_until_it_has_its_scale_and_resumes_with_it(objective, tmp_path):
    """From a scale of 2^30 it is halved at each step that overflows, and no such step changes a weight.

    The gradient that is clipped and logged is the unscaled one: of the first step that counts about that of float32.
    """
    seen, norms, full = [], [], []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            scale = trainer.precision_plugin.scaler.get_scale()
            seen.append((module._skips.state[0], scale, [p.detach().clone() for p in module.parameters()]))
            norms.append(float(trainer.callback_metrics["grad_norm"]))

    train_steps(digits(), model(digits(), objective), 1, folder=tmp_path, logger=Log(full))
    for stops in ((26,), (22, 26)):
        data, folder = digits(), tmp_path / str(len(stops))
        for stop in stops:
            scaler, module = torch.amp.GradScaler("cpu", init_scale=2.0**30), model(data, objective)
            options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "resume": checkpoint_path(folder)}
            train_steps(data, module, stop, Record(), LastCheckpoint(), folder=folder, **options)
        skips, scales, weights = zip(*seen[-26:], strict=True)
        assert 5 < skips[-1] < 20
        assert all(scale == 2.0 ** (30 - skipped) for skipped, scale in zip(skips, scales, strict=True))
        same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(weights)]
        assert same == [b > a for a, b in itertools.pairwise(skips)]
        assert all(bool(torch.isfinite(w).all()) for w in weights[-1])
        assert {int(state["step"]) for state in module.optimizers(False).state.values()} == {26 - skips[-1]}
        assert norms[-26:][same.index(False) + 1] == pytest.approx(full[0][1]["grad_norm"], rel=0.5)
    assert len(seen) == 2 * 26
    assert all(torch.equal(a, b) for a, b in zip(seen[25][2], seen[-1][2], strict=True))


def test_the_network_runs_in_bfloat16_and_the_rest_does_not(monkeypatch):
    seen = {}

    class Net(TimeMLP):
        def forward(self, x, c_noise, *, label=None):
            out = super().forward(x, c_noise, label=label)
            seen.update(x=x.dtype, c_noise=c_noise.dtype, out=out.dtype)
            return out

    data = DataModule(SampleSet(torch.randn(40, 3)), SampleSet(torch.randn(9, 3)), batch_size=8, seed=0)
    module = PFGM(Net((3,), width=8, depth=1), data.summary)
    whole = PFGM._loss
    monkeypatch.setattr(PFGM, "_loss", lambda *args: seen.setdefault("loss", whole(*args)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.training_step(Batch(data.train.x[:8], {}, 0, (0, 8)), 0)
    assert seen["loss"].dtype == torch.float32
    assert seen["c_noise"] == seen["x"] == torch.float32
    assert seen["out"] == torch.bfloat16
