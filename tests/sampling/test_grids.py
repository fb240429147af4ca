"""Grids: where draws hand over to the final denoising, and both directions."""

import math

import pytest
import torch

from pfgm.theory.analytic import CauchyBlob
from tests.helpers import F64, TIGHT, make_sampler


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
    with pytest.raises(ValueError, match="grid begins at 5; this way begins at 40"):
        s.sample(2)
    with pytest.raises(ValueError, match=r"grid ends at 0\.2; this way ends at 0.3"):
        s.integrate(x, 5.0, 0.3)
