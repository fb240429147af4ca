"""The order of the house: a room imports only from the rooms before it, and only some may import Lightning."""

import ast
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pfgm"
FLOORS = "core / files / theory / nn sampling data / flow / evaluation / training / cli"
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS.split("/")) for room in rooms.split()}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 1)
LIGHTNING = {"training", "data/datamodule.py", "cli/train.py"}


def imported_modules(path):
    """Dotted names of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_from_rooms_before_it(path):
    own = path.relative_to(PACKAGE).parts[0]
    for name in imported_modules(path):
        package, _, inside = name.partition(".")
        other = inside.partition(".")[0]
        if package == "pfgm" and other in ROOMS and other != own:
            assert ROOMS[other] < ROOMS[own], f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_lightning_stays_where_it_belongs(path):
    place = path.relative_to(PACKAGE)
    if place.parts[0] in LIGHTNING or place.as_posix() in LIGHTNING:
        return
    names = [name for name in imported_modules(path) if name.split(".")[0] in ("pytorch_lightning", "lightning_fabric")]
    assert not names, f"{place} imports {names}"


def test_every_folder_is_a_room_with_an_introduction_and_is_installed():
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(ROOMS)
    for room in ROOMS:
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())), room
    packages = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(packages) == {"pfgm", "pfgm.configs", *(f"pfgm.{room}" for room in ROOMS)}
