"""Checks and small helpers of tensors [B, ...]: one value a sample, norms, shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_positive(name: str, value: float) -> None:
    """ValueError unless `value` is positive and finite, and so is its square."""
    if not 1e-150 < value < 1e150:
        raise ValueError(f"{name} = {value} must be a positive finite number, from 1e-150 to 1e150")


def check_shapes(x: Tensor, y: Tensor, name: str) -> None:
    """ValueError unless `y`, called `name`, has samples like those of `x` [B, ...], as many or one."""
    if y.shape[1:] != x.shape[1:] or len(y) not in (1, len(x)):
        raise ValueError(f"{name} has the shape {tuple(y.shape)}, x {tuple(x.shape)}; give as many samples of the same shape")


def per_sample(value: float | Tensor, like: Tensor, name: str = "sigma") -> Tensor:
    """A float or a [B] tensor as float64 [B] on the device of samples `like` [B, ...]; ValueError for any other."""
    if like.ndim < 2:
        raise ValueError(f"x or y has the shape {tuple(like.shape)}; give samples [B, ...], single numbers as [B, 1]")
    if not like.is_floating_point():
        raise ValueError(f"x or y has the type {like.dtype}; give floating-point numbers")
    tensor = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if tensor.ndim > 1 or (tensor.ndim == 1 and len(tensor) != len(like)):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give a float or one value for each of {len(like)} samples")
    return tensor.expand(len(like))


def expand(value: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ..., 1] in the dtype of `like` [B, ...], so that it multiplies samples."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def norm(x: Tensor) -> Tensor:
    """Euclidean norm over the event, in float64: [B, ...] -> [B]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)


def check_shape(shape: Sequence[int]) -> None:
    """ValueError unless samples can have this shape."""
    if not len(shape) or min(shape) < 1:
        raise ValueError(f"shape = {tuple(shape)}: give whole numbers >= 1, one for each dimension of a sample")


def check_finite_samples(name: str, x: Tensor) -> None:
    """ValueError if `x` has values that are NaN or infinite, or no samples."""
    if not len(x):
        raise ValueError(f"{name} has no samples; give at least one")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: {int((~torch.isfinite(x)).sum())} values are NaN or infinite")


def check_levels(sigma_min: float, sigma_max: float) -> None:
    """ValueError unless 1e-30 <= sigma_min < sigma_max <= 1e30."""
    if not 1e-30 <= sigma_min < sigma_max <= 1e30:
        raise ValueError(
            f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: noise levels must be from 1e-30 to 1e30, sigma_min < sigma_max"
        )
