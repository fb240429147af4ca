"""Checks and small helpers for tensors of samples [B, ...]: one value per sample, norms, shapes."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from pfgm.core.arguments import is_real


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` and its square are positive and finite in float64."""
    if not 1e-150 < value < 1e150:
        raise ValueError(f"{name} = {value}: must be a positive finite number, from 1e-150 to 1e150")


def check_levels(sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless 1e-30 <= sigma_min < sigma_max <= 1e30."""
    if not 1e-30 <= sigma_min < sigma_max <= 1e30:
        raise ValueError(
            f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: noise levels must be from 1e-30 to 1e30, sigma_min < sigma_max"
        )


def check_shape(shape: Sequence[int], name: str = "shape") -> None:
    """Raise ValueError unless `shape`, called `name`, has one or more dimensions, each of a size of 1 or more."""
    if not len(shape) or not all(is_real(size, Integral) and size >= 1 for size in shape):
        raise ValueError(f"{name} = {tuple(shape)}: expected one integer >= 1 for each dimension of a sample")


def check_shapes(x: Tensor, y: Tensor, name: str) -> None:
    """Raise ValueError unless `y`, called `name`, holds samples like those of `x` [B, ...]: B of them, or one."""
    if y.shape[1:] != x.shape[1:] or len(y) not in (1, len(x)):
        raise ValueError(
            f"{name} has shape {tuple(y.shape)}, x has shape {tuple(x.shape)}: expected as many samples, of the same shape"
        )


def check_finite_samples(name: str, x: Tensor) -> None:
    """Raise ValueError if `x` has no samples, or values that are NaN or infinite."""
    if not len(x):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected at least one sample")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: {int((~torch.isfinite(x)).sum())} values are NaN or infinite. Remove those samples.")


def per_sample(value: float | Tensor, like: Tensor, name: str = "sigma") -> Tensor:
    """Expand `value`, a number or [B], called `name`, to one for each sample of `like` [B, ...]: [B] in float64.

    Raises:
        ValueError: If `value` has another shape, or `like` are no floating-point samples.
    """
    if like.ndim < 2:
        raise ValueError(
            f"x or y has shape {tuple(like.shape)}: expected samples [B, ...]. Pass samples of single numbers as [B, 1]."
        )
    if not like.is_floating_point():
        raise ValueError(f"x or y has dtype {like.dtype}: expected floating-point numbers")
    tensor = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if tensor.ndim > 1 or (tensor.ndim == 1 and len(tensor) != len(like)):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: expected a float or one value for each of {len(like)} samples"
        )
    return tensor.expand(len(like))


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Reshape `value` [B] to [B, 1, ..., 1], in the dtype of `like` [B, ...], so that it multiplies samples."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def norm(x: Tensor) -> Tensor:
    """Compute the Euclidean norm [B] of each sample of `x` [B, ...] in float64."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)
