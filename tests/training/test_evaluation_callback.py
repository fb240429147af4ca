"""What `test` reports, from the samples and data up."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pfgm
from pfgm.cli import prepare
from pfgm.cli import train as train_cli
from pfgm.core import rng
from pfgm.evaluation import metrics
from pfgm.evaluation.metrics import FeatureSet
from pfgm.flow import checkpoints
from pfgm.training import evaluation_callback
from pfgm.training.evaluation_callback import Evaluation
from tests.helpers import ROOT, SMALL, TOY, fit

DIGITS = ["--config", str(ROOT / "configs" / "digits_pfgmpp.yaml"), *SMALL]


@pytest.mark.process
def test_classifier_features_are_reported_and_unsuitable_ones_refused(tmp_path, capsys):
    words = ["features", *DIGITS[:2], "--data.labels=true", "--steps=3", "--width=8", f"--out={tmp_path}/f.safetensors"]
    prepare.prepare(words)
    assert "of the labels of 360 held-out images right" in capsys.readouterr().out
    header = checkpoints.read_header(tmp_path / "f.safetensors")
    assert header["made"]["of"] == "labels"
    assert header["made"]["data"]["class_path"] == "pfgm.data.Digits"
    base = [*DIGITS, "--model.net.init_args.width=8", "--model.net.init_args.blocks=1"]
    fit(tmp_path / "run", "--trainer.max_steps=1", base=base)
    options = ["--evaluation.n=20", "--evaluation.sets=2", f"--evaluation.features={tmp_path}/f.safetensors"]
    train_cli.main(["test", *base, "--run_dir", str(tmp_path / "run"), *options, "--evaluation.reference=50"])
    result = json.loads((tmp_path / "run" / "test.json").read_text())
    assert result["compared"] == f"Classifier {header['digest'][:12]}"
    assert result["reference"] == [50, 50]
    for row in ("samples against training data", "samples against held-out data", "held-out against training data"):
        assert list(result[row]) == ["energy", "frechet", "kernel", "precision", "recall", "1-nn"]
    assert len(result["copying"]) == len(result["samples against training data"]["kernel"]) == 2
    assert (tmp_path / "run" / "nearest.png").exists()
    table = capsys.readouterr().out
    assert "copying " in table
    assert "Classifier" in table
    with pytest.raises(ValueError, match="this network does not take images"):
        train_cli.main(["test", *base, "--run_dir", str(tmp_path / "run"), f"--evaluation.features={__name__}.ColourNet"])


class ColourNet(nn.Module):
    """A network for colour images only."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.layer(x).mean((2, 3))


@pytest.mark.process
@pytest.mark.parametrize("flip", [False, True])
def test_every_reported_figure_matches_a_recomputation(flip, tmp_path, monkeypatch):
    """Recomputes every figure from samples generated here, for images that come sorted by class."""
    for i in range(60):
        place = tmp_path / "images" / "abc"[i // 20] / f"{i:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(i).integers(80 * (i // 20), 80 * (i // 20) + 90, (8, 8)).astype(np.uint8)
        Image.fromarray(image).save(place)
        if i % 3 == 0:
            (tmp_path / "other" / "abc"[i // 20]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - image).save(tmp_path / "other" / "abc"[i // 20] / f"{i:02}.png")
    base = ["--config", str(ROOT / "configs" / "folder.yaml"), *SMALL, f"--data.path={tmp_path}/images", "--data.size=8"]
    base += [f"--data.held_out={tmp_path}/other", "--data.labels=true", f"--data.flip={flip}", "--data.batch_size=8"]
    base += ["--model.net.init_args.width=8", "--model.net.init_args.blocks=1", "--run_dir", str(tmp_path / "run")]
    fit(tmp_path / "run", "--trainer.max_steps=1", base=base)
    asked, copying = [], metrics.copying
    monkeypatch.setattr("pfgm.evaluation.metrics.copying", lambda *sets: asked.append(sets) or copying(*sets))
    tested = train_cli.main(["test", *base, "--evaluation.n=30", "--evaluation.sets=2", "--evaluation.reference=25"])
    result, data = json.loads((tmp_path / "run" / "test.json").read_text()), tested.datamodule
    order = torch.randperm(60, generator=rng.generator(0))
    label = data.train.label[order[:30]]
    assert label.bincount().min() >= 5
    flow = pfgm.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    sets = [flow.to_model(flow.sample(30, seed=seed, labels=label).x) for seed in (0, 1)]
    every = flow.to_model(data.train.x.float())
    train = every[order[:25]]
    held_out = flow.to_model(data.held_out.x[torch.randperm(20, generator=rng.generator(0))].float())
    assert result["reference"] == [25, 20]
    rows = {"samples against training data": (sets, train), "samples against held-out data": (sets, held_out)}
    for row, (ours, theirs) in (rows | {"held-out against training data": ([held_out], train)}).items():
        for measure in metrics.MEASURES:
            expected = [measure.function(x, theirs) for x in ours]
            assert result[row][measure.name] == pytest.approx(expected, rel=1e-5, abs=1e-6), (row, measure.name)
    known = torch.cat([every, flow.to_model(data.train.x.flip(3).float())]) if flip else every
    assert result["copying"] == [copying(*sets) for sets in asked]
    for x, points in zip(sets, asked, strict=True):
        for ours, theirs in zip((x, known, held_out), points, strict=True):
            assert torch.allclose(ours.flatten(1).double(), theirs.x, atol=1e-5)


def test_large_images_are_averaged_to_32_pixels(tmp_path):
    x = torch.arange(2 * 3 * 64 * 48.0).reshape(2, 3, 64, 48)
    small = evaluation_callback._shrink(x)
    assert torch.allclose(small[:, :, :, ::2][..., 0], x.reshape(2, 3, 32, 2, 48)[..., :2].mean((3, 4)), rtol=1e-5)
    assert small.shape == (2, 3, 32, 32)
    assert evaluation_callback._shrink(x[:, :, :20]).shape == (2, 3, 20, 32)
    assert torch.equal(evaluation_callback._shrink(x[:, :, :9, :9]), x[:, :, :9, :9])
    assert evaluation_callback._shrink(x.flatten(1)).shape == (2, 3 * 64 * 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3}, "n = 3"),
        ({"reference": 2}, "reference = 2"),
        ({"likelihood": 1}, "likelihood = 1"),
    ],
)
def test_too_small_evaluations_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**options)


def test_a_single_held_out_sample_raises(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(9, 3)))
    base = ["--data=pfgm.data.Arrays", f"--data.path={tmp_path}/x.npy", "--model.net=pfgm.nn.TimeMLP", *SMALL]
    fit(tmp_path / "run", "--trainer.max_steps=1", base=base)
    with pytest.raises(ValueError, match="data: 1 held-out samples, but a test needs two or more"):
        train_cli.main(["test", *base, "--run_dir", str(tmp_path / "run")])


def test_features_of_points_raise(tmp_path):
    fit(tmp_path, "--trainer.max_steps=1")
    with pytest.raises(ValueError, match=r"features = inception: these need images, not samples of shape \(2,\)"):
        train_cli.main(["test", *TOY, "--run_dir", str(tmp_path), "--evaluation.features=inception"])


@pytest.mark.parametrize("mirrored", [False, True])
def test_nearest_picture_shows_samples_beside_their_nearest_training_images(mirrored, tmp_path):
    """Recognises each image by its brightness, and its left side by being dark."""
    train = torch.linspace(0.2, 1, 9)[:, None, None, None].repeat(1, 1, 32, 32)
    train[..., :16] = 0
    x = torch.tensor([0.52, 0.89, 0.33])[:, None, None, None] * (train[:1] > 0)
    x = x.flip(3) if mirrored else x
    known = torch.cat([train, train.flip(3)]) if mirrored else train
    evaluation_callback.save_nearest(tmp_path / "n.png", x, FeatureSet(x), train, FeatureSet(known), (0.0, 1.0), count=2)
    picture = np.asarray(Image.open(tmp_path / "n.png").convert("L")) / 255
    bright, dark = (8, 24) if mirrored else (24, 8)
    shown = [picture[18, 2 + bright + 34 * k] for k in range(8)]
    assert shown == pytest.approx([0.89, 0.9, 0.8, 1.0, 0.5, 0.52, 0.5, 0.6], abs=0.01)
    assert [picture[18, 2 + dark + 34 * k] for k in (0, 1, 2, 3, 5, 6)] == pytest.approx([0.0] * 6, abs=0.01)
