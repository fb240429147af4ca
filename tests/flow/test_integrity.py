"""Damaged and missing files, full disks: what was there stays, and what is damaged is named."""

import os
import random
import shutil

import pytest
import torch

import pfgm
from benchmarks.faulty import damage, draws, hostile, kills
from pfgm.cli import outputs, train
from pfgm.evaluation import plots
from pfgm.files.atomic import atomic_write
from pfgm.files.untrusted import load_torch
from pfgm.flow import checkpoints
from pfgm.flow.integrity import DamagedError, verify_digest
from pfgm.training import run_directory
from pfgm.training.module import PFGM
from tests.helpers import full_disk


@pytest.mark.parametrize("harm", damage.HARMS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_resumed(harm, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    path = run_directory.checkpoint_path(tmp_path / "run")
    damage.HARMS[harm](path, random.Random(1))
    with pytest.raises(checkpoints.DamagedCheckpointError, match=r"last\.ckpt .*such as .*previous\.ckpt"):
        pfgm.load(path)
    with pytest.raises(checkpoints.DamagedCheckpointError):
        PFGM.load_from_checkpoint(path)
    train.main(kills.command(tmp_path / "run", "denoising", 10))
    told = capsys.readouterr().err
    assert "last.ckpt" in told
    assert f"Resuming from {path.with_name('previous.ckpt')} instead" in told
    assert kills.fingerprint(tmp_path / "run") == kills.fingerprint(run)
    assert path.with_name("damaged.ckpt").exists()


def test_each_byte_of_a_large_file_counts(tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoints.write_checkpoint(path, {"x": torch.zeros(2**20)})
    whole = path.read_bytes()
    for place in (0, 2**20 + 1, 2**21 + 7, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedError):
            verify_digest(path)
    path.write_bytes(whole)
    verify_digest(path)


def test_two_damaged_checkpoints_are_no_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for name in ("last.ckpt", "previous.ckpt"):
        damage.empty(run_directory.checkpoint_path(tmp_path / "run", name), random.Random(1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        checkpoints.CheckpointError, match=r"run cannot be resumed: .*last\.ckpt is empty.*previous\.ckpt is empty"
    ):
        train.main(kills.command(tmp_path / "run", "denoising", 12))
    assert before == {path: path.read_bytes() for path in before}


def test_a_missing_checkpoint_is_replaced_by_the_one_before(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    run_directory.checkpoint_path(tmp_path / "run").unlink()
    train.main(kills.command(tmp_path / "run", "denoising", 10))
    assert kills.fingerprint(tmp_path / "run") == kills.fingerprint(run)


def test_bits_flipped_anywhere_are_seen(run, tmp_path):
    counts = damage.trial(run_directory.checkpoint_path(run), tmp_path, tries=60, seed=2)
    assert counts == {"tried": 60, "named": 60}


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    for error in (PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), MemoryError()):

        def fail(path, place, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "load_torch", fail)
            with pytest.raises(type(error)):
                train.main(kills.command(tmp_path / "run", "denoising", 12))
    assert not run_directory.checkpoint_path(tmp_path / "run", "damaged.ckpt").exists()
    train.main(kills.command(tmp_path / "run", "denoising", 10))


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("optimizer_states", r"last\.ckpt holds weights only; give another --run_dir, and --init_from .*last\.ckpt"),
        ("hyper_parameters", r"last\.ckpt is not a checkpoint of this package"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_named(left_out, message, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = run_directory.checkpoint_path(tmp_path / "run")
    checkpoint = checkpoints.read_checkpoint(path)
    del checkpoint[left_out]
    own = checkpoint.pop(checkpoints.KEY)
    checkpoints.describe(checkpoint, own["flow"], own["data"])
    checkpoints.write_checkpoint(path, checkpoint)
    with pytest.raises(checkpoints.CheckpointError, match=message):
        train.main(kills.command(tmp_path / "run", "denoising", 12))


def test_there_is_a_last_checkpoint_at_each_moment(tmp_path, monkeypatch):
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
        (tmp_path / ".partial-previous.ckpt").write_text("of a killed process")
    assert seen == [False, True] + 8 * [True]
    assert [load_torch(path, path) for path in (last, previous)] == [{"k": 3}, {"k": 2}]

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written: No space left on device"):
        checkpoints.write_checkpoint(last, {"k": 4}, previous)
    assert [load_torch(path, path) for path in (last, previous)] == [{"k": 3}, {"k": 2}]


def test_an_export_is_replaced_when_both_its_files_are_written(tmp_path, monkeypatch):
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
    with pytest.raises(OSError, match=r"folder = .*config\.json/b cannot be made: Not a directory; give another"):
        hostile.flow().save_pretrained(tmp_path / "a" / "config.json" / "b")


def test_exports_that_cannot_be_read_now_are_not_called_damaged(tmp_path, monkeypatch):
    hostile.flow().save_pretrained(tmp_path / "a")

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints, "check_safetensors", fail)
    with pytest.raises(PermissionError):
        pfgm.load(tmp_path / "a")


def test_a_full_disk_leaves_what_was_there_and_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = run_directory.checkpoint_path(tmp_path / "run")
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


WRITERS = {
    "a.ckpt": lambda path: checkpoints.write_checkpoint(path, {"x": torch.zeros(10_000)}),
    "a.safetensors": lambda path: checkpoints.write_tensors(path, {"x": torch.zeros(10_000)}, {}),
    "a.npz": lambda path: outputs.save_arrays(path, {"x": torch.zeros(10_000)}),
    "a.pt": lambda path: outputs.save_arrays(path, {"x": torch.zeros(10_000)}),
    "a.png": lambda path: plots.save_grid(path, torch.rand(16, 3, 40, 40)),
    "a.gif": lambda path: plots.save_animation(path, *torch.rand(2, 3, 4, 1, 32, 32)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_writer_is_whole_or_leaves_the_old_file(name, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    with full_disk(2_000), pytest.raises(OSError, match=rf"{name} cannot be written: .*unchanged; make room, or change folder"):
        WRITERS[name](path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    before = os.umask(0o027)
    try:
        WRITERS[name](path)
    finally:
        os.umask(before)
    assert path.stat().st_size > 2_000
    assert path.stat().st_mode & 0o777 == 0o640


def test_content_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replaced"), replace(*paths)))
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("new")
        inode = temporary.stat().st_ino
    assert done == [inode, "replaced", tmp_path.stat().st_ino]
