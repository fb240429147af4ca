"""Features of images, in which `metrics` compares sets of them: Inception's, a small classifier's, any network's.

A feature network is a module that maps images [n, C, H, W] in [0, 1] to [n, F].
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfgm.core import rng
from pfgm.core.configurable import Configurable, build
from pfgm.data.batches import Batch, Preparation, SampleSet, TrainingStream
from pfgm.files.untrusted import first_line
from pfgm.flow import checkpoints

INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


class Classifier(Configurable, nn.Module):
    """A small convolutional classifier of images with `channels`; its features are the means of its last 4 `width` channels.

    Convolutions and poolings until a side has 4 pixels or fewer.
    """

    def __init__(self, channels: int, classes: int, width: int = 32):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second, self.third = Stage(width, 2 * width), Stage(2 * width, 4 * width)
        self.last = Stage(4 * width, 4 * width)
        self.out = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, C, H, W] in [0, 1] -> features [n, 4 width]."""
        x = F.silu(self.first(2 * x - 1))
        x = self.third(pooled(self.second(pooled(x))))
        while min(x.shape[2:]) > 4:
            x = pooled(x)
        return self.last(x).mean((2, 3))


class Stage(nn.Module):
    """Two normalised convolutions."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.one, self.two = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.norm_one, self.norm_two = nn.GroupNorm(8, after), nn.GroupNorm(8, after)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm_one(self.one(x)))
        return F.silu(self.norm_two(self.two(x)))


def pooled(x: Tensor) -> Tensor:
    """Half the size, if there is more than 4 pixels of each side."""
    return F.avg_pool2d(x, 2) if min(x.shape[2:]) > 4 else x


class Inception(nn.Module):
    """The 2048 features of FID and KID: Inception-v3 of 2015, by torch-fidelity, with its resizing.

    Its weights are downloaded once to $TORCH_HOME/hub/checkpoints. ImportError without torch-fidelity, OSError, which says
    where to put them, if they are not there and cannot be had.
    """

    def __init__(self) -> None:
        super().__init__()
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ImportError("Inception needs the package torch-fidelity: pip install 'pfgm[inception]'")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_weights()))

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 1 or 3, H, W] in [0, 1], rounded to bytes -> [n, 2048]."""
        images = (x * 255).round().clamp(0, 255).to(torch.uint8)
        return self.net(images.expand(-1, 3, -1, -1))[0]


def inception_weights() -> Path:
    """Their file, which holds weights and nothing else. OSError or ValueError if there is none."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path))
        except OSError as error:
            raise OSError(
                f"features = inception: no weights at {path}, and they cannot be downloaded ({first_line(error)}). Download "
                f"{INCEPTION} elsewhere and put it there; or train a classifier of this data: python train.py features"
            ) from error
    try:
        torch.load(path, weights_only=True, mmap=False)
    except Exception as error:  # whatever unpickling makes of it
        raise ValueError(f"features = inception: {path} holds no weights ({type(error).__name__}); download it anew") from error
    return path


def load_features(value: str | Path | nn.Module) -> nn.Module:
    """A feature network: itself, "inception", or the file of a classifier. ValueError or OSError if there is none."""
    if isinstance(value, nn.Module):
        return value.eval()
    if value == "inception":
        return Inception().eval()
    path = Path(value)
    if not path.is_file():
        raise FileNotFoundError(
            f'features = {value} does not exist: give "inception", a file of python train.py features, or the class of a '
            "network"
        )
    header = checkpoints.read_header(path)
    if not isinstance(header.get("classifier"), Mapping):
        raise ValueError(f"features = {value} holds {sorted(header)}, no classifier; make one with python train.py features")
    state = checkpoints.read_tensors(path)
    net: Classifier = checkpoints.restore_module(
        lambda: build(header["classifier"], kind=Classifier), state, f"features = {value}"
    )
    net.digest = header["digest"]
    return net.eval()


def name_of(net: nn.Module) -> str:
    """What tells features from others: figures can be compared if it is the same."""
    digest = getattr(net, "digest", None)
    return type(net).__name__ + (f" {digest[:12]}" if digest else "")


@torch.no_grad()
def extract(net: nn.Module, x: Tensor, value_range: Sequence[float], device: torch.device) -> Tensor:
    """Features [n, F] of images [n, C, H, W] in the user's units, of which `value_range` is black and white."""
    low, high = value_range
    images = (x.to(device, torch.float32) - low) / (high - low)
    return net.to(device)(images.clamp(0, 1)).flatten(1)


def fit_classifier(
    train: SampleSet,
    value_range: Sequence[float],
    *,
    steps: int = 1000,
    batch_size: int = 128,
    width: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Classifier:
    """A classifier of the labels of images, or without labels of four rotations of their central squares.

    A function of the data and of `seed` on one machine. Source of the rotations: Gidaris et al. (arXiv 1803.07728).
    """
    classes = 4 if train.label is None else int(train.label.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed(seed, rng.FEATURES))
        net = Classifier(train.x.shape[1], classes, width).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    batches = TrainingStream(train, Preparation(), batch_size=batch_size, seed=seed, start=0, reference_size=0)
    for step, batch in zip(range(steps), batches, strict=False):
        x, label = questions(batch, value_range, seed, step)
        loss = F.cross_entropy(net.out(net(x.to(device))), label.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
        raise ValueError(f"lr = {lr}: the weights are not finite after {steps} steps; give a lower one")
    return net.eval()


def questions(batch: Batch | SampleSet, value_range: Sequence[float], seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and their classes: labels, or the quarter turns given to each."""
    x = (batch.x.float() - value_range[0]) / (value_range[1] - value_range[0])
    if "label" in batch.conditions:
        return x, batch.conditions["label"]
    side = min(x.shape[2:])
    top, left = ((length - side) // 2 for length in x.shape[2:])
    square = x[:, :, top : top + side, left : left + side]
    turns = (rng.uniform(len(x), rng.generator(seed, rng.FEATURES, step)) * 4).long()
    return torch.stack([image.rot90(k, (1, 2)) for image, k in zip(square, turns.tolist(), strict=True)]), turns


@torch.no_grad()
def accuracy(
    net: Classifier, part: SampleSet, value_range: Sequence[float], seed: int, device: torch.device | str = "cpu"
) -> float:
    """Share of `part` that `net` classifies rightly."""
    right = []
    for i in range(0, len(part), 250):
        x, label = questions(part[slice(i, i + 250)], value_range, seed, i)
        right.append(net.out(net(x.to(device))).argmax(1).cpu() == label)
    return float(torch.cat(right).double().mean())


def save_classifier(path: str | Path, net: Classifier, made: Mapping[str, Any]) -> None:
    """Write `net` to a safetensors file, with what it was `made` from."""
    checkpoints.write_tensors(path, net.state_dict(), {"classifier": net.spec, "made": dict(made)})
