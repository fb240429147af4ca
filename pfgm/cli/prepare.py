"""Commands of train.py before a run, by a first word: advice on its settings, a classifier whose features `test` compares."""

import inspect
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from pfgm.cli.arguments import PARSER_MODE, check_device, read_config
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
    """Train a small classifier of the data, for `train.py test --evaluation.features OUT`.

    It learns the labels, if data.labels is true or a CSV file, else by which quarter turn an image was turned. Runs are
    comparable by the features of one file.

    Args:
        data: The images; --config F takes them from the data section of a training configuration.
        out: File to write, ending in .safetensors.
        steps: Optimizer steps.
        batch_size: Images in each.
        width: Channels of the first layer; there are 4 times as many features.
        lr: Highest learning rate.
        seed: Of weights and order.
        device: Such as cpu or cuda; default: a GPU if there is one.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out = {out}: give a file ending in .safetensors")
    if min(steps, batch_size) < 1 or width < 4 or width % 4 or not lr > 0:
        raise ValueError(
            f"steps = {steps}, batch_size = {batch_size}, width = {width}, lr = {lr}: give positive numbers, and as width a "
            "multiple of 4"
        )
    check_writable(out.parent, "out", out)
    if not plots.is_image(data.shape) or data.summary.value_range is None:
        raise ValueError(f"data: features are of images, not of samples of shape {data.shape}")
    place = check_device(device)
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "width": width, "lr": lr, "seed": seed}
    net = fit_classifier(data.train, data.summary.value_range, device=place, **settings)
    right = accuracy(net, data.held_out, data.summary.value_range, seed, place)
    kind = "labels" if data.num_classes else "quarter turns"
    save_classifier(out, net, {"data": data.spec, "of": kind, "held-out accuracy": right, **settings})
    print(f"{right:.4f} of the {kind} of {len(data.held_out)} held-out images right -> {out}")


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
    """Look at a data set and print a configuration for it, with the reasons: train.py advise photos > photos.yaml

    Args:
        path: Images, as pfgm.data.ImageDataModule takes them, or a .npy, .npz or .pt file of other samples.
        size: Of the images; default: theirs if all have one, else the power of two below the median side, at most 64.
        labels: Whether to train with labels, or a CSV file of them.
        skip_damaged: Leave damaged images out.
        D: Augmented dimensions, from .5 to inf; 1 gives PFGM with its own objective.
        gpu: Whether training has a GPU; default: whether this machine has one.
        run_dir: Folder of the run.
    """
    data = look_at(path, size, labels, skip_damaged)
    settings = recommend(DataMeasurements.of(data), trimmed(data.spec), D, torch.cuda.is_available() if gpu is None else gpu)
    print(f"# Recommended for {path}: {len(data.train)} training samples of shape {data.shape}.")
    if len(data.train) < 5000:
        print("# They are few: begin with the weights of a model of similar data with this network, --init_from other.ckpt.")
    print(to_yaml({"run_dir": run_dir} | settings))


def look_at(path: str, size: int | None, labels: bool | str, skip_damaged: bool) -> DataModule:
    """The data module for what is at `path`: images if it can be read so. ValueError or OSError if neither can read it."""
    try:
        source = open_source(path)
    except ValueError:
        if not path.endswith(ARRAYS) or not isinstance(labels, bool):
            raise
        if size is not None:
            raise ValueError(f"size = {size}: {path} holds no images; leave it out") from None
        return Arrays(Path(path), labels=labels)
    forms = ImageSurvey.of(source).formats.values()
    if size is None and len({(form.height, form.width) for form in forms}) > 1:
        middle = statistics.median(min(form.height, form.width) for form in forms)
        size = min(64, 2 ** int(math.log2(middle)))
    return ImageDataModule(path, size=size, labels=labels, skip_damaged=skip_damaged)


def trimmed(spec: dict[str, Any]) -> dict[str, Any]:
    """A data section without seed and batch size, and without what is as by default."""
    class_ = Arrays if spec["class_path"].endswith("Arrays") else ImageDataModule
    parameters = inspect.signature(class_.__init__).parameters
    given = {name: value for name, value in spec["init_args"].items() if value != parameters[name].default}
    return {**spec, "init_args": {name: value for name, value in given.items() if name not in ("seed", "batch_size")}}


COMMANDS: dict[str, Callable[..., None]] = {"features": features, "advise": advise}


def prepare(words: Sequence[str]) -> None:
    """Run the command that the first of `words` names with the others as its options."""
    positional, prog = words[0] == "advise", f"train.py {words[0]}"
    auto_cli(
        COMMANDS[words[0]],
        args=with_data_of(words[1:]),
        as_positional=positional,
        prog=prog,
        parser_mode=PARSER_MODE,
        exit_on_error=False,
    )


def with_data_of(words: Sequence[str]) -> list[str]:
    """`words` with `--config F` replaced by `--data` and the data section of F."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words[:-1]:
        return words
    i = words.index("--config")
    section = read_config(words[i + 1]).get("data")
    if not isinstance(section, dict):
        raise ValueError(f"config = {words[i + 1]} has no data section; give a training configuration")
    return [*words[:i], "--data", json.dumps(section), *words[i + 2 :]]
