"""Runs and draws that are killed, and folders that only one process writes to. The bench of kills in small."""

import os
import platform
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from benchmarks.faulty import draws, kills
from benchmarks.faulty.forks import forks
from pfgm.cli import train
from pfgm.files import locking
from pfgm.training import run_directory
from pfgm.training.module import PFGM


@pytest.mark.parametrize(("objective", "seed"), list(zip(kills.OBJECTIVES, (4, 5), strict=True)))
def test_killed_runs_go_on_as_if_nothing_had_happened(objective, seed, tmp_path):
    counts = kills.chain(tmp_path, objective, kills=1, seed=seed, steps=20)
    assert counts["kills"] == 1
    assert counts["different"] == counts["torn"] == counts["failed"] == counts["unexpected"] == 0


class Killed(BaseException):
    pass


def test_a_validation_that_was_cut_short_is_repeated_and_no_other(tmp_path, monkeypatch):
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


def hold(folder, ready):
    with locking.lock_folder(folder):
        ready.send("locked")
        time.sleep(60)


def test_one_process_writes_to_a_folder_and_a_dead_one_is_replaced(tmp_path):
    ready, there = forks().Pipe()
    owner = forks().Process(target=hold, args=(tmp_path, there))
    owner.start()
    assert ready.recv() == "locked"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".partial-last-xyz.ckpt").write_text("of the owner, who is writing it")
    with (
        pytest.raises(BlockingIOError, match=rf"run_dir = .* is in use by process {owner.pid} on "),
        locking.lock_folder(tmp_path),
    ):
        pass
    assert list((tmp_path / "checkpoints").iterdir())
    owner.kill()
    owner.join()
    with locking.lock_folder(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".owner").read_text()
        run_directory.clear(tmp_path)
        assert not list((tmp_path / "checkpoints").iterdir())
    (tmp_path / ".owner").write_bytes(b"\xff\0 process")
    with locking.lock_folder(tmp_path):
        pass


def test_a_lock_ends_with_its_block_and_its_owner_is_named_while_it_begins(tmp_path, monkeypatch):
    lock = FileLock(tmp_path / ".lock")
    monkeypatch.setattr(locking, "PATIENCE", 0.1)
    (tmp_path / ".owner").write_text(f"process 999999999 on {platform.node()}, since yesterday")
    lock.acquire(timeout=0)
    (tmp_path / ".owner").unlink()
    with pytest.raises(BlockingIOError, match="in use by another process; wait"), locking.lock_folder(tmp_path):
        pass
    (tmp_path / ".owner").write_text("")
    with pytest.raises(BlockingIOError, match="in use by another process; wait"), locking.lock_folder(tmp_path):
        pass
    lock.release()
    with locking.lock_folder(tmp_path), pytest.raises(Timeout):
        FileLock(tmp_path / ".lock").acquire(timeout=0)
    FileLock(tmp_path / ".lock").acquire(timeout=0)
    assert not (tmp_path / ".owner").exists()


@pytest.mark.parametrize(("number", "patience"), [(999999999, locking.PATIENCE), (os.getpid(), 0)], ids=["dead", "living"])
def test_a_lock_whose_owner_is_dead_is_waited_for_since_its_children_end_soon(number, patience, tmp_path, monkeypatch):
    asked, acquire = [], FileLock.acquire

    def record(self, timeout):
        asked.append(timeout)
        return acquire(self, timeout=0)

    (tmp_path / ".owner").write_text(f"process {number} on {platform.node()}, since yesterday")
    monkeypatch.setattr(FileLock, "acquire", record)
    with locking.lock_folder(tmp_path):
        pass
    assert asked == [patience]
    assert patience < 60


def test_a_folder_whose_owner_cannot_be_written_is_not_locked(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(locking, "atomic_write", fail)
        with pytest.raises(OSError, match="cannot be written: No space left") as error, locking.lock_folder(tmp_path):
            pass
    FileLock(tmp_path / ".lock").acquire(timeout=0)
    assert error.value.__traceback__ is not None  # which holds the lock, so that it is not gone by itself


def test_a_run_clears_what_a_killed_one_left(tmp_path):
    left = [tmp_path / name / ".partial-x" for name in ("checkpoints", "grids", "averages")]
    for path in left:
        path.parent.mkdir()
        path.write_text("")
    run_directory.clear(tmp_path)
    assert not any(path.exists() for path in left)
    left[0].write_text("")
    for name in ("grids", "averages"):
        (tmp_path / name).rmdir()
    train.main(kills.command(tmp_path, "denoising", 2))
    assert not left[0].exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"run_dir = .*file/run cannot be written: Not a directory"),
        locking.lock_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_a_second_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *kills.command(tmp_path, "denoising", 4)])
    with locking.lock_folder(tmp_path), pytest.raises(SystemExit) as end:
        train.run()
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"train\.py: error: run_dir = .* is in use by process {os.getpid()} on ", last)
    assert not Path(tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_test_that_a_signal_stops_ends_with_its_code(number, run, monkeypatch, capsys):
    monkeypatch.setattr(PFGM, "test_step", lambda *_: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["train.py", "test", *kills.command(run, "denoising", 10)[1:]])
    with pytest.raises(SystemExit) as end:
        train.run()
    assert end.value.code == 128 + number
    assert f"stopped by {signal.Signals(number).name}; " in capsys.readouterr().err


def test_killed_draws_go_on_as_if_nothing_had_happened(tmp_path):
    counts = draws.chain(tmp_path / "draws", kills=2, seed=2)
    assert counts["kills"] >= 2
    assert counts["different"] == counts["torn"] == counts["failed"] == 0
