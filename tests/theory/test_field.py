"""Compare the field with physics (Gauss's law, zero curl, closed forms) and with the direct sum over charges."""

import itertools
import math

import pytest
import torch

from pfgm.core import rng
from pfgm.core.tensors import norm
from pfgm.theory.analytic import UniformSegment
from pfgm.theory.field import denoised_from_field, field_from_displacement, normalized_field, poisson_field, posterior_mean
from pfgm.theory.kernel import StudentTKernel

F64 = torch.float64
CHARGES = torch.randn(7, 3, generator=rng.generator(1), dtype=F64)
WEIGHTS = torch.rand(7, generator=rng.generator(2), dtype=F64)


def direct_field(x, r, charges, D, p):
    """Sum the field over the charges, one at a time."""
    E_x, E_r = torch.zeros_like(x), torch.zeros(len(x), dtype=F64)
    for y, weight in zip(charges, p / p.sum(), strict=True):
        size = ((x - y).square().sum(1) + r**2) ** (-(x.shape[1] + D) / 2)
        E_x, E_r = E_x + weight * (x - y) * size[:, None], E_r + weight * r * size
    return E_x, E_r


@pytest.mark.parametrize("D", [0.5, 1, 2.5, 64])
def test_field_is_the_sum_over_charges(D):
    x = torch.randn(5, 3, dtype=F64)
    for weights, p in ((None, torch.ones(7, dtype=F64)), (WEIGHTS, WEIGHTS)):
        for mine, sum_ in zip(poisson_field(x, 0.4, CHARGES, D, weights), direct_field(x, 0.4, CHARGES, D, p), strict=True):
            assert torch.allclose(mine, sum_, rtol=1e-11)


def derivatives(D, weights=None):
    """Compute points (x, r), the field (E_x, E_r) there, and its Jacobian."""
    points = torch.cat([torch.randn(5, 3, dtype=F64), 0.5 + torch.rand(5, 1, dtype=F64)], dim=1)

    def field(point):
        E_x, E_r = poisson_field(point[None, :3], point[3:], CHARGES, D, weights)
        return torch.cat([E_x[0], E_r])

    return (
        points,
        torch.stack([field(p) for p in points]),
        torch.stack([torch.autograd.functional.jacobian(field, p) for p in points]),
    )


@pytest.mark.parametrize("D", [0.5, 1, 3.5, 64])
def test_field_has_no_divergence_and_no_curl(D):
    points, E, J = derivatives(D, WEIGHTS)
    scale = J.abs().amax((1, 2))
    divergence = J.diagonal(dim1=1, dim2=2).sum(1) + (D - 1) * E[:, 3] / points[:, 3]
    assert float((divergence / scale).abs().max()) < 1e-9
    assert float(((J - J.transpose(1, 2)) / scale[:, None, None]).abs().max()) < 1e-9


def test_flux_through_a_circle_is_two_pi_per_unit_charge():
    """Check Gauss's law for N = D = 1, with one charge inside the circle and one outside."""
    angle = torch.linspace(0, 2 * math.pi, 4001, dtype=F64)[:-1]
    normal = torch.stack([angle.cos(), angle.sin()], dim=1)
    charges, weights = torch.tensor([[0.3], [9.0]], dtype=F64), torch.tensor([0.25, 0.75])
    upper = normal[:, 1] > 1e-9
    E_x, E_r = poisson_field(2 * normal[upper][:, :1], 2 * normal[upper][:, 1], charges, 1, weights)
    # twice the upper half-plane, then the two points on the axis
    flux = 2 * (2 * math.pi * 2 / 4000) * (E_x[:, 0] * normal[upper][:, 0] + E_r * normal[upper][:, 1]).sum()
    on_axis = (
        2
        * (2 * math.pi / 4000)
        * sum(float(poisson_field(torch.tensor([[s * 2.0]], dtype=F64), 1e-9, charges, 1, weights)[0]) * s for s in (1, -1))
    )
    assert float(flux + on_axis) == pytest.approx(0.25 * 2 * math.pi, rel=1e-9)


def test_uniform_segment_has_the_closed_form():
    x, z = torch.linspace(-2.0, 2.0, 9, dtype=F64)[:, None], 0.7
    n = 200001
    nodes = (torch.linspace(-1, 1, n, dtype=F64)[:-1] + 1 / (n - 1))[:, None]
    E_x, E_z = poisson_field(x, z, nodes, 1)
    assert torch.allclose(E_z, (torch.atan((x + 1) / z) - torch.atan((x - 1) / z))[:, 0] / 2, rtol=1e-9)
    assert torch.allclose(x - z * E_x / E_z[:, None], UniformSegment()(x, z), atol=1e-9)


@pytest.mark.parametrize("D", [1, 4])
def test_far_field_is_that_of_one_charge_with_an_error_of_order_two(D):
    centre, errors = CHARGES.mean(0, keepdim=True), []
    for distance in (50.0, 100.0, 200.0):
        x = distance * torch.nn.functional.normalize(torch.ones(1, 3, dtype=F64)) + centre
        many, one = poisson_field(x, distance, CHARGES, D)[0], poisson_field(x, distance, centre, D)[0]
        errors.append(float((many - one).norm() / one.norm()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([2, 2], abs=0.1)


@pytest.mark.parametrize("D", [0.5, 1, 128, 1e12, math.inf])
def test_posterior_mean_weights_charges_by_the_kernels_density(D):
    x, kernel = torch.randn(5, 3, dtype=F64), StudentTKernel(D)
    log_p = torch.stack([kernel.log_prob(x, y.expand_as(x), 0.6) for y in CHARGES], dim=1) + WEIGHTS.log()
    expected = torch.softmax(log_p, dim=1) @ CHARGES
    assert torch.allclose(posterior_mean(x, 0.6, CHARGES, D, WEIGHTS), expected, rtol=1e-9)
    sigma = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6])
    single = torch.cat([posterior_mean(x[i : i + 1], float(sigma[i]), CHARGES, D) for i in range(5)])
    assert torch.allclose(posterior_mean(x, sigma, CHARGES, D), single)


def test_block_size_does_not_change_the_posterior_mean(monkeypatch):
    x, images = torch.randn(4, 1, 2, 3, dtype=F64), torch.randn(50, 1, 2, 3, dtype=F64)
    whole = posterior_mean(x, 0.5, images, 3)
    monkeypatch.setattr("pfgm.theory.field.BLOCK_BYTES", 8 * 6 * 7)
    assert torch.allclose(posterior_mean(x, 0.5, images, 3), whole, rtol=1e-13)
    assert whole.shape == x.shape


@pytest.mark.process
@pytest.mark.parametrize("D", [1.0, 128.0])
@pytest.mark.parametrize("data", ["digits", "random"])
def test_posterior_mean_of_float32_data_is_accurate_at_every_sigma(D, data):
    """Bound the error by 1e-3 |x - denoised|, also between near-duplicates."""
    from sklearn.datasets import load_digits

    y = torch.tensor(load_digits().data[:1000] / 8 - 1) if data == "digits" else torch.rand(1000, 64, dtype=F64) * 2 - 1
    y = torch.cat([y, y[:200] + 1e-4 * torch.randn(200, 64, dtype=F64)])
    for sigma in (1e-3, 1e-2, 0.1, 1.0, 40.0):
        x = StudentTKernel(D).sample(y[:100].float(), sigma, rng.generator(5))
        distance2 = (x.double()[:, None] - y.float().double()).square().sum(2)
        w = torch.softmax(-(64 + D) / 2 * torch.log1p(distance2 / (D * sigma**2)), dim=1)
        exact = w @ y.float().double()
        error = norm(posterior_mean(x, sigma, y.float(), D).double() - exact) / norm(x.double() - exact)
        assert float(error.max()) < 1e-3


def test_posterior_mean_is_differentiable():
    x, sigma = torch.randn(3, 3, dtype=F64, requires_grad=True), torch.full((3,), 0.7, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, s: posterior_mean(a, s, CHARGES, 2.0), (x, sigma))


def test_normalised_field_has_pfgms_sign_and_scale():
    """Check v = -sqrt(N) (x, z)/(|(x, z)| + gamma), which points to the data, for one charge at 0."""
    x, z = torch.tensor([[3.0, 0.0]], dtype=F64), 4.0
    v_x, v_z = normalized_field(x, z, torch.zeros(1, 2, dtype=F64), gamma=1.0)
    assert torch.allclose(v_x, -math.sqrt(2) * x / 6)
    assert float(v_z) == pytest.approx(-math.sqrt(2) * 4 / 6)


@pytest.mark.parametrize("gamma", [0.0, 0.05, 5.0])
@pytest.mark.parametrize("z", [1e-3, 1.0, 40.0])
def test_inverse_of_the_normalised_field_is_exact(gamma, z):
    x = torch.randn(20, 4, dtype=F64) * 10
    v_x, v_z = normalized_field(x, z, torch.randn(30, 4, dtype=F64), gamma)
    away = x - denoised_from_field(x, z, v_x, v_z, gamma)
    for mine, v in zip(field_from_displacement(away, torch.full((20,), z, dtype=F64), gamma), (v_x, v_z), strict=True):
        assert torch.allclose(mine, v, rtol=1e-5 if gamma == 0 else 1e-8)


def blurred_inverse(N, z, gamma, error):
    """Return the true distances, the displacements from a field with relative `error` in each component, and its v_x."""
    x = StudentTKernel(1).sample(torch.zeros(500, N, dtype=F64), z, rng.generator(6))
    v_x, v_z = field_from_displacement(x, torch.full((500,), z, dtype=F64), gamma)
    g = rng.generator(7)
    v_x, v_z = (v * (1 + error * torch.randn(v.shape, generator=g, dtype=F64)) for v in (v_x, v_z))
    return norm(x), x - denoised_from_field(x, z, v_x, v_z, gamma), v_x


@pytest.mark.parametrize(("z", "bound"), [(40.0, 0.04), (1.0, 0.01), (0.01, 0.01)])
def test_inverse_is_accurate_for_a_field_with_two_percent_error(z, bound):
    rho, away, _ = blurred_inverse(3072, z, 5.0, 0.02)
    assert float(((norm(away) - rho).abs() / rho).median()) < bound


@pytest.mark.parametrize("error", [0.1, 1.0])
def test_inverse_is_finite_and_keeps_the_direction_for_any_field(error):
    for z in (1e-3, 1.0, 40.0):
        _, away, v_x = blurred_inverse(64, z, 5.0, error)
        cosine = -(away * v_x).sum(1) / (norm(away) * norm(v_x))
        assert float(cosine.min()) > 1 - 1e-6
    zero = denoised_from_field(torch.ones(2, 4), 1.0, torch.zeros(2, 4), torch.zeros(2), 5.0)
    assert bool(torch.isfinite(zero).all())


def test_errors_name_the_argument():
    x = torch.zeros(2, 3)
    for call, name in (
        (lambda: posterior_mean(x, 0.0, CHARGES, 1), "sigma"),
        (lambda: posterior_mean(x, torch.ones(3), CHARGES, 1), "sigma"),
        (lambda: posterior_mean(x, 1.0, CHARGES[:0], 1), "charges"),
        (lambda: posterior_mean(x, 1.0, CHARGES[:, :2], 1), "charges"),
        (lambda: posterior_mean(x, 1.0, CHARGES, 1, WEIGHTS[:3]), "weights"),
        (lambda: posterior_mean(x, 1.0, CHARGES, 1, -WEIGHTS), "weights"),
        (lambda: poisson_field(x, 1.0, CHARGES, math.inf), "D = inf"),
        (lambda: normalized_field(x, 1.0, CHARGES, gamma=-1.0), "gamma = -1"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize("error", [0.02, 0.1])
@pytest.mark.parametrize("z", [0.01, 1.0, 5.0, 10.0, 40.0])
@pytest.mark.parametrize(("N", "n"), [(64, 500), (3072, 300), (12288, 100)])
def test_inverse_is_within_1_5_times_the_better_single_inverse(N, n, z, error):
    """Compare median errors with (a) bisection of n (R + gamma) = rho and (b) the estimate from v_z alone."""
    gamma, height = 5.0, torch.full((n,), z, dtype=F64)
    x, g = StudentTKernel(1).sample(torch.zeros(n, N, dtype=F64), z, rng.generator(6)), rng.generator(7)
    v_x, v_z = (
        v * (1 + error * torch.randn(v.shape, generator=g, dtype=F64)) for v in field_from_displacement(x, height, gamma)
    )
    share = (norm(v_x) / math.sqrt(N)).clamp(max=1 - 1e-6)
    low, high = torch.zeros(n, dtype=F64), torch.full((n,), 1e12, dtype=F64)
    for _ in range(200):
        rho = (low + high) / 2
        small = rho < share * (torch.hypot(rho, height) + gamma)
        low, high = torch.where(small, rho, low), torch.where(small, high, rho)
    R = (math.sqrt(N) * z / v_z.abs() - gamma).clamp(min=z)
    mine = norm(x - denoised_from_field(x, z, v_x, v_z, gamma))
    errors = [float(((r - norm(x)).abs() / norm(x)).median()) for r in (mine, low, (R**2 - z**2).sqrt())]
    assert errors[0] < 1.5 * min(errors[1:])


def test_normalised_field_weights_the_charges():
    x, z, y, p = torch.tensor([[0.4]], dtype=F64), 0.7, torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([0.9, 0.1])
    k = p / ((0.4 - y[:, 0]) ** 2 + z**2)
    away = 0.4 - float((k * y[:, 0]).sum() / k.sum())
    v_x, v_z = normalized_field(x, z, y, 0.5, p)
    R = math.hypot(away, z)
    assert float(v_x) == pytest.approx(-away / (R + 0.5))
    assert float(v_z) == pytest.approx(-z / (R + 0.5))


def test_weights_per_sample_equal_separate_calls():
    """Include a row in which a single charge has all the weight."""
    x, sigma = torch.randn(3, 3, dtype=F64), torch.tensor([0.2, 1.0, 5.0], dtype=F64)
    rows = torch.rand(3, len(CHARGES), dtype=F64)
    rows[2] = 0
    rows[2, 4] = 7.0
    alone = torch.cat([posterior_mean(x[i : i + 1], float(sigma[i]), CHARGES, 2.0, rows[i]) for i in range(3)])
    for check in (True, False):
        assert torch.allclose(posterior_mean(x, sigma, CHARGES, 2.0, rows, check=check), alone, rtol=1e-12)
    assert torch.allclose(alone[2], CHARGES[4])
    E_x, E_r = poisson_field(x, sigma, CHARGES, 2.0, rows)
    for i in range(3):
        single = poisson_field(x[i : i + 1], float(sigma[i]), CHARGES, 2.0, rows[i])
        assert torch.allclose(E_x[i], single[0][0], rtol=1e-12)
        assert torch.allclose(E_r[i], single[1][0], rtol=1e-12)
    with pytest.raises(ValueError, match="weights must be"):
        posterior_mean(x, sigma, CHARGES, 2.0, rows * torch.tensor([1.0, 0.0, 1.0])[:, None])
    assert bool(torch.isnan(posterior_mean(x, 1.0, CHARGES, 2.0, 0 * rows, check=False)).all()), "check=False"
