"""Commands end with one line and an exit code, and name words and files that they cannot use."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.faulty import kills
from pfgm.cli import console, main, train
from pfgm.cli.arguments import shipped_configs
from pfgm.core import exits
from pfgm.sampling.ode import SolverError
from pfgm.training.nonfinite import NonFiniteLoss
from tests.helpers import ROOT


def kill_by(number):
    def command(words):
        os.kill(os.getpid(), number)
        time.sleep(10)

    return command


def fail(error):
    def command(words):
        raise error

    return command


NO_CONFIG = "config = none.yaml is neither a file nor a shipped configuration. Pass a path, or one of "
NO_CONFIG += f"{', '.join(sorted(path.stem for path in shipped_configs().glob('*.yaml')))}."
SMALLER = r"Use a smaller batch_size \(.*\), fewer samples, or a smaller network\."
GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")
ENDS = [
    (lambda words: torch.empty(2**60), 2, rf"x\.py: error: out of memory \(tried to allocate {4 * 2**60} bytes\)\. {SMALLER}"),
    (lambda words: torch.empty(2**62), 2, rf"x\.py: error: out of memory\. {SMALLER}"),
    (lambda words: bytearray(2**62), 2, rf"x\.py: error: out of memory\. {SMALLER}"),
    (
        fail(RuntimeError("not enough memory: you tried to allocate 8 bytes.")),
        2,
        rf".*memory \(tried to .* 8 bytes\)\. {SMALLER}",
    ),
    (fail(GPU_FULL), 2, rf"x\.py: error: out of memory \(Tried to allocate 2\.00 GiB\)\. {SMALLER}"),
    (
        fail(OverflowError("int too large")),
        2,
        r"x\.py: error: a number is too large \(int too large\)\. Pass one that fits in 64 bits\.",
    ),
    (fail(RuntimeError("size\n mismatch")), 1, r"x\.py: RuntimeError: size mismatch\. This is a defect of pfgm: .*"),
    (fail(ValueError("n = 0: give more")), 2, r"x\.py: error: n = 0: give more"),
    (fail(OSError(28, "No space left on device", "a.npz")), 2, r"x\.py: error: .*No space left on device: 'a\.npz'"),
    (fail(NonFiniteLoss("at step 3")), 2, r"x\.py: error: at step 3"),
    (fail(exits.LostProcess("another process ended")), 75, r"x\.py: another process ended"),
    (kill_by(signal.SIGINT), 130, r"stopped by SIGINT; .* the same command continues .*"),
    (kill_by(signal.SIGTERM), 143, r"stopped by SIGTERM; .* the same command continues .*"),
    (fail(ZeroDivisionError("division")), 1, r"x\.py: ZeroDivisionError: division\. This is a defect of pfgm: .*--debug"),
]


@pytest.mark.parametrize(("command", "code", "text"), ENDS)
def test_commands_end_with_one_line_and_a_code(command, code, text, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        console.run("x.py", command, ["a"], (NonFiniteLoss,))
    assert end.value.code == code
    assert re.fullmatch(text, capsys.readouterr().err.strip())
    assert signal.getsignal(signal.SIGTERM) == before != exits.exit_for_signal


def test_ignored_signals_stay_ignored_and_threads_set_no_handlers():
    """A shell makes background jobs of a script ignore SIGINT."""
    before, done = signal.signal(signal.SIGINT, signal.SIG_IGN), []

    def command(words):
        os.kill(os.getpid(), signal.SIGINT)
        done.extend(words)

    try:
        console.run("x.py", command, ["alone"])
        with ThreadPoolExecutor() as pool:
            pool.submit(console.run, "x.py", command, ["in a thread"]).result()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["alone", "in a thread"]


def test_solver_errors_are_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        console.run("x.py", fail(SolverError("too stiff")), [])
    assert capsys.readouterr().err == "x.py: error: too stiff\n"


def test_unwritable_output_is_not_reported_as_a_defect(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        console.run("x.py", lambda words: print("a"), [])
        sys.stdout.close()
        sys.stderr.close()
    with Path("/dev/full").open("w", encoding="ascii") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="2"):
            console.run("x.py", lambda words: print("é"), [])
    assert capsys.readouterr().err == "x.py: done, but its output cannot be written: No space left on device\n"


@pytest.mark.process
@pytest.mark.parametrize("program", [["train.py"], ["sample.py"], ["-m", "pfgm", "sample"]], ids=" ".join)
def test_ctrl_c_while_libraries_are_imported_ends_at_once(program):
    process = subprocess.Popen([sys.executable, *program, "nothing"], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.log_every_n_steps=0"], r"trainer\.log_every_n_steps = 0: too small\. Pass a number >= 1"),
        (["--trainer.limit_train_batches=0"], r"trainer\.limit_train_batches = 0\.0 leaves nothing to do"),
        ([f"--trainer.max_steps={10**400}"], r"trainer\.max_steps = 1000+\.\.\.: expected a 64-bit integer"),
        (["--trainer.check_val_every_n_epoch=0"], r"trainer\.check_val_every_n_epoch = 0: too small\. Pass a number >= 1"),
        (["--trainer.num_nodes=0"], r"trainer\.num_nodes = 0: too small\. Pass a number >= 1"),
        ([f"--trainer.num_nodes={10**30}"], r"trainer\.num_nodes = 1000+: expected a 64-bit integer"),
        (["--trainer.max_time={x: 1}"], r"trainer: 'x' is an invalid keyword argument .*\. See pfgm fit --help"),
        (["--trainer.max_epochs=0"], r"trainer\.max_epochs = 0 leaves nothing to do"),
        (
            ["--trainer.val_check_interval={hours: 1}"],
            r"trainer\.val_check_interval = .*hours.*: too small\. Pass a number >= 1",
        ),
        (["--seed_everything=-1"], "seed_everything = -1: expected an integer"),
        (["--seed_everything=4294967296"], "seed_everything = 4294967296: expected an integer"),
    ],
)
def test_unusable_trainer_settings_are_named(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main([*kills.command(tmp_path, "denoising", 5), *words])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("name", "kind"), [("max_steps", "a 64-bit integer"), ("detect_anomaly", "True or False")])
def test_null_trainer_settings_in_a_file_are_named(name, kind, tmp_path):
    (tmp_path / "a.yaml").write_text(f"trainer: {{{name}: null}}")
    with pytest.raises(ValueError, match=rf"trainer\.{name} = None: expected {kind}"):
        train.main([*kills.command(tmp_path / "run", "denoising", 5), f"--config={tmp_path}/a.yaml"])


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"a:\n\t- b", b"[1, 2]", b"x: [", b"a: &a [*a", b"a: &a [*a]", b"n: 1\nn: 2", b""]
)
@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "fit", "--config"],
        ["train.py", "fit", "-c"],
        ["train.py", "features", "--config"],
        ["sample.py", "--config"],
        ["sample.py", "encode", "--config"],
    ],
    ids=" ".join,
)
def test_unreadable_configurations_are_named(words, content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    program, *rest = [*words, str(path)]
    monkeypatch.setattr(sys, "argv", [program, *rest])
    with pytest.raises(SystemExit, match="2"):
        train.run() if program == "train.py" else main.sample(rest)
    told = capsys.readouterr().err
    assert re.fullmatch(
        rf"{program}: error: config = {path} (is not valid YAML: .* Correct the file\.|holds a \w+, not settings\. .*)\n", told
    ), told


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("train.py", "", 'expected "subcommand" to be one of {fit,test}, but it was not provided.'),
        ("train.py", "fit", 'Parser key "run_dir": Expected a str. Got value: None'),
        ("train.py", "test --run_dir=a --grids.n=1", "unrecognized arguments: --grids.n=1"),
        ("train.py", "advise", "the following arguments are required: path"),
        (
            "train.py",
            "fit --run_dir=a --model.loss=pfgm.training.PoissonFieldLoss --model.loss.noise=pfgm.training.PoissonFlowNoise "
            "--model.loss.noise.tau=x",
            'Parser key "model.loss": Problem with given class_path \'pfgm.training.PoissonFieldLoss\': Parser key "noise": '
            "Problem with given class_path 'pfgm.training.PoissonFlowNoise': "
            'Parser key "tau": Expected a float. Got value: x',
        ),
        (
            "train.py",
            "fit --run_dir=a --data.class_path=pfgm.data.Toy --data.colour=1",
            "Parser key \"data\": Problem with given class_path 'pfgm.data.Toy': Option 'colour' is not accepted",
        ),
        (
            "train.py",
            "fit --run_dir=a --model.net=UNet3",
            'Parser key "model.net": - Expected a path but UNet3 either not accessible or invalid - Expected a dot import path '
            "string: UNet3",
        ),
        ("sample.py", "", "the following arguments are required: checkpoint"),
        ("sample.py", "a --n=x", 'Parser key "n": Expected one of [int, NoneType]. Got value: x'),
        ("sample.py", "sample a --n=x", 'Parser key "n": Expected one of [int, NoneType]. Got value: x'),
        (
            "sample.py",
            "a --guidance=[x]",
            "Parser key \"guidance\": Expected one of [float, list[float], NoneType]. Got value: ['x']",
        ),
        ("sample.py", "a --config=none.yaml", NO_CONFIG),
        (
            "sample.py",
            "a --dtype=x",
            "Parser key \"dtype\": Expected a typing.Literal['float32', 'float64', 'bfloat16', 'float16']. Got value: x",
        ),
        ("sample.py", "encode a b --c.npz", "unrecognized arguments: --c.npz"),
        ("sample.py", "a --config", "argument --config: expected one argument"),
    ],
)
def test_parser_errors_are_one_line(program, words, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [program, *words.split()])
    with pytest.raises(SystemExit, match="2"):
        train.run() if program == "train.py" else main.sample()
    assert capsys.readouterr().err == f"{program}: error: {message}\n"


def test_debug_shows_the_traceback_and_is_hidden_from_the_command():
    with pytest.raises(ZeroDivisionError):
        console.run("x.py", fail(ZeroDivisionError()), ["--debug"])
    given = []
    console.run("x.py", given.extend, ["a", "--debug", "b"])
    console.run("x.py", given.extend, ["c"])
    assert given == ["a", "b", "c"]
