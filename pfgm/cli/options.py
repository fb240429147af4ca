"""Options that several commands share, each declared once, and what they stand for: flows, seeds, conditions, measurements."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from pfgm.cli.arguments import PARSER_MODE
from pfgm.core.tensors import check_positive
from pfgm.files.arrays import ARRAYS, load_arrays, read_inputs
from pfgm.files.images import read_images
from pfgm.flow.loading import load
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.inverse import Mask, Measurement
from pfgm.sampling.sampler import seed_pairs

MAX_SEEDS = 10**7  # of one command


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded.

    Args:
        device: Device, such as cpu, cuda or cuda:1 (default: cuda if there is one; of several that of this process).
        ema: Whether to use the averaged weights rather than the raw ones.
        dtype: Type of the network's weights and arithmetic.
        trust: Modules outside pfgm whose networks the checkpoint may name.
    """

    device: str | None = None
    ema: bool = True
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    trust: list[str] = field(default_factory=list)

    def load(self, checkpoint: Path, local: int = 0) -> PoissonFlow:
        """Load a flow in float32; `local` is the number of this process on its machine."""
        return load(checkpoint, choose_device(self.device, local), self.ema, self.trust)

    def cast(self, flow: PoissonFlow) -> None:
        """Give the network of `flow` its dtype."""
        flow.denoiser.to(getattr(torch, self.dtype))


@dataclass(frozen=True)
class ConditionOptions:
    """Choose what samples are drawn under.

    Args:
        labels: One class for all samples, or several ([1,7,...]) in turn, each for as many samples.
        condition: Array file ("conditions", or a single array) or images; one for all samples, or several in turn.
    """

    labels: int | list[int] | None = None
    condition: Path | None = None


@dataclass(frozen=True)
class GuidanceOptions:
    """Choose how samples are guided.

    Args:
        guidance: Guidance scale, or one for each sample ([1,2,...]); 1 is none. Needs labels and label dropout, or a guide.
        guidance_interval: Noise levels (low, high), in model units, between which guidance acts (default: all).
        guide: Checkpoint of a weaker model of the same data, for autoguidance.
        inpaint: An image, and a mask that is white where the image is to be filled in: --inpaint image.png mask.png.
        measurement_noise: Noise of the image's known part, in the units of the data (default: the model's lowest noise level).
    """

    guidance: float | list[float] | None = None
    guidance_interval: tuple[float, float] | None = None
    guide: Path | None = None
    inpaint: tuple[Path, Path] | None = None
    measurement_noise: float | None = None


@dataclass(frozen=True)
class SeedOptions:
    """Which samples are drawn.

    Args:
        n: Number of samples (default: 64, or one for each condition or label); sample i is a function of (seed, i).
        seed: Seed of all n samples (default: 0).
        seeds: Instead of n and seed, one sample for each of these, such as 0-63 or 1,2,5-10.
    """

    n: int | None = None
    seed: int | None = None
    seeds: str | None = None

    def pairs(self, labels: int | list[int] | None, condition: Tensor | None) -> list[tuple[int, int]]:
        """Return (seed, index) of each sample; without n as many as there are conditions or labels, if several, else 64."""
        n = self.n
        if n is None and self.seeds is None:
            several = [len(one) for one in (condition, labels) if one is not None and not isinstance(one, int) and len(one) > 1]
            n = several[0] if several else 64
        return seed_pairs(n, self.seed, None if self.seeds is None else parse_seeds(self.seeds))


def choose_device(device: str | None, local: int = 0) -> torch.device:
    """Return the device of that name, or the best for process `local` of this machine.

    Raises:
        ValueError: If the device is unknown or not here.
    """
    try:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        chosen = torch.device(device or (f"cuda:{local % gpus}" if gpus else "cpu"))
        torch.empty(0, device=chosen).cpu()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError among them, of devices without memory
        raise ValueError(f"device = {device!r} cannot be used here ({str(error).partition(chr(10))[0]}); try cpu") from error
    return chosen


def parse_seeds(text: str) -> list[int]:
    """Parse "1,2,5-10" as a list of seeds. Raise ValueError for anything else."""
    seeds: list[int] = []
    try:
        for word in text.split(","):
            first, dash, last = word.strip().partition("-")
            rising = range(int(first), int(last if dash else first) + 1)
            if not rising or len(seeds) + len(rising) > MAX_SEEDS:
                raise ValueError
            seeds += rising
    except ValueError:
        raise ValueError(
            f"seeds = {text!r}: give numbers and rising ranges such as 0-63 or 1,2,5-10, none negative, {MAX_SEEDS} in all"
        ) from None
    return seeds


def repeat_in_turn(name: str, values: Any, n: int) -> Any:
    """Return a list or tensor of m values as one of `n`, each n/m times in turn; None and single numbers as they are.

    Raises:
        ValueError: If m does not divide n.
    """
    if values is None or isinstance(values, int) or len(values) == 1:
        return values[0] if isinstance(values, list) else values
    if not len(values) or n % len(values):
        raise ValueError(f"{name}: {len(values)} for {n} samples, in turn; give a number that divides {n}, or another n")
    return [*values] * (n // len(values)) if isinstance(values, list) else values[torch.arange(n) % len(values)]


def read_condition(path: Path | None, flow: PoissonFlow) -> Tensor | None:
    """Read the conditions [n, ...] of a flow, in the user's units, from arrays or images; None for no file.

    Raises:
        ValueError: If the model takes no condition, or several, or the file does not fit.
    """
    if path is None:
        return None
    shapes = flow.summary.conditions
    if not shapes:
        raise ValueError(f"condition = {path}: this model was trained without conditions; leave condition out")
    if len(shapes) > 1:
        raise ValueError(f"condition = {path}: this model takes {', '.join(shapes)}; give them in Python")
    (shape,) = shapes.values()
    return read_inputs(path, shape, flow.summary.value_range, "condition", key="conditions").to(flow.device)


def read_inpainting(paths: tuple[Path, Path] | None, noise: float | None, flow: PoissonFlow) -> Measurement | None:
    """Read the known part of an image, by a mask that is white, or True, where it is to be filled in."""
    if paths is None:
        if noise is not None:
            raise ValueError(f"measurement_noise = {noise}: nothing is measured; give inpaint as well")
        return None
    image = read_inputs(paths[0], flow.shape, flow.summary.value_range, "inpaint").to(flow.device)
    filled = read_mask(paths[1], flow.shape).to(flow.device)
    if len(image) != 1:
        raise ValueError(f"inpaint = {paths[0]}: {len(image)} images; give one")
    if noise is not None:
        check_positive("measurement_noise", noise)
    known = Mask(~filled)
    return Measurement(known, known(image), flow.sigma_min * flow.summary.scale if noise is None else noise)


def read_mask(path: Path, shape: Sequence[int]) -> Tensor:
    """Read a mask [*shape], True where it is white, or 1 in an array of the last dimensions of `shape`.

    Raises:
        ValueError: If the file is no mask of this shape, or the same everywhere.
    """
    if path.suffix in ARRAYS:
        mask = load_arrays(path, ["x"], name="inpaint")["x"]
        if tuple(mask.shape) != tuple(shape)[len(shape) - mask.ndim :] or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"inpaint = {path}: {tuple(mask.shape)} is no mask of {tuple(shape)}; give 1 to fill in, else 0")
    else:
        mask = read_images(path, (1, *shape[1:]), "inpaint", any_size=False)[0]
    filled = (mask > 0.5).expand(*shape)
    if bool((filled == filled.flatten()[0]).all()):
        raise ValueError(f"inpaint = {path}: the mask is the same everywhere; make it white where the image is to be filled in")
    return filled


def add_command(parser: ArgumentParser, function: Callable[..., None]) -> None:
    """Add the parameters of a command to `parser`: required ones by position, fields of dataclasses as flags of their own."""
    groups = option_groups(function)
    parser.add_function_arguments(function, as_positional=True, skip=set(groups))
    for group in groups.values():
        parser.add_class_arguments(group)


def command_parser(program: str, function: Callable[..., None]) -> ArgumentParser:
    """Make the parser of one command."""
    parser = ArgumentParser(prog=program, parser_mode=PARSER_MODE, exit_on_error=False)
    parser.add_argument("--config", action="config", help="File of options.")
    add_command(parser, function)
    return parser


def subcommand_parser(program: str, commands: Mapping[str, tuple[str, Callable[..., None]]]) -> ArgumentParser:
    """Make a parser of several commands, given by name with a summary and a function."""
    parser = ArgumentParser(prog=program, parser_mode=PARSER_MODE, exit_on_error=False)
    subcommands = parser.add_subcommands()
    for name, (summary, function) in commands.items():
        subcommands.add_subcommand(name, command_parser(f"{program} {name}", function), help=summary)
    return parser


def call_command(function: Callable[..., None], settings: Namespace) -> None:
    """Call a command with parsed settings, the dataclasses of its parameters made from their fields."""
    groups = option_groups(function)
    own = {name: settings[name] for name in inspect.signature(function).parameters if name not in groups}
    made = {name: group(**{f.name: settings[f.name] for f in fields(group)}) for name, group in groups.items()}
    function(**own, **made)


def option_groups(function: Callable[..., None]) -> dict[str, type]:
    """Return the parameters of `function` that are dataclasses, by their names."""
    hints = get_type_hints(function)
    return {name: hints[name] for name in inspect.signature(function).parameters if is_dataclass(hints[name])}
