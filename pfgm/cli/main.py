"""The command `pfgm`: it lists the sub-commands and hands the words after one to the module that runs it.

Nothing heavy is imported before a sub-command is known, so that help comes at once.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A sub-command: what it does in a line, and the module and function that do it."""

    summary: str
    module: str
    function: str


GROUPS = {
    "train": {
        "fit": Command("Start a training run, or resume it.", "train", "fit"),
        "test": Command("Evaluate the newest checkpoint of a run.", "train", "test"),
    },
    "prepare": {
        "advise": Command("Print a recommended configuration for a data set, with reasons.", "prepare", "advise"),
        "features": Command("Train a classifier whose features the metrics of test compare.", "prepare", "features"),
    },
    "sample": {
        "sample": Command("Draw samples from a trained model.", "generate", "draw"),
        "average": Command("Export weights averaged over training with a width chosen now.", "average", "average"),
    },
    "edit": {
        "encode": Command("Follow the flow from data up to latents.", "edit", "encode"),
        "decode": Command("Follow the flow from latents down to data.", "edit", "decode"),
        "interpolate": Command("Interpolate between images or random samples.", "edit", "interpolate"),
        "vary": Command("Vary images: noise up to a level, and back.", "edit", "vary"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
SAMPLING = (*GROUPS["sample"], *GROUPS["edit"])  # the commands of sample.py
TRAINING = (*GROUPS["train"], *GROUPS["prepare"])  # the commands of train.py


def main(args: Sequence[str] | None = None) -> None:
    """Run `pfgm`, or with `args` in Python."""
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["--version"]:
        from pfgm import __version__

        print(f"pfgm {__version__}")
        return
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return
    debug, words = [word for word in words if word == "--debug"], [word for word in words if word != "--debug"]
    if words and words[0] in COMMANDS:
        run([*words, *debug], f"pfgm {words[0]}")
    else:
        print(
            f"pfgm: error: command = {' '.join(words[:1])}: choose one of {', '.join(COMMANDS)}; see pfgm --help",
            file=sys.stderr,
        )
        sys.exit(2)


def help_text() -> str:
    """Return the list of commands in groups."""
    lines = ["usage: pfgm COMMAND ...", "", "Train Poisson flow generative models and draw from them."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:12} {command.summary}" for name, command in commands.items())]
    return "\n".join([*lines, "", "pfgm COMMAND --help shows the options of a command."])


def sample(args: Sequence[str] | None = None) -> None:
    """Run sample.py: words that begin with no command are those of `sample`."""
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] in (["-h"], ["--help"]):
        from pfgm.cli.options import subcommand_parser

        subcommand_parser("sample.py", {name: (COMMANDS[name].summary, _function(name)) for name in SAMPLING}).print_help()
        return
    named = bool(words) and words[0] in SAMPLING
    run(words if named else ["sample", *words], "sample.py")


def run(words: list[str], program: str) -> None:
    """Run the command that `words` begin with; messages call it `program`."""
    from pfgm.cli import console

    if words[0] in TRAINING:
        from pfgm.cli import train

        console.run(program, lambda rest: train.command([words[0], *rest], program), words[1:], train.errors())
    else:
        console.run(program, lambda rest: _sampling_command(words[0], rest, program), words[1:])


def _sampling_command(name: str, words: list[str], program: str) -> None:
    from pfgm.cli.arguments import prepare_words
    from pfgm.cli.options import call_command, command_parser

    function = _function(name)
    call_command(function, command_parser(program, function).parse_args(prepare_words(words)))


def _function(name: str) -> Callable[..., Any]:
    command = COMMANDS[name]
    return getattr(importlib.import_module(f"pfgm.cli.{command.module}"), command.function)
