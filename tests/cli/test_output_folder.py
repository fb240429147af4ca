"""Several processes: the loss of one with their batches in one; samples drawn to a folder once each, and continued."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment

from benchmarks.faulty import draws, kills
from benchmarks.faulty.draws import content
from pfgm.cli import main as sample_cli
from pfgm.cli import output_folder, train
from pfgm.cli.output_folder import Share
from pfgm.core.exits import LostProcess
from pfgm.files import locking
from pfgm.flow import checkpoints
from pfgm.nn import TimeMLP, UNet
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.training.checkpointing import Stopped
from tests.helpers import flow_of


def test_a_run_on_two_devices_starts_from_one_command(tmp_path):
    """And stops, saved, with the scheduler's signal to the first process alone."""
    arguments = [*kills.command(tmp_path, "denoising", 100_000), "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(kills.ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    try:
        while process.poll() is None and kills.reached(tmp_path) < 20:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "stopped by SIGTERM. The state after step" in told
    assert checkpoints.read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == kills.reached(tmp_path)


@pytest.mark.parametrize("stopped", [True, False])
def test_the_connection_of_ranks_ends_with_the_run(stopped, tmp_path, monkeypatch):
    """gloo aborts now and then if the interpreter ends before it."""

    def main():
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        if stopped:
            raise Stopped(signal.SIGTERM, 3, 143)

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit"])
    with pytest.raises(Stopped, match="after step 3") if stopped else contextlib.nullcontext():
        train.command(["fit"])
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("text", ["[gloo/transport/tcp/pair.cc:545] Connection reset by peer", "CUDA error"])
def test_the_loss_of_another_process_is_told_from_a_defect(text, tmp_path, monkeypatch):
    def main():
        raise RuntimeError(text)

    monkeypatch.setattr(train, "main", main)
    with pytest.raises(RuntimeError, match=re.escape(text)) as alone:
        train.command(["fit"])
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError) as ranked:
            train.command(["fit"])
    finally:
        torch.distributed.destroy_process_group()
    assert not isinstance(alone.value, LostProcess)
    assert isinstance(ranked.value, LostProcess) == ("gloo" in text)
    if "gloo" in text:
        told = r"another process of this run ended, or never came \(.*reset by peer\)\. .* resumes from .*"
        assert re.fullmatch(told, str(ranked.value))


def test_a_process_that_never_came_is_named(monkeypatch):
    def main():
        nobody = "tcp://127.0.0.1:9"
        torch.distributed.init_process_group("gloo", nobody, timedelta(seconds=1), rank=1, world_size=2)

    monkeypatch.setattr(train, "main", main)
    with pytest.raises(LostProcess, match="never came"):
        train.command(["fit"])


def test_a_run_that_loses_one_of_its_processes_goes_on(tmp_path):
    counts = kills.chain(tmp_path, "Poisson field", kills=1, seed=1, steps=20, ranks=2)
    assert counts["kills"] == counts["at random"] + counts["while saving"] + counts["while drawing a grid"] == 1
    assert counts["different"] == counts["torn"] == counts["failed"] == counts["unexpected"] == 0


@pytest.mark.parametrize("objective", kills.OBJECTIVES)
def test_two_processes_have_the_loss_of_one_with_twice_the_batch(objective, tmp_path):
    """And its gradient, weights and average; the Poisson field's charges are common to both."""
    common = ["--trainer.precision=64-true", "--averages.every_n_steps=0", "--trainer.val_check_interval=5"]
    one, two = (kills.command(tmp_path / name, objective, 10) + common for name in ("one", "two"))
    assert kills.finish([*two, "--data.init_args.batch_size=16"], ranks=2) == 0
    train.main(one)
    rows = [np.genfromtxt(tmp_path / name / "metrics.csv", delimiter=",", names=True) for name in ("one", "two")]
    for column in ("step", "train_loss", "lr", "grad_norm", "skipped"):
        assert np.allclose(rows[0][column], rows[1][column], rtol=1e-5, equal_nan=True), column
    a, b = (checkpoints.read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    for part in ("state_dict", "current_model_state"):
        for name, value in a[part].items():
            assert torch.allclose(value, b[part][name], rtol=1e-4, atol=1e-7), name


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A flow of small images with random weights, and one of vectors."""
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


def draw(export, out, *options, name="images"):
    labels = ["--labels=[0,1,2]"] if name == "images" else []
    sample_cli.sample([str(export / name), "--n=21", "--batch_size=4", f"--out={out}", "--device=cpu", *labels, *options])


SOLVERS = (["--preset=fast"], ["--method=adaptive_heun", "--rtol=0.3"])


@pytest.mark.parametrize("solver", SOLVERS, ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", ["images", "vectors"])
def test_processes_share_out_the_samples_of_one(name, solver, export, tmp_path):
    draw(export, tmp_path / "one", *solver, name=name)
    made = []
    for share in ("3/3", "1/3", "2/3"):
        before = set(content(tmp_path / "many")) if made else set()
        draw(export, tmp_path / "many", f"--share={share}", *solver, name=name)
        made.append(set(content(tmp_path / "many")) - before - {"draw.json"})
    assert content(tmp_path / "one") == content(tmp_path / "many")
    assert [len(new) for new in made] == [5, 8, 8], "batches of 4 in turn, the last has one sample"
    assert len(content(tmp_path / "one")) == 22


@pytest.mark.parametrize("solver", SOLVERS, ids=["fixed", "adaptive"])
def test_an_interrupted_draw_is_continued_and_draws_nothing_twice(solver, export, tmp_path, monkeypatch, capsys):
    draw(export, tmp_path / "whole", *solver)
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
            draw(export, tmp_path / "parts", *solver)
    assert "stopped by SIGINT" in capsys.readouterr().err
    (tmp_path / "parts" / ".partial-000000-000005-xyz.png").write_text("of a killed process")
    (tmp_path / "parts" / ".partial-000001-000005-xyz.png").write_text("of another")
    draw(export, tmp_path / "parts", *solver)
    assert [rows.start for rows in written] == [0, 4, 4, 8, 8, 12, 16, 20]
    assert "8 of 21 samples were there already" in capsys.readouterr().out
    assert content(tmp_path / "parts").pop(".partial-000001-000005-xyz.png")
    (tmp_path / "parts" / ".partial-000001-000005-xyz.png").unlink()
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    draw(export, tmp_path / "parts", *solver)
    assert "21 of 21 samples were there already" in capsys.readouterr().out


def test_a_folder_holds_samples_of_one_kind(export, tmp_path, capsys):
    draw(export, tmp_path / "a", "--preset=fast")
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
            draw(export, tmp_path / "a", *options)
        error = capsys.readouterr().err
        assert "holds samples that were made otherwise" in error
        assert message.replace("\\", "") in error
    other = tmp_path / "other"
    flow_file = checkpoints.read_export(export / "images")
    checkpoints.write_export(other / "images", flow_file[0], {k: v + 0.01 * v.abs() for k, v in flow_file[1].items()})
    with pytest.raises(SystemExit, match="2"):
        draw(other, tmp_path / "a", "--preset=fast")
    assert "flow: " in capsys.readouterr().err
    assert content(tmp_path / "a") == before
    guided = ["--preset=fast", "--n=null", "--batch_size=2", "--labels=1", f"--guide={export / 'images'}", "--guidance=[1,8]"]
    draw(export, tmp_path / "guided", *guided, "--seeds=0,1")
    with pytest.raises(SystemExit, match="2"):
        draw(export, tmp_path / "guided", *guided, "--seeds=1,0")
    assert "seeds: 0,1 -> 1,0" in capsys.readouterr().err
    draw(export, tmp_path / "a", "--preset=fast", "--seed=1")
    assert len(content(tmp_path / "a")) == 22 + 21, "samples of other seeds may join"


def test_files_of_which_nothing_is_known_are_left_alone(export, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "000000-000007.png").write_text("old")
    with pytest.raises(SystemExit, match="2"):
        draw(export, tmp_path / "a")
    assert "holds 1 of these samples, and no draw.json" in capsys.readouterr().err
    assert content(tmp_path / "a") == {"000000-000007.png": b"old"}
    (tmp_path / "a" / "draw.json").write_text("[1]")
    with pytest.raises(SystemExit, match="2"):
        draw(export, tmp_path / "a")
    assert "draw.json cannot be read" in capsys.readouterr().err


def test_a_share_is_drawn_by_one_process(export, tmp_path, capsys):
    with locking.lock_folder(tmp_path / "a", "out", "-2-of-3"):
        draw(export, tmp_path / "a", "--share=1/3")
        with pytest.raises(SystemExit, match="2"):
            draw(export, tmp_path / "a", "--share=2/3")
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err


def test_shares_of_another_number_of_processes_wait(export, tmp_path, capsys):
    """They would draw the same batches."""
    with locking.lock_folder(tmp_path / "a", "out", "-2-of-3"):
        with pytest.raises(SystemExit, match="2"):
            draw(export, tmp_path / "a")
        assert f"out = {tmp_path / 'a'} is being drawn by 3 processes, each its share" in capsys.readouterr().err
    draw(export, tmp_path / "a")


def test_of_two_that_begin_a_folder_at_once_one_says_how_it_is_made(export, tmp_path):
    """With other settings each, one of them is refused, and no sample of it is there."""
    words = [str(export / "images"), "--n=21", "--batch_size=4", "--labels=[0,1,2]", "--device=cpu"]
    for k in range(3):
        out = tmp_path / f"{k}"
        shares = [[*words, f"--out={out}", f"--share={i}/2", f"--seed={i}", f"--preset={preset}"] for i, preset in SHARES]
        processes = [draws.start(share) for share in shares]
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        assert sorted(codes) == [0, 2]
        seed = codes.index(0) + 1
        assert {name[:6] for name in content(out)} == {f"{seed:06d}", "draw.j"}


SHARES = ((1, "fast"), (2, "balanced"))


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1.0/2"])
def test_shares_that_are_none_are_named(text, export, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        draw(export, tmp_path / "a", f"--share={text}")
    assert "share = " in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_numbers_of_processes_that_are_none_are_named(monkeypatch):
    for rank, world in (("5", "2"), ("0", "0")):
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"RANK = {rank}, WORLD_SIZE = {world}: .* unset them"):
            Share.found()


@pytest.mark.parametrize("devices", ["-1", "two", "1.5", "0", "[0,1,2]", "99"])
def test_devices_that_are_none_are_named(devices, tmp_path):
    for command in ("fit", "test"):
        with pytest.raises(ValueError, match=r"trainer\.devices = .*; give a number from 1 to"):
            train.main([command, *kills.command(tmp_path, "denoising", 5)[1:], f"--trainer.devices={devices}"])


def test_several_processes_need_a_folder(export, tmp_path, capsys):
    for options in (["--out", str(tmp_path / "x.png")], ["--trajectory", str(tmp_path / "x.npz")]):
        with pytest.raises(SystemExit, match="2"):
            draw(export, tmp_path / "a", "--share=1/2", *options)
        assert "several processes draw to a folder" in capsys.readouterr().err


def test_torchrun_and_srun_tell_the_share(monkeypatch):
    assert Share.found() == Share(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of a job, whose batch script is none of its tasks
    assert Share.found() == Share(0, 1), "of one process"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert Share.found() == Share(5, 8, 1)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Share.found() == Share(1, 2, 1)
    assert str(Share.parse("2/4")) == "2/4"


def test_jobs_of_slurm_are_left_to_its_batch_script(tmp_path, monkeypatch):
    """Lightning would listen to SIGUSR1 itself, and put the job into the queue."""
    for name, value in (("NTASKS", "1"), ("JOB_ID", "7"), ("PROCID", "0"), ("LOCALID", "0"), ("NODEID", "0"), ("NNODES", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    plugins = []
    monkeypatch.setattr(
        pl.Trainer, "fit", lambda self, *_, **__: plugins.append(self._accelerator_connector.cluster_environment)
    )
    train.main(kills.command(tmp_path, "denoising", 5))
    assert isinstance(plugins[0], SLURMEnvironment)
    assert not plugins[0].auto_requeue


def test_devices_on_the_cpu_are_processes_of_which_there_are_enough_cores():
    for devices in (1, "2", "auto"):
        train.check_processes(devices, cores=2)
    for devices in (0, 3, "-1", [0, 1], 1.5):
        with pytest.raises(ValueError, match=r"trainer\.devices = .*: each is a process .* from 1 to 2, its cores"):
            train.check_processes(devices, cores=2)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "FSDPStrategy"])
def test_weights_that_are_shared_out_are_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match=rf"trainer\.strategy = .*{strategy}: .* neither averaged .* give ddp"):
        train.main([*kills.command(tmp_path, "denoising", 5), f"--trainer.strategy={strategy}"])


@pytest.mark.process
def test_killed_draws_go_on_as_if_nothing_had_happened(tmp_path):
    counts = draws.chain(tmp_path / "draws", kills=2, seed=2)
    assert counts["kills"] >= 2
    assert counts["different"] == counts["torn"] == counts["failed"] == 0
