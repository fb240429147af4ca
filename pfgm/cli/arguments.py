"""Words of a command line and configuration files, before and while jsonargparse reads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from pfgm.core.configurable import ALIASES, renamed
from pfgm.files.untrusted import read_text

PARSER_MODE = "pfgm"  # the name under which jsonargparse finds `load_settings`


def prepare_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line as the parsers of this package take them.

    Shipped configurations are found by name, class paths of version 0.1 are replaced by today's, and the two words after
    `--inpaint` become a list.

    Raises:
        ValueError: If a file after --config cannot be read as settings, or there is none.
    """
    return _join_pair(_find_configs([_renamed(word) for word in words]))


def _renamed(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{ALIASES.get(value, value)}"


def _join_pair(words: list[str]) -> list[str]:
    """Write `--inpaint image mask` as `--inpaint ["image", "mask"]`, which is how the parser reads a pair."""
    if "--inpaint" not in words:
        return words
    i = words.index("--inpaint") + 1
    pair = words[i : i + 2]
    if len(pair) < 2 or pair[0].startswith("[") or any(word.startswith("--") for word in pair):
        return words
    return [*words[:i], json.dumps(pair), *words[i + 2 :]]


def _find_configs(words: list[str]) -> list[str]:
    """Replace names of shipped configurations after --config by their paths, and check that all can be read."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith(("--config=", "-c=")) else [word])]
    for i, word in enumerate(words[1:], 1):
        if words[i - 1] in ("--config", "-c") and not word.lstrip().startswith("{"):
            words[i] = str(find_config(word))
            if Path(words[i]).is_file():  # a pipe can be read only once, by the parser
                read_config(words[i])
    return words


def shipped_configs() -> Path:
    """Return the folder of the configurations that come with the package."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """Return the configuration file of that path or, if there is none here, the shipped one of that name.

    Raises:
        FileNotFoundError: If there is neither; the message lists the shipped names.
    """
    if Path(name).exists() and not Path(name).is_dir():
        return Path(name)
    shipped = {path.stem: path for path in sorted(shipped_configs().glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    if stem not in shipped:
        raise FileNotFoundError(
            f"config = {name} is neither a file nor a shipped configuration. Pass a path, or one of {', '.join(shipped)}."
        )
    return shipped[stem]


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuse a mapping with one key twice, of which the parser would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in names:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            names.add(key.value)
        return node


def read_config(path: str) -> dict[str, Any]:
    """Read the settings in a YAML file.

    Raises:
        ValueError: If the file holds no settings.
        OSError: If it cannot be read.
    """
    try:
        content = renamed(yaml.load(read_text(Path(path), f"config = {path}"), UniqueKeyLoader))
    except OSError as error:
        raise OSError(f"config = {path} cannot be read: {error.strerror}. Pass a YAML file of settings.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config = {path} is not valid YAML: {reason}. Correct the file.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"config = {path} holds a {type(content).__name__}, not settings. Write lines such as run_dir: runs/mine, or start "
            "from a shipped configuration."
        )
    return content


def load_settings(text: str) -> Any:
    """Parse a YAML text, with class paths of version 0.1 replaced by today's."""
    return renamed(get_loader("yaml")(text))


set_loader(PARSER_MODE, load_settings, (yaml.YAMLError,))
