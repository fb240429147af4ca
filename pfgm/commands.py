"""The command line of sample.py: drawing, and by a first word one of the other commands."""

import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from pfgm import shell
from pfgm.draw import draw
from pfgm.edit import decode, encode, interpolate, vary
from pfgm.files.untrusted import read_text
from pfgm.flow.posthoc_ema import average

COMMANDS: dict[str, Callable[..., None]] = {
    "encode": encode,
    "decode": decode,
    "interpolate": interpolate,
    "vary": vary,
    "average": average,
}


def main(args: Sequence[str] | None = None) -> None:
    """An error of the user's making is one line on stderr and exit code 2; see `pfgm.shell`."""
    shell.run("sample.py", command, sys.argv[1:] if args is None else args)


def command(words: list[str]) -> None:
    """What the first of `words` names, or drawing."""
    from jsonargparse import auto_cli

    check_configs(words)
    function = COMMANDS.get(words[0]) if words else None
    prog = "sample.py" if function is None else f"sample.py {words.pop(0)}"
    auto_cli(function or draw, args=join_pair(words), as_positional=True, prog=prog, exit_on_error=False)


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


class OnceLoader(yaml.SafeLoader):
    """Refuses a mapping with one key twice, of which the parser would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in names:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            names.add(key.value)
        return node


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
        content = yaml.load(read_text(Path(path), f"config = {path}"), OnceLoader)
    except OSError as error:
        raise OSError(f"config = {path} cannot be read: {error.strerror}; give a YAML file of settings") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"config = {path} is no YAML ({told}); mend it, or give another") from error
    if not isinstance(content, dict):
        raise ValueError(f"config = {path} holds no settings but {type(content).__name__}; give those of configs/, for example")
    return content
