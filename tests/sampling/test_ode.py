"""Solutions of the flow against flows known in closed form."""

import math

import pytest
import torch

from pfgm.sampling import ode
from pfgm.theory.analytic import CauchyBlob, EmpiricalDenoiser, GaussianBlob, PointCharge
from tests.helpers import F64, TIGHT, make_sampler


@pytest.mark.process
@pytest.mark.parametrize("coordinates", ["angle", "log_sigma"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_lines_to_a_point_charge_are_straight(coordinates, method):
    y, x = torch.randn(3, dtype=F64), 30 * torch.randn(4, 3, dtype=F64)
    s = make_sampler(PointCharge(y), method=method, coordinates=coordinates, rtol=1e-9, atol=1e-9)
    assert torch.allclose(s.integrate(x, 40.0, 0.01), y + (x - y) * 0.01 / 40, atol=1e-7)
    assert torch.allclose(s.integrate(x, 0.5, 40.0), y + (x - y) * 80, atol=1e-5)


@pytest.mark.parametrize("method", ["dpmpp_2m", "dpmpp_3m", "edm_heun"])
def test_published_methods_are_exact_on_straight_lines(method):
    y, x = torch.randn(3, dtype=F64), 30 * torch.randn(4, 3, dtype=F64)
    s = make_sampler(PointCharge(y), method=method, steps=5)
    assert torch.allclose(s.integrate(x, 40.0, 0.01), y + (x - y) * 0.01 / 40, atol=1e-12)
    assert torch.allclose(s.integrate(x, 0.5, 40.0), y + (x - y) * 80, atol=1e-9)


@pytest.mark.parametrize("coordinates", ["angle", "log_sigma"])
@pytest.mark.parametrize(
    ("denoiser", "ratio"),
    [
        (CauchyBlob(0.3), lambda a, b: (0.3 + b) / (0.3 + a)),
        (GaussianBlob(0.3), lambda a, b: math.sqrt((0.09 + b * b) / (0.09 + a * a))),
    ],
)
def test_flows_of_blobs_match_their_closed_form(denoiser, ratio, coordinates):
    x = torch.randn(4, 3, dtype=F64)
    s = make_sampler(denoiser, coordinates=coordinates, sigma_data=0.7, **TIGHT)
    assert torch.allclose(s.integrate(x, 5.0, 0.02), x * ratio(5.0, 0.02), atol=1e-7)
    assert torch.allclose(s.integrate(x, 0.02, 5.0), x * ratio(0.02, 5.0), atol=1e-6)


def test_stream_function_is_constant_along_lines():
    """For N = D = 1 the stream function Σ p_i arg(x - y_i + i z) is constant along a line."""
    y, p = torch.tensor([[-0.6], [0.1], [0.9]], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    x = torch.linspace(-3, 3, 12, dtype=F64)[:, None]

    def stream(x, z):
        return (p * torch.atan2(torch.full_like(x, z), x - y.T)).sum(1)

    for coordinates in ("angle", "log_sigma"):
        s = make_sampler(EmpiricalDenoiser(y, 1.0, p), coordinates=coordinates, **TIGHT)
        assert torch.allclose(stream(s.integrate(x, 2.0, 0.05), 0.05), stream(x, 2.0), atol=1e-7)


def test_the_state_is_float64():
    x = torch.randn(4, 3, dtype=F64)
    fine = make_sampler(CauchyBlob(0.3), method="dopri8", rtol=1e-12, atol=1e-12).integrate(x, 5.0, 0.02)
    assert torch.allclose(fine, x * 0.32 / 5.3, rtol=1e-10, atol=0)


def test_networks_get_the_dtype_of_their_parameters():
    class Net(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=dtype))

        def forward(self, x, sigma, label=None):
            assert x.dtype == sigma.dtype == self.scale.dtype
            return self.scale * x

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert make_sampler(Net(dtype)).sample(2).x.dtype == dtype


def test_nan_from_the_network_is_reported():
    def denoiser(x, sigma, label=None):
        return torch.where(sigma[:, None] < 1.0, torch.nan, 0.5 * x)

    with pytest.raises(ode.SolverError, match=r"NaN or infinity for .* of 4 samples at level .* \(call"):
        make_sampler(denoiser).sample(4)


def test_a_tolerance_that_cannot_be_met_is_reported_with_advice(monkeypatch):
    monkeypatch.setattr(ode, "MAX_STEPS", 50)

    def denoiser(x, sigma, label=None):
        return torch.rand_like(x)

    with pytest.raises(ode.SolverError, match="Raise rtol and atol"):
        make_sampler(denoiser, rtol=1e-12, atol=1e-12).sample(2)
