"""Test where the grids place their levels and where sampling stops."""

import itertools
import math

import pytest
import torch

from pfgm.sampling.coordinates import Angle, LogSigma
from pfgm.sampling.grids import ExplicitGrid, KarrasGrid, PacedGrid, UniformGrid, make_grid
from pfgm.theory.analytic import CauchyBlob
from tests.helpers import F64, TIGHT, make_sampler

ANGLE = Angle(0.5)


def angle_steps(grid):
    """Return the steps of a sampling run in theta, and theta at its end."""
    times = [ANGLE.time(level) for level in grid.levels(ANGLE, 40.0, grid.last(ANGLE, 40.0, 0.01))]
    return [a - b for a, b in itertools.pairwise(times)], times[-1]


def test_uniform_grid_has_equal_steps_and_leaves_a_third_of_one_to_denoising():
    steps, rest = angle_steps(UniformGrid(6))
    assert [*steps, rest] == pytest.approx([steps[0]] * 6 + [steps[0] / 3])


def test_paced_grid_has_a_long_first_step_and_short_second_and_last_steps():
    steps, rest = angle_steps(PacedGrid(6))
    unit = steps[2]
    assert [*steps, rest] == pytest.approx([1.1 * unit, 0.8 * unit, unit, unit, unit, 0.8 * unit, 0.3 * unit])
    assert [len(PacedGrid(n).levels(ANGLE, 40.0, 0.01)) for n in (1, 2, 3)] == [2, 3, 4]


def test_karras_grid_is_equation_5_of_edm():
    expected = [(40 ** (1 / 7) + i / 9 * (0.01 ** (1 / 7) - 40 ** (1 / 7))) ** 7 for i in range(10)]
    assert KarrasGrid(9).levels(ANGLE, 40.0, 0.01) == pytest.approx(expected)


@pytest.mark.parametrize("grid", [UniformGrid(400), PacedGrid(400), KarrasGrid(6), ExplicitGrid((40.0, 1.0, 0.01))])
def test_sampling_never_stops_below_the_end(grid):
    assert grid.last(ANGLE, 40.0, 0.01) == 0.01


@pytest.mark.parametrize("grid", [UniformGrid(6), PacedGrid(6), KarrasGrid(6)])
def test_named_grids_run_upwards_too_and_stop_early_in_angle_coordinates_only(grid):
    up = grid.levels(ANGLE, 0.01, 40.0)
    assert (up[0], up[-1], len(up)) == (0.01, 40.0, 7)
    assert all(a < b for a, b in itertools.pairwise(up))
    assert grid.last(LogSigma(), 40.0, 0.01) == 0.01


def test_explicit_grid_below_sigma_min_is_rejected():
    with pytest.raises(ValueError, match=r"grid ends at 0\.001, below sigma_min = 0\.01"):
        make_grid([40.0, 0.001], None, "ab3").last(ANGLE, 40.0, 0.01)


def test_draws_on_the_uniform_grid_leave_a_third_of_a_step_to_denoising():
    seen = []
    make_sampler(CauchyBlob(0.3), method="euler", steps=6, sigma_data=0.5).sample(2, on_call=lambda *call: seen.append(call))
    theta = [math.atan(level / 0.5) for _, level in seen]
    assert theta[-1] == pytest.approx((theta[0] - theta[1]) / 3)
    seen.clear()
    make_sampler(CauchyBlob(0.3), method="euler", steps=400).sample(2, on_call=lambda *call: seen.append(call))
    assert seen[-1][1] == 0.01, "never below sigma_min"
    seen.clear()
    make_sampler(CauchyBlob(0.3), grid=[40.0, 2.0, 0.2]).sample(2, on_call=lambda *call: seen.append(call))
    assert [level for _, level in seen][-1] == 0.2


def test_explicit_grids_serve_both_directions():
    x = torch.randn(4, 3, dtype=F64)
    s = make_sampler(CauchyBlob(0.3), method="midpoint", grid=[5.0, 2.0, 1.0, 0.5, 0.2])
    up = make_sampler(CauchyBlob(0.3), **TIGHT).integrate(x, 0.01, 5.0)
    assert torch.allclose(s.integrate(x, 0.01, 5.0), up, rtol=0.05), "one more step to the end"
    with pytest.raises(ValueError, match="grid begins at 5, but the highest level here is 40"):
        s.sample(2)
    with pytest.raises(ValueError, match=r"grid ends at 0\.2, but the lowest level here is 0\.3"):
        s.integrate(x, 5.0, 0.3)
