"""Lazy names of packages."""

import importlib
import subprocess
import sys

import pytest

from pfgm.core.exports import lazy_names
from tests.helpers import ROOT

HOMES = {"rng": ("Rows", "normal"), "tensors": ("norm",)}


def test_names_come_from_the_submodule_that_holds_them():
    assert lazy_names("pfgm.core", HOMES, "Rows") is importlib.import_module("pfgm.core.rng").Rows
    assert lazy_names("pfgm.core", HOMES, "norm") is importlib.import_module("pfgm.core.tensors").norm
    assert lazy_names("pfgm.core", HOMES, "tensors") is importlib.import_module("pfgm.core.tensors")


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(AttributeError, match=r"has no attribute 'nrom'; public names are Rows, norm, normal"):
        lazy_names("pfgm.core", HOMES, "nrom")


@pytest.mark.process
def test_rooms_do_not_load_lightning_before_a_name_needs_it():
    loaded = "print('pytorch_lightning' in sys.modules)"
    code = f"import sys, pfgm.data, pfgm.training; {loaded}; pfgm.data.Digits; {loaded}"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert process.stdout.split() == ["False", "True"]
