"""Checkpoints and exports are replaced as a whole."""

import os

import pytest

import pfgm
from benchmarks.faulty import draws, hostile
from pfgm.files.untrusted import load_torch
from pfgm.flow import checkpoints


def test_a_last_checkpoint_exists_at_every_moment(tmp_path, monkeypatch):
    last, previous, seen = tmp_path / "last.ckpt", tmp_path / "previous.ckpt", []
    replace = os.replace

    def look(*paths):
        seen.append(last.exists())
        replace(*paths)
        seen.append(last.exists())

    for k in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", look)
            checkpoints.write_checkpoint(last, {"k": k}, previous)
        (tmp_path / ".partial-previous.ckpt").write_text("file of a killed process")
    assert seen == [False, True] + 8 * [True]
    assert [load_torch(path, path) for path in (last, previous)] == [{"k": 3}, {"k": 2}]

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written: No space left on device"):
        checkpoints.write_checkpoint(last, {"k": 4}, previous)
    assert [load_torch(path, path) for path in (last, previous)] == [{"k": 3}, {"k": 2}]


def test_an_export_is_replaced_only_when_both_files_are_written(tmp_path, monkeypatch):
    hostile.flow().save_pretrained(tmp_path / "a")
    before = draws.content(tmp_path / "a")
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"config\.json, .*model\.safetensors cannot be written: .*unchanged"):
        hostile.flow().save_pretrained(tmp_path / "a")
    assert draws.content(tmp_path / "a") == before
    with pytest.raises(OSError, match=r"folder = .*config\.json/b cannot be made: Not a directory\. Choose another"):
        hostile.flow().save_pretrained(tmp_path / "a" / "config.json" / "b")


def test_unreadable_exports_are_not_called_damaged(tmp_path, monkeypatch):
    hostile.flow().save_pretrained(tmp_path / "a")

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints, "check_safetensors", fail)
    with pytest.raises(PermissionError):
        pfgm.load(tmp_path / "a")
