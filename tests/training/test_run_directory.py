"""Runs that were killed or whose checkpoints are damaged resume, and end as if nothing had happened."""

import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

import pfgm
from benchmarks.faulty import damage, kills
from pfgm.cli import train
from pfgm.files import locking
from pfgm.flow import checkpoints
from pfgm.training import run_directory
from pfgm.training.module import PFGM


@pytest.mark.process
@pytest.mark.parametrize(("objective", "seed"), list(zip(kills.OBJECTIVES, (4, 5), strict=True)))
def test_killed_runs_resume_to_the_same_result(objective, seed, tmp_path):
    counts = kills.chain(tmp_path, objective, kills=1, seed=seed, steps=20)
    assert counts["kills"] == 1
    assert counts["different"] == counts["torn"] == counts["failed"] == counts["unexpected"] == 0


def test_partial_files_of_a_killed_run_are_removed(tmp_path):
    left = [tmp_path / name / ".partial-x" for name in ("checkpoints", "grids", "averages")]
    for path in left:
        path.parent.mkdir()
        path.write_text("")
    run_directory.remove_partial_files(tmp_path)
    assert not any(path.exists() for path in left)
    left[0].write_text("")
    for name in ("grids", "averages"):
        (tmp_path / name).rmdir()
    train.main(kills.command(tmp_path, "denoising", 2))
    assert not left[0].exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *kills.command(tmp_path, "denoising", 4)])
    with locking.lock_folder(tmp_path), pytest.raises(SystemExit) as end:
        train.run()
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"train\.py: error: run_dir = .* is in use by process {os.getpid()} on ", last)
    assert not Path(tmp_path / "checkpoints").exists()


@pytest.mark.process
@pytest.mark.parametrize("harm", damage.HARMS)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_resumed(harm, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    path = checkpoints.checkpoint_path(tmp_path / "run")
    damage.HARMS[harm](path, random.Random(1))
    with pytest.raises(checkpoints.DamagedCheckpointError, match=r"last\.ckpt .*such as .*previous\.ckpt"):
        pfgm.load(path)
    with pytest.raises(checkpoints.DamagedCheckpointError):
        PFGM.load_from_checkpoint(path)
    train.main(kills.command(tmp_path / "run", "denoising", 10))
    messages = capsys.readouterr().err
    assert "last.ckpt" in messages
    assert f"Resuming from {path.with_name('previous.ckpt')} instead" in messages
    assert kills.fingerprint(tmp_path / "run") == kills.fingerprint(run)
    assert path.with_name("damaged.ckpt").exists()


@pytest.mark.process
def test_a_run_with_two_damaged_checkpoints_is_left_alone(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for name in ("last.ckpt", "previous.ckpt"):
        damage.empty(checkpoints.checkpoint_path(tmp_path / "run", name), random.Random(1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        checkpoints.CheckpointError, match=r"run cannot be resumed: .*last\.ckpt is empty.*previous\.ckpt is empty"
    ):
        train.main(kills.command(tmp_path / "run", "denoising", 12))
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.process
def test_a_run_without_its_last_checkpoint_resumes_from_the_previous_one(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoints.checkpoint_path(tmp_path / "run").unlink()
    train.main(kills.command(tmp_path / "run", "denoising", 10))
    assert kills.fingerprint(tmp_path / "run") == kills.fingerprint(run)


@pytest.mark.process
def test_an_unreadable_checkpoint_is_not_renamed(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    for error in (PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), MemoryError()):

        def fail(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "load_torch", fail)
            with pytest.raises(type(error)):
                train.main(kills.command(tmp_path / "run", "denoising", 12))
    assert not checkpoints.checkpoint_path(tmp_path / "run", "damaged.ckpt").exists()
    train.main(kills.command(tmp_path / "run", "denoising", 10))


@pytest.mark.process
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("optimizer_states", r"last\.ckpt holds weights only; give another --run_dir, and --init_from .*last\.ckpt"),
        ("hyper_parameters", r"last\.ckpt is not a checkpoint of this package"),
    ],
)
def test_an_incomplete_checkpoint_is_named(missing, message, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = checkpoints.checkpoint_path(tmp_path / "run")
    checkpoint = checkpoints.read_checkpoint(path)
    del checkpoint[missing]
    own = checkpoint.pop(checkpoints.KEY)
    checkpoints.describe(checkpoint, own["flow"], own["data"])
    checkpoints.write_checkpoint(path, checkpoint)
    with pytest.raises(checkpoints.CheckpointError, match=message):
        train.main(kills.command(tmp_path / "run", "denoising", 12))
