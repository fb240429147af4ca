"""Training on several devices: the loss of a single process, lost processes, signals, and clusters."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment

from benchmarks.faulty import kills
from pfgm.cli import train
from pfgm.core.exits import LostProcess
from pfgm.flow import checkpoints
from pfgm.training.checkpointing import Stopped


@pytest.mark.process
def test_a_run_on_two_devices_starts_from_one_command_and_saves_on_a_signal(tmp_path):
    """The scheduler signals only the first process."""
    arguments = [*kills.command(tmp_path, "denoising", 100_000), "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(kills.ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    try:
        while process.poll() is None and kills.reached(tmp_path) < 20:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "stopped by SIGTERM. The state after step" in stderr
    assert checkpoints.read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == kills.reached(tmp_path)


@pytest.mark.parametrize("stopped", [True, False])
def test_the_process_group_is_destroyed_when_the_run_ends(stopped, tmp_path, monkeypatch):
    """gloo sometimes aborts if it outlives the interpreter."""

    def main(**_):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        if stopped:
            raise Stopped(signal.SIGTERM, 3, 143)

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit"])
    with pytest.raises(Stopped, match="after step 3") if stopped else contextlib.nullcontext():
        train.command(["fit"])
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("text", ["[gloo/transport/tcp/pair.cc:545] Connection reset by peer", "CUDA error"])
def test_a_lost_process_is_distinguished_from_other_errors(text, tmp_path, monkeypatch):
    def main(**_):
        raise RuntimeError(text)

    monkeypatch.setattr(train, "main", main)
    with pytest.raises(RuntimeError, match=re.escape(text)) as alone:
        train.command(["fit"])
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError) as ranked:
            train.command(["fit"])
    finally:
        torch.distributed.destroy_process_group()
    assert not isinstance(alone.value, LostProcess)
    assert isinstance(ranked.value, LostProcess) == ("gloo" in text)
    if "gloo" in text:
        told = r"another process of this run ended, or never came \(.*reset by peer\)\. .* resumes from .*"
        assert re.fullmatch(told, str(ranked.value))


@pytest.mark.process
def test_a_missing_rank_raises_lost_process(monkeypatch):
    def main(**_):
        nobody = "tcp://127.0.0.1:9"
        torch.distributed.init_process_group("gloo", nobody, timedelta(seconds=1), rank=1, world_size=2)

    monkeypatch.setattr(train, "main", main)
    with pytest.raises(LostProcess, match="never came"):
        train.command(["fit"])


@pytest.mark.process
def test_a_run_resumes_after_losing_one_of_its_processes(tmp_path):
    counts = kills.chain(tmp_path, "Poisson field", kills=1, seed=1, steps=20, ranks=2)
    assert counts["kills"] == counts["at random"] + counts["while saving"] + counts["while drawing a grid"] == 1
    assert counts["different"] == counts["torn"] == counts["failed"] == counts["unexpected"] == 0


@pytest.mark.process
@pytest.mark.parametrize("objective", kills.OBJECTIVES)
def test_two_processes_match_one_with_twice_the_batch(objective, tmp_path):
    """Compares loss, gradient, weights and average; ranks share the charges of the Poisson field."""
    common = ["--trainer.precision=64-true", "--averages.every_n_steps=0", "--trainer.val_check_interval=5"]
    one, two = (kills.command(tmp_path / name, objective, 10) + common for name in ("one", "two"))
    assert kills.finish([*two, "--data.init_args.batch_size=16"], ranks=2) == 0
    train.main(one)
    rows = [np.genfromtxt(tmp_path / name / "metrics.csv", delimiter=",", names=True) for name in ("one", "two")]
    for column in ("step", "train_loss", "lr", "grad_norm", "skipped"):
        assert np.allclose(rows[0][column], rows[1][column], rtol=1e-5, equal_nan=True), column
    a, b = (checkpoints.read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    for part in ("state_dict", "current_model_state"):
        for name, value in a[part].items():
            assert torch.allclose(value, b[part][name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("devices", ["-1", "two", "1.5", "0", "[0,1,2]", "99"])
def test_invalid_devices_raise(devices, tmp_path):
    for command in ("fit", "test"):
        with pytest.raises(ValueError, match=r"trainer\.devices = .*; give a number from 1 to"):
            train.main([command, *kills.command(tmp_path, "denoising", 5)[1:], f"--trainer.devices={devices}"])


def test_cpu_devices_are_limited_to_the_cores():
    for devices in (1, "2", "auto"):
        train.check_processes(devices, cores=2)
    for devices in (0, 3, "-1", [0, 1], 1.5):
        with pytest.raises(ValueError, match=r"trainer\.devices = .*: each is a process .* from 1 to 2, its cores"):
            train.check_processes(devices, cores=2)


def test_slurm_jobs_are_not_requeued_by_lightning(tmp_path, monkeypatch):
    """By default Lightning handles SIGUSR1 itself and requeues the job."""
    for name, value in (("NTASKS", "1"), ("JOB_ID", "7"), ("PROCID", "0"), ("LOCALID", "0"), ("NODEID", "0"), ("NNODES", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    plugins = []
    monkeypatch.setattr(
        pl.Trainer, "fit", lambda self, *_, **__: plugins.append(self._accelerator_connector.cluster_environment)
    )
    train.main(kills.command(tmp_path, "denoising", 5))
    assert isinstance(plugins[0], SLURMEnvironment)
    assert not plugins[0].auto_requeue


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "FSDPStrategy"])
def test_strategies_that_shard_weights_raise(strategy, tmp_path):
    with pytest.raises(ValueError, match=rf"trainer\.strategy = .*{strategy}: .* neither averaged .* give ddp"):
        train.main([*kills.command(tmp_path, "denoising", 5), f"--trainer.strategy={strategy}"])
