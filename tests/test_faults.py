"""Nothing lost, nothing let in: killed runs, damaged checkpoints, full disks, files of strangers. The bench in small."""

import contextlib
import csv
import gc
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import pfgm
from benchmarks.faulty import damage, draws, hostile_data, hostile_models, inputs, kills, lines, strangers
from benchmarks.faulty.forks import forks
from pfgm import cli, output, plot, rundir, shell, storage
from pfgm.atomic import replacing
from pfgm.intake import load_torch
from pfgm.module import PFGM
from pfgm.runlog import RunLog
from pfgm.skips import NonFiniteLoss


@pytest.mark.parametrize("objective", kills.OBJECTIVES)
def test_killed_runs_go_on_as_if_nothing_had_happened(objective, tmp_path):
    counts = kills.chain(tmp_path, objective, kills=2, seed=1, steps=30)
    assert counts["kills"] == 2
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
    assert seen == [False, True] + 8 * [True]
    assert [load_torch(path, path) for path in (last, previous)] == [{"k": 3}, {"k": 2}]


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
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_test_that_a_signal_stops_ends_with_its_code(number, run, monkeypatch, capsys):
    monkeypatch.setattr(PFGM, "test_step", lambda *_: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["train.py", "test", *kills.command(run, "denoising", 10)[1:]])
    with pytest.raises(SystemExit) as end:
        cli.run()
    assert end.value.code == 128 + number
    assert f"stopped by {signal.Signals(number).name}; " in capsys.readouterr().err


def test_debug_shows_the_traceback_and_is_no_word_of_the_command():
    with pytest.raises(ZeroDivisionError):
        shell.run("x.py", fail(ZeroDivisionError()), ["--debug"])
    given = []
    shell.run("x.py", given.extend, ["a", "--debug", "b"])
    shell.run("x.py", given.extend, ["c"])
    assert given == ["a", "b", "c"]


HOSTILE = [*hostile_models.corpus(), *hostile_data.corpus()]


@pytest.mark.parametrize("file", [f for f in HOSTILE if f.quick][::2], ids=lambda file: file.name)
def test_files_of_strangers_run_no_code_write_nothing_and_take_little_memory(file, tmp_path):
    kind, text, memory = strangers.attempt(file, tmp_path / "a")
    assert kind == "refused" or (kind == "read" and file.harmless), text
    assert memory < 1000


def test_killed_draws_go_on_as_if_nothing_had_happened(tmp_path):
    counts = draws.chain(tmp_path / "draws", kills=4, seed=2)
    assert counts["kills"] >= 4
    assert counts["different"] == counts["torn"] == counts["failed"] == 0


def test_odd_arguments_are_named():
    told = []
    counts = inputs.functions(250, 3, told.append)
    assert counts["tried"] == 250
    assert not told, told
    assert counts["named"] > 100


def test_spoiled_command_lines_end_in_one_line(tmp_path):
    told = []
    counts = lines.command_lines(25, 4, tmp_path, told.append)
    assert counts["tried"] == 25
    assert not told, told
    assert counts["named"] > 10
    assert not counts["executed"]
