"""Locks of folders: one process writes, and its death frees the folder."""

import os
import platform
import time

import pytest
from filelock import FileLock, Timeout

from benchmarks.faulty.forks import forks
from pfgm.files import locking
from pfgm.files.atomic import clear_partial


def _hold(folder, ready):
    with locking.lock_folder(folder):
        ready.send("locked")
        time.sleep(60)


@pytest.mark.process
def test_one_process_locks_a_folder_until_it_dies(tmp_path):
    ready, there = forks().Pipe()
    owner = forks().Process(target=_hold, args=(tmp_path, there))
    owner.start()
    assert ready.recv() == "locked"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".partial-last-xyz.ckpt").write_text("unfinished file of the owner")
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
        clear_partial(tmp_path / "checkpoints")
        assert not list((tmp_path / "checkpoints").iterdir())
    (tmp_path / ".owner").write_bytes(b"\xff\0 process")
    with locking.lock_folder(tmp_path):
        pass


def test_a_lock_ends_with_its_block(tmp_path, monkeypatch):
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
def test_the_lock_of_a_dead_owner_is_waited_for(number, patience, tmp_path, monkeypatch):
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


def test_a_folder_on_a_full_disk_is_not_left_locked(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(locking, "atomic_write", fail)
        with pytest.raises(OSError, match="cannot be written: No space left") as error, locking.lock_folder(tmp_path):
            pass
    FileLock(tmp_path / ".lock").acquire(timeout=0)
    assert error.value.__traceback__ is not None  # which holds the lock, so that it is not gone by itself


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"run_dir = .*file/run cannot be written: Not a directory"),
        locking.lock_folder(tmp_path / "file" / "run"),
    ):
        pass
