"""Arguments of commands: seeds, devices, conditions, masks and configuration files."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import get_loader, set_loader
from torch import Tensor

from pfgm.core.configurable import ALIASES, renamed
from pfgm.core.tensors import check_positive
from pfgm.files import arrays
from pfgm.files.arrays import read_inputs
from pfgm.files.untrusted import read_text
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.inverse import Mask, Measurement
from pfgm.sampling.sampler import seed_pairs

PARSER_MODE = "pfgm"  # how jsonargparse calls `load_settings`


def join_pair(words: list[str]) -> list[str]:
    """`--inpaint image mask`, or `--draw.inpaint`, as `--inpaint ["image", "mask"]`, which is how the parser reads a pair."""
    found = [i for i, word in enumerate(words) if word in ("--inpaint", "--draw.inpaint")]
    if not found:
        return words
    i = found[0] + 1
    pair = words[i : i + 2]
    if len(pair) < 2 or pair[0].startswith("[") or any(word.startswith("--") for word in pair):
        return words
    return [*words[:i], json.dumps(pair), *words[i + 2 :]]


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a mapping with one key twice, of which the parser would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in names:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            names.add(key.value)
        return node


def load_settings(text: str) -> Any:
    """Parse a YAML text, with class paths of version 0.1 replaced by today's."""
    return renamed(get_loader("yaml")(text))


set_loader(PARSER_MODE, load_settings, (yaml.YAMLError,))


def renamed_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with class paths of version 0.1, alone or after "=", replaced by today's."""
    split = [word.rpartition("=") for word in words]
    return [f"{option}{equals}{ALIASES.get(value, value)}" for option, equals, value in split]


def check_configs(words: Sequence[str]) -> None:
    """ValueError or OSError, which names it, if a file after --config cannot be read as settings."""
    for word, after in pairwise([*words, ""]):
        option, joined, value = word.partition("=")
        path = value if joined else after
        if option in ("--config", "-c") and Path(path).is_file():  # others are for the parser
            read_config(path)


def read_config(path: str) -> dict[str, Any]:
    """The settings in a YAML file. ValueError or OSError, which names it, if there are none."""
    try:
        content = yaml.load(read_text(Path(path), f"config = {path}"), UniqueKeyLoader)
    except OSError as error:
        raise OSError(f"config = {path} cannot be read: {error.strerror}; give a YAML file of settings") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"config = {path} is no YAML ({told}); mend it, or give another") from error
    if not isinstance(content, dict):
        raise ValueError(f"config = {path} holds no settings but {type(content).__name__}; give those of configs/, for example")
    return content


MOST_SEEDS = 10**7
"""In one command."""


def parse_seeds(text: str) -> list[int]:
    """ "1,2,5-10" as a list of seeds. ValueError for anything else."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            some = range(int(first), int(last if dash else first) + 1)
            if not some or len(seeds) + len(some) > MOST_SEEDS:
                raise ValueError
            seeds += some
    except ValueError:
        raise ValueError(
            f"seeds = {text!r}: give numbers and rising ranges such as 0-63 or 1,2,5-10, none negative, {MOST_SEEDS} in all"
        ) from None
    return seeds


def solver_options(
    *,
    preset: str | None = None,
    method: str | None = None,
    coordinates: str | None = None,
    start: str | None = None,
    temperature: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    independent: bool = False,
    steps: int | None = None,
    grid: str | list[float] | None = None,
    s_churn: float | None = None,
    s_tmin: float | None = None,
    s_tmax: float | None = None,
    restart: list[tuple[float, float, int]] | None = None,
) -> dict[str, Any]:
    """How to follow the flow, as options of `PoissonFlow.sampler`.

    Args:
        preset: fast (6 calls), balanced (10 calls, the default) or reference (dopri5 at tolerance 1e-4).
        method: adaptive dopri5, dopri8, bosh3, adaptive_heun, or fixed ab2, ab3, euler, midpoint, heun2, rk4, or, for
            comparison, dpmpp_2m, dpmpp_3m, edm_heun (default: bosh3 if a tolerance is given, otherwise ab3).
        coordinates: angle (default) or log_sigma (that of dpmpp_2m, dpmpp_3m, edm_heun).
        start: hemisphere (default) or hyperplane.
        temperature: scales the prior (default 1; below it samples are more alike; useful from .8 to 1.2).
        rtol: relative tolerance of adaptive methods (default .05).
        atol: absolute tolerance of adaptive methods (default .05).
        independent: adaptive steps for each sample (adaptive_heun, bosh3, dopri5), so that it does not depend on its batch.
        steps: number of steps of fixed methods.
        grid: uniform, paced (default of ab3), rho, falling levels in model units, or optimized (for ab3; kept in a .json).
        s_churn: of one-step methods: noise added before the steps, as in EDM (default 0).
        s_tmin: lowest level at which it is added, in model units (default 0).
        s_tmax: highest level at which it is added (default inf).
        restart: intervals [[t_min, t_max, K], ...] of levels; each is passed K times more, lifted from t_min to t_max by noise.
    """
    return dict(locals())


def chosen_pairs(
    n: int | None, seed: int | None, seeds: str | None, labels: int | list[int] | None, condition: Tensor | None
) -> list[tuple[int, int]]:
    """(seed, index) of each sample: of `n` of `seed`, or of one for each of `seeds`; as many as there are conditions or labels,
    if there are several, otherwise 64."""
    if n is None and seeds is None:
        several = [len(one) for one in (condition, labels) if one is not None and not isinstance(one, int) and len(one) > 1]
        n = several[0] if several else 64
    return seed_pairs(n, seed, None if seeds is None else parse_seeds(seeds))


def in_turn(name: str, values: Any, n: int) -> Any:
    """A list or tensor of m values as one of `n`, each n/m times in turn; None and single numbers as they are.

    ValueError if m does not divide n.
    """
    if values is None or isinstance(values, int) or len(values) == 1:
        return values[0] if isinstance(values, list) else values
    if not len(values) or n % len(values):
        raise ValueError(f"{name}: {len(values)} for {n} samples, in turn; give a number that divides {n}, or another n")
    return [*values] * (n // len(values)) if isinstance(values, list) else values[torch.arange(n) % len(values)]


def read_condition(path: Path | None, flow: PoissonFlow) -> Tensor | None:
    """Conditions [n, *condition_shape] in the user's units from a file of arrays or of images; None for no file."""
    if path is None:
        return None
    if flow.condition_shape is None:
        raise ValueError(f"condition = {path}: this model was trained without conditions; leave condition out")
    return read_inputs(path, flow.condition_shape, flow.value_range, "condition", key="conditions").to(flow.mean.device)


def read_inpainting(paths: tuple[Path, Path] | None, noise: float | None, flow: PoissonFlow) -> Measurement | None:
    """The known part of an image, by a mask that is white, or True, where it is to be filled in."""
    if paths is None:
        if noise is not None:
            raise ValueError(f"measurement_noise = {noise}: nothing is measured; give inpaint as well")
        return None
    image = read_inputs(paths[0], flow.shape, flow.value_range, "inpaint").to(flow.mean.device)
    filled = read_mask(paths[1], flow.shape).to(flow.mean.device)
    if len(image) != 1:
        raise ValueError(f"inpaint = {paths[0]}: {len(image)} images; give one")
    if noise is not None:
        check_positive("measurement_noise", noise)
    known = Mask(~filled)
    return Measurement(known, known(image), flow.sigma_min * flow.scale if noise is None else noise)


def read_mask(path: Path, shape: Sequence[int]) -> Tensor:
    """A mask [*shape], True where it is white, or 1 in an array of the last dimensions of `shape`. ValueError if it is no mask,
    or the same everywhere."""
    if path.suffix in arrays.ARRAYS:
        mask = arrays.load_arrays(path, ["x"], name="inpaint")["x"]
        if tuple(mask.shape) != tuple(shape)[len(shape) - mask.ndim :] or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"inpaint = {path}: {tuple(mask.shape)} is no mask of {tuple(shape)}; give 1 to fill in, else 0")
    else:
        mask = arrays.read_images(path, (1, *shape[1:]), "inpaint", any_size=False)[0]
    filled = (mask > 0.5).expand(*shape)
    if bool((filled == filled.flatten()[0]).all()):
        raise ValueError(f"inpaint = {path}: the mask is the same everywhere; make it white where the image is to be filled in")
    return filled


def check_device(device: str | None, local: int = 0) -> torch.device:
    """The device of that name, or the best for process `local` of this machine. ValueError if it is unknown or not here."""
    try:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        place = torch.device(device or (f"cuda:{local % gpus}" if gpus else "cpu"))
        torch.empty(0, device=place).cpu()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError among them, of devices without memory
        raise ValueError(f"device = {device!r} cannot be used here ({str(error).partition(chr(10))[0]}); try cpu") from error
    return place
