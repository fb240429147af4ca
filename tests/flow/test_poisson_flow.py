"""Units, loading, exports, damage, and drawing to disk."""

import json
import math
import os
import re
import subprocess
import sys
from glob import glob

import numpy as np
import pytest
import torch
from PIL import Image

import pfgm
import pfgm.sampling.sampler
from pfgm.cli import main
from pfgm.core.configurable import build
from pfgm.flow import checkpoints
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.sampling.likelihood import log_prob
from pfgm.sampling.sampler import seed_pairs
from pfgm.theory.analytic import GaussianBlob
from tests.helpers import FAST, flow_of, make_flow


@pytest.mark.parametrize("D", [1, 128.0, math.inf])
def test_an_export_gives_the_same_samples_and_is_strict_json(D, tmp_path):
    flow = make_flow(D, scale=2.0).eval()
    flow.save_pretrained(tmp_path / "export")
    text = (tmp_path / "export" / "config.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = pfgm.load(tmp_path / "export")
    assert torch.equal(again.sample(5, seed=3, **FAST).x, flow.sample(5, seed=3, **FAST).x)
    assert not again.training
    assert again.kernel.D == D


def test_a_flow_has_the_kernel_and_the_sigma_data_of_its_denoiser():
    flow = make_flow(D=8.0)
    assert flow.kernel is flow.denoiser.kernel
    assert flow.summary.sigma_data == flow.denoiser.sigma_data == 0.5
    with pytest.raises(ValueError, match=r"sigma_data = 0\.7: the denoiser was made with sigma_data = 0\.5"):
        flow_of(flow.denoiser, (1, 8, 8), sigma_data=0.7)
    with pytest.raises(ValueError, match="denoiser = Identity: it has no StudentTKernel"):
        flow_of(torch.nn.Identity(), (1, 8, 8))
    assert flow_of(GaussianBlob(0.3, 16.0), (1, 8, 8)).kernel.D == 16


def test_samples_come_in_the_users_units():
    flow = make_flow(scale=1.0)
    scaled = make_flow(scale=127.5)
    options = {"method": "midpoint", "steps": 8}
    assert torch.allclose(scaled.sample(4, **options).x, flow.sample(4, **options).x * 127.5, rtol=1e-5)
    model = flow.sampler(**options).sample(4).x
    assert torch.allclose(flow.sample(4, **options).x, model + flow.summary.mean)
    x = scaled.sample(4, **options).x
    assert torch.allclose(scaled.summary.to_user(scaled.to_model(x)), x, rtol=1e-4, atol=1e-3)
    noisy, sigma = x + 10 * torch.randn_like(x), torch.full((4,), 10.0)
    expected = scaled.summary.to_user(scaled.denoiser(scaled.to_model(noisy), sigma / 127.5))
    assert torch.allclose(scaled.denoise(noisy, sigma), expected)


def test_encode_and_decode_in_the_users_units():
    flow = make_flow(D=8.0, shape=(4,), scale=3.0, sigma_min=0.1)
    x = flow.sample(5).x.double()
    options = {"method": "dopri5", "rtol": 1e-7, "atol": 1e-7}
    latent = flow.encode(x, **options)
    assert (latent.surface, latent.level) == ("plane", 120.0)
    assert torch.allclose(flow.decode(latent, **options), x, atol=1e-3)


def test_batches_do_not_change_fixed_grid_samples():
    flow, options = make_flow(shape=(5,)), {"method": "midpoint", "steps": 4}
    whole = flow.sample(10, seed=2, **options)
    parts = flow.sample(10, seed=2, batch_size=3, **options)
    assert torch.allclose(whole.x, parts.x, atol=1e-5)
    assert whole.calls == parts.calls == 9
    assert flow.sample(0).x.shape == (0, 5)


def test_labels_are_checked_and_used():
    flow = make_flow(shape=(5,), classes=3, std=0.5)
    x = flow.sample(2, labels=2).x
    assert torch.equal(flow.sample(2, labels=[2, 2]).x, x)
    assert not torch.allclose(flow.sample(2, labels=1).x, x)
    for labels, message in (
        ([0, 3], r"0\.\.2"),
        (-1, r"0\.\.2"),
        ([1, 1, 1], "each of the 2"),
        ([1], "each of the 2"),
        ([0.5, 1.0], "labels = .*64-bit integer"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.sample(2, labels=labels)
    with pytest.raises(ValueError, match="class-conditional"):
        flow.sample(2)
    with pytest.raises(ValueError, match="trained without labels"):
        make_flow(shape=(5,)).sample(2, labels=1)


def test_every_single_flipped_bit_is_found(tmp_path):
    make_flow(shape=(5,)).save_pretrained(tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    for position in np.random.default_rng(0).integers(header, len(content), 20):
        damaged = content.copy()
        damaged[position] ^= 1 << int(position) % 8
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(checkpoints.CheckpointError, match="altered"):
            pfgm.load(tmp_path)


def test_an_edited_description_is_found(tmp_path):
    make_flow(shape=(5,)).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"sigma_max": 40.0', '"sigma_max": 500.0'))
    with pytest.raises(checkpoints.CheckpointError, match="altered"):
        pfgm.load(tmp_path)


def test_a_file_cannot_name_classes_that_are_no_networks(tmp_path):
    flow = make_flow(shape=(5,))
    spec = {"class_path": "pfgm.data.Arrays", "init_args": {"path": "/etc/hostname"}}
    checkpoints.write_export(tmp_path, flow.config | {"denoiser": spec}, flow.state_dict())
    with pytest.raises(ValueError, match="not a class that a checkpoint may name"):
        pfgm.load(tmp_path)


@pytest.mark.parametrize("change", [{"shape": 3}, {"colour": 1}, {"sigma_max": "40"}, {"denoiser": {}}])
def test_an_incomplete_description_is_named(change, tmp_path):
    flow = make_flow(shape=(5,))
    checkpoints.write_export(tmp_path, flow.config | change, flow.state_dict())
    with pytest.raises(checkpoints.CheckpointError, match="incomplete"):
        pfgm.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "sphere"}, "start = 'sphere'"),
        ({"scale": math.nan}, "scale = nan"),
        ({"sigma_data": 0.0}, r"sigma_data = 0\.0"),
        ({"sigma_min": 50.0}, r"sigma_min = 50\.0"),
    ],
)
def test_bad_settings_of_a_flow_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_flow(shape=(5,), **settings)


def test_bad_points_are_named_and_integers_are_numbers():
    flow = make_flow(shape=(5,), scale=2.0)
    x = torch.arange(10).reshape(2, 5)
    assert torch.equal(flow.denoise(x, 0.5), flow.denoise(x.float(), 0.5))
    for sigma in (-1.0, 0.0, math.nan, math.inf, torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="sigma = "):
            flow.denoise(x, sigma)
    with pytest.raises(ValueError, match="trained without labels"):
        flow.denoise(x, 1.0, torch.tensor([1, 1]))
    for method in (lambda y: flow.denoise(y, 1.0), flow.encode):
        with pytest.raises(ValueError, match="x: 2 values are NaN"):
            method(torch.where(x < 2, torch.nan, x))
        with pytest.raises(ValueError, match="shape"):
            method(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"latent\.t has shape \(2, 4\)"):
        flow.decode(pfgm.sampling.sampler.Latent(torch.zeros(2, 4), 40.0, "plane"))


def test_damaged_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pfgm.load(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        pfgm.load(tmp_path)
    make_flow(shape=(5,)).save_pretrained(tmp_path / "good")
    for name, content, message in (
        ("empty", b"", r"empty\.ckpt is empty"),
        ("text", b"hello", "truncated, altered or not a checkpoint"),
        ("zip", b"PK\x03\x04" + b"0" * 100, "truncated, altered or not a checkpoint"),
    ):
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        with pytest.raises(checkpoints.DamagedCheckpointError, match=message):
            pfgm.load(tmp_path / f"{name}.ckpt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(checkpoints.CheckpointError, match="not a checkpoint of this package"):
        pfgm.load(tmp_path / "other.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    with pytest.raises(checkpoints.CheckpointError, match="holds a Tensor"):
        pfgm.load(tmp_path / "tensor.ckpt")
    whole = (tmp_path / "good" / "model.safetensors").read_bytes()
    (tmp_path / "good" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(checkpoints.CheckpointError, match="cannot be read"):
        pfgm.load(tmp_path / "good")
    (tmp_path / "good" / "config.json").write_text("{")
    with pytest.raises(checkpoints.CheckpointError, match="cannot be read"):
        pfgm.load(tmp_path / "good")


def test_weights_that_do_not_match_the_network_are_named(tmp_path):
    flow = make_flow(shape=(5,))
    state = flow.state_dict() | {"surplus": torch.zeros(1)}
    checkpoints.write_export(tmp_path, flow.config, state)
    with pytest.raises(checkpoints.CheckpointError, match="do not match"):
        pfgm.load(tmp_path)


class Elsewhere(pfgm.nn.Network):
    """A network that is not of this package."""

    def __init__(self, shape, num_classes=0, extra_channels=0):
        super().__init__()
        self.layer = torch.nn.Linear(*shape, *shape)

    def forward(self, x, c_noise, label=None):
        return self.layer(x)


def test_classes_from_elsewhere_need_trust(tmp_path):
    flow = flow_of(PreconditionedDenoiser(Elsewhere((3,)), 4.0, 0.5, 0.06), shape=(3,), sigma_min=0.01, sigma_max=40.0)
    flow.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass trust="):
        pfgm.load(tmp_path)
    assert torch.equal(pfgm.load(tmp_path, trust=[__name__]).sample(2).x, flow.sample(2).x)
    for path in ("os.system", "pfgm.storage.os", "pfgm.core.rng.generator", "pfgm.none.Thing", "builtins.eval"):
        with pytest.raises(ValueError, match="class_path"):
            build({"class_path": path, "init_args": {}})
    with pytest.raises(ValueError, match="cannot be made"):
        build({"class_path": "pfgm.nn.mlp.TimeMLP", "init_args": {"colour": 1}})


def test_a_network_that_cannot_be_stored_is_refused():
    with pytest.raises(TypeError, match=r"inherit from pfgm\.nn\.Network"):
        PreconditionedDenoiser(torch.nn.Linear(3, 3), 4.0, 0.5, 0.06).spec  # noqa: B018


def test_errors_and_trajectories_are_in_the_users_units():
    one, other = make_flow(D=4.0), make_flow(D=4.0, scale=3.0)
    a, b = (flow.sample(4, batch_size=3, method="ab3", steps=5) for flow in (one, other))
    assert torch.allclose(b.error, 3 * a.error)
    assert torch.allclose(b.x, 3 * a.x, rtol=1e-4, atol=1e-5)
    short, long = (flow.trajectory(seed_pairs(4), 3, batch_size=3, method="ab3", steps=5) for flow in (one, other))
    for name in ("x", "denoised", "sigma", "level"):
        assert torch.allclose(getattr(long, name), 3 * getattr(short, name), rtol=1e-4, atol=1e-5)
    assert torch.allclose(short.denoised[-1].float(), a.x, atol=1e-5)
    assert float(short.level[0]) == pytest.approx(40.0)
    with pytest.raises(ValueError, match="pairs is empty"):
        one.trajectory([], 3)


def test_a_trajectory_in_batches_has_the_labels_of_each():
    flow = make_flow(classes=3, std=0.2)
    options = {"labels": [0, 1, 2, 1], "method": "ab3", "steps": 3}
    whole, parts = (flow.trajectory(seed_pairs(4), 3, batch_size=size, **options) for size in (4, 3))
    assert torch.allclose(whole.x, parts.x, atol=1e-4)
    assert not torch.allclose(whole.x, flow.trajectory(seed_pairs(4), 3, **(options | {"labels": 0})).x, atol=1e-2)


@pytest.mark.process
def test_a_draw_is_complete_only_if_all_its_batches_are():
    flow = make_flow(D=1)
    options = {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3}
    calls = [next(flow.sample_batches([pair], **options))[1].calls for pair in seed_pairs(8)]
    assert min(calls) < max(calls)
    out = flow.sample(8, batch_size=1, max_calls=min(calls), **options)
    assert not out.complete
    assert flow.sample(8, batch_size=1, max_calls=max(calls), **options).complete


@pytest.mark.process
def test_log_prob_is_in_the_users_units():
    """The same model told in other units: the density of 3 x is 3^-N times as large."""
    one, other = make_flow(D=4.0), make_flow(D=4.0)
    other.summary.scale = 3 * one.summary.scale
    x = one.sample(2, method="midpoint", steps=3).x
    settings = {"probes": 2, "rtol": 0.05, "atol": 0.05}
    value = one.log_prob(x, **settings)
    assert value.shape == (2,)
    assert torch.allclose(other.log_prob(3 * x, **settings), value - 64 * math.log(3), rtol=1e-3)
    model = log_prob(one.denoiser, one.kernel, one.to_model(x), sigma_min=one.sigma_min, sigma_max=one.sigma_max, **settings)
    assert torch.allclose(value, model)
    with pytest.raises(ValueError, match="trained without labels"):
        one.log_prob(x, labels=3)
    with pytest.raises(ValueError, match="x: 128 values are NaN"):
        one.log_prob(x * math.nan)


@pytest.fixture
def export(tmp_path):
    make_flow().save_pretrained(tmp_path / "export")
    return str(tmp_path / "export")


@pytest.fixture
def conditional(tmp_path):
    make_flow(classes=3).save_pretrained(tmp_path / "conditional")
    return str(tmp_path / "conditional")


@pytest.mark.process
def test_drawing_writes_what_was_asked_for(export, conditional, tmp_path, capsys):
    out = str(tmp_path / "out")
    main.sample(
        [conditional, "--n=3", "--seed=7", "--out", f"{out}/x.npz", "--method=midpoint", "--steps=3", "--labels=[0,1,2]"]
    )
    with np.load(f"{out}/x.npz") as arrays:
        assert arrays["x"].shape == (3, 1, 8, 8)
        assert arrays["seeds"].tolist() == [[7, 0], [7, 1], [7, 2]]
        assert arrays["labels"].tolist() == [0, 1, 2]
        expected = pfgm.load(conditional).sample(3, seed=7, method="midpoint", steps=3, labels=[0, 1, 2]).x
        assert np.allclose(arrays["x"], expected.numpy(), atol=1e-6)
    main.sample([conditional, "--n=2", "--labels=1", "--out", f"{out}/y.npz", "--preset=fast"])
    os.remove(f"{out}/y.npz")
    assert "3 samples in 7 network calls" in capsys.readouterr().out
    main.sample(
        [export, "--seeds=1,4-5", "--out", f"{out}/x.pt", "--batch_size=2", "--method=midpoint", "--steps=3", "--dtype=float64"]
    )
    assert torch.load(f"{out}/x.pt")["seeds"].tolist() == [[1, 0], [4, 0], [5, 0]]
    main.sample([export, "--n=2", "--out", f"{out}/folder", "--method=euler", "--steps=3"])
    assert sorted(glob("*", root_dir=f"{out}/folder")) == ["000000-000000.png", "000000-000001.png", "draw.json"]
    main.sample([export, "--n=5", "--out", f"{out}/grid.png", "--method=euler", "--steps=3", "--trajectory", f"{out}/way.png"])
    main.sample([export, "--n=5", "--out", f"{out}/x.pt", "--rtol=0.1", "--trajectory", f"{out}/way.npz", "--batch_size=2"])
    way, end = np.load(f"{out}/way.npz"), torch.load(f"{out}/x.pt")["x"]
    assert way["x"].shape == way["denoised"].shape == (48, 5, *end.shape[1:])
    assert np.allclose(way["denoised"][-1], end, atol=1e-5)
    assert way["sigma"].shape == (48, 5)
    assert np.all(np.diff(way["sigma"], axis=0) < 0)
    main.sample([export, "--n=5", "--out", f"{out}/x.npz", "--trajectory", f"{out}/way.gif"])
    main.sample([export, "--n=5", "--out", f"{out}/x.npz", "--max_calls=5"])
    assert "stopped by max_calls = 5" in capsys.readouterr().err
    with Image.open(f"{out}/way.gif") as film:
        assert film.n_frames > 10
    assert {"grid.png", "way.png", "way.npz", "way.gif", "x.npz", "x.pt", "folder"} == set(os.listdir(out)), (
        "no temporary file is left"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n=-1"], "n = -1: expected"),
        (["--seeds=3-x"], "seeds = '3-x'"),
        (["--n=2", "--seeds=1"], "either"),
        (["--seed=2", "--seeds=1"], "either"),
        (["--n=0"], "n = 0"),
        (["--seeds=5-1"], "seeds = '5-1'"),
        (["--seeds=1,1", "--out=folder"], "given twice"),
        (["--preset=fast", "--steps=3"], "Leave out either preset or steps"),
        (["--trajectory=samples.png"], "another argument names this file"),
        (["--out=new/x.png", "--method=foo"], "method = 'foo'"),
        (["--labels=[5]"], "labels = 5: this model was trained without labels"),
        (["--method=rk45"], "method = 'rk45'"),
        (["--coordinates=z"], "coordinates = 'z'"),
        (["--method=euler"], "steps = None"),
        (["--batch_size=0"], "batch_size = 0"),
        (["--device=cuda:77"], "device = 'cuda:77'"),
        (["--out=x.jpg"], r"out = x\.jpg"),
        (["--out=/proc/none/x.png"], "out = /proc/none/x.png cannot be written"),
        (["--trajectory=export/folder.png"], r"trajectory = export/folder\.png is a folder"),
        (["--trajectory=x.jpg"], r"trajectory = x\.jpg"),
        (["--trajectory=/proc/none/x.png"], "trajectory = /proc/none/x.png cannot be written"),
        (["--out=new/x.png", "--grid=[9,1]"], "grid begins at 9"),
        (["--steps=1000000"], "steps = 1000000: ab3 takes fixed steps. Choose a number from 1 to 100000"),
        (["--max_calls=3", "--trajectory=x.png"], "a trajectory is whole"),
        (["--max_calls=0"], "max_calls = 0 must be at least 1"),
        (["--s_churn=5"], "s_churn = 5.0: noise before each step needs fixed steps"),
        (["--restart=[[1,2]]"], "restart"),
        (["--independent=true", "--method=dopri8"], "independent = True: dopri8 has no steps for each sample"),
    ],
)
def test_bad_arguments_end_in_one_line(export, arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("export/folder.png")
    with pytest.raises(SystemExit, match="2"):
        main.sample([export, *arguments])
    assert re.search(message, capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == ["export"], "nothing is written"


def test_a_missing_checkpoint_ends_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main.sample(["none.ckpt"])
    error = capsys.readouterr().err.strip()
    assert (
        error
        == "sample.py: error: none.ckpt does not exist or is not a file. Pass a .ckpt file, a run folder or an exported folder."
    )


@pytest.mark.process
def test_the_sampling_path_stays_light():
    """Importing it and loading leaves Lightning, torchvision, scikit-learn and matplotlib unimported."""
    heavy = ("pytorch_lightning", "lightning", "torchvision", "sklearn", "matplotlib", "torchdiffeq")
    code = f"import sys, pfgm, pfgm.cli.main; pfgm.load; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_unknown_names_of_the_package_are_named():
    with pytest.raises(AttributeError, match="public names are"):
        pfgm.colour  # noqa: B018
