"""What `train.py test` measures: how far samples are from the data, and whether they are copies of it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F

from pfgm.core import rng
from pfgm.core.arguments import checked
from pfgm.data.batches import SampleSet
from pfgm.data.datamodule import DataModule
from pfgm.evaluation import metrics, plots
from pfgm.evaluation.features import extract, load_features, name_of
from pfgm.evaluation.metrics import HEADS, FeatureSet, compare
from pfgm.files.atomic import atomic_write
from pfgm.sampling.ode import SolverError
from pfgm.training.module import PFGM

BATCH = 250


class Evaluation(Callback):
    """In `test`: distances of `sets` disjoint sets of `n` samples to training and held-out data, printed and in test.json.

    They are distances of values in model space (images larger than 32 x 32 averaged to that), or, of images, of `features`:
    "inception", the file of a classifier (`train.py features`), or a network (see `features`). Samples are drawn with the
    labels and under the conditions of random training samples, if there are any. Of larger data sets `reference` samples chosen
    at random stand for all; but copies are looked for among all training data, mirrored too if they are so in training, and
    nearest.png shows the images most like one of them beside it. Held-out data, `likelihood` of them at most, get their
    bits/dim with its standard error, if they are discrete and the model has such a likelihood.
    """

    @checked
    def __init__(
        self,
        n: int = 1000,
        sets: int = 3,
        likelihood: int = 1000,
        reference: int = 10_000,
        features: nn.Module | str | None = None,
    ):
        if n < 4 or sets < 1 or likelihood < 0 or likelihood == 1 or reference < 4:
            raise ValueError(
                f"n = {n}, sets = {sets}, likelihood = {likelihood}, reference = {reference}: give n >= 4, at least one set, "
                "likelihood 0 or >= 2, reference >= 4"
            )
        self.n, self.sets, self.likelihood, self.reference = n, sets, likelihood, reference
        self.features = features
        self.net: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """ValueError or OSError for too little data, for features that cannot be had, or that are not for this data."""
        if stage != "test":
            return
        assert isinstance(pl_module, PFGM)
        flow, data = pl_module.flow, _data(trainer)
        for name, part in (("training", data.train), ("held-out", data.held_out)):
            if len(part) < 2:
                raise ValueError(f"data: {len(part)} {name} samples; a test compares with two or more, give more data")
        if self.features is None:
            return
        if flow.summary.value_range is None or not plots.is_image(flow.shape):
            raise ValueError(f"features = {self.features}: they are of images, not of {flow.shape}; leave it out")
        self.net = load_features(self.features)
        try:
            extract(self.net, data.held_out.x[:1], flow.summary.value_range, pl_module.device)
        except RuntimeError as error:
            raise ValueError(f"features = {self.features}: this network does not take images {flow.shape}: {error}") from error

    @rank_zero_only
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PFGM)
        data = _data(trainer)
        given = data.prepared(data.train[shuffled(len(data.train)).repeat(-(-self.n // len(data.train)))[: self.n]])
        under: Any = {"labels": given.label, "condition": _conditions(given)}
        draws = [pl_module.flow.sample(self.n, seed=seed, **under) for seed in range(self.sets)]
        sets = [FeatureSet(self._compared(pl_module, draw.x)) for draw in draws]
        every = self._compared(pl_module, data.train.x)
        train = FeatureSet(every[shuffled(len(every))[: self.reference]])
        held_out = FeatureSet(self._compared(pl_module, data.held_out.x[shuffled(len(data.held_out))[: self.reference]]))
        if data.augmentation.flip:
            every = torch.cat([every, self._compared(pl_module, data.train.x, mirrored=True)])
        known = FeatureSet(every)
        result = {
            "compared": self._what(pl_module),
            "samples against training data": compare(sets, train),
            "samples against held-out data": compare(sets, held_out),
            "held-out against training data": compare([held_out], train),
            "copying": [metrics.copying(points, known, held_out) for points in sets],
            "calls": max(draw.calls for draw in draws),
            "seconds": sum(draw.seconds for draw in draws),
            "samples": [self.sets, self.n],
            "reference": [len(train), len(held_out)],
            "test_loss": float(trainer.callback_metrics["test_loss"]),
            "bits/dim": self._bits_per_dim(pl_module, data) if self.likelihood else "not asked for",
        }
        with atomic_write(Path(trainer.default_root_dir) / "test.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
        if plots.is_image(pl_module.flow.shape):
            picture = Path(trainer.default_root_dir) / "nearest.png"
            save_nearest(picture, draws[0].x, sets[0], data.train.x, known, pl_module.flow.summary.value_range)
        print(table(result))

    def _what(self, module: PFGM) -> str:
        """What is compared: figures can be, if it is the same."""
        if self.net is not None:
            return name_of(self.net)
        small = _averaged(torch.empty(1, *module.flow.shape, device="meta")).shape[1:]
        return "values in model space" + ("" if small == module.flow.shape else f", averaged to {small[1]} x {small[2]}")

    def _compared(self, module: PFGM, x: Any, mirrored: bool = False) -> Tensor:
        """What is compared of samples [n, ...] in the user's units, batch by batch: [n, ...] on the module's device."""
        parts = []
        for i in range(0, len(x), BATCH):
            batch = x[i : i + BATCH].to(module.device, torch.float32)
            batch = batch.flip(-1) if mirrored else batch
            if self.net is None:
                parts.append(_averaged(module.flow.to_model(batch)))
            else:
                assert module.flow.summary.value_range is not None
                parts.append(extract(self.net, batch, module.flow.summary.value_range, module.device))
        return torch.cat(parts)

    def _bits_per_dim(self, module: PFGM, data: DataModule) -> list[float] | str:
        """Mean over held-out data and its standard error, or why there is none."""
        try:
            module.flow.check_discrete()
        except ValueError as error:
            return str(error)
        try:
            bits = torch.cat([*self._bits(module, data)])
        except SolverError as error:
            return f"bits/dim: {error}"
        return [float(bits.mean()), float(bits.std() / len(bits) ** 0.5)]

    def _bits(self, module: PFGM, data: DataModule) -> Iterator[Tensor]:
        """Of held-out data, by batches."""
        part = data.held_out[shuffled(len(data.held_out))[: self.likelihood]]
        part = dataclasses.replace(part, conditions=data.prepared(part).conditions)
        for k, i in enumerate(range(0, len(part), BATCH)):
            batch = part[slice(i, i + BATCH)]
            x, given = batch.x.to(module.device), {"labels": batch.label, "condition": _conditions(batch)}
            yield module.flow.bits_per_dim(x, seed=k, rtol=1e-3, atol=1e-3, **given)


def _conditions(samples: SampleSet) -> dict[str, Tensor] | None:
    """Return the conditions of samples without their labels; None for none."""
    return {key: value for key, value in samples.conditions.items() if key != "label"} or None


def _data(trainer: pl.Trainer) -> DataModule:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return data


def shuffled(n: int) -> Tensor:
    """0..n-1 in an order that is always the same: files come sorted by class."""
    return torch.randperm(n, generator=rng.generator(0))


def _averaged(x: Tensor) -> Tensor:
    """Images [n, C, H, W] of 32 x 32 pixels at most; other samples as they are."""
    return F.adaptive_avg_pool2d(x, (min(x.shape[2], 32), min(x.shape[3], 32))) if x.ndim == 4 else x


def save_nearest(
    path: Path, x: Tensor, points: FeatureSet, train: Any, known: FeatureSet, value_range: plots.ValueRange, count: int = 24
) -> None:
    """The samples `x` most like a training image, each before its three nearest of `train`; `points`, `known` are compared.

    If `known` is twice as many as `train`, the second half are mirrored ones. Two groups in a row, with gaps between them.
    """
    distance, index = (found.cpu() for found in metrics.nearest(points, known, min(3, len(known))))
    first = distance[:, 0].argsort()[:count]
    chosen = index[first].flatten()
    images = train[chosen % len(train)].to(x.dtype)
    images = torch.where((chosen >= len(train))[:, None, None, None], images.flip(-1), images).unflatten(0, (len(first), -1))
    found = torch.cat([x[first, None].cpu(), images], dim=1)
    low, high = value_range or (float(found.min()), float(found.max()))
    rows = torch.cat([found, torch.full_like(found[:, :1], (low + high) / 2)], dim=1)
    plots.save_grid(path, rows.flatten(0, 1), (low, high), columns=2 * rows.shape[1])


def table(result: dict[str, Any]) -> str:
    """The result as a table: mean and, over several sets, standard deviation."""
    sets, n = result["samples"]
    lines = [f"{sets} sets of {n} samples, {result['calls']} network calls, {result['seconds']:.1f} s; mean (sd over sets)"]
    train, held_out = result["reference"]
    lines.append(f"compared: {result['compared']}; {train} training and {held_out} held-out samples")
    lines.append(f"{'':32}" + "".join(f"{head:>18}" for head in HEADS))
    for name, row in result.items():
        if isinstance(row, dict):
            lines.append(f"{name:32}" + "".join(f"{_mean_sd(values):>18}" for values in row.values()))
    lines.append(
        f"{'copying':32}{_mean_sd(result['copying']):>18}  (samples nearer to training data than held-out data are; "
        "new data: .5, copies: 1)"
    )
    bits = result["bits/dim"]
    lines.append(f"held-out bits/dim {bits[0]:.3f} ({bits[1]:.3f})" if isinstance(bits, list) else bits)
    return "\n".join(lines)


def _mean_sd(values: list[float]) -> str:
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.4f}" + (f" ({x.std():.4f})" if len(x) > 1 else "")
