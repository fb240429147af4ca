"""Checks and helpers of tensors of samples."""

import math
import re

import pytest
import torch

from pfgm.core.tensors import (
    check_finite_samples,
    check_levels,
    check_positive,
    check_shape,
    check_shapes,
    expand,
    norm,
    per_sample,
)

X = torch.zeros(3, 2, 2)


def test_values_become_one_per_sample_in_float64():
    assert torch.equal(per_sample(2, X), torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(per_sample(torch.tensor([1.0, 2.0, 3.0]), X), torch.tensor([1, 2, 3], dtype=torch.float64))
    assert per_sample(1e-40, X)[0] == 1e-40, "not rounded to the dtype of the samples"


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(3, 1)])
def test_values_of_another_shape_are_named(value):
    with pytest.raises(ValueError, match=r"r has shape .*: expected a float or one value for each of 3 samples"):
        per_sample(value, X, "r")


def test_samples_need_a_dimension_of_their_own_and_floating_point():
    with pytest.raises(ValueError, match=r"has shape \(3,\): expected samples \[B, \.\.\.\]\. .*single numbers as \[B, 1\]"):
        per_sample(1.0, torch.zeros(3))
    for dtype in (torch.bool, torch.int64):
        with pytest.raises(ValueError, match=rf"has dtype {dtype}: expected floating-point numbers"):
            per_sample(1.0, torch.ones(3, 4, dtype=dtype))


def test_expanded_values_multiply_samples():
    value = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert expand(value, X).shape == (3, 1, 1)
    assert expand(value, X).dtype == torch.float32
    assert torch.equal((expand(value, X) * torch.ones(3, 2, 2))[:, 1, 1], value.float())


def test_norms_are_computed_in_float64():
    x = torch.full((2, 2, 2), 1e30)
    assert torch.allclose(norm(x), torch.tensor([2e30, 2e30], dtype=torch.float64)), "squares overflow float32"
    assert norm(x).dtype == torch.float64


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-151, 1e150, math.inf, math.nan])
def test_numbers_whose_square_is_not_positive_and_finite_are_named(value):
    check_positive("rtol", 1e-149)
    with pytest.raises(ValueError, match=rf"rtol = {re.escape(str(value))}: must be a positive finite number"):
        check_positive("rtol", value)


@pytest.mark.parametrize("levels", [(1, 1), (2, 1), (0, 1), (9e-31, 1), (1, 1.1e30), (math.nan, 1), (1, math.nan)])
def test_noise_levels_out_of_order_or_range_are_named(levels):
    check_levels(1e-30, 1e30)
    with pytest.raises(ValueError, match=r"sigma_min = .*, sigma_max = .*: noise levels must be from 1e-30 to 1e30"):
        check_levels(*levels)


@pytest.mark.parametrize("shape", [(), (0,), (3, -1)])
def test_shapes_without_values_are_named(shape):
    check_shape((1, 2))
    with pytest.raises(ValueError, match=r"shape = .*: expected one integer >= 1 for each dimension"):
        check_shape(shape)


def test_samples_of_another_shape_or_number_are_named():
    check_shapes(X, X, "y")
    check_shapes(X, X[:1], "y")
    for other in (X[:2], X[:, :1], torch.zeros(3, 4)):
        with pytest.raises(ValueError, match=r"y has shape .*, x has shape \(3, 2, 2\): expected as many samples"):
            check_shapes(X, other, "y")


def test_samples_without_values_or_with_infinite_ones_are_named():
    check_finite_samples("x", X)
    with pytest.raises(ValueError, match=r"x has shape \(0, 2, 2\): expected at least one sample"):
        check_finite_samples("x", X[:0])
    with pytest.raises(ValueError, match="x: 2 values are NaN or infinite"):
        check_finite_samples("x", torch.tensor([[1.0, math.nan, math.inf]]))
