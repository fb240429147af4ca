"""Settings recommended for a data set, with the reasons, from what is measured on it."""

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

SAMPLES, NUMBERS = 2000, 2**27
"""At most so many samples, of so many numbers in all, are measured, at random."""


@dataclass(frozen=True)
class Recommendation:
    """A value and the reason for it."""

    value: Any
    reason: str


@dataclass(frozen=True)
class DataMeasurements:
    """Of the training data: how many, their summary, and in model units `widest`, the standard deviation along the direction
    in which they vary most, and `furthest`, the largest RMS of a sample.

    `mirrored` is the accuracy with which a nearest neighbour tells images from mirrored images, of so many `pairs`; None for
    other data.
    """

    count: int
    summary: DataSummary
    widest: float
    furthest: float
    mirrored: float | None
    pairs: int = 0

    @classmethod
    def of(cls, data: DataModule) -> "DataMeasurements":
        """Measure `data`."""
        order = torch.randperm(len(data.train), generator=rng.generator(data.seed))
        rows = order[: min(SAMPLES, max(2, NUMBERS // math.prod(data.shape)))]
        x = data.prepared(data.train[rows]).x.double()
        assert data.summary.mean is not None
        centred = x / data.summary.scale - data.summary.mean
        flat = centred.flatten(1)
        images = x.ndim == 4 and len(x) >= 4
        return cls(
            count=len(data.train),
            summary=data.summary,
            widest=widest(flat),
            furthest=float(flat.square().mean(1).max().sqrt()),
            mirrored=mirrored(centred) if images else None,
            pairs=len(x) // 2,
        )


def widest(x: Tensor) -> float:
    """Standard deviation of `x` [n, N] along its first principal direction.

    That is found on one half and measured on the other: on its own half it would be too large, by far in many dimensions.
    """
    a, b = x[::2], x[1::2]
    vectors = torch.linalg.eigh((a - a.mean(0)) @ (a - a.mean(0)).T).eigenvectors
    direction = F.normalize(vectors[:, -1] @ (a - a.mean(0)), dim=0)
    return float((b @ direction).std()) if len(b) > 1 else float(x.std())


def mirrored(x: Tensor) -> float:
    """How well a nearest neighbour tells one half of the images [n, C, H, W] from the other half, mirrored; .5: not at all."""
    small = F.adaptive_avg_pool2d(x, (min(x.shape[2], 8), min(x.shape[3], 8)))
    return metrics.nearest_neighbour_accuracy(small[::2], small[1::2].flip(3))


def recommend(measured: DataMeasurements, data: Mapping[str, Any], D: float | str, gpu: bool) -> dict[str, Any]:
    """A training configuration of nested names, some of whose values are Because; `data` is its data section."""
    D, s, n = check_dimensions(D), measured.summary, measured.count
    side = math.sqrt(math.prod(s.shape[1:]))  # of an image with as many pixels
    batch = _batch(side, n, gpu)
    images = max(5_000_000, min(200_000_000, 2000 * n)) if gpu else 1_000_000
    steps = round_down(images / batch.value)
    width = _width(s.shape, n, gpu)
    init = dict(data["init_args"]) | {"batch_size": batch}
    if measured.mirrored is not None:
        init["flip"] = _flip(measured)
    augmented = gpu and measured.mirrored is not None and D != 1 and n < 100_000
    model = {
        "D": _dimensions(D, s),
        "sigma_data": Recommendation(figure(s.sigma_data), "The RMS of the centred data in model units, measured."),
        "sigma_min": Recommendation(
            figure(recommended_sigma_min(s.sigma_data)), "sigma_data / 50: the last denoising removes the rest."
        ),
        "sigma_max": _sigma_max(measured, D),
        **_start(measured),
        "loss": _loss(measured, D, side),
        "net": _network(s.shape, n, width, gpu, augmented),
        "lr": _rate(batch.value, width, s.shape, D),
        "warmup_steps": round_down(steps / 20),
    }
    if augmented:
        law = {"probability": Recommendation(0.12, f"{n} images, few enough to be known by heart; EDM has .12 and .15.")}
        model["augment"] = {"class_path": "pfgm.data.Augment", "init_args": law}
    return {
        "seed_everything": 0,
        "data": {**data, "init_args": init},
        "model": model,
        "ema": {"half_life": min(500_000, images // 20), "warmup": 0.05},
        **({"speed": {"compile": True, "channels_last": len(s.shape) == 3}} if gpu else {}),
        "trainer": {
            "max_steps": Recommendation(steps, f"{images / 1e6:.0f} million samples, {images / n:.0f} times the data."),
            "val_check_interval": max(100, round_down(steps / 50)),
            **({"precision": "bf16-mixed"} if gpu else {}),
        },
    }


def _dimensions(D: float, s: DataSummary) -> Recommendation:
    reason = "1 is PFGM, inf diffusion. 128 has the best published FID on faces, by little; finite D bears errors of "
    reason += "the network better."
    if D != 1:
        reason += f" With PFGM's own objective (--D 1) M would be {_exponent(s):.0f}."
    return Recommendation("inf" if math.isinf(D) else int(D) if int(D) == D else D, reason)


def _exponent(s: DataSummary) -> float:
    """PFGM's M for these data."""
    return PoissonFlowNoise().exponent(s.norm, math.prod(s.shape))


def _batch(side: float, n: int, gpu: bool) -> Recommendation:
    most = 512 if side <= 32 and n >= 20_000 else int(256 * min(1.0, 64 / side) ** 2)
    reason = "EDM: 512 at 32 x 32, 256 at 64 x 64; as many pixels in larger images, and 64 at most for few samples or a CPU."
    return Recommendation(max(8, most if gpu and n >= 5000 else min(64, most)), reason)


def _rate(batch: int, width: int, shape: Sequence[int], D: float) -> Recommendation:
    if len(shape) == 1:
        return Recommendation(1e-3, "Adam's own.")
    name, reference, lr = ("EDM", 512, 1e-3) if math.prod(shape[1:]) <= 32**2 else ("EDM", 256, 2e-4)
    if D == 1:
        name, reference, lr = "PFGM", 128, 2e-4
    reason = f"{name}'s {lr:g} for batches of {reference} at width 128, by square roots of batch and width."
    return Recommendation(figure(lr * math.sqrt(batch / reference * 128 / width)), reason)


def _sigma_max(measured: DataMeasurements, D: float) -> Recommendation:
    s = measured.summary
    if D == 1:
        z_max = PoissonFlowNoise().z_max(s.norm, math.prod(s.shape))
        return Recommendation(figure(z_max), "Where the noise of M ends: sqrt(2/pi) sigma_end (1 + tau)^M.")
    rms, widest = recommended_sigma_max(measured.summary.sigma_data), math.sqrt(5) * measured.widest
    ratio = measured.widest / measured.summary.sigma_data
    reason = f"The larger of 80 sigma_data, {rms:.3g}, and {widest:.3g}. Along their first principal direction the data spread "
    reason += f"by {ratio:.1f} sigma_data; at sqrt(5) times that the prior is within .01 nats of a Gaussian so wide (D = inf)."
    return Recommendation(figure(max(rms, widest)), reason)


def _start(measured: DataMeasurements) -> dict[str, Recommendation]:
    """Where samples start, if not on the hemisphere."""
    if measured.furthest < 0.1 * recommended_sigma_max(measured.summary.sigma_data):
        return {}
    text = f"The furthest sample is at {measured.furthest:.3g}: heavy tails, for which there is no hemisphere around the data."
    return {"start": Recommendation("hyperplane", text)}


def _loss(measured: DataMeasurements, D: float, side: float) -> dict[str, Any]:
    s = measured.summary
    if D == 1 and s.condition_shape is None:
        M = Recommendation(figure(_exponent(s)), f"The published rule, from the mean norm of the data, {s.norm:.4g}, measured.")
        noise = {"class_path": "pfgm.training.PoissonFlowNoise", "init_args": {"M": M}}
        most = max(32, int(4096 * min(1.0, 32 / side) ** 2))
        charges = Recommendation(
            min(measured.count, most), "Published: 4096 charges at 32 x 32, 512 at 64 x 64, 32 at 256 x 256."
        )
        return {"class_path": "pfgm.training.PoissonFieldLoss", "init_args": {"reference_size": charges, "noise": noise}}
    shift = max(0.0, math.log(side / 64))
    reason = f"Of log(sigma / sigma_data), so P_mean = {math.log(s.sigma_data) + shift - 0.5:.2f}. EDM's -1.2 at .5"
    reason += f", and log({side:.0f}/64) for the size (arXiv 2301.11093)." if shift else ", at any size up to 64 x 64."
    wide = "P_std of EDM" + (", and half of that shift, so that small noise is met as often as there." if shift else ".")
    law = {"mean": Recommendation(figure(shift - 0.5), reason), "std": Recommendation(figure(1.2 + shift / 2), wide)}
    noise = {"class_path": "pfgm.training.ScaledLogNormal", "init_args": law}
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
    share = 0.2 if n < 5000 else 0.13 if n < 60_000 else 0.05
    arguments = {
        "width": Recommendation(width, "128 as published, from 5000 images of 32 x 32 on; else 64, and 32 for a CPU."),
        "multipliers": [1, 1, 2, 2, 4, 4][:levels] if side >= 128 else [1, 2, 2, 2, 2, 2][:levels],
        "blocks": 1 if not gpu else 4 if side <= 64 else 2,
        "attention_levels": [min(levels - 1, max(0, round(math.log2(side / 16))))],
        "dropout": Recommendation(share, f"{n} samples. EDM: .13 for 50,000, .05 for 70,000 faces; .2 for few is a guess."),
    }
    return {"class_path": "pfgm.nn.UNet", "init_args": arguments | ({"augmentation_size": 9} if augmented else {})}


def _flip(measured: DataMeasurements) -> Recommendation:
    assert measured.mirrored is not None
    margin = 3 * math.sqrt(0.25 / measured.pairs)
    text = f"A nearest neighbour tells images from mirrored ones in {measured.mirrored:.0%} of cases, by chance in 50%"
    if margin > 0.15:
        return Recommendation(False, f"{text}, but {measured.pairs} pairs are too few to tell.")
    return Recommendation(measured.mirrored < 0.5 + margin, f"{text} (3 standard errors: {margin:.0%}).")


def figure(value: float) -> float:
    """With three digits."""
    return float(f"{value:.3g}")


def round_down(value: float) -> int:
    """To two digits, at least 1."""
    unit = 10 ** max(0, len(str(int(value))) - 2)
    return max(1, int(value) // unit * unit)


def to_yaml(settings: Mapping[str, Any], depth: int = 0) -> str:
    """Nested settings as YAML, each reason in a comment above its value."""
    lines = []
    for name, value in settings.items():
        pad = "  " * depth
        if isinstance(value, Recommendation):
            lines += textwrap.wrap(value.reason, 100, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")
            value = value.value
        if isinstance(value, Mapping):
            lines += [f"{pad}{name}:", to_yaml(value, depth + 1)]
        else:
            plain = yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
            lines.append(f"{pad}{name}: {plain}")
    return "\n".join(lines)
