"""Nothing lost: runs that are killed, stopped and resumed; checkpoints that are damaged; disks that are full."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faulty import kills
from pfgm import rundir, storage


@pytest.mark.parametrize("objective", kills.OBJECTIVES)
def test_killed_runs_go_on_as_if_nothing_had_happened(objective, tmp_path):
    counts = kills.chain(tmp_path, objective, kills=6, seed=1)
    assert counts["kills"] == 6
    assert counts["different"] == counts["torn"] == counts["failed"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_save_the_step_in_progress_and_end_with_a_code_of_their_own(number, tmp_path):
    arguments = [*kills.command(tmp_path, "denoising", 100_000), "--checkpoint.every_n_steps=100000"]
    arguments += ["--trainer.val_check_interval=100000", "--averages.every_n_steps=0"]
    process = kills.start(arguments)
    while process.is_alive() and kills.reached(tmp_path) < 20:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number
    assert storage.read_checkpoint(rundir.checkpoint_path(tmp_path))["global_step"] == kills.reached(tmp_path) >= 20
    assert not list(tmp_path.glob(".owner"))


HOLD = """
import sys, time
from pfgm.rundir import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_writes_to_a_folder_and_a_dead_one_is_replaced(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".partial-last-xyz.ckpt").write_text("of the owner, who is writing it")
    with pytest.raises(BlockingIOError, match=rf"run_dir = .* is in use by process {owner.pid} on "), rundir.held(tmp_path):
        pass
    assert list((tmp_path / "checkpoints").iterdir())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    with rundir.held(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".owner").read_text()
        assert not list((tmp_path / "checkpoints").iterdir())
    with rundir.held(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"run_dir = .*file/run cannot be written: Not a directory"),
        rundir.held(tmp_path / "file" / "run"),
    ):
        pass


def test_a_second_run_is_refused(tmp_path):
    with rundir.held(tmp_path):
        process = subprocess.run(
            [sys.executable, str(kills.ROOT / "train.py"), *kills.command(tmp_path, "denoising", 4)],
            capture_output=True,
            text=True,
        )
    assert process.returncode == 2
    assert f"is in use by process {os.getpid()}" in process.stderr
    assert "Traceback" not in process.stderr
    assert not Path(tmp_path / "checkpoints").exists()
