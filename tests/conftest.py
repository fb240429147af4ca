"""Shared by all tests: double precision helpers and small models."""

import warnings

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _errors_are_not_hidden():
    """Every test starts from the same global random state, so that none depends on another."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        yield
