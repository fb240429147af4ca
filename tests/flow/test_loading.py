"""Files of version 0.1 keep loading: checkpoints, exports and configurations with the class paths of that version."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import pfgm
from pfgm.core.configurable import ALIASES
from pfgm.flow.checkpoints import CheckpointError, read_checkpoint
from pfgm.flow.integrity import digest
from tests.helpers import FIXTURES, SMALL, last
from tests.helpers import fit as fit_run

RUNS = ("pfgm", "pfgmpp", "conditional")
OLD = FIXTURES / "version_0_1"


@pytest.fixture
def run(request, tmp_path):
    """A run of version 0.1, of twenty steps."""
    with zipfile.ZipFile(OLD / f"{request.param}.zip") as archive:
        archive.extractall(tmp_path / "run")
    return request.param, tmp_path / "run"


def stored(name):
    with np.load(OLD / "samples.npz") as arrays:
        return torch.from_numpy(arrays[name])


def given(name):
    if name != "conditional":
        return {}
    return {"labels": [3, 7, 3, 0], "condition": stored("condition"), "guidance": 1.5}


@pytest.mark.parametrize("run", RUNS, indirect=True)
@pytest.mark.parametrize("ema", [True, False])
def test_checkpoints_of_version_0_1_give_their_samples(run, ema):
    name, folder = run
    flow = pfgm.load(folder / "checkpoints" / "last.ckpt", ema=ema)
    x = flow.sample(4, seed=1, **given(name)).x
    torch.testing.assert_close(x, stored(name if ema else f"{name}_raw"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_densities_and_adaptive_samples_of_version_0_1_stay(run):
    name, folder = run
    flow = pfgm.load(folder / "checkpoints" / "last.ckpt")
    options = {key: value if key == "guidance" else value[:2] for key, value in given(name).items()}
    x = flow.sample(2, seed=2, rtol=1e-3, atol=1e-3, **options).x
    torch.testing.assert_close(x, stored(f"{name}_adaptive"), rtol=0, atol=1e-5)
    conditions = {key: value for key, value in given(name).items() if key != "guidance"}
    density = flow.log_prob(stored(name), rtol=1e-3, atol=1e-3, **conditions)
    torch.testing.assert_close(density, stored(f"{name}_log_prob"), rtol=1e-5, atol=1e-3)


@pytest.mark.process
@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_runs_of_version_0_1_resume_by_their_configuration(run):
    """The stored configuration names the old classes; two more steps change the weights and keep the rest."""
    _, folder = run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert any(old in str(config) for old in ALIASES)
    before = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    options = ["--config", str(folder / "config.yaml"), *SMALL, "--grid.n=0"]
    fit_run(folder, "--trainer.max_steps=22", base=options)
    after = last(folder)
    assert (before["global_step"], after["global_step"]) == (20, 22)
    assert pfgm.PFGM.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").flow.kernel.D in (1, 128)
    again = yaml.safe_load((folder / "config.yaml").read_text())
    assert not any(old in str(again) for old in ALIASES), "what is written names today's classes"


def test_an_export_of_version_0_1_gives_its_samples():
    x = pfgm.load(OLD / "export").sample(4, seed=1).x
    torch.testing.assert_close(x, stored("pfgmpp"), rtol=0, atol=1e-6)


def test_an_export_of_version_0_1_with_two_D_is_refused(tmp_path):
    shutil.copytree(OLD / "export", tmp_path / "export")
    config = json.loads((OLD / "export" / "config.json").read_text())
    config["flow"]["D"] = 8.0
    content = {name: value for name, value in config.items() if name != "digest"} | {
        "tensors": load_file(OLD / "export" / "model.safetensors")
    }
    (tmp_path / "export" / "config.json").write_text(json.dumps(config | {"digest": digest(content)}))
    with pytest.raises(CheckpointError, match=r"D = 8\.0 of the flow is not that of its denoiser"):
        pfgm.load(tmp_path / "export")
