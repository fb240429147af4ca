"""Statistics of the data that a flow needs, against values worked out by hand."""

import math

import pytest
import torch

from pfgm.core.configurable import build
from pfgm.theory.data_summary import DataSummary


def test_statistics_of_three_samples():
    data = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 6.0]])
    summary = DataSummary.from_data(data, scale=2.0)
    assert torch.equal(summary.mean, torch.tensor([1.0, 1.0]))  # centred: (-1, -1), (1, -1), (0, 2)
    assert summary.sigma_data == pytest.approx(math.sqrt((2 + 2 + 4) / 6))
    assert summary.norm == pytest.approx((2 * math.sqrt(2) + 2) / 3)
    assert summary.power_std == pytest.approx(math.sqrt((2 * (1 - 4 / 3) ** 2 + (2 - 4 / 3) ** 2) / 3))
    assert torch.equal(DataSummary.from_data(data, mean=0.0).mean, torch.zeros(2))
    again = build(summary.spec)
    assert (again.sigma_data, again.shape, again.scale) == (summary.sigma_data, (2,), 2.0)


def test_a_stated_mean_is_in_the_users_units():
    assert DataSummary.from_data(torch.tensor([[0.0], [4.0]]), scale=2.0, mean=2.0).mean.tolist() == [1.0]


def test_equal_samples_are_refused():
    with pytest.raises(ValueError, match="all 3 samples are equal"):
        DataSummary.from_data(torch.ones(3, 2))
