"""The command line of sample.py: drawing, and by a first word one of the other commands."""

import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

from pfgm.cli import console
from pfgm.cli.arguments import PARSER_MODE, check_configs, join_pair
from pfgm.cli.average import average
from pfgm.cli.edit import decode, encode, interpolate, vary
from pfgm.cli.generate import draw
from pfgm.cli.options import add_command, call_command

COMMANDS: dict[str, Callable[..., None]] = {
    "encode": encode,
    "decode": decode,
    "interpolate": interpolate,
    "vary": vary,
    "average": average,
}


def main(args: Sequence[str] | None = None) -> None:
    """An error of the user's making is one line on stderr and exit code 2; see `pfgm.cli.console`."""
    console.run("sample.py", command, sys.argv[1:] if args is None else args)


def command(words: list[str]) -> None:
    """What the first of `words` names, or drawing."""
    check_configs(words)
    function = COMMANDS.get(words[0], draw) if words else draw
    prog = "sample.py" if function is draw else f"sample.py {words.pop(0)}"
    parser = ArgumentParser(prog=prog, parser_mode=PARSER_MODE, exit_on_error=False)
    parser.add_argument("--config", action="config")
    add_command(parser, function)
    call_command(function, parser.parse_args(join_pair(words)))
