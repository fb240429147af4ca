"""Commands before a run: `advise` recommends settings, `features` trains a classifier for the metrics of `test`."""

import inspect
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from pfgm.cli.arguments import PARSER_MODE, read_config
from pfgm.cli.options import choose_device
from pfgm.cli.outputs import check_writable
from pfgm.data.datamodule import DataModule
from pfgm.data.datasets import Arrays, ImageDataModule
from pfgm.data.image_dataset import ImageSurvey
from pfgm.data.image_sources import open_source
from pfgm.evaluation import plots
from pfgm.evaluation.features import accuracy, fit_classifier, save_classifier
from pfgm.files.arrays import ARRAYS
from pfgm.training.recommend import DataMeasurements, recommend, to_yaml


def features(
    data: DataModule,
    out: Path,
    *,
    steps: int = 1000,
    batch_size: int = 128,
    width: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Train a small classifier, whose features `train.py test --evaluation.features OUT` compares.

    The classifier learns the labels if data.labels is true or a CSV file, and otherwise by which quarter turn an image is
    rotated. Metrics of different runs are comparable if they use the same file.

    Args:
        data: Images; --config F takes them from the data section of a training configuration.
        out: Output file, ending in .safetensors.
        steps: Optimizer steps.
        batch_size: Images per step.
        width: Channels of the first layer, a multiple of 4; there are 4 times as many features.
        lr: Highest learning rate.
        seed: Seed of the initial weights and of the order of the images.
        device: Device such as cpu or cuda; by default a GPU if there is one.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out = {out}: give a file ending in .safetensors.")
    if min(steps, batch_size) < 1 or width < 4 or width % 4 or not lr > 0:
        raise ValueError(
            f"steps = {steps}, batch_size = {batch_size}, width = {width}, lr = {lr}: all must be positive, and width a "
            "multiple of 4."
        )
    check_writable(out.parent, "out", out)
    if not plots.is_image(data.shape) or data.summary.value_range is None:
        raise ValueError(f"data: features need images, not samples of shape {data.shape}. Pass a data set of images.")
    torch_device = choose_device(device)
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "width": width, "lr": lr, "seed": seed}
    net = fit_classifier(data.train, data.summary.value_range, device=torch_device, **settings)
    correct = accuracy(net, data.held_out, data.summary.value_range, seed, torch_device)
    task = "labels" if data.num_classes else "quarter turns"
    save_classifier(out, net, {"data": data.spec, "of": task, "held-out accuracy": correct, **settings})
    print(f"{correct:.4f} of the {task} of {len(data.held_out)} held-out images right -> {out}")


def advise(
    path: str,
    *,
    size: int | None = None,
    labels: bool | str = False,
    skip_damaged: bool = False,
    D: float | str = 128.0,
    gpu: bool | None = None,
    run_dir: str = "runs/mine",
) -> None:
    """Print a recommended configuration for a data set, with reasons: train.py advise photos > photos.yaml

    Args:
        path: Images, as pfgm.data.ImageDataModule reads them, or a .npy, .npz or .pt file of other samples.
        size: Image size; by default that of the images if they all have one, else the power of two below the median side, at
            most 64.
        labels: Whether to train with labels, or a CSV file of them.
        skip_damaged: Whether to leave damaged images out.
        D: Augmented dimensions, from 0.5 to inf; 1 gives PFGM with its own objective.
        gpu: Whether training has a GPU; by default whether this machine has one.
        run_dir: Folder of the run.
    """
    data = _open_data(path, size, labels, skip_damaged)
    gpu = torch.cuda.is_available() if gpu is None else gpu
    settings = recommend(DataMeasurements.of(data), _without_defaults(data.spec), D, gpu)
    print(f"# Recommended for {path}: {len(data.train)} training samples of shape {data.shape}.")
    if len(data.train) < 5000:
        print("# With so few samples, start from a model of similar data that has this network: --init_from other.ckpt.")
    print(to_yaml({"run_dir": run_dir} | settings))


def _open_data(path: str, size: int | None, labels: bool | str, skip_damaged: bool) -> DataModule:
    """Open `path` as images if possible, else as arrays. Raise ValueError or OSError if it is neither."""
    try:
        source = open_source(path)
    except ValueError:
        if not path.endswith(ARRAYS) or not isinstance(labels, bool):
            raise
        if size is not None:
            raise ValueError(f"size = {size}: {path} contains no images. Leave size out.") from None
        return Arrays(Path(path), labels=labels)
    forms = ImageSurvey.of(source).formats.values()
    if size is None and len({(form.height, form.width) for form in forms}) > 1:
        middle = statistics.median(min(form.height, form.width) for form in forms)
        size = min(64, 2 ** int(math.log2(middle)))
    return ImageDataModule(path, size=size, labels=labels, skip_damaged=skip_damaged)


def _without_defaults(spec: dict[str, Any]) -> dict[str, Any]:
    """Remove default values, seed and batch size from the spec of a data module."""
    class_ = Arrays if spec["class_path"].endswith("Arrays") else ImageDataModule
    parameters = inspect.signature(class_.__init__).parameters
    arguments = {
        name: value
        for name, value in spec["init_args"].items()
        if value != parameters[name].default and name not in ("seed", "batch_size")
    }
    return {**spec, "init_args": arguments}


COMMANDS: dict[str, Callable[..., None]] = {"features": features, "advise": advise}


def prepare(words: Sequence[str], program: str = "train.py") -> None:
    """Run the command named by the first of `words`, with the other words as its options."""
    auto_cli(
        COMMANDS[words[0]],
        args=_expand_config(words[1:]),
        as_positional=words[0] == "advise",
        prog=program if program.endswith(words[0]) else f"{program} {words[0]}",
        parser_mode=PARSER_MODE,
        exit_on_error=False,
    )


def _expand_config(words: Sequence[str]) -> list[str]:
    """Replace `--config F` by `--data` and the data section of F."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words[:-1]:
        return words
    i = words.index("--config")
    section = read_config(words[i + 1]).get("data")
    if not isinstance(section, dict):
        raise ValueError(f"config = {words[i + 1]} has no data section. Pass a training configuration.")
    return [*words[:i], "--data", json.dumps(section), *words[i + 2 :]]
