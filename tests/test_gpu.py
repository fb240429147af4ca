"""What only a GPU can show: no waiting in the training step, the same model as on a CPU, compiled bfloat16 runs that resume.

Not part of the fast suite: `pytest -m gpu`.
"""

import math

import pytest
import pytorch_lightning as pl
import torch

import pfgm
from pfgm.cli import train as train_cli
from pfgm.cli.prepare import prepare
from pfgm.core.rng import generator
from pfgm.evaluation.metrics import MEASURES, FeatureSet
from pfgm.theory.field import posterior_mean
from pfgm.theory.kernel import StudentTKernel
from pfgm.training.callbacks import Speed
from pfgm.training.ema import EMA, PowerAverages
from tests.helpers import OBJECTIVES, ROOT, digits, fit, model, pack, train_steps, write_set

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_steps_between_two_logs_wait_for_nothing(objective, tmp_path):
    """With torch's own detector, over whole steps of Lightning: data, transfer, loss, optimizer, averages."""

    class Detector(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if 3 <= trainer.global_step < 8 else "default")

        def on_train_end(self, trainer, module):
            torch.cuda.set_sync_debug_mode("default")

    data = digits()
    averages = [EMA(), PowerAverages(every_n_steps=100)]
    options = {"accelerator": "gpu", "devices": 1, "log_every_n_steps": 10, "precision": "bf16-mixed"}
    try:
        weights = train_steps(
            data, model(data, objective, label_dropout=0.1), 10, Detector(), *averages, folder=tmp_path, **options
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(w.device.type == DEVICE and bool(torch.isfinite(w).all()) for w in weights)


def test_a_gpu_takes_the_steps_that_a_cpu_takes(tmp_path):
    """The noise differs, since generators do; the same batches without noise to speak of lead to nearly the same loss."""
    data, losses = digits(), {}

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *args):
            losses.setdefault(module.device.type, []).append(float(outputs["loss"]))

    for accelerator in ("cpu", "gpu"):
        train_steps(data, model(data), 200, EMA(), Record(), folder=tmp_path, accelerator=accelerator, devices=1)
    cpu, gpu = (sum(losses[device][100:]) for device in ("cpu", DEVICE))
    assert abs(gpu / cpu - 1) < 0.05


def test_the_average_stays_on_the_gpu(tmp_path):
    places = set()

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            places.update(p.device.type for p in trainer.callbacks[0]._average_model.parameters())
            places.update(p.device.type for part in trainer.callbacks[1].averages.values() for p in part.values())

    data = digits()
    train_steps(data, model(data), 3, EMA(), PowerAverages(100), Look(), folder=tmp_path, accelerator="gpu", devices=1)
    assert places == {DEVICE}


def test_a_step_that_is_not_finite_is_skipped_on_the_gpu(tmp_path, monkeypatch):
    """The error comes when the loss is logged, and by then no weight has been harmed."""
    data = digits()
    module = model(data)
    whole = type(module)._loss
    monkeypatch.setattr(
        type(module), "_loss", lambda self, batch, stream: whole(self, batch, stream) * (math.nan if batch.step == 2 else 1)
    )
    with pytest.raises(Exception, match="nan at step 2"):
        train_steps(data, module, 20, folder=tmp_path, accelerator="gpu", devices=1, log_every_n_steps=10)
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_a_compiled_bfloat16_run_learns_resumes_and_is_loaded_on_a_cpu(tmp_path):
    base = ["--config", str(ROOT / "configs" / "digits_pfgmpp.yaml"), "--trainer.accelerator=gpu", "--trainer.devices=1"]
    base += ["--speed.compile=true", "--speed.channels_last=true", "--trainer.precision=bf16-mixed", "--grid.n=16"]
    base += ["--trainer.val_check_interval=50", "--trainer.enable_progress_bar=false"]
    for steps in ("50", "150"):
        trained = fit(tmp_path, f"--trainer.max_steps={steps}", base=base)
    assert float(trained.trainer.callback_metrics["val_loss"]) < 0.9
    path = tmp_path / "checkpoints" / "last.ckpt"
    on_cpu, on_gpu = pfgm.load(path).sample(8, seed=1), pfgm.load(path, device=DEVICE).sample(8, seed=1)
    assert on_cpu.calls == on_gpu.calls
    assert torch.allclose(on_cpu.x, on_gpu.x.cpu(), atol=0.02), "the noise of samples comes from the CPU"


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_noise_and_targets_have_their_law_on_the_gpu(D):
    """Quantiles of |x - y|²/N against the CPU's, and posterior means against the CPU's."""
    y, kernel = torch.zeros(200_000, 8), StudentTKernel(D)
    radii = [
        kernel.sample(y.to(place), 1.0, generator(k, device=place)).norm(dim=1).cpu().double()
        for k, place in enumerate(("cpu", DEVICE))
    ]
    at = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    assert torch.allclose(*(torch.quantile(r, at) for r in radii), rtol=0.03)
    x, charges = torch.randn(64, 3, 8, 8), torch.randn(500, 3, 8, 8)
    there = posterior_mean(x.to(DEVICE), 0.7, charges.to(DEVICE), D).cpu()
    assert torch.allclose(there, posterior_mean(x, 0.7, charges, D), atol=1e-5)


def test_speed_changes_the_run_but_not_the_model(tmp_path):
    data, weights = digits(), []
    for speed in (Speed(), Speed(compile=True, channels_last=True)):
        weights.append(
            train_steps(data, model(data), 5, speed, EMA(half_life=0), folder=tmp_path, accelerator="gpu", devices=1)
        )
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("memory", ["null", "0"])
def test_images_are_trained_on_and_tested_by_features(memory, tmp_path):
    archive = pack(write_set(tmp_path / "images"), tmp_path / "images.zip")
    data = [f"--data.path={archive}", "--data.size=16", "--data.batch_size=8", f"--data.memory={memory}", "--data.workers=2"]
    base = ["--config", str(ROOT / "configs" / "folder.yaml"), *data, "--model.net.init_args.width=8"]
    base += ["--model.net.init_args.blocks=1", "--trainer.accelerator=gpu", "--trainer.devices=1"]
    fit(tmp_path / "run", "--trainer.max_steps=3", "--trainer.val_check_interval=3", base=base)
    made = ["features", "--data=pfgm.data.ImageDataModule", *data[:2], "--data.labels=true", "--steps=5", "--width=8"]
    prepare([*made, "--device", DEVICE, "--out", str(tmp_path / "f.safetensors")])
    options = ["--evaluation.n=20", "--evaluation.sets=1", f"--evaluation.features={tmp_path}/f.safetensors"]
    train_cli.main(["test", *base, "--run_dir", str(tmp_path / "run"), *options])
    assert (tmp_path / "run" / "nearest.png").exists()


def test_measures_are_those_of_the_cpu():
    x, y = torch.randn(300, 20, generator=generator(0)), torch.randn(400, 20, generator=generator(1)) + 0.1
    for measure in MEASURES:
        assert measure.function(FeatureSet(x.to(DEVICE)), FeatureSet(y.to(DEVICE))) == pytest.approx(
            measure.function(FeatureSet(x), FeatureSet(y)), rel=1e-6
        ), measure.name
