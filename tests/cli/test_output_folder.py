"""Folders of samples: shares of several processes, continuation, and refusal of other settings."""

import os

import pytest
import torch

from benchmarks.faulty import draws
from benchmarks.faulty.draws import content
from pfgm.cli import main as sample_cli
from pfgm.cli import output_folder
from pfgm.cli.output_folder import Share
from pfgm.files import locking
from pfgm.flow import checkpoints
from pfgm.nn import TimeMLP, UNet
from pfgm.nn.preconditioning import PreconditionedDenoiser
from tests.helpers import flow_of


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports of two flows with random weights: small images and vectors."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exports")
    for name, net, shape in (
        ("images", UNet((1, 8, 8), 3, 0, width=8, blocks=1), (1, 8, 8)),
        ("vectors", TimeMLP((3,), 0, 0, width=8, depth=1), (3,)),
    ):
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        given = {"num_classes": 3, "value_range": (-1.0, 1.0)} if name == "images" else {}
        denoiser = PreconditionedDenoiser(net, 8.0, 0.5, 0.1)
        flow_of(denoiser, shape=shape, sigma_min=0.01, sigma_max=40.0, **given).save_pretrained(folder / name)
    return folder


def draw(exports, out, *options, name="images"):
    labels = ["--labels=[0,1,2]"] if name == "images" else []
    sample_cli.sample([str(exports / name), "--n=21", "--batch_size=4", f"--out={out}", "--device=cpu", *labels, *options])


SOLVERS = (["--preset=fast"], ["--method=adaptive_heun", "--rtol=0.3"])


@pytest.mark.process
@pytest.mark.parametrize("solver", SOLVERS, ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", ["images", "vectors"])
def test_shares_of_several_processes_add_up_to_the_samples_of_one(name, solver, exports, tmp_path):
    draw(exports, tmp_path / "one", *solver, name=name)
    made = []
    for share in ("3/3", "1/3", "2/3"):
        before = set(content(tmp_path / "many")) if made else set()
        draw(exports, tmp_path / "many", f"--share={share}", *solver, name=name)
        made.append(set(content(tmp_path / "many")) - before - {"draw.json"})
    assert content(tmp_path / "one") == content(tmp_path / "many")
    assert [len(new) for new in made] == [5, 8, 8], "batches of 4 in turn, the last with one sample"
    assert len(content(tmp_path / "one")) == 22


@pytest.mark.process
@pytest.mark.parametrize("solver", SOLVERS, ids=["fixed", "adaptive"])
def test_interrupted_sampling_continues_without_repeating_a_batch(solver, exports, tmp_path, monkeypatch, capsys):
    draw(exports, tmp_path / "whole", *solver)
    write, written = output_folder.SampleFolder.write, []

    def stop(self, rows, x):
        written.append(rows)
        if len(written) in (2, 4):
            write(self, rows[:2], x[:2])
            raise KeyboardInterrupt
        write(self, rows, x)

    monkeypatch.setattr(output_folder.SampleFolder, "write", stop)
    for _ in range(2):
        with pytest.raises(SystemExit, match="130"):
            draw(exports, tmp_path / "parts", *solver)
    assert "stopped by SIGINT" in capsys.readouterr().err
    (tmp_path / "parts" / ".partial-000000-000005-xyz.png").write_text("killed process")
    (tmp_path / "parts" / ".partial-000001-000005-xyz.png").write_text("another process")
    draw(exports, tmp_path / "parts", *solver)
    assert [rows.start for rows in written] == [0, 4, 4, 8, 8, 12, 16, 20]
    assert "8 of 21 samples were there already" in capsys.readouterr().out
    assert content(tmp_path / "parts").pop(".partial-000001-000005-xyz.png")
    (tmp_path / "parts" / ".partial-000001-000005-xyz.png").unlink()
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    draw(exports, tmp_path / "parts", *solver)
    assert "21 of 21 samples were there already" in capsys.readouterr().out


@pytest.mark.process
def test_a_folder_refuses_samples_of_other_settings(exports, tmp_path, capsys):
    draw(exports, tmp_path / "a", "--preset=fast")
    before = content(tmp_path / "a")
    torch.manual_seed(1)
    for options, message in (
        (["--preset=balanced"], "preset: fast -> balanced"),
        (["--preset=fast", "--batch_size=5"], "batch_size: 4 -> 5"),
        (["--preset=fast", "--labels=1"], r"labels: \[0, 1, 2\] -> 1"),
        (["--preset=fast", "--dtype=float64"], "dtype: float32 -> float64"),
        (["--preset=fast", "--seeds=0-20", "--n=null"], "seeds: None -> 0-20"),
    ):
        with pytest.raises(SystemExit, match="2"):
            draw(exports, tmp_path / "a", *options)
        error = capsys.readouterr().err
        assert "holds samples of other settings" in error
        assert message.replace("\\", "") in error
    other = tmp_path / "other"
    flow_file = checkpoints.read_export(exports / "images")
    checkpoints.write_export(other / "images", flow_file[0], {k: v + 0.01 * v.abs() for k, v in flow_file[1].items()})
    with pytest.raises(SystemExit, match="2"):
        draw(other, tmp_path / "a", "--preset=fast")
    assert "flow: " in capsys.readouterr().err
    assert content(tmp_path / "a") == before
    guided = ["--preset=fast", "--n=null", "--batch_size=2", "--labels=1", f"--guide={exports / 'images'}", "--guidance=[1,8]"]
    draw(exports, tmp_path / "guided", *guided, "--seeds=0,1")
    with pytest.raises(SystemExit, match="2"):
        draw(exports, tmp_path / "guided", *guided, "--seeds=1,0")
    assert "seeds: 0,1 -> 1,0" in capsys.readouterr().err
    draw(exports, tmp_path / "a", "--preset=fast", "--seed=1")
    assert len(content(tmp_path / "a")) == 22 + 21, "samples of other seeds may be added"


def test_files_without_a_record_are_left_alone(exports, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "000000-000007.png").write_text("old")
    with pytest.raises(SystemExit, match="2"):
        draw(exports, tmp_path / "a")
    assert "holds 1 of these samples but no draw.json" in capsys.readouterr().err
    assert content(tmp_path / "a") == {"000000-000007.png": b"old"}
    (tmp_path / "a" / "draw.json").write_text("[1]")
    with pytest.raises(SystemExit, match="2"):
        draw(exports, tmp_path / "a")
    assert "draw.json cannot be read" in capsys.readouterr().err


def test_a_share_is_locked_by_one_process(exports, tmp_path, capsys):
    with locking.lock_folder(tmp_path / "a", "out", "-2-of-3"):
        draw(exports, tmp_path / "a", "--share=1/3")
        with pytest.raises(SystemExit, match="2"):
            draw(exports, tmp_path / "a", "--share=2/3")
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err


def test_shares_of_another_number_of_processes_are_refused(exports, tmp_path, capsys):
    """They would write the same batches."""
    with locking.lock_folder(tmp_path / "a", "out", "-2-of-3"):
        with pytest.raises(SystemExit, match="2"):
            draw(exports, tmp_path / "a")
        assert f"out = {tmp_path / 'a'} is being written by 3 processes, each its share" in capsys.readouterr().err
    draw(exports, tmp_path / "a")


@pytest.mark.process
def test_two_processes_with_other_settings_that_start_at_once_leave_one_record(exports, tmp_path):
    """One of them is refused and writes no sample."""
    settings = ((1, "fast"), (2, "balanced"))
    words = [str(exports / "images"), "--n=21", "--batch_size=4", "--labels=[0,1,2]", "--device=cpu"]
    for k in range(3):
        out = tmp_path / f"{k}"
        shares = [[*words, f"--out={out}", f"--share={i}/2", f"--seed={i}", f"--preset={preset}"] for i, preset in settings]
        processes = [draws.start(share) for share in shares]
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        assert sorted(codes) == [0, 2]
        seed = codes.index(0) + 1
        assert {name[:6] for name in content(out)} == {f"{seed:06d}", "draw.j"}


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1.0/2"])
def test_malformed_shares_raise_before_any_file(text, exports, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        draw(exports, tmp_path / "a", f"--share={text}")
    assert "share = " in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_inconsistent_rank_variables_raise(monkeypatch):
    for rank, world in (("5", "2"), ("0", "0")):
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"RANK = {rank} is not below WORLD_SIZE = {world}. Unset"):
            Share.from_environment()


def test_share_is_read_from_torchrun_and_srun(monkeypatch):
    assert Share.from_environment() == Share(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # set in batch scripts too
    assert Share.from_environment() == Share(0, 1), "not a task of srun"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert Share.from_environment() == Share(5, 8, 1)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Share.from_environment() == Share(1, 2, 1)
    assert str(Share.parse("2/4")) == "2/4"


def test_several_processes_need_a_folder(exports, tmp_path, capsys):
    for options in (["--out", str(tmp_path / "x.png")], ["--trajectory", str(tmp_path / "x.npz")]):
        with pytest.raises(SystemExit, match="2"):
            draw(exports, tmp_path / "a", "--share=1/2", *options)
        assert "several processes draw to a folder" in capsys.readouterr().err
