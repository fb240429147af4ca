"""The command `pfgm`: its list of commands, errors, shipped configurations and run folders."""

import subprocess
import sys

import pytest
import torch

import pfgm
from pfgm.cli import main, train
from pfgm.cli.arguments import find_config, shipped_configs
from tests.helpers import ROOT


def test_help_lists_every_command_in_its_group(capsys):
    main.main(["--help"])
    text = capsys.readouterr().out
    for group, commands in main.GROUPS.items():
        section = text.split(f"\n{group}:\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines()] == list(commands)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main.main([command, "--help"])
    assert exit.value.code in (0, None)
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.startswith("usage: pfgm ")
    assert command in usage.split()


@pytest.mark.parametrize("words", [["draw"], ["predict"], ["--n=3"]])
def test_unknown_commands_exit_with_2_and_list_the_known(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(words)
    captured = capsys.readouterr()
    assert not captured.out
    assert f"command = {words[0]}: choose one of {', '.join(main.COMMANDS)}" in captured.err


def test_debug_may_come_before_the_command():
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        main.main(["--debug", "sample", "none.ckpt"])


@pytest.mark.process
def test_a_configuration_may_come_through_a_pipe(tmp_path):
    quick = "--trainer.max_steps=1 --trainer.enable_progress_bar=false --trainer.accelerator=cpu"
    line = f"{sys.executable} -W ignore -m pfgm fit --config <(cat configs/heart.yaml) {quick} --run_dir {tmp_path}/run"
    process = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_version(capsys):
    main.main(["--version"])
    assert capsys.readouterr().out == f"pfgm {pfgm.__version__}\n"


@pytest.mark.process
def test_help_imports_neither_torch_nor_lightning():
    heavy = "[name for name in sys.modules if name.startswith(('torch', 'pytorch_lightning', 'jsonargparse'))]"
    code = f"import sys; from pfgm.cli.main import main; main(['--help']); print({heavy})"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


@pytest.mark.process
def test_the_module_is_the_command():
    for words, code in ((["--version"], 0), (["nothing"], 2), (["sample", "none.ckpt"], 2)):
        process = subprocess.run([sys.executable, "-m", "pfgm", *words], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == code, process.stderr
        assert "Traceback" not in process.stderr


def test_shipped_configurations_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits.yaml"):
        assert find_config(name) == shipped_configs() / "digits.yaml"
    (tmp_path / "digits").write_text("model: {}\n")
    assert str(find_config("digits")) == "digits", "a file here comes first"
    with pytest.raises(FileNotFoundError, match=r"config = digit is neither a file nor .*digits, .*heart"):
        find_config("digit")


@pytest.mark.process
def test_fit_by_name_then_sample_the_run_folder(tmp_path, monkeypatch):
    """In an empty folder, as after `pip install`; the file is what `pfgm.load` gives in Python."""
    monkeypatch.chdir(tmp_path)
    main.main(
        [
            "fit",
            "--config",
            "digits",
            "--trainer.max_steps=2",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
        ]
    )
    main.main(["sample", "runs/digits", "--n=3", "--out=samples.pt", "--device=cpu"])
    flow = pfgm.load("runs/digits", device="cpu")
    assert torch.equal(torch.load("samples.pt")["x"], flow.sample(3, seed=0).x)
    with pytest.raises(FileNotFoundError, match="config = digit"):
        train.main(["fit", "--config", "digit"])
