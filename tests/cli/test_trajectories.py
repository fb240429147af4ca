"""Trajectories on disk."""

import pytest

from pfgm.cli.trajectories import rescale
from pfgm.sampling.sampler import seed_pairs
from tests.helpers import make_flow


def test_rescaled_states_have_the_mean_and_spread_of_the_data():
    flow = make_flow(D=1, shape=(1, 16, 16), scale=3.0)
    for options in ({}, {"method": "euler", "steps": 3, "s_churn": 1.0}):
        trajectory = flow.trajectory(seed_pairs(40), 4, **options)
        start = (rescale(flow, trajectory)[0] / 3 - flow.summary.mean).flatten(1)
        assert start.square().mean(1).sqrt().numpy() == pytest.approx(0.5, rel=0.5 if options else 0.03)
        assert float(start.square().mean(1).sqrt().median()) == pytest.approx(0.5, rel=0.02)
