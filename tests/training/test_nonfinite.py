"""Counting of steps whose loss or gradient is not finite."""

import math

import pytest
import torch

from pfgm.training.nonfinite import SkippedSteps


def adam():
    return torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], fused=True)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_step_is_skipped_if_its_loss_or_its_gradient_is_not_finite(loss, norm):
    skips, optimizer = SkippedSteps((2, 1)), adam()
    skips.add(torch.tensor(loss), torch.tensor(norm), optimizer)
    assert (skips.state, float(skips.total), float(optimizer.found_inf)) == ([3, 2], 3, 1)
    skips.add(torch.tensor(1.0), torch.tensor(1.0), optimizer)
    assert (skips.state, float(skips.total), float(optimizer.found_inf)) == ([3, 0], 3, 0)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(monkeypatch):
    bad_elsewhere = [0, 1, 0]

    def all_reduce(x, operation):
        assert operation == torch.distributed.ReduceOp.MAX
        x.copy_(torch.maximum(x, torch.tensor(bad_elsewhere.pop(0))))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    skips, optimizer, states = SkippedSteps(), adam(), []
    for loss in (1.0, 1.0, math.nan):
        skips.add(torch.tensor(loss), torch.tensor(1.0), optimizer, world_size=2)
        states.append((*skips.state, float(optimizer.found_inf)))
    assert states == [(0, 0, 0.0), (1, 1, 1.0), (2, 2, 1.0)]
