"""Metrics against closed forms, sums written out, and scipy."""

import pytest
import torch
from scipy import linalg, stats

from pfgm.core import rng
from pfgm.evaluation import metrics
from pfgm.evaluation.metrics import (
    FeatureSet,
    copying,
    energy_distance,
    frechet_distance,
    kernel_distance,
    nearest,
    nearest_neighbour_accuracy,
    precision,
    recall,
)

F64 = torch.float64


def normals(n, *counters, mean=0.0, N=3):
    return mean + torch.randn(n, N, generator=rng.generator(*counters), dtype=F64)


def test_energy_distance_of_two_points_is_exact_and_unbiased_for_one_distribution():
    x, y = torch.zeros(2, 1, dtype=F64), torch.full((2, 1), 3.0, dtype=F64)
    assert energy_distance(x, y) == pytest.approx(6.0)
    same = torch.tensor([energy_distance(normals(60, 1, k), normals(60, 2, k)) for k in range(200)])
    assert abs(float(same.mean())) < 3 * float(same.std()) / 200**0.5
    assert energy_distance(normals(500, 1), normals(500, 2, mean=0.5)) > 0.05


def test_frechet_distance_of_gaussians_is_the_closed_form():
    x, y = normals(200000, 3), 2 * normals(200000, 4) + 1
    assert frechet_distance(x, y) == pytest.approx(3 * 1 + 3 * (2 - 1) ** 2, rel=0.02)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_correlated_sets_matches_scipy():
    """Uses sets with exact sample means and covariances."""
    a, b = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=F64), torch.tensor([[1.0, 0.8], [0.8, 1.5]], dtype=F64)

    def exactly(n, covariance, mean, k):
        x = normals(n, 9, k, N=2)
        white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
        return white @ torch.linalg.cholesky(covariance).T + mean

    x, y = exactly(50, a, torch.zeros(2), 1), exactly(70, b, torch.tensor([2.0, -3.0]), 2)
    expected = 13 + float((a + b).trace()) - 2 * linalg.sqrtm((a @ b).numpy()).trace().real
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_nearest_neighbour_accuracy_is_half_for_one_distribution_and_one_far_apart():
    assert nearest_neighbour_accuracy(normals(400, 5), normals(400, 6)) == pytest.approx(0.5, abs=0.06)
    assert nearest_neighbour_accuracy(normals(400, 5), normals(400, 6, mean=50.0)) == 1.0


def test_kernel_distance_is_the_unbiased_u_statistic():
    """Checks the double sums written out, and the closed form for two Gaussians in one dimension."""
    x, y = normals(7, 11).numpy(), normals(5, 12, mean=0.7).numpy()

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    own = [
        sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1)) for z in (x, y)
    ]
    cross = sum(kernel(a, b) for a in x for b in y) / 35
    assert kernel_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(own[0] + own[1] - 2 * cross, rel=1e-12)
    same = torch.tensor([kernel_distance(normals(50, 13, k), normals(50, 14, k)) for k in range(100)])
    assert abs(float(same.mean())) < 3 * float(same.std()) / 100**0.5
    # On the line (ab + 1)³ is the product of (1, √3 a, √3 a², a³) with that of b; means (1, 0, √3, 0) and
    # (1, √3 m, √3 (m² + 1), m³ + 3m).
    m = 0.5
    expected = 3 * m**2 + 3 * m**4 + (m**3 + 3 * m) ** 2
    many = [kernel_distance(normals(2000, 15, k, N=1), normals(2000, 16, k, N=1, mean=m)) for k in range(12)]
    assert sum(many) / 12 == pytest.approx(expected, rel=0.05)


def test_precision_and_recall_of_missing_modes_and_of_points_on_a_line():
    two = torch.cat([normals(300, 21), normals(300, 22, mean=100.0)])[torch.randperm(600, generator=rng.generator(5))]
    other = torch.cat([normals(300, 23), normals(300, 24, mean=100.0)])[torch.randperm(600, generator=rng.generator(6))]
    one = normals(600, 25)
    assert precision(other, two) > 0.9
    assert recall(other, two) > 0.9
    assert precision(one, two) > 0.75, "all samples resemble data"
    assert recall(one, two) == pytest.approx(0.5, abs=0.05), "half of the data is missing"
    assert recall(two, one) > 0.75
    assert precision(two, one) == pytest.approx(0.5, abs=0.05)
    assert precision(two, two + 1000) == 0.0
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    # The third neighbours of 0, 1, 2, 3, 10 are 3, 2, 2, 3, 9 away: 18.9 is within the radius of the last, 19.1 of none.
    x = torch.tensor([[18.9], [19.1], [-2.9], [-3.1], [1.5]])
    assert precision(x, line) == pytest.approx(3 / 5)
    assert precision(torch.tensor([[3.9], [4.1]]), line[[0, 2]]) == pytest.approx(1 / 2), "a set of two has one neighbour"


def test_copying_detects_copies_at_any_scale_and_matches_mann_whitney():
    train, held_out, new = normals(400, 31), normals(300, 32), normals(500, 33)
    assert copying(new, train, held_out) == pytest.approx(0.5, abs=0.05)
    assert copying(train[:200], train, held_out) == 1.0
    assert copying(train[:200] * 1e-6, train * 1e-6, held_out * 1e-6) == 1.0
    assert copying(new + 100, train, held_out) == 0.0
    half = torch.cat([new[:100], train[:100]])
    assert copying(half, train, held_out) == pytest.approx(0.75, abs=0.05)
    ours, others = nearest(new, train)[0][:, 0].numpy(), nearest(held_out, train)[0][:, 0].numpy()
    assert copying(new, train, held_out) == pytest.approx(
        1 - stats.mannwhitneyu(ours, others).statistic / (500 * 300), rel=1e-12
    )
    assert copying(held_out, train, held_out) == pytest.approx(0.5, abs=1e-12), "ties count half"


def test_small_distances_are_exact_far_from_zero():
    x = normals(100, 51)
    for far in (0.0, 1e4, 1e6):
        y = torch.cat([normals(30, 52), x[:50] + 1e-3]) + far
        distance, index = nearest(y[30:], x + far)
        assert torch.allclose(distance[:, 0], torch.tensor(1e-3 * 3**0.5, dtype=F64), rtol=1e-3)
        assert index[:, 0].tolist() == list(range(50))


def test_sets_of_different_sizes_are_cut_to_the_smaller():
    x, y = normals(40, 61), normals(400, 62)
    for measure in (precision, recall, nearest_neighbour_accuracy):
        assert measure(x, y) == measure(x, y[:40]) == pytest.approx(measure(x, normals(400, 62)[:40]))
        assert measure(y, x) == measure(y[:40], x)


def test_results_do_not_depend_on_the_block_size(monkeypatch):
    x, y = normals(23, 41), normals(31, 42, mean=0.3)
    measures = (energy_distance, frechet_distance, kernel_distance, precision, recall, nearest_neighbour_accuracy)
    whole = [measure(x, y) for measure in measures]
    distance, index = nearest(x, y, 4)
    monkeypatch.setattr(metrics, "BLOCK", 70)
    assert [measure(FeatureSet(x), FeatureSet(y)) for measure in measures] == pytest.approx(whole, rel=1e-7)
    assert torch.equal(nearest(x, y, 4)[1], index)
    by_hand = ((x[:, None] - y[None]) ** 2).sum(2).sqrt().sort(1)
    assert torch.equal(index, by_hand.indices[:, :4])
    assert torch.allclose(distance, by_hand.values[:, :4])


def test_sets_that_cannot_be_compared_raise():
    x, y = normals(100, 51), normals(5, 2)
    with pytest.raises(ValueError, match="Pass two or more samples"):
        energy_distance(y[:1], y)
    with pytest.raises(ValueError, match="Pass two or more samples"):
        FeatureSet(x[:, 0])
    with pytest.raises(ValueError, match="2 of 100 samples contain NaN or infinite values"):
        FeatureSet(torch.where(torch.arange(100)[:, None] < 2, torch.nan, x))
    with pytest.raises(ValueError, match="x has 3 values per sample, y has 2"):
        energy_distance(x, y[:, :2])
