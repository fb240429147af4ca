"""Commands of train.py around a run, by a first word: a classifier whose features `test` compares."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli

from pfgm import plot
from pfgm.datamodule import DataModule
from pfgm.draw import check_device
from pfgm.features import accuracy, fit_classifier, save_classifier
from pfgm.output import check_writable


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
    if not plot.is_image(data.shape) or data.summary.value_range is None:
        raise ValueError(f"data: features are of images, not of samples of shape {data.shape}")
    place = check_device(device)
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "width": width, "lr": lr, "seed": seed}
    net = fit_classifier(data.train, data.summary.value_range, device=place, **settings)
    right = accuracy(net, data.held_out, data.summary.value_range, seed, place)
    kind = "labels" if data.num_classes else "quarter turns"
    save_classifier(out, net, {"data": data.spec, "of": kind, "held-out accuracy": right, **settings})
    print(f"{right:.4f} of the {kind} of {len(data.held_out)} held-out images right -> {out}")


COMMANDS: dict[str, Callable[..., None]] = {"features": features}


def prepare(words: Sequence[str]) -> None:
    """Run the command that the first of `words` names with the others as its options."""
    auto_cli(COMMANDS[words[0]], args=with_data_of(words[1:]), as_positional=False, prog=f"train.py {words[0]}")


def with_data_of(words: Sequence[str]) -> list[str]:
    """`words` with `--config F` replaced by `--data` and the data section of F."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words[:-1]:
        return words
    i = words.index("--config")
    section = yaml.safe_load(Path(words[i + 1]).read_text())["data"]
    return [*words[:i], "--data", json.dumps(section), *words[i + 2 :]]
