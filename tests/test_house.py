"""The order of the house: a file imports only from files above it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "pfgm"
ORDER = "typed rng spec kernel field analytic noise nn denoiser guidance inverse loss coordinates grid multistep adaptive "
ORDER += "solver ode shell stochastic latent sampler likelihood conditioning progress atomic intake storage rundir flow "
ORDER += "loading posthoc optimal plot trajectory images files output drawing draw edit commands metrics toys degrade "
ORDER += "augment labels sources imageset stream features collect datamodule data ema skips module runlog callbacks "
ORDER += "checkpointing evaluation advice prepare cli"


def room(module):
    """Position of pfgm.<room>... in the reading order."""
    return ORDER.split().index(module.split(".")[1])


def imports_at_load(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pfgm"):
            names = [f"pfgm.{a.name}" for a in node.names] if node.module == "pfgm" else [node.module]
            yield from names


def test_files_import_only_from_files_above_them():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("").parts
        if relative == ("__init__",):
            continue
        for name in imports_at_load(path):
            inside = relative[0] == "nn" and name.startswith("pfgm.nn")
            assert inside or room(name) < room(f"pfgm.{relative[0]}"), f"{path.name} imports {name}"


def test_every_file_has_its_place():
    rooms = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(ORDER.split())
