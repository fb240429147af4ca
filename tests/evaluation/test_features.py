"""Feature networks, and what `test` reports by them."""

import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import gaussian_blur

import pfgm
from pfgm.cli import prepare
from pfgm.cli import train as train_cli
from pfgm.core import rng
from pfgm.data import Digits
from pfgm.data.batches import SampleSet
from pfgm.evaluation import features, metrics
from pfgm.evaluation.features import Classifier, accuracy, extract, fit_classifier, load_features, save_classifier
from pfgm.evaluation.metrics import FeatureSet
from pfgm.flow import checkpoints
from pfgm.training import evaluation_callback
from pfgm.training.evaluation_callback import Evaluation
from tests.helpers import ROOT, SMALL, TOY, fit

RANGE = (-1.0, 1.0)
DIGITS = ["--config", str(ROOT / "configs" / "digits_pfgmpp.yaml"), *SMALL]


@pytest.fixture(scope="module")
def judge():
    """A classifier of half of the digits."""
    data = Digits(labels=True, held_out=0.5)
    net = fit_classifier(data.train, RANGE, steps=120, batch_size=64, width=16)
    return net, data


def test_a_classifier_learns_labels_and_without_them_rotations(judge):
    net, data = judge
    assert accuracy(net, data.held_out, RANGE, 0) > 0.9
    turns = fit_classifier(SampleSet(data.train.x), RANGE, steps=60, batch_size=64, width=16)
    assert turns.out.out_features == 4
    assert accuracy(turns, SampleSet(data.held_out.x), RANGE, 0) > 0.5
    again = fit_classifier(SampleSet(data.train.x), RANGE, steps=60, batch_size=64, width=16)
    assert all(torch.equal(a, b) for a, b in zip(turns.parameters(), again.parameters(), strict=True)), "by the seed alone"


def test_rotated_images_are_asked_for_their_turn():
    x = torch.randint(0, 256, (200, 3, 6, 8), dtype=torch.uint8)
    asked, turns = features.questions({"x": x}, (0.0, 255.0), seed=1, step=2)
    square = x[:, :, :, 1:7].numpy() / 255
    for image, before, k in zip(asked.numpy(), square, turns.tolist(), strict=True):
        assert np.allclose(image, np.rot90(before, k, (1, 2)), atol=1e-6)
    assert turns.bincount().min() > 30
    same = features.questions({"x": x, "label": turns}, (0.0, 255.0), seed=1, step=2)
    assert torch.allclose(same[0], x / 255)
    assert torch.equal(same[1], turns)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 20), (1, 3, 5), (3, 64, 64)])
def test_classifiers_take_images_of_any_size_and_are_stored(shape, tmp_path):
    net = Classifier(shape[0], 5, width=8).eval()
    x = torch.rand(7, *shape) * 255
    values = extract(net, x, (0.0, 255.0), torch.device("cpu"))
    assert values.shape == (7, 32)
    assert torch.allclose(values, net(x / 255), atol=1e-5)
    save_classifier(tmp_path / "a.safetensors", net, {"seed": 3})
    loaded = load_features(str(tmp_path / "a.safetensors"))
    assert torch.equal(extract(loaded, x, (0.0, 255.0), torch.device("cpu")), values)
    digest = checkpoints.read_header(tmp_path / "a.safetensors")["digest"]
    assert features.name_of(loaded) == f"Classifier {digest[:12]}"


def test_features_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='features = none does not exist: give "inception", a file of'):
        load_features("none")
    checkpoints.write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)}, {"step": 1})
    with pytest.raises(ValueError, match=r"no classifier; make one with python train.py features"):
        load_features(str(tmp_path / "b.safetensors"))

    def offline(*args):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError, match=r"cannot be downloaded \(no network\). Download https://.*pth elsewhere and put it"):
        load_features("inception")
    weights = tmp_path / "hub" / "checkpoints" / features.INCEPTION.rpartition("/")[2]
    weights.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"holds no weights .*; download it anew"):
        load_features("inception")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pfgm\[inception\]'"):
        load_features("inception")


class Evil:
    """Code in a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_inception_gets_bytes_of_three_channels_and_gives_2048_features(tmp_path, monkeypatch):
    """With random weights, stored as the published ones are."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        net = kind("inception-v3-compat", ["2048"])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = tmp_path / "hub" / "checkpoints" / features.INCEPTION.rpartition("/")[2]
    weights.parent.mkdir(parents=True)
    torch.save(net.state_dict(), weights)
    x = torch.rand(2, 1, 12, 12, generator=rng.generator(0))
    values = load_features("inception")(x)
    expected = net((x * 255).round().to(torch.uint8).repeat(1, 3, 1, 1))[0]
    assert values.shape == (2, 2048)
    assert torch.equal(values, expected)


def degraded(judge):
    """{kind: sets from slightly to badly degraded}, each as Points, beside those of training and of two held-out sets."""
    net, data = judge
    x, label = data.held_out.x[:450], data.held_out.label[:450]
    noise = torch.randn(x.shape, generator=rng.generator(7))
    copies = [torch.cat([data.train.x[: int(450 * share)], x[int(450 * share) :]]) for share in (0.25, 0.5, 1.0)]
    sets = {
        "blur": [gaussian_blur(x, [5, 5], [width, width]) for width in (0.5, 0.7, 1.2)],
        "noise": [(x + 2 * std * noise).clamp(-1, 1) for std in (0.1, 0.2, 0.4)],
        "classes": [x[label < count].repeat(4, 1, 1, 1)[:450] for count in (8, 5, 2)],
        "copies": copies,
    }

    def points(images):
        return FeatureSet(extract(net, images, RANGE, torch.device("cpu")))

    return {kind: [points(s) for s in group] for kind, group in sets.items()}, *map(
        points, (data.train.x, x, data.held_out.x[450:])
    )


def test_each_degradation_is_ranked_by_the_measure_that_should_see_it(judge):
    sets, train, real, other = degraded(judge)

    def along(measure, kind):
        return [measure(real), *(measure(s) for s in sets[kind])]

    def rises(values):
        return all(a < b for a, b in itertools.pairwise(values))

    for measure in (metrics.frechet_distance, metrics.kernel_distance, metrics.energy_distance):
        for kind in ("blur", "noise", "classes"):
            assert rises(along(lambda s, m=measure: m(s, train), kind)), (measure.__name__, kind)
    for kind in ("blur", "noise"):
        assert rises(along(lambda s: -metrics.precision(s, train), kind)[1:]), kind
        assert metrics.precision(sets[kind][2], train) < metrics.precision(real, train) - 0.2
    assert rises(along(lambda s: -metrics.recall(s, train), "classes"))
    assert metrics.precision(sets["classes"][2], train) > metrics.precision(real, train) - 0.1, "what is left is still real"
    copying = along(lambda s: metrics.copying(s, train, other), "copies")
    assert rises(copying)
    assert copying[0] == pytest.approx(0.5, abs=0.06)
    assert copying[3] > 0.99
    blurred, copied = (metrics.frechet_distance(sets[kind][k], train) for kind, k in (("blur", 1), ("copies", 2)))
    assert copied < blurred / 2, "it cannot see copies"


def test_runs_are_tested_by_a_classifier_of_their_data(tmp_path, capsys):
    made = [
        "features",
        *DIGITS[:2],
        "--data.labels",
        "true",
        "--steps=3",
        "--width=8",
        "--out",
        str(tmp_path / "f.safetensors"),
    ]
    prepare.prepare(made)
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
        train_cli.main(
            ["test", *base, "--run_dir", str(tmp_path / "run"), "--evaluation.features=tests.evaluation.test_features.Colour"]
        )


class Colour(nn.Module):
    """A network for colour images."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.layer(x).mean((2, 3))


@pytest.mark.parametrize("flip", [False, True])
def test_what_is_reported_is_what_it_says(flip, tmp_path, monkeypatch):
    """Every figure again, from samples drawn here, for images that come sorted by class."""
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
        for name, measure in metrics.MEASURES.items():
            assert result[row][name] == pytest.approx([measure(x, theirs) for x in ours], rel=1e-5, abs=1e-6), (row, name)
    known = torch.cat([every, flow.to_model(data.train.x.flip(3).float())]) if flip else every
    assert result["copying"] == [copying(*sets) for sets in asked]
    for x, points in zip(sets, asked, strict=True):
        for ours, theirs in zip((x, known, held_out), points, strict=True):
            assert torch.allclose(ours.flatten(1).double(), theirs.x, atol=1e-5)


def test_large_images_are_compared_by_their_averages(tmp_path):
    x = torch.arange(2 * 3 * 64 * 48.0).reshape(2, 3, 64, 48)
    small = evaluation_callback._averaged(x)
    assert torch.allclose(small[:, :, :, ::2][..., 0], x.reshape(2, 3, 32, 2, 48)[..., :2].mean((3, 4)), rtol=1e-5)
    assert small.shape == (2, 3, 32, 32)
    assert evaluation_callback._averaged(x[:, :, :20]).shape == (2, 3, 20, 32)
    assert torch.equal(evaluation_callback._averaged(x[:, :, :9, :9]), x[:, :, :9, :9])
    assert evaluation_callback._averaged(x.flatten(1)).shape == (2, 3 * 64 * 48)


def test_figures_are_those_of_the_network_given(judge):
    """Of any network, here one whose features are the four quarters of an image."""
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    x = torch.rand(6, 1, 8, 8) * 2 - 1
    expected = ((x + 1) / 2).reshape(6, 2, 4, 2, 4).mean((2, 4)).flatten(1)
    assert torch.allclose(extract(net, x, RANGE, torch.device("cpu")), expected, atol=1e-6)
    assert load_features(net) is net
    assert float(extract(net, x * 9, RANGE, torch.device("cpu")).max()) <= 1, "as pictures would be clipped"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3}, "n = 3"),
        ({"reference": 2}, "reference = 2"),
        ({"likelihood": 1}, "likelihood = 1"),
    ],
)
def test_sizes_of_an_evaluation_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**options)


def test_one_held_out_sample_is_no_test(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(9, 3)))
    base = ["--data=pfgm.data.Arrays", f"--data.path={tmp_path}/x.npy", "--model.net=pfgm.nn.TimeMLP", *SMALL]
    fit(tmp_path / "run", "--trainer.max_steps=1", base=base)
    with pytest.raises(ValueError, match="data: 1 held-out samples; a test compares with two"):
        train_cli.main(["test", *base, "--run_dir", str(tmp_path / "run")])


def test_features_of_points_are_refused(tmp_path):
    fit(tmp_path, "--trainer.max_steps=1")
    with pytest.raises(ValueError, match=r"features = inception: they are of images, not of \(2,\)"):
        train_cli.main(["test", *TOY, "--run_dir", str(tmp_path), "--evaluation.features=inception"])


@pytest.mark.parametrize("mirrored", [False, True])
def test_samples_are_shown_beside_their_nearest_training_images(mirrored, tmp_path):
    """Brightness says which image is which, a dark left half which side is left."""
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out=a.pt"], "out = a.pt: give a file ending in .safetensors"),
        (["--out=a.safetensors", "--width=5"], "width = 5"),
        (["--out=a.safetensors", "--steps=0"], "steps = 0"),
        (["--out=a.safetensors", "--config", str(ROOT / "configs" / "heart.yaml")], r"not samples of shape \(2,\)"),
    ],
)
def test_bad_options_of_features_are_named(words, message, tmp_path):
    (tmp_path / "empty.yaml").write_text("model: 3")
    with pytest.raises(ValueError, match=r"empty.yaml has no data section"):
        prepare.prepare(["features", f"--config={tmp_path}/empty.yaml", *words])
    config = [] if "--config" in words else ["--config", str(ROOT / "configs" / "digits.yaml")]
    with pytest.raises(ValueError, match=message):
        prepare.prepare(["features", *config, *words])
