"""Training settings recommended for a data set, each with a reason, from measurements of the data."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from pfgm.core import rng
from pfgm.data.datamodule import DataModule
from pfgm.evaluation import metrics
from pfgm.theory.data_summary import DataSummary
from pfgm.theory.kernel import check_dimensions
from pfgm.training.noise import PoissonFlowNoise, recommended_sigma_max, recommended_sigma_min

MAX_SAMPLES, MAX_NUMBERS = 2000, 2**27  # limits of the random subset that is measured, in samples and in numbers


@dataclass(frozen=True)
class Recommendation:
    """Pair a value of the configuration with the reason for it."""

    value: Any
    reason: str

    @classmethod
    def rounded(cls, value: float, reason: str) -> "Recommendation":
        """Round `value` to three significant digits."""
        return cls(float(f"{value:.3g}"), reason)


@dataclass(frozen=True)
class DataMeasurements:
    """Hold what recommendations need to know of the training data.

    Args:
        count: Number of samples.
        summary: Statistics of all samples.
        principal_std: Standard deviation along the first principal direction, in model units.
        max_rms: Largest RMS of a centred sample, in model units.
        mirror_accuracy: Accuracy with which a nearest neighbour tells images from mirrored ones; None for other data.
        mirror_pairs: Number of pairs behind that accuracy.
    """

    count: int
    summary: DataSummary
    principal_std: float
    max_rms: float
    mirror_accuracy: float | None
    mirror_pairs: int = 0

    @classmethod
    def of(cls, data: DataModule) -> "DataMeasurements":
        """Measure a random subset of the training samples of `data`."""
        order = torch.randperm(len(data.train), generator=rng.generator(data.seed))
        rows = order[: min(MAX_SAMPLES, max(2, MAX_NUMBERS // math.prod(data.shape)))]
        x = data.prepared(data.train[rows]).x.double()
        assert data.summary.mean is not None
        centred = x / data.summary.scale - data.summary.mean
        flat = centred.flatten(1)
        return cls(
            count=len(data.train),
            summary=data.summary,
            principal_std=principal_std(flat),
            max_rms=float(flat.square().mean(1).max().sqrt()),
            mirror_accuracy=mirror_accuracy(centred) if x.ndim == 4 and len(x) >= 4 else None,
            mirror_pairs=len(x) // 2,
        )


def principal_std(x: Tensor) -> float:
    """Return the standard deviation of samples `x` [n, N] along their first principal direction.

    One half of the samples determines the direction and the other half the standard deviation. On the same samples the estimate
    would be too large, by far in many dimensions.
    """
    a, b = x[::2], x[1::2]
    vectors = torch.linalg.eigh((a - a.mean(0)) @ (a - a.mean(0)).T).eigenvectors
    direction = F.normalize(vectors[:, -1] @ (a - a.mean(0)), dim=0)
    return float((b @ direction).std()) if len(b) > 1 else float(x.std())


def mirror_accuracy(x: Tensor) -> float:
    """Return how accurately a nearest neighbour tells one half of images `x` [n, C, H, W] from the mirrored other half.

    An accuracy of 0.5 means that mirroring does not change the distribution. Images are compared at 8 x 8 pixels.
    """
    small = F.adaptive_avg_pool2d(x, (min(x.shape[2], 8), min(x.shape[3], 8)))
    return metrics.nearest_neighbour_accuracy(small[::2], small[1::2].flip(3))


def recommend(measured: DataMeasurements, data: Mapping[str, Any], D: float | str, gpu: bool) -> dict[str, Any]:
    """Recommend a training configuration.

    Args:
        measured: Measurements of the training data.
        data: Data section of the configuration, a class_path with init_args.
        D: Number of augmented dimensions; 1 gives PFGM with its own objective.
        gpu: Whether training has a GPU.

    Returns:
        Nested settings, some of whose values are `Recommendation`; `to_yaml` writes them.
    """
    D, s, n = check_dimensions(D), measured.summary, measured.count
    side = math.sqrt(math.prod(s.shape[1:]))  # of a square image with as many pixels
    batch = _batch_size(side, n, gpu)
    samples = max(5_000_000, min(200_000_000, 2000 * n)) if gpu else 1_000_000
    steps = round_down(samples / batch.value)
    width = _width(s.shape, n, gpu)
    is_image = measured.mirror_accuracy is not None
    augmented = gpu and is_image and D != 1 and n < 100_000
    sigma_min = recommended_sigma_min(s.sigma_data)
    model = {
        "D": _dimensions(D, s),
        "sigma_data": Recommendation.rounded(s.sigma_data, "The measured RMS of the centred data in model units."),
        "sigma_min": Recommendation.rounded(sigma_min, "sigma_data / 50; the last denoising step removes the remaining noise."),
        "sigma_max": _sigma_max(measured, D),
        **_start(measured),
        "loss": _loss(measured, D, side),
        "net": _network(s.shape, n, width, gpu, augmented),
        "lr": _learning_rate(batch.value, width, s.shape, D),
        "warmup_steps": round_down(steps / 20),
    }
    if augmented:
        probability = Recommendation(0.12, f"A network can memorize {n} images. EDM uses 0.12 and 0.15.")
        model["augment"] = {"class_path": "pfgm.data.Augment", "init_args": {"probability": probability}}
    init_args = dict(data["init_args"]) | {"batch_size": batch} | ({"flip": _flip(measured)} if is_image else {})
    return {
        "seed_everything": 0,
        "data": {**data, "init_args": init_args},
        "model": model,
        "ema": {"half_life": min(500_000, samples // 20), "warmup": 0.05},
        **({"speed": {"compile": True, "channels_last": len(s.shape) == 3}} if gpu else {}),
        "trainer": {
            "max_steps": Recommendation(steps, f"{samples / 1e6:.0f} million samples, {samples / n:.0f} passes over the data."),
            "val_check_interval": max(100, round_down(steps / 50)),
            **({"precision": "bf16-mixed"} if gpu else {}),
        },
    }


def _dimensions(D: float, s: DataSummary) -> Recommendation:
    reason = "D = 1 is PFGM, D = inf is diffusion. D = 128 has the best published FID on faces, by a small margin. Finite D "
    reason += "tolerates errors of the network better."
    if D != 1:
        reason += f" With PFGM's own objective (--D 1), M would be {_exponent(s):.0f}."
    return Recommendation("inf" if math.isinf(D) else int(D) if int(D) == D else D, reason)


def _exponent(s: DataSummary) -> float:
    return PoissonFlowNoise().exponent(s.mean_norm, math.prod(s.shape))


def _batch_size(side: float, n: int, gpu: bool) -> Recommendation:
    largest = 512 if side <= 32 and n >= 20_000 else int(256 * min(1.0, 64 / side) ** 2)
    reason = "EDM uses 512 at 32 x 32 and 256 at 64 x 64. Larger images get as many pixels per batch. Few samples or a CPU get "
    reason += "at most 64."
    return Recommendation(max(8, largest if gpu and n >= 5000 else min(64, largest)), reason)


def _learning_rate(batch_size: int, width: int, shape: Sequence[int], D: float) -> Recommendation:
    if len(shape) == 1:
        return Recommendation(1e-3, "The default of Adam.")
    name, published_batch, lr = ("EDM", 512, 1e-3) if math.prod(shape[1:]) <= 32**2 else ("EDM", 256, 2e-4)
    if D == 1:
        name, published_batch, lr = "PFGM", 128, 2e-4
    reason = (
        f"{name} uses {lr:g} for batches of {published_batch} at width 128; scaled by the square root of batch size / width."
    )
    return Recommendation.rounded(lr * math.sqrt(batch_size / published_batch * 128 / width), reason)


def _sigma_max(measured: DataMeasurements, D: float) -> Recommendation:
    s = measured.summary
    if D == 1:
        z_max = PoissonFlowNoise().z_max(s.mean_norm, math.prod(s.shape))
        return Recommendation.rounded(z_max, "The mean height z of the largest noise: sqrt(2/pi) sigma_end (1 + tau)^M.")
    by_rms, by_direction = recommended_sigma_max(s.sigma_data), math.sqrt(5) * measured.principal_std
    reason = f"The larger of 80 sigma_data = {by_rms:.3g} and {by_direction:.3g}, sqrt(5) times the standard deviation along "
    reason += (
        f"the first principal direction, {measured.principal_std / s.sigma_data:.1f} sigma_data. There the prior is within "
    )
    reason += "0.01 nats of Gaussian data of that width plus noise (D = inf)."
    return Recommendation.rounded(max(by_rms, by_direction), reason)


def _start(measured: DataMeasurements) -> dict[str, Recommendation]:
    """Recommend the hyperplane for heavy tails."""
    if measured.max_rms < 0.1 * recommended_sigma_max(measured.summary.sigma_data):
        return {}
    reason = f"The largest RMS of a sample is {measured.max_rms:.3g}. With such heavy tails, no hemisphere encloses the data."
    return {"start": Recommendation("hyperplane", reason)}


def _loss(measured: DataMeasurements, D: float, side: float) -> dict[str, Any]:
    s = measured.summary
    if D == 1 and not s.conditions:
        reason = f"The published rule for the measured mean norm of the data, {s.norm:.4g}."
        M = Recommendation.rounded(_exponent(s), reason)
        count = min(measured.count, max(32, int(4096 * min(1.0, 32 / side) ** 2)))
        charges = Recommendation(count, "PFGM uses 4096 charges at 32 x 32, 512 at 64 x 64 and 32 at 256 x 256.")
        noise = {"class_path": "pfgm.training.PoissonFlowNoise", "init_args": {"M": M}}
        return {"class_path": "pfgm.training.PoissonFieldLoss", "init_args": {"reference_size": charges, "noise": noise}}
    shift = max(0.0, math.log(side / 64))
    mean = (
        f"Of ln(sigma / sigma_data), so P_mean = {math.log(s.sigma_data) + shift - 0.5:.2f}. EDM uses -1.2 at sigma_data = 0.5"
    )
    mean += f"; ln({side:.0f}/64) is added for the size (arXiv 2301.11093)." if shift else ", at any size up to 64 x 64."
    std = "EDM's P_std" + (" plus half of that shift, so that low noise levels stay as frequent." if shift else ".")
    noise = {
        "class_path": "pfgm.training.ScaledLogNormal",
        "init_args": {
            "mean": Recommendation.rounded(shift - 0.5, mean),
            "std": Recommendation.rounded(1.2 + shift / 2, std),
        },
    }
    return {"class_path": "pfgm.training.DenoisingLoss", "init_args": {"noise": noise}}


def _width(shape: Sequence[int], n: int, gpu: bool) -> int:
    if len(shape) == 1:
        return 256 if n >= 2000 else 64
    return 128 if gpu and min(shape[1:]) > 16 and n >= 5000 else 64 if gpu else 32


def _network(shape: Sequence[int], n: int, width: int, gpu: bool, augmented: bool) -> dict[str, Any]:
    if len(shape) == 1:
        hidden = Recommendation(width, "64 for fewer than 2000 samples, else 256.")
        return {"class_path": "pfgm.nn.TimeMLP", "init_args": {"width": hidden, "depth": 3}}
    side = min(shape[1:])
    levels = min(6, max(2, round(math.log2(max(side, 8) / 4))))
    dropout = 0.2 if n < 5000 else 0.13 if n < 60_000 else 0.05
    arguments = {
        "width": Recommendation(
            width, "128, as published, for 5000 images or more above 16 x 16. Otherwise 64, or 32 on a CPU."
        ),
        "multipliers": [1, 1, 2, 2, 4, 4][:levels] if side >= 128 else [1, 2, 2, 2, 2, 2][:levels],
        "blocks": 1 if not gpu else 4 if side <= 64 else 2,
        "attention_levels": [min(levels - 1, max(0, round(math.log2(side / 16))))],
        "dropout": Recommendation(
            dropout, "EDM uses 0.13 for 50,000 images, 0.05 for 70,000 faces; 0.2 below 5000 is a guess."
        ),
    }
    return {"class_path": "pfgm.nn.UNet", "init_args": arguments | ({"augmentation_size": 9} if augmented else {})}


def _flip(measured: DataMeasurements) -> Recommendation:
    assert measured.mirror_accuracy is not None
    margin = 3 * math.sqrt(0.25 / measured.mirror_pairs)
    reason = f"A nearest neighbour tells images from mirrored ones in {measured.mirror_accuracy:.0%} of cases; chance is 50%"
    if margin > 0.15:
        return Recommendation(False, f"{reason}. With {measured.mirror_pairs} pairs, this is too uncertain.")
    return Recommendation(measured.mirror_accuracy < 0.5 + margin, f"{reason} (3 standard errors: {margin:.0%}).")


def round_down(value: float) -> int:
    """Round down to two digits, at least to 1."""
    unit = 10 ** max(0, len(str(int(value))) - 2)
    return max(1, int(value) // unit * unit)


def to_yaml(settings: Mapping[str, Any], depth: int = 0) -> str:
    """Write nested settings as YAML, each reason in a comment above its value."""
    lines = []
    for name, value in settings.items():
        pad = "  " * depth
        if isinstance(value, Recommendation):
            lines += textwrap.wrap(value.reason, 100, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")
            value = value.value
        if isinstance(value, Mapping):
            lines += [f"{pad}{name}:", to_yaml(value, depth + 1)]
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
            lines.append(f"{pad}{name}: {text}")
    return "\n".join(lines)
