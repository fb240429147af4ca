"""When checkpoints are saved, that they hold finite weights, and how signals end a run."""

import contextlib
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import pfgm
from benchmarks.faulty import kills
from pfgm.cli import train
from pfgm.flow import checkpoints
from pfgm.training.checkpointing import LastCheckpoint, Stopped
from pfgm.training.module import PFGM
from pfgm.training.nonfinite import NonFiniteLoss
from tests.helpers import full_disk


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_save_the_step_in_progress_and_set_the_exit_code(number, tmp_path):
    arguments = [*kills.command(tmp_path, "denoising", 100_000), "--checkpoint.every_n_steps=100000"]
    arguments += ["--trainer.val_check_interval=100000", "--averages.every_n_steps=0"]
    process = kills.start(arguments)
    while process.is_alive() and kills.reached(tmp_path) < 20:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number
    assert checkpoints.read_checkpoint(checkpoints.checkpoint_path(tmp_path))["global_step"] == kills.reached(tmp_path) >= 20
    assert not list(tmp_path.glob(".owner"))


@pytest.mark.filterwarnings("ignore:.* steps were skipped so far")
def test_ruined_weights_replace_no_checkpoint(tmp_path):
    run = [*kills.command(tmp_path, "denoising", 40), "--model.lr=1e38", "--model.warmup_steps=0"]
    with pytest.raises(
        NonFiniteLoss, match=r"At step \d+ sample .*The last checkpoint precedes these steps and is kept.* --run_dir"
    ):
        train.main(run)
    for path in (tmp_path / "checkpoints").iterdir():
        assert all(bool(torch.isfinite(p).all()) for p in pfgm.load(path, ema=False).parameters())


@pytest.mark.filterwarnings("ignore:.* steps were skipped so far")
@pytest.mark.process
def test_saving_waits_for_a_finite_step(tmp_path, monkeypatch):
    """A signal keeps the earlier checkpoint, from which the same command resumes to the same end."""
    whole, seen = PFGM._loss, []

    def bad(self, batch, stream):
        if self.global_step == 12 and stop:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(checkpoints.read_checkpoint(checkpoints.checkpoint_path(run))["global_step"])
        return whole(self, batch, stream) * (torch.nan if 8 <= batch.step < 13 else 1)

    monkeypatch.setattr(PFGM, "_loss", bad)
    for name, stops in (("whole", (False,)), ("run", (True, False))):
        for stop in stops:
            run = tmp_path / name
            seen.clear()
            with pytest.raises(Stopped, match="after step 5") if stop else contextlib.nullcontext():
                train.main([*kills.command(run, "denoising", 20), "--trainer.val_check_interval=100"])
            if stop:
                assert set(seen[-5:]) == {5}
            elif name == "whole":
                assert [seen[k] for k in (5, 9, 12, 13, 14, 15, 16)] == [5, 5, 5, 5, 14, 15, 15]
    assert kills.fingerprint(tmp_path / "whole") == kills.fingerprint(tmp_path / "run")


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """This holds even right after a step with a finite loss."""
    start = LastCheckpoint.on_train_batch_start

    def ruin(self, trainer, module, *args):
        if trainer.global_step == 7:
            next(module.parameters()).data.view(-1)[0] = torch.inf
        start(self, trainer, module, *args)

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_start", ruin)
    with pytest.raises(NonFiniteLoss, match="weights are not finite any more at step 7"):
        train.main([*kills.command(tmp_path, "denoising", 20), "--checkpoint.every_n_steps=1"])
    assert checkpoints.read_checkpoint(checkpoints.checkpoint_path(tmp_path))["global_step"] == 6


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.* steps were skipped so far")
def test_training_stops_after_32_steps_without_a_finite_loss(tmp_path, monkeypatch):
    whole = PFGM._loss
    monkeypatch.setattr(PFGM, "_loss", lambda self, batch, stream: whole(self, batch, stream) * torch.nan)
    with pytest.raises(NonFiniteLoss, match="in the last 32 steps, to step 31,"):
        train.main([*kills.command(tmp_path, "denoising", 50), "--trainer.val_check_interval=100"])


def signals_in_step_3(monkeypatch, number):
    """Send SIGINT `number` times within a step, and return the list of steps reached after each signal."""
    whole, after = PFGM._loss, []

    def loss(self, batch, stream):
        for _ in range(number if batch.step == 3 else 0):
            os.kill(os.getpid(), signal.SIGINT)
            after.append(self.global_step)
        return whole(self, batch, stream)

    monkeypatch.setattr(PFGM, "_loss", loss)
    return after


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, monkeypatch, capsys):
    after = signals_in_step_3(monkeypatch, 2)
    monkeypatch.setattr(sys, "argv", ["train.py", *kills.command(tmp_path, "denoising", 20)])
    with pytest.raises(SystemExit, match="130"):
        train.run()
    assert after == [3]
    assert "stopped by SIGINT; files are whole" in capsys.readouterr().err
    assert checkpoints.read_checkpoint(checkpoints.checkpoint_path(tmp_path))["global_step"] == 0


def test_an_ignored_signal_does_not_stop_a_run(tmp_path, monkeypatch):
    after = signals_in_step_3(monkeypatch, 2)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train.main(kills.command(tmp_path, "denoising", 8))
    finally:
        signal.signal(signal.SIGINT, before)
    assert after == [3, 3]
    assert checkpoints.read_checkpoint(checkpoints.checkpoint_path(tmp_path))["global_step"] == 8


def test_a_run_in_a_thread_installs_no_signal_handlers(tmp_path):
    with ThreadPoolExecutor() as pool:
        pool.submit(train.main, kills.command(tmp_path, "denoising", 8)).result()
    assert checkpoints.read_checkpoint(checkpoints.checkpoint_path(tmp_path))["global_step"] == 8


def test_only_the_first_rank_exits_with_the_code_of_the_signal():
    """Lightning kills all processes as soon as one that it started exits with another code than 0."""
    checkpoint = LastCheckpoint()
    checkpoint.saved = (4, False)
    codes = [checkpoint._stopped(SimpleNamespace(is_global_zero=first), signal.SIGUSR1).code for first in (True, False)]
    assert codes == [138, 0]


class Killed(BaseException):
    pass


@pytest.mark.process
def test_only_an_interrupted_validation_is_repeated(tmp_path, monkeypatch):
    def die(*_):
        raise Killed

    whole, run = tmp_path / "whole", tmp_path / "run"
    train.main(kills.command(whole, "denoising", 24))
    with monkeypatch.context() as patch:
        patch.setattr(PFGM, "validation_step", die)
        with pytest.raises(Killed):
            train.main(kills.command(run, "denoising", 20))
    assert kills.reached(run) == 15
    train.main(kills.command(run, "denoising", 20))
    train.main(kills.command(run, "denoising", 24))
    assert kills.fingerprint(run) == kills.fingerprint(whole)


@pytest.mark.process
def test_a_full_disk_leaves_the_old_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = checkpoints.checkpoint_path(tmp_path / "run")
    names, before = sorted(path.parent.iterdir()), path.read_bytes()
    with (
        full_disk(20_000),
        pytest.raises(OSError, match=r"last\.ckpt cannot be written: .*is unchanged; make room"),
    ):
        train.main(kills.command(tmp_path / "run", "denoising", 12))
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == names
    train.main(kills.command(tmp_path / "run", "denoising", 12))
    assert checkpoints.read_checkpoint(path)["global_step"] == 12


def test_a_signal_during_the_agreement_of_ranks_counts_next_time():
    """Otherwise one rank would stop while the others wait for it."""
    callback = LastCheckpoint()

    class Strategy:
        def reduce_boolean_decision(self, decision, all):
            callback.signal = signal.SIGUSR1
            return decision

    class Trainer:
        world_size, strategy = 2, Strategy()

    assert [callback._agreed_signal(Trainer()) for _ in range(2)] == [0, signal.SIGUSR1]
    callback.signal = 0
    Strategy.reduce_boolean_decision = lambda *_, **__: True
    assert callback._agreed_signal(Trainer()) == signal.SIGTERM


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_evaluation_stopped_by_a_signal_exits_with_its_code(number, run, monkeypatch, capsys):
    monkeypatch.setattr(PFGM, "test_step", lambda *_: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["train.py", "test", *kills.command(run, "denoising", 10)[1:]])
    with pytest.raises(SystemExit) as end:
        train.run()
    assert end.value.code == 128 + number
    assert f"stopped by {signal.Signals(number).name}; " in capsys.readouterr().err
