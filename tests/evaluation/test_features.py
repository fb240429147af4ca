"""Feature networks: training, storage, errors, and which metric sees which degradation."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from pfgm.core import rng
from pfgm.data import Digits
from pfgm.data.batches import SampleSet
from pfgm.evaluation import features, metrics
from pfgm.evaluation.features import Classifier, accuracy, extract, fit_classifier, load_features, save_classifier
from pfgm.evaluation.metrics import FeatureSet
from pfgm.flow import checkpoints

RANGE = (-1.0, 1.0)


@pytest.fixture(scope="module")
def judge():
    """A classifier trained on half of the digits."""
    data = Digits(labels=True, held_out=0.5)
    net = fit_classifier(data.train, RANGE, steps=120, batch_size=64, width=16)
    return net, data


@pytest.mark.process
def test_classifier_learns_labels_or_rotations_and_is_reproducible(judge):
    net, data = judge
    assert accuracy(net, data.held_out, RANGE, 0) > 0.9
    turns = fit_classifier(SampleSet(data.train.x), RANGE, steps=60, batch_size=64, width=16)
    assert turns.out.out_features == 4
    assert accuracy(turns, SampleSet(data.held_out.x), RANGE, 0) > 0.5
    again = fit_classifier(SampleSet(data.train.x), RANGE, steps=60, batch_size=64, width=16)
    assert all(torch.equal(a, b) for a, b in zip(turns.parameters(), again.parameters(), strict=True)), "reproducible"


def test_unlabelled_batches_become_rotated_squares_labelled_by_their_turn():
    x = torch.randint(0, 256, (200, 3, 6, 8), dtype=torch.uint8)
    asked, turns = features.classification_batch(SampleSet(x), (0.0, 255.0), seed=1, step=2)
    square = x[:, :, :, 1:7].numpy() / 255
    for image, before, k in zip(asked.numpy(), square, turns.tolist(), strict=True):
        assert np.allclose(image, np.rot90(before, k, (1, 2)), atol=1e-6)
    assert turns.bincount().min() > 30
    same = features.classification_batch(SampleSet(x, {"label": turns}), (0.0, 255.0), seed=1, step=2)
    assert torch.allclose(same[0], x / 255)
    assert torch.equal(same[1], turns)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 20), (1, 3, 5), (3, 64, 64)])
def test_classifier_takes_any_image_size_and_reloads_with_equal_features(shape, tmp_path):
    net = Classifier(shape[0], 5, width=8).eval()
    x = torch.rand(7, *shape) * 255
    values = extract(net, x, (0.0, 255.0), torch.device("cpu"))
    assert values.shape == (7, 32)
    assert torch.allclose(values, net(x / 255), atol=1e-5)
    save_classifier(tmp_path / "a.safetensors", net, {"seed": 3})
    loaded = load_features(str(tmp_path / "a.safetensors"))
    assert torch.equal(extract(loaded, x, (0.0, 255.0), torch.device("cpu")), values)
    digest = checkpoints.read_header(tmp_path / "a.safetensors")["digest"]
    assert features.describe_features(loaded) == f"Classifier {digest[:12]}"


@pytest.mark.process
def test_any_network_serves_as_feature_network(judge):
    """Uses the means of the four quarters of an image."""
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    x = torch.rand(6, 1, 8, 8) * 2 - 1
    expected = ((x + 1) / 2).reshape(6, 2, 4, 2, 4).mean((2, 4)).flatten(1)
    assert torch.allclose(extract(net, x, RANGE, torch.device("cpu")), expected, atol=1e-6)
    assert load_features(net) is net
    assert float(extract(net, x * 9, RANGE, torch.device("cpu")).max()) <= 1, "values outside the range are clipped"


def test_unavailable_features_raise_with_a_remedy(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r'features = none: there is no such file\. Use "inception", a file of'):
        load_features("none")
    checkpoints.write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)}, {"step": 1})
    with pytest.raises(ValueError, match=r"no classifier. Make one with python train.py features"):
        load_features(str(tmp_path / "b.safetensors"))

    def offline(*args):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError, match=r"the download failed \(no network\)\. Download https://.*pth elsewhere and put it"):
        load_features("inception")
    weights = tmp_path / "hub" / "checkpoints" / features.INCEPTION.rpartition("/")[2]
    weights.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"does not contain weights .*Delete it to download it again"):
        load_features("inception")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pfgm\[inception\]'"):
        load_features("inception")


class Evil:
    """Runs code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.mark.process
def test_inception_receives_three_byte_channels_and_returns_2048_features(tmp_path, monkeypatch):
    """Uses random weights, stored as the published ones are."""
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
    """Return {kind: features of sets from slightly to badly degraded}, and those of training and of two held-out sets."""
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


@pytest.mark.process
def test_each_degradation_is_ranked_by_the_metrics_that_should_see_it(judge):
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
    assert metrics.precision(sets["classes"][2], train) > metrics.precision(real, train) - 0.1, "the rest is still real"
    copying = along(lambda s: metrics.copying(s, train, other), "copies")
    assert rises(copying)
    assert copying[0] == pytest.approx(0.5, abs=0.06)
    assert copying[3] > 0.99
    blurred, copied = (metrics.frechet_distance(sets[kind][k], train) for kind, k in (("blur", 1), ("copies", 2)))
    assert copied < blurred / 2, "the Fréchet distance does not see copies"
