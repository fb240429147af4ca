"""Test interpolation between latents."""

import math

import pytest
import torch

from pfgm.sampling.latents import Latent, interpolate
from pfgm.theory.kernel import StudentTKernel

F64 = torch.float64


def test_interpolation_has_equal_angles_and_geometric_lengths():
    a, b = torch.tensor([[2.0, 0, 0], [0, 0, 3]], dtype=F64), torch.tensor([[0, 8.0, 0], [3, 0, 3]], dtype=F64)
    path = interpolate(Latent(a, 40.0, "plane"), Latent(b, 40.0, "plane"), 5)
    for k, latent in enumerate(path):
        angle = math.pi / 2 * k / 4
        assert torch.allclose(latent.t[0], 2 * 4 ** (k / 4) * torch.tensor([math.cos(angle), math.sin(angle), 0], dtype=F64))
        assert math.degrees(math.atan2(*latent.t[1, [0, 2]].tolist())) == pytest.approx(45 * k / 4)
    assert torch.equal(path[0].t, a)
    assert (path[2].level, path[2].surface) == (40.0, "plane")


@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_midpoint_of_two_prior_samples_has_the_length_of_a_sample(D):
    """The midpoint of a straight line would be too short by sqrt 2 for D >> 1."""
    g = torch.Generator().manual_seed(0)
    a, b = (StudentTKernel(D).direction((4000, 64), g, like=torch.empty(0, dtype=F64)) for _ in range(2))
    middle = interpolate(Latent(a, 1.0, "hemisphere"), Latent(b, 1.0, "hemisphere"), 3)[1].t
    assert float(middle.norm(dim=1).median() / a.norm(dim=1).median()) == pytest.approx(1, abs=0.15)


def test_interpolation_between_equal_latents_is_constant_and_keeps_the_dtype():
    t = torch.randn(3, 1, 2, 2)
    for latent in interpolate(Latent(t, 1.0, "plane"), Latent(t.clone(), 1.0, "plane"), 4):
        assert torch.allclose(latent.t, t, atol=1e-6)
        assert latent.t.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "points", "message"),
    [
        ({}, 1, "points = 1: must be an integer from 2"),
        ({"level": 2.0}, 3, "levels 1, 2, surfaces plane, plane must agree"),
        ({"surface": "hemisphere"}, 3, "surfaces plane, hemisphere must agree"),
        ({"t": torch.ones(1, 3)}, 3, r"shapes \(1, 2\), \(1, 3\)"),
        ({"t": torch.zeros(1, 2)}, 3, "t = 0 has no direction"),
        ({"t": -torch.ones(1, 2)}, 3, "opposite to each other"),
    ],
)
def test_latents_without_a_great_circle_are_rejected(change, points, message):
    one = {"t": torch.ones(1, 2), "level": 1.0, "surface": "plane"}
    with pytest.raises(ValueError, match=message):
        interpolate(Latent(**one), Latent(**(one | change)), points)
