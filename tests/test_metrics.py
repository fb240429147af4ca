"""Distances against closed forms."""

import pytest
import torch
from scipy import linalg

from pfgm import rng
from pfgm.metrics import energy_distance, frechet_distance, nearest_neighbour_accuracy

F64 = torch.float64


def normals(n, *counters, mean=0.0, N=3):
    return mean + torch.randn(n, N, generator=rng.generator(*counters), dtype=F64)


def test_energy_distance_is_that_of_two_points_and_unbiased_for_one_law():
    x, y = torch.zeros(2, 1, dtype=F64), torch.full((2, 1), 3.0, dtype=F64)
    assert energy_distance(x, y) == pytest.approx(6.0)
    same = torch.tensor([energy_distance(normals(60, 1, k), normals(60, 2, k)) for k in range(200)])
    assert abs(float(same.mean())) < 3 * float(same.std()) / 200**0.5
    assert energy_distance(normals(500, 1), normals(500, 2, mean=0.5)) > 0.05


def test_frechet_distance_of_gaussians():
    x, y = normals(200000, 3), 2 * normals(200000, 4) + 1
    assert frechet_distance(x, y) == pytest.approx(3 * 1 + 3 * (2 - 1) ** 2, rel=0.02)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_correlated_sets():
    """Two sets whose sample means and covariances are exact; the root by scipy."""
    a, b = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=F64), torch.tensor([[1.0, 0.8], [0.8, 1.5]], dtype=F64)

    def exactly(n, covariance, mean, k):
        x = normals(n, 9, k, N=2)
        white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
        return white @ torch.linalg.cholesky(covariance).T + mean

    x, y = exactly(50, a, torch.zeros(2), 1), exactly(70, b, torch.tensor([2.0, -3.0]), 2)
    expected = 13 + float((a + b).trace()) - 2 * linalg.sqrtm((a @ b).numpy()).trace().real
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_nearest_neighbours_tell_sets_apart():
    assert nearest_neighbour_accuracy(normals(400, 5), normals(400, 6)) == pytest.approx(0.5, abs=0.06)
    assert nearest_neighbour_accuracy(normals(400, 5), normals(400, 6, mean=50.0)) == 1.0
    with pytest.raises(ValueError, match="two or more"):
        energy_distance(normals(1, 1), normals(5, 2))
