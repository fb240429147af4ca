"""Measurements of data against closed forms, and recommended configurations, which train."""

import math

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pfgm.cli import prepare
from pfgm.core import rng
from pfgm.data import Arrays, Digits
from pfgm.theory.data_summary import DataSummary
from pfgm.training import recommend as recommend_module
from pfgm.training.recommend import DataMeasurements, Recommendation, mirror_accuracy, principal_std, recommend, to_yaml
from tests.helpers import SMALL, fit, last

F64 = torch.float64


def test_principal_std_does_not_overestimate():
    noise = torch.randn(400, 2000, generator=rng.generator(0), dtype=F64)
    assert principal_std(noise) == pytest.approx(1.0, abs=0.15), "the largest eigenvalue of the sample would say 3.2"
    direction = torch.randn(2000, generator=rng.generator(1), dtype=F64)
    along = torch.randn(400, 1, generator=rng.generator(2), dtype=F64) * direction / direction.norm()
    assert principal_std(noise + 30 * along) == pytest.approx(math.sqrt(30**2 + 1), rel=0.12)
    # The Kullback-Leibler divergence of two Gaussians whose variances differ by 20%, as at sqrt(5) times the deviation:
    assert (0.2 - math.log(1.2)) / 2 < 0.01


def test_digits_differ_from_their_mirror_images():
    digits = Digits().train.x.double()
    assert mirror_accuracy(digits) > 0.6
    coin = torch.rand(len(digits), generator=rng.generator(3)) < 0.5
    either = torch.where(coin[:, None, None, None], digits.flip(3), digits)
    assert mirror_accuracy(either) == pytest.approx(0.5, abs=0.05)


def measured(shape=(3, 32, 32), count=50_000, **changes):
    summary = DataSummary(shape, 0.5, 0.5 * math.sqrt(math.prod(shape)), 0.1)
    values = {"count": count, "summary": summary, "principal_std": 5.0, "max_rms": 1.0}
    values |= {"mirror_accuracy": 0.51 if len(shape) == 3 else None, "mirror_pairs": 1000}
    return DataMeasurements(**values | changes)


def values(settings):
    """Remove the reasons."""
    if isinstance(settings, Recommendation):
        return values(settings.value)
    return {k: values(v) for k, v in settings.items()} if isinstance(settings, dict) else settings


DATA = {"class_path": "pfgm.data.ImageDataModule", "init_args": {"path": "x"}}


def test_the_configuration_for_cifar10_is_nearly_the_published_one():
    found = values(recommend(measured(), DATA, 128, gpu=True))
    model, net = found["model"], found["model"]["net"]["init_args"]
    assert (model["sigma_data"], model["D"], model["lr"], net["width"], net["blocks"]) == (0.5, 128, 1e-3, 128, 4)
    assert model["loss"]["init_args"]["noise"]["init_args"] == {"mean": -0.5, "std": 1.2}
    assert found["data"]["init_args"] == {"path": "x", "batch_size": 512, "flip": True}
    assert found["trainer"]["max_steps"] * 512 == pytest.approx(1e8, rel=0.05)
    assert net["attention_levels"] == [1]
    assert model["augment"]["init_args"] == {"probability": 0.12}
    assert net["augmentation_size"] == 9


def test_recommended_values_follow_the_measurements():
    def model(gpu=True, D=128, **changes):
        return values(recommend(measured(**changes), DATA, D, gpu))["model"]

    assert model()["sigma_max"] == 40
    assert model(principal_std=100.0)["sigma_max"] == pytest.approx(100 * math.sqrt(5), rel=0.01)
    large = model(shape=(3, 256, 256))
    law = large["loss"]["init_args"]["noise"]["init_args"]
    assert law["mean"] == pytest.approx(-0.5 + math.log(4), abs=0.01)
    assert law["mean"] - 2 * law["std"] == pytest.approx(-0.5 - 2 * 1.2, abs=0.02), "low noise levels stay as frequent"
    assert large["net"]["init_args"]["multipliers"] == [1, 1, 2, 2, 4, 4]
    assert large["net"]["init_args"]["attention_levels"] == [4]
    slices = values(recommend(measured(shape=(1, 512, 512), count=20_000), DATA, 128, True))
    assert (slices["data"]["init_args"]["batch_size"], model(shape=(1, 8, 8))["net"]["init_args"]["multipliers"]) == (8, [1, 2])
    signals = model(shape=(2, 1000))
    assert signals["loss"]["init_args"]["noise"]["init_args"]["mean"] == -0.5, "no more numbers than 32 x 32 pixels"
    assert signals["net"]["init_args"]["attention_levels"] == [5]
    assert "start" not in model()
    assert model(max_rms=10.0)["start"] == "hyperplane"
    pfgm = model(D=1)
    rule = 0.75 * math.log(0.25 * 3072 / (2 * math.sqrt(3072) * 0.01**2)) / math.log(1.03)
    assert pfgm["loss"]["init_args"]["noise"]["init_args"]["M"] == pytest.approx(rule, rel=0.005)
    assert pfgm["loss"]["init_args"]["reference_size"] == 4096
    assert model(D=1, shape=(3, 256, 256))["loss"]["init_args"]["reference_size"] == 64
    assert model(D=1, count=900)["loss"]["init_args"]["reference_size"] == 900
    assert pfgm["lr"] == pytest.approx(2e-4 * 2, rel=0.01), "512 for 128"
    assert model(shape=(3, 64, 64))["lr"] == pytest.approx(2e-4)
    assert model(gpu=False)["lr"] == pytest.approx(1e-3 * math.sqrt(64 / 512 * 128 / 32), rel=0.01)
    assert model(shape=(7,))["lr"] == 1e-3
    assert pfgm["sigma_max"] == pytest.approx(math.sqrt(2 / math.pi) * 0.01 * 1.03**rule, rel=0.005)
    assert "augment" not in pfgm
    assert model(gpu=False)["net"]["init_args"]["width"] == 32
    assert model(count=900)["net"]["init_args"]["dropout"] == 0.2
    assert model(shape=(7,))["net"]["class_path"] == "pfgm.nn.TimeMLP"
    assert model(D="inf")["D"] == "inf"
    for changes in ({"mirror_accuracy": 0.6}, {"mirror_accuracy": 0.45, "mirror_pairs": 60}, {"mirror_accuracy": 0.55}):
        assert not values(recommend(measured(**changes), DATA, 128, True))["data"]["init_args"]["flip"]
    text = to_yaml(recommend(measured(), DATA, 128, True))
    assert "so P_mean = -1.19" in text


def test_reasons_are_comments_above_their_values():
    text = to_yaml(
        {"a": Recommendation(3, "since " * 30), "b": {"c": [1, 2], "d": "torchvision:MNIST", "e": Recommendation("inf", "why")}}
    )
    assert yaml.safe_load(text) == {"a": 3, "b": {"c": [1, 2], "d": "torchvision:MNIST", "e": "inf"}}
    lines = text.splitlines()
    assert lines[0].startswith("# since since")
    assert max(map(len, lines)) <= 100
    assert lines[-2:] == ["  # why", "  e: inf"]


def pictures(folder):
    """Write coloured ramps, brighter to the right, of two sizes and two classes."""
    g = np.random.default_rng(0)
    for i in range(60):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0, 1, 20 + 4 * (i % 2))[None, :, None] * g.random(3) * np.ones((20, 1, 1))
        Image.fromarray((255 * ramp).astype(np.uint8)).save(path)
    return str(folder)


def vectors(path):
    np.save(path, np.random.default_rng(0).normal(size=(60, 5)) * 3 + 100)
    return str(path)


@pytest.mark.process
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda d: pictures(d / "photos"), ["--labels=true"]),
        (lambda d: pictures(d / "photos"), ["--D=1", "--size=8"]),
        (lambda d: vectors(d / "x.npy"), ["--D=inf"]),
    ],
)
def test_recommended_configurations_train(make, options, tmp_path, capsys):
    path = make(tmp_path)
    prepare.prepare(["advise", path, *options, "--run_dir", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert text.startswith(f"# Recommended for {path}: 54 training samples of shape")
    assert "--init_from" in text
    (tmp_path / "mine.yaml").write_text(text)
    base = ["--config", str(tmp_path / "mine.yaml"), *SMALL, "--data.batch_size=4"]
    base += ["--model.net.init_args.width=8"] if "photos" in path else []
    fit(tmp_path / "run", "--trainer.max_steps=1", base=base)
    settings, stored = yaml.safe_load(text), last(tmp_path / "run")["hyper_parameters"]
    assert stored["sigma_max"] == settings["model"]["sigma_max"]
    if "photos" in path:
        assert not settings["data"]["init_args"]["flip"], "ramps differ from their mirror images"
        assert settings["data"]["init_args"]["size"] == (8 if "--size=8" in options else 16)
        assert settings["data"]["init_args"].get("labels", False) == ("--labels=true" in options)


def test_a_random_subset_is_centred_and_measured(tmp_path, monkeypatch):
    """The samples are far from zero, and sorted into two clusters."""
    x = torch.randn(400, 3, generator=rng.generator(1), dtype=F64)
    x[200:, 0] += 20
    np.save(tmp_path / "x.npy", (x + 1000).numpy())
    data = Arrays(tmp_path / "x.npy", held_out=0.1)
    data.train = type(data.train)(data.train.x[data.train.x[:, 0].argsort()])
    monkeypatch.setattr(recommend_module, "MAX_SAMPLES", 100)
    found = DataMeasurements.of(data)
    assert found.principal_std * data.summary.scale == pytest.approx(math.sqrt(101), rel=0.1)
    assert found.max_rms * data.summary.scale < 10


def test_heavy_tails_start_on_the_hyperplane(tmp_path):
    np.save(tmp_path / "t.npy", np.random.default_rng(1).standard_t(1.5, size=(3000, 3)))
    data = Arrays(tmp_path / "t.npy")
    assert values(recommend(DataMeasurements.of(data), data.spec, 128, False))["model"]["start"] == "hyperplane"


def test_three_images_are_enough_for_advice(tmp_path, capsys):
    for i in range(3):
        Image.fromarray(np.full((8, 8), 90 * i, np.uint8)).save(tmp_path / f"{i}.png")
    prepare.prepare(["advise", str(tmp_path)])
    assert "flip" not in yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]


def test_unusable_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="path = nowhere: no such folder"):
        prepare.prepare(["advise", "nowhere"])
    np.save(tmp_path / "x.npy", np.zeros((9, 4)))
    with pytest.raises(ValueError, match="all 8 samples are equal"):
        prepare.prepare(["advise", str(tmp_path / "x.npy")])
    np.save(tmp_path / "y.npy", np.random.default_rng(0).normal(size=(9, 4)))
    with pytest.raises(ValueError, match=r"D = 0.2: out of range"):
        prepare.prepare(["advise", str(tmp_path / "y.npy"), "--D=.2"])


def test_values_are_rounded():
    assert [recommend_module.round_down(x) for x in (0.3, 7, 99.9, 123, 98765)] == [1, 7, 99, 120, 98000]
    assert Recommendation.rounded(0.123456, "").value == 0.123
