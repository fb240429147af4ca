"""Compare the coordinates with a flow in closed form and with each other."""

import pytest
import torch

from pfgm.sampling.coordinates import Angle, LogSigma, Sigma

COORDINATES = [Angle(0.7), LogSigma(), Sigma()]


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_slope_is_the_derivative_of_the_state_of_cauchy_data(coordinates):
    """The flow of Cauchy data of scale s is x = c (s + level), with denoised = c s."""
    c, s, level, h = torch.tensor([[0.3, -2.0]], dtype=torch.float64), 0.4, 1.3, 1e-5

    def state(time):
        here = coordinates.level(time)
        return c * (s + here) / coordinates.radius(here)

    time = coordinates.time(level)
    difference = (state(time + h) - state(time - h)) / (2 * h)
    assert torch.allclose(coordinates.slope(c * (s + level), c * s, level), difference, rtol=1e-8)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_level_inverts_time_for_numbers_and_tensors(coordinates):
    levels = torch.tensor([0.01, 1.0, 40.0], dtype=torch.float64)
    assert torch.allclose(coordinates.level(coordinates.time(levels)), levels, rtol=1e-12)
    for level in levels.tolist():
        assert isinstance(coordinates.time(level), float)
        assert coordinates.level(coordinates.time(level)) == pytest.approx(level, rel=1e-12)
