"""Features of images in which `metrics` compares sets of them: Inception's, a small classifier's, or any network's.

A feature network is a module that maps images [n, C, H, W] in [0, 1] to features [n, F].
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
    """Classify images with a small convolutional network whose pooled last layer serves as features.

    Convolutions alternate with poolings until a side has 4 pixels or fewer.

    Args:
        channels: Channels of the images.
        classes: Number of classes.
        width: Channels of the first layer; there are 4 `width` features. A multiple of 4.
    """

    def __init__(self, channels: int, classes: int, width: int = 32):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second, self.third = ConvBlock(width, 2 * width), ConvBlock(2 * width, 4 * width)
        self.last = ConvBlock(4 * width, 4 * width)
        self.out = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, C, H, W] in [0, 1] to features [n, 4 width]."""
        x = F.silu(self.first(2 * x - 1))
        x = self.third(downsample(self.second(downsample(x))))
        while min(x.shape[2:]) > 4:
            x = downsample(x)
        return self.last(x).mean((2, 3))


class ConvBlock(nn.Module):
    """Apply two convolutions, each with group normalisation and SiLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.one = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.two = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm_one, self.norm_two = nn.GroupNorm(8, out_channels), nn.GroupNorm(8, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm_one(self.one(x)))
        return F.silu(self.norm_two(self.two(x)))


def downsample(x: Tensor) -> Tensor:
    """Halve height and width by averaging, if both are above 4 pixels."""
    return F.avg_pool2d(x, 2) if min(x.shape[2:]) > 4 else x


class Inception(nn.Module):
    """Compute the 2048 features of FID and KID with the Inception-v3 of 2015, by torch-fidelity, including its resizing.

    The weights are downloaded once to $TORCH_HOME/hub/checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ImportError("features = inception: the package torch-fidelity is missing. Run pip install 'pfgm[inception]'.")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_weights()))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, 1 or 3, H, W] in [0, 1], rounded to bytes, to features [n, 2048]."""
        images = (x * 255).round().clamp(0, 255).to(torch.uint8)
        return self.net(images.expand(-1, 3, -1, -1))[0]


def inception_weights() -> Path:
    """Return the file of the weights after downloading it if needed and checking that it unpickles to weights only."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path))
        except OSError as error:
            raise OSError(
                f"features = inception: there are no weights at {path} and the download failed ({first_line(error)}). Download "
                f"{INCEPTION} elsewhere and put it there, or train a classifier of your data with python train.py features."
            ) from error
    try:
        torch.load(path, weights_only=True, mmap=False)
    except Exception as error:  # unpickling can raise anything
        raise ValueError(
            f"features = inception: {path} does not contain weights ({type(error).__name__}). Delete it to download it again."
        ) from error
    return path


def load_features(value: str | Path | nn.Module) -> nn.Module:
    """Load a feature network in evaluation mode.

    Args:
        value: "inception", a classifier file written by `train.py features`, or a network, which is returned itself.

    Raises:
        ImportError: If torch-fidelity, which Inception needs, is not installed.
        OSError: If there is no such file, or if Inception's weights cannot be downloaded.
        ValueError: If the file does not contain a classifier or readable weights.
    """
    if isinstance(value, nn.Module):
        return value.eval()
    if value == "inception":
        return Inception().eval()
    if not Path(value).is_file():
        raise FileNotFoundError(
            f'features = {value}: there is no such file. Use "inception", a file of python train.py features, or a class path.'
        )
    header = checkpoints.read_header(value)
    spec = header.get("classifier")
    if not isinstance(spec, Mapping):
        raise ValueError(
            f"features = {value}: the file contains {sorted(header)}, no classifier. Make one with python train.py features."
        )
    state, place = checkpoints.read_tensors(value), f"features = {value}"
    net: Classifier = checkpoints.restore_module(lambda: build(spec, kind=Classifier), state, place)
    net.digest = header["digest"]
    return net.eval()


def describe_features(net: nn.Module) -> str:
    """Return the class and digest of a feature network; figures are comparable if this text is the same."""
    digest = getattr(net, "digest", None)
    return type(net).__name__ + (f" {digest[:12]}" if digest else "")


@torch.no_grad()
def extract(net: nn.Module, x: Tensor, value_range: Sequence[float], device: torch.device) -> Tensor:
    """Compute features [n, F] of images [n, C, H, W] in the user's units, clipped to `value_range`, on `device`."""
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
    """Train a classifier of images, by their labels or else by which of four rotations was applied (arXiv 1803.07728).

    The result depends only on the data, the arguments and the machine.

    Args:
        train: Images, in the user's units, and their labels if there are any.
        value_range: Black and white in the user's units.
        steps: Optimizer steps.
        batch_size: Images per step.
        width: See `Classifier`.
        lr: Peak learning rate of the one-cycle schedule.
        seed: Seed of the weights, the order of the images and the rotations.
        device: Where to train.

    Raises:
        ValueError: If the weights are not finite after training.
    """
    classes = 4 if train.label is None else int(train.label.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed(seed, rng.FEATURES))
        net = Classifier(train.x.shape[1], classes, width).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    batches = TrainingStream(train, Preparation(), batch_size=batch_size, seed=seed, start=0, reference_size=0)
    for step, batch in zip(range(steps), batches, strict=False):
        x, label = classification_batch(batch, value_range, seed, step)
        loss = F.cross_entropy(net.out(net(x.to(device))), label.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
        raise ValueError(f"lr = {lr}: the weights are not finite after {steps} steps. Use a lower learning rate.")
    return net.eval()


def classification_batch(batch: Batch | SampleSet, value_range: Sequence[float], seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Convert a batch to images in [0, 1] and their labels, or else to rotated central squares and their quarter turns."""
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
    """Compute the share of `part` that `net` classifies correctly. For other arguments see `fit_classifier`."""
    correct = 0
    for i in range(0, len(part), 250):
        x, label = classification_batch(part[slice(i, i + 250)], value_range, seed, i)
        correct += int((net.out(net(x.to(device))).argmax(1).cpu() == label).sum())
    return correct / len(part)


def save_classifier(path: str | Path, net: Classifier, made: Mapping[str, Any]) -> None:
    """Write `net` to a safetensors file, with a record `made` of the data and settings that it was trained with."""
    checkpoints.write_tensors(path, net.state_dict(), {"classifier": net.spec, "made": dict(made)})
