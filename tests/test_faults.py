"""Nothing lost, nothing let in: killed runs, damaged checkpoints, full disks, files of strangers. The bench in small."""

import contextlib
import csv
import gc
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

import pfgm
from benchmarks.faulty import damage, draws, hostile, hostile_data, hostile_models, inputs, kills, lines, strangers
from benchmarks.faulty.forks import forks
from pfgm import cli, commands, draw, output, plot, rundir, shell, storage
from pfgm.atomic import DamagedError, check_stamp, replacing
from pfgm.intake import load_torch
from pfgm.kernel import StudentTKernel
from pfgm.module import PFGM
from pfgm.ode import SolverError
from pfgm.runlog import RunLog, read_rows
from pfgm.sampler import Sampler
from pfgm.skips import NonFiniteLoss
from pfgm.typed import ArgumentTypeError, checked


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
    cli.main(kills.command(whole, "denoising", 24))
    with monkeypatch.context() as patch:
        patch.setattr(PFGM, "validation_step", die)
        with pytest.raises(Killed):
            cli.main(kills.command(run, "denoising", 20))
    assert kills.reached(run) == 15
    cli.main(kills.command(run, "denoising", 20))
    cli.main(kills.command(run, "denoising", 24))
    assert kills.fingerprint(run) == kills.fingerprint(whole)


def hold(folder, ready):
    with rundir.held(folder):
        ready.send("held")
        time.sleep(60)


def test_one_process_writes_to_a_folder_and_a_dead_one_is_replaced(tmp_path):
    ready, there = forks().Pipe()
    owner = forks().Process(target=hold, args=(tmp_path, there))
    owner.start()
    assert ready.recv() == "held"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".partial-last-xyz.ckpt").write_text("of the owner, who is writing it")
    with pytest.raises(BlockingIOError, match=rf"run_dir = .* is in use by process {owner.pid} on "), rundir.held(tmp_path):
        pass
    assert list((tmp_path / "checkpoints").iterdir())
    owner.kill()
    owner.join()
    with rundir.held(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".owner").read_text()
        rundir.clear(tmp_path)
        assert not list((tmp_path / "checkpoints").iterdir())
    (tmp_path / ".owner").write_bytes(b"\xff\0 process")
    with rundir.held(tmp_path):
        pass


def test_a_lock_ends_with_its_block_and_its_owner_is_named_while_it_begins(tmp_path, monkeypatch):
    lock = FileLock(tmp_path / ".lock")
    monkeypatch.setattr(rundir, "PATIENCE", 0.1)
    (tmp_path / ".owner").write_text(f"process 999999999 on {platform.node()}, since yesterday")
    lock.acquire(timeout=0)
    (tmp_path / ".owner").unlink()
    with pytest.raises(BlockingIOError, match="in use by another process; wait"), rundir.held(tmp_path):
        pass
    (tmp_path / ".owner").write_text("")
    with pytest.raises(BlockingIOError, match="in use by another process; wait"), rundir.held(tmp_path):
        pass
    lock.release()
    with rundir.held(tmp_path), pytest.raises(Timeout):
        FileLock(tmp_path / ".lock").acquire(timeout=0)
    FileLock(tmp_path / ".lock").acquire(timeout=0)
    assert not (tmp_path / ".owner").exists()


@pytest.mark.parametrize(("number", "patience"), [(999999999, rundir.PATIENCE), (os.getpid(), 0)], ids=["dead", "living"])
def test_a_lock_whose_owner_is_dead_is_waited_for_since_its_children_end_soon(number, patience, tmp_path, monkeypatch):
    asked, acquire = [], FileLock.acquire

    def record(self, timeout):
        asked.append(timeout)
        return acquire(self, timeout=0)

    (tmp_path / ".owner").write_text(f"process {number} on {platform.node()}, since yesterday")
    monkeypatch.setattr(FileLock, "acquire", record)
    with rundir.held(tmp_path):
        pass
    assert asked == [patience]
    assert patience < 60


def test_a_folder_whose_owner_cannot_be_written_is_not_locked(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "replacing", fail)
        with pytest.raises(OSError, match="cannot be written: No space left") as error, rundir.held(tmp_path):
            pass
    FileLock(tmp_path / ".lock").acquire(timeout=0)
    assert error.value.__traceback__ is not None  # which holds the lock, so that it is not gone by itself


def test_a_run_clears_what_a_killed_one_left(tmp_path):
    left = [tmp_path / name / ".partial-x" for name in ("checkpoints", "grids", "averages")]
    for path in left:
        path.parent.mkdir()
        path.write_text("")
    rundir.clear(tmp_path)
    assert not any(path.exists() for path in left)
    left[0].write_text("")
    for name in ("grids", "averages"):
        (tmp_path / name).rmdir()
    cli.main(kills.command(tmp_path, "denoising", 2))
    assert not left[0].exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"run_dir = .*file/run cannot be written: Not a directory"),
        rundir.held(tmp_path / "file" / "run"),
    ):
        pass


def test_a_second_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *kills.command(tmp_path, "denoising", 4)])
    with rundir.held(tmp_path), pytest.raises(SystemExit) as end:
        cli.run()
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"train\.py: error: run_dir = .* is in use by process {os.getpid()} on ", last)
    assert not Path(tmp_path / "checkpoints").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ten steps with checkpoints of its steps 5 and 10."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert kills.finish(kills.command(folder, "denoising", 10)) == 0
    return folder


@pytest.mark.parametrize("harm", damage.HARMS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_resumed(harm, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    path = rundir.checkpoint_path(tmp_path / "run")
    damage.HARMS[harm](path, random.Random(1))
    with pytest.raises(storage.DamagedCheckpointError, match=r"last\.ckpt .*such as .*previous\.ckpt"):
        pfgm.load(path)
    with pytest.raises(storage.DamagedCheckpointError):
        PFGM.load_from_checkpoint(path)
    cli.main(kills.command(tmp_path / "run", "denoising", 10))
    told = capsys.readouterr().err
    assert "last.ckpt" in told
    assert f"Resuming from {path.with_name('previous.ckpt')} instead" in told
    assert kills.fingerprint(tmp_path / "run") == kills.fingerprint(run)
    assert path.with_name("damaged.ckpt").exists()


def test_each_byte_of_a_large_file_counts(tmp_path):
    path = tmp_path / "a.ckpt"
    storage.write_checkpoint(path, {"x": torch.zeros(2**20)})
    whole = path.read_bytes()
    for place in (0, 2**20 + 1, 2**21 + 7, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedError):
            check_stamp(path)
    path.write_bytes(whole)
    check_stamp(path)


def test_two_damaged_checkpoints_are_no_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for name in ("last.ckpt", "previous.ckpt"):
        damage.empty(rundir.checkpoint_path(tmp_path / "run", name), random.Random(1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(storage.CheckpointError, match=r"run cannot be resumed: .*last\.ckpt is empty.*previous\.ckpt is empty"):
        cli.main(kills.command(tmp_path / "run", "denoising", 12))
    assert before == {path: path.read_bytes() for path in before}


def test_a_missing_checkpoint_is_replaced_by_the_one_before(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    rundir.checkpoint_path(tmp_path / "run").unlink()
    cli.main(kills.command(tmp_path / "run", "denoising", 10))
    assert kills.fingerprint(tmp_path / "run") == kills.fingerprint(run)


def test_bits_flipped_anywhere_are_seen(run, tmp_path):
    counts = damage.trial(rundir.checkpoint_path(run), tmp_path, tries=60, seed=2)
    assert counts == {"tried": 60, "named": 60}


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    for error in (PermissionError(13, "Permission denied"), OSError(5, "Input/output error"), MemoryError()):

        def fail(path, place, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(storage, "load_torch", fail)
            with pytest.raises(type(error)):
                cli.main(kills.command(tmp_path / "run", "denoising", 12))
    assert not rundir.checkpoint_path(tmp_path / "run", "damaged.ckpt").exists()
    cli.main(kills.command(tmp_path / "run", "denoising", 10))


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("optimizer_states", r"last\.ckpt holds weights only; give another --run_dir, and --init_from .*last\.ckpt"),
        ("hyper_parameters", r"last\.ckpt is not a checkpoint of this package"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_named(left_out, message, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = rundir.checkpoint_path(tmp_path / "run")
    checkpoint = storage.read_checkpoint(path)
    del checkpoint[left_out]
    own = checkpoint.pop(storage.KEY)
    storage.seal(checkpoint, own["flow"], own["data"])
    storage.write_checkpoint(path, checkpoint)
    with pytest.raises(storage.CheckpointError, match=message):
        cli.main(kills.command(tmp_path / "run", "denoising", 12))


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
            storage.write_checkpoint(last, {"k": k}, previous)
        (tmp_path / ".partial-previous.ckpt").write_text("of a killed process")
    assert seen == [False, True] + 8 * [True]
    assert [load_torch(path, path) for path in (last, previous)] == [{"k": 3}, {"k": 2}]

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written: No space left on device"):
        storage.write_checkpoint(last, {"k": 4}, previous)
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

    monkeypatch.setattr(storage, "check_safetensors", fail)
    with pytest.raises(PermissionError):
        pfgm.load(tmp_path / "a")


@contextlib.contextmanager
def full_disk(size):
    """No file of this process can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there_and_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = rundir.checkpoint_path(tmp_path / "run")
    names, before = sorted(path.parent.iterdir()), path.read_bytes()
    with (
        full_disk(20_000),
        pytest.raises(OSError, match=r"last\.ckpt cannot be written: .*is unchanged; make room"),
    ):
        cli.main(kills.command(tmp_path / "run", "denoising", 12))
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == names
    cli.main(kills.command(tmp_path / "run", "denoising", 12))
    assert storage.read_checkpoint(path)["global_step"] == 12


WRITERS = {
    "a.ckpt": lambda path: storage.write_checkpoint(path, {"x": torch.zeros(10_000)}),
    "a.safetensors": lambda path: storage.write_tensors(path, {"x": torch.zeros(10_000)}, {}),
    "a.npz": lambda path: output.save_arrays(path, {"x": torch.zeros(10_000)}),
    "a.pt": lambda path: output.save_arrays(path, {"x": torch.zeros(10_000)}),
    "a.png": lambda path: plot.save_grid(path, torch.rand(16, 3, 40, 40)),
    "a.gif": lambda path: plot.save_animation(path, *torch.rand(2, 3, 4, 1, 32, 32)),
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
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        inode = temporary.stat().st_ino
    assert done == [inode, "replaced", tmp_path.stat().st_ino]


def test_pictures_leave_no_figures_in_memory(tmp_path):
    from matplotlib.figure import Figure

    RunLog(tmp_path).log_metrics({"train_loss": 0.5}, 1)
    states = torch.rand(3, 4, 2)
    gc.collect()
    for _ in range(3):
        plot.save_loss_curve(tmp_path / "loss.png", tmp_path / "metrics.csv")
        plot.save_scatter(tmp_path / "a.png", states[0])
        plot.save_field_lines(tmp_path / "b.png", states, torch.rand(3, 4), states[0])
        plot.save_animation(tmp_path / "c.gif", states, states)
    assert not [thing for thing in gc.get_objects() if type(thing) is Figure]
    assert gc.isenabled()


def test_the_log_keeps_its_rows_on_a_full_disk_and_drops_torn_ones(tmp_path):
    log = RunLog(tmp_path)
    log.log_metrics({"train_loss": 0.5}, 1)
    before = log.path.read_bytes()
    with full_disk(len(before) + 5), pytest.raises(OSError, match=r"metrics\.csv cannot be written: .*make room"):
        log.log_metrics({"train_loss": 0.25}, 2)
    assert log.path.read_bytes() == before
    log.path.write_bytes(before + bytes(200_000) + b"\n2,0.2\n3,abc,,,,\n4,0.125,,,,\n5,0.1,,,,,,7\n\0\0\0")
    with pytest.warns(UserWarning, match="5 of 7 rows are damaged and left out"):
        RunLog(tmp_path).log_metrics({"train_loss": 0.0625}, 9)
    with log.path.open(newline="") as file:
        assert [(row["step"], row["train_loss"]) for row in csv.DictReader(file)] == [
            ("1", "0.5"),
            ("4", "0.125"),
            ("9", "0.0625"),
        ]


@pytest.mark.parametrize("header", ["qtep,train_loss,lr", "1,0.5,0.1"])
def test_a_log_whose_header_is_lost_is_kept_aside(header, tmp_path):
    (tmp_path / "metrics.csv").write_text(f"{header}\n1,0.5,0.1\n2,0.25,0.1\n")
    with pytest.warns(UserWarning, match="damaged"):
        RunLog(tmp_path).log_metrics({"train_loss": 0.125}, 3)
    assert (tmp_path / "metrics.damaged.csv").read_text().endswith("2,0.25,0.1\n")
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == ["3,0.125,,,,"]


def test_short_rows_are_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("train_loss,step\n0.5,1\n0.25\n")
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert read_rows(tmp_path / "metrics.csv")[1] == [{"train_loss": "0.5", "step": "1"}]


def kill_by(number):
    def command(words):
        os.kill(os.getpid(), number)
        time.sleep(10)

    return command


def fail(error):
    def command(words):
        raise error

    return command


ENDS = [
    (fail(ValueError("n = 0: give more")), 2, r"x\.py: error: n = 0: give more"),
    (fail(OSError(28, "No space left on device", "a.npz")), 2, r"x\.py: error: .*No space left on device: 'a\.npz'"),
    (fail(NonFiniteLoss("at step 3")), 2, r"x\.py: error: at step 3"),
    (fail(shell.LostProcess("another process ended")), 75, r"x\.py: another process ended"),
    (kill_by(signal.SIGINT), 130, r"stopped by SIGINT; .* the same command continues .*"),
    (kill_by(signal.SIGTERM), 143, r"stopped by SIGTERM; .* the same command continues .*"),
    (fail(ZeroDivisionError("division")), 1, r"x\.py: ZeroDivisionError: division\. This is a defect of pfgm: .*--debug"),
]


@pytest.mark.parametrize(("command", "code", "text"), ENDS)
def test_commands_end_with_one_line_and_a_code(command, code, text, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        shell.run("x.py", command, ["a"], (NonFiniteLoss,))
    assert end.value.code == code
    assert re.fullmatch(text, capsys.readouterr().err.strip())
    assert signal.getsignal(signal.SIGTERM) == before != shell.end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_test_that_a_signal_stops_ends_with_its_code(number, run, monkeypatch, capsys):
    monkeypatch.setattr(PFGM, "test_step", lambda *_: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["train.py", "test", *kills.command(run, "denoising", 10)[1:]])
    with pytest.raises(SystemExit) as end:
        cli.run()
    assert end.value.code == 128 + number
    assert f"stopped by {signal.Signals(number).name}; " in capsys.readouterr().err


def test_signals_that_are_ignored_stay_so_and_threads_hear_none():
    """As those of a job in the background of a script."""
    before, done = signal.signal(signal.SIGINT, signal.SIG_IGN), []

    def command(words):
        os.kill(os.getpid(), signal.SIGINT)
        done.extend(words)

    try:
        shell.run("x.py", command, ["alone"])
        with ThreadPoolExecutor() as pool:
            pool.submit(shell.run, "x.py", command, ["in a thread"]).result()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["alone", "in a thread"]


def test_other_errors_of_a_draw_are_for_the_user(capsys):
    with pytest.raises(SystemExit, match="2"):
        shell.run("x.py", fail(SolverError("too stiff")), [])
    assert capsys.readouterr().err == "x.py: error: too stiff\n"


def test_output_that_goes_nowhere_is_no_defect(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        shell.run("x.py", lambda words: print("a"), [])
        sys.stdout.close()
        sys.stderr.close()
    with Path("/dev/full").open("w", encoding="ascii") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="2"):
            shell.run("x.py", lambda words: print("é"), [])
    assert capsys.readouterr().err == "x.py: done, but its output cannot be written: No space left on device\n"


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_ctrl_c_while_libraries_are_imported_ends_at_once(program):
    process = subprocess.Popen([sys.executable, kills.ROOT / program, "nothing"], stderr=subprocess.PIPE, text=True)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.log_every_n_steps=0"], r"trainer\.log_every_n_steps = 0: give a number >= 1"),
        (["--trainer.limit_train_batches=0"], r"trainer\.limit_train_batches = 0\.0: nothing would be done"),
        (["--trainer.max_epochs=0"], r"trainer\.max_epochs = 0: nothing would be done"),
        (["--trainer.val_check_interval={hours: 1}"], r"trainer\.val_check_interval = .*hours.*: give a number >= 1"),
        (["--seed_everything=-1"], "seed_everything = -1: give a whole number from 0"),
        (["--seed_everything=4294967296"], "seed_everything = 4294967296: give a whole number from 0"),
    ],
)
def test_settings_with_which_nothing_can_be_done_are_named(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cli.main([*kills.command(tmp_path, "denoising", 5), *words])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a:\n\t- b", b"[1, 2]", b"x: [", b"a: &a [*a"])
@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "fit", "--config"],
        ["train.py", "fit", "-c"],
        ["train.py", "features", "--config"],
        ["sample.py", "--config"],
    ],
    ids=" ".join,
)
def test_configurations_that_are_none_are_named(words, content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    program, *rest = [*words, str(path)]
    monkeypatch.setattr(sys, "argv", [program, *rest])
    with pytest.raises(SystemExit, match="2"):
        cli.run() if program == "train.py" else commands.main(rest)
    told = capsys.readouterr().err
    assert re.fullmatch(rf"{program}: error: config = {path} (is no YAML|holds no settings).*\n", told), told


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("train.py", "", 'expected "subcommand" to be one of {fit,test,predict}, but it was not provided.'),
        ("train.py", "fit", 'Parser key "run_dir": Expected a str. Got value: None'),
        ("train.py", "test --run_dir=a --grids.n=1", "unrecognized arguments: --grids.n=1"),
        ("train.py", "advise", "the following arguments are required: path"),
        (
            "train.py",
            "fit --run_dir=a --model.loss=pfgm.loss.PoissonFieldLoss --model.loss.noise=pfgm.noise.PoissonFlowNoise "
            "--model.loss.noise.tau=x",
            'Parser key "model.loss": Problem with given class_path \'pfgm.loss.PoissonFieldLoss\': Parser key "noise": '
            "Problem with given class_path 'pfgm.noise.PoissonFlowNoise': Parser key \"tau\": Expected a float. Got value: x",
        ),
        ("sample.py", "", "the following arguments are required: checkpoint"),
        ("sample.py", "a --n=x", 'Parser key "n": Expected one of [int, NoneType]. Got value: x'),
        ("sample.py", "encode a b --c.npz", "unrecognized arguments: --c.npz"),
        ("sample.py", "a --config", "argument --config: expected one argument"),
    ],
)
def test_what_the_parser_refuses_is_said_in_one_line(program, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, *words.split()])
    with pytest.raises(SystemExit, match="2"):
        cli.run() if program == "train.py" else commands.main()
    assert capsys.readouterr().err == f"{program}: error: {message}\n"


def test_debug_shows_the_traceback_and_is_no_word_of_the_command():
    with pytest.raises(ZeroDivisionError):
        shell.run("x.py", fail(ZeroDivisionError()), ["--debug"])
    given = []
    shell.run("x.py", given.extend, ["a", "--debug", "b"])
    shell.run("x.py", given.extend, ["c"])
    assert given == ["a", "b", "c"]


HOSTILE = [*hostile_models.corpus(), *hostile_data.corpus()]


@pytest.mark.parametrize("file", [f for f in HOSTILE if f.quick][::3], ids=lambda file: file.name)
def test_files_of_strangers_run_no_code_write_nothing_and_take_little_memory(file, tmp_path):
    kind, text, memory = strangers.attempt(file, tmp_path / "a")
    assert kind == "refused" or (kind == "read" and file.harmless), text
    assert memory < 1000


def test_killed_draws_go_on_as_if_nothing_had_happened(tmp_path):
    counts = draws.chain(tmp_path / "draws", kills=2, seed=2)
    assert counts["kills"] >= 2
    assert counts["different"] == counts["torn"] == counts["failed"] == 0


def test_what_no_number_or_word_is_does_not_pass_for_one():
    @checked
    def f(n: int = 0, name: Literal["a", 1] = "a", pair: tuple[float, float] = (0.0, 1.0), x: torch.Tensor | None = None):
        return True

    assert f(3, 1, np.array([1.0, 2.0]), torch.ones(1))
    for bad in ({"n": True}, {"name": True}, {"pair": np.ones(3)}, {"pair": [1.0]}, {"x": torch.ones(1, dtype=torch.cfloat)}):
        with pytest.raises(ArgumentTypeError, match=f"{next(iter(bad))} = .*: give"):
            f(**bad)


@pytest.mark.parametrize("text", ["0-99999999999", "1,5-1", "5-", "-3", "1,,2", ""])
def test_seeds_that_are_none_are_named(text):
    with pytest.raises(ValueError, match=re.escape(f"seeds = {text!r}: give numbers and rising ranges")):
        draw.parse_seeds(text)


def test_no_input_is_written_over_by_another_name(tmp_path):
    (tmp_path / "below").mkdir()
    with pytest.raises(ValueError, match="is also read; choose another name"):
        output.check_other_file(tmp_path / "below" / ".." / "a.npz", tmp_path / "a.npz")


def test_denoisers_return_the_shape_that_they_get():
    for denoiser in (lambda x, sigma: x[:1], lambda x, sigma: None):
        with pytest.raises(SolverError, match=r"denoiser returned .* for x of shape \(3, 4\)"):
            Sampler(denoiser, StudentTKernel(8.0), shape=(4,), sigma_min=0.1, sigma_max=1.0).sample(3)
    with pytest.raises(ValueError, match=r"shape = \(-2,\)"):
        Sampler(lambda x, sigma: x, StudentTKernel(8.0), shape=(-2,), sigma_min=0.1, sigma_max=1.0)


def test_odd_arguments_are_named():
    told = []
    counts = inputs.functions(150, 3, told.append)
    assert counts["tried"] == 150
    assert not told, told
    assert counts["named"] > 75


@pytest.mark.parametrize(
    ("call", "accident"),
    [
        (lambda: draw.parse_seeds("a"), False),
        (lambda: commands.read_config("nowhere"), False),
        (lambda: commands.join_pair(3), True),
        (lambda: np.zeros(-1), True),
    ],
)
def test_errors_that_nobody_raised_for_a_user_are_told_from_others(call, accident):
    with pytest.raises((ValueError, TypeError, OSError)) as error:
        call()
    assert lines.accidental(error.value) == accident


def test_spoiled_command_lines_end_in_one_line(tmp_path):
    told = []
    counts = lines.command_lines(12, 4, tmp_path, told.append)
    assert counts["tried"] == 12
    assert not told, told
    assert counts["named"] > 6
    assert not counts["executed"]
