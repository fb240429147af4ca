"""Shared by all tests."""

import signal
import sys

import pytest
import torch

from benchmarks.faulty import kills
from benchmarks.faulty.forks import PRELOAD

PRELOAD.append("pytest")  # the main module, which each process would import again
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a script ignores
torch.set_num_threads(1)  # the suite runs in as many processes as there are cores


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark slow and GPU tests as process tests too, so that `-m "not process"` leaves all of them out."""
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("gpu"):
            item.add_marker("process")


@pytest.fixture(autouse=True)
def _clean_start(monkeypatch):
    """The same global random state for every test, and no command line but the one that a test gives."""
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of ten steps with checkpoints of its steps 5 and 10."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert kills.finish(kills.command(folder, "denoising", 10)) == 0
    return folder
