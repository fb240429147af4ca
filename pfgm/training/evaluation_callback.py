"""Measure samples in `test`: their distances to the data, copies of training data, and the likelihood of held-out data."""

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
from pfgm.evaluation.features import describe_features, extract, load_features
from pfgm.evaluation.metrics import MEASURES, FeatureSet, compare
from pfgm.files.atomic import atomic_write
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.ode import SolverError
from pfgm.sampling.sampler import Samples
from pfgm.training.module import PFGM

BATCH_SIZE = 250  # samples whose features or likelihoods are computed at once


class Evaluation(Callback):
    """Compare generated samples with training and held-out data in `test`, print a table and write test.json.

    Samples are compared in model space, where images larger than 32 x 32 are averaged to that size, or by features of images.
    Labels and conditions of the samples are those of random training samples. Copies are searched among all training data,
    mirrored images included if training mirrors them; nearest.png shows the samples that are most like a training image beside
    it. Discrete held-out data also get their bits/dim with its standard error, if the model has such a likelihood.

    Args:
        n: Number of samples in a set, at least 4.
        sets: Number of disjoint sets; the table shows mean and standard deviation over them.
        likelihood: Number of held-out samples, at most, whose bits/dim is computed: 0 for none, or at least 2.
        reference: Number of random training samples, and of held-out ones, to compare with at most; at least 4.
        features: "inception", the file of a classifier (`train.py features`), or a network (see `pfgm.evaluation.features`).
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
                f"n = {n}, sets = {sets}, likelihood = {likelihood}, reference = {reference}: too few samples to compare. Use "
                "n >= 4, sets >= 1, reference >= 4, and likelihood 0 or >= 2."
            )
        self.n, self.sets, self.likelihood, self.reference = n, sets, likelihood, reference
        self.features = features
        self.net: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the feature network; raise ValueError or OSError if it does not fit the data or there are too few data."""
        if stage != "test":
            return
        assert isinstance(pl_module, PFGM)
        flow, data = pl_module.flow, _data(trainer)
        for name, part in (("training", data.train), ("held-out", data.held_out)):
            if len(part) < 2:
                raise ValueError(f"data: {len(part)} {name} samples, but a test needs two or more. Add data.")
        if self.features is None:
            return
        if flow.summary.value_range is None or not plots.is_image(flow.shape):
            raise ValueError(f"features = {self.features}: these need images, not samples of shape {flow.shape}. Leave it out.")
        self.net = load_features(self.features)
        try:
            extract(self.net, data.held_out.x[:1], flow.summary.value_range, pl_module.device)
        except RuntimeError as error:
            raise ValueError(
                f"features = {self.features}: this network does not take images of shape {flow.shape} ({error}). Use another."
            ) from error

    @rank_zero_only
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PFGM)
        data, folder = _data(trainer), Path(trainer.default_root_dir)
        samples = self._sample(pl_module.flow, data)
        sets = [FeatureSet(self._features(pl_module, one.x)) for one in samples]
        every = self._features(pl_module, data.train.x)
        train = FeatureSet(subsample(every, self.reference))
        held_out = FeatureSet(self._features(pl_module, subsample(data.held_out.x, self.reference)))
        if data.augmentation.flip:
            every = torch.cat([every, self._features(pl_module, data.train.x, mirror=True)])
        known = FeatureSet(every)
        result = {
            "compared": self._describe(pl_module.flow),
            "samples against training data": compare(sets, train),
            "samples against held-out data": compare(sets, held_out),
            "held-out against training data": compare([held_out], train),
            "copying": [metrics.copying(features, known, held_out) for features in sets],
            "calls": max(one.calls for one in samples),
            "seconds": sum(one.seconds for one in samples),
            "samples": [self.sets, self.n],
            "reference": [len(train), len(held_out)],
            "test_loss": float(trainer.callback_metrics["test_loss"]),
            "bits/dim": self._bits_per_dim(pl_module, data) if self.likelihood else "not asked for",
        }
        with atomic_write(folder / "test.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
        if plots.is_image(pl_module.flow.shape):
            save_nearest(folder / "nearest.png", samples[0].x, sets[0], data.train.x, known, pl_module.flow.summary.value_range)
        print(format_table(result))

    def _sample(self, flow: PoissonFlow, data: DataModule) -> list[Samples]:
        """Generate the sets with labels and conditions of random training samples."""
        count = len(data.train)
        like = data.prepared(data.train[permutation(count).repeat(-(-self.n // count))[: self.n]])
        under: Any = {"labels": like.label, "condition": _conditions(like)}
        return [flow.sample(self.n, seed=seed, **under) for seed in range(self.sets)]

    def _describe(self, flow: PoissonFlow) -> str:
        """Describe what is compared; the figures of two runs are comparable if this text is the same."""
        if self.net is not None:
            return describe_features(self.net)
        small = _shrink(torch.empty(1, *flow.shape, device="meta")).shape[1:]
        return "values in model space" + ("" if small == flow.shape else f", averaged to {small[1]} x {small[2]}")

    def _features(self, module: PFGM, x: Any, mirror: bool = False) -> Tensor:
        """Map samples [n, ...] in the user's units to the values that are compared, [n, ...] on the module's device."""
        parts = []
        for i in range(0, len(x), BATCH_SIZE):
            batch = x[i : i + BATCH_SIZE].to(module.device, torch.float32)
            batch = batch.flip(-1) if mirror else batch
            if self.net is None:
                parts.append(_shrink(module.flow.to_model(batch)))
            else:
                assert module.flow.summary.value_range is not None
                parts.append(extract(self.net, batch, module.flow.summary.value_range, module.device))
        return torch.cat(parts)

    def _bits_per_dim(self, module: PFGM, data: DataModule) -> list[float] | str:
        """Return the mean over held-out data and its standard error, or the reason why there is none."""
        try:
            module.flow.summary.check_discrete()
        except ValueError as error:
            return str(error)
        try:
            bits = torch.cat([*self._bits(module, data)])
        except SolverError as error:
            return f"bits/dim: {error}"
        return [float(bits.mean()), float(bits.std() / len(bits) ** 0.5)]

    def _bits(self, module: PFGM, data: DataModule) -> Iterator[Tensor]:
        part = subsample(data.held_out, self.likelihood)
        part = dataclasses.replace(part, conditions=data.prepared(part).conditions)
        for k, i in enumerate(range(0, len(part), BATCH_SIZE)):
            batch = part[slice(i, i + BATCH_SIZE)]
            x, conditions = batch.x.to(module.device), {"labels": batch.label, "condition": _conditions(batch)}
            yield module.flow.bits_per_dim(x, seed=k, rtol=1e-3, atol=1e-3, **conditions)


def _conditions(samples: SampleSet) -> dict[str, Tensor] | None:
    """Return the conditions of samples without their labels; None for none."""
    return {key: value for key, value in samples.conditions.items() if key != "label"} or None


def _data(trainer: pl.Trainer) -> DataModule:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return data


def permutation(n: int) -> Tensor:
    """Return a fixed random order of 0..n-1, since files often come sorted by class."""
    return torch.randperm(n, generator=rng.generator(0))


def subsample(x: Any, n: int) -> Any:
    """Return `n` random samples of `x`, always the same ones, or all of them in random order if there are fewer."""
    return x[permutation(len(x))[:n]]


def _shrink(x: Tensor) -> Tensor:
    """Average images [n, C, H, W] to at most 32 x 32 pixels; leave other samples as they are."""
    return F.adaptive_avg_pool2d(x, (min(x.shape[2], 32), min(x.shape[3], 32))) if x.ndim == 4 else x


def save_nearest(
    path: Path,
    x: Tensor,
    features: FeatureSet,
    train: Any,
    train_features: FeatureSet,
    value_range: plots.ValueRange,
    count: int = 24,
) -> None:
    """Save a picture of the samples that are most like a training image, each followed by its three nearest neighbours.

    Two groups share a row, with a gap after each.

    Args:
        path: PNG file to write.
        x: Samples [n, C, H, W] in the user's units.
        features: Features of `x`.
        train: Training images [m, C, H, W].
        train_features: Features of `train`, or of `train` followed by its mirror images.
        value_range: Black and white in the user's units.
        count: Number of samples to show.
    """
    distance, index = (t.cpu() for t in metrics.nearest(features, train_features, min(3, len(train_features))))
    first = distance[:, 0].argsort()[:count]
    chosen = index[first].flatten()
    images = train[chosen % len(train)].to(x.dtype)
    images = torch.where((chosen >= len(train))[:, None, None, None], images.flip(-1), images).unflatten(0, (len(first), -1))
    groups = torch.cat([x[first, None].cpu(), images], dim=1)
    low, high = value_range or (float(groups.min()), float(groups.max()))
    groups = torch.cat([groups, torch.full_like(groups[:, :1], (low + high) / 2)], dim=1)
    plots.save_grid(path, groups.flatten(0, 1), (low, high), columns=2 * groups.shape[1])


def format_table(result: dict[str, Any]) -> str:
    """Format the content of test.json as a table of means and, for several sets, standard deviations."""
    sets, n = result["samples"]
    lines = [f"{sets} sets of {n} samples, {result['calls']} network calls, {result['seconds']:.1f} s; mean (sd over sets)"]
    train, held_out = result["reference"]
    lines.append(f"compared: {result['compared']}; {train} training and {held_out} held-out samples")
    lines.append(f"{'':32}" + "".join(f"{measure.heading:>18}" for measure in MEASURES))
    for name, row in result.items():
        if isinstance(row, dict):
            lines.append(f"{name:32}" + "".join(f"{_mean_sd(row[measure.name]):>18}" for measure in MEASURES))
    lines.append(
        f"{'copying':32}{_mean_sd(result['copying']):>18}  (share of samples nearer to training data than held-out data are; "
        "new samples: .5, copies: 1)"
    )
    bits = result["bits/dim"]
    lines.append(f"held-out bits/dim {bits[0]:.3f} ({bits[1]:.3f})" if isinstance(bits, list) else bits)
    return "\n".join(lines)


def _mean_sd(values: list[float]) -> str:
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.4f}" + (f" ({x.std():.4f})" if len(x) > 1 else "")
