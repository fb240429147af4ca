"""Arguments of commands: seeds, devices, conditions, masks and configuration files."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from pfgm.core.configurable import ALIASES, renamed
from pfgm.files.untrusted import read_text

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
