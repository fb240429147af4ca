"""Distances between two sets of samples, without any trained features.

x [n, ...] and y [m, ...] are in the same units; everything is computed in float64 on flattened samples.
"""

import torch
from torch import Tensor


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'|, unbiased: about 0, or a little below, for two samples of one distribution.

    Source: Székely and Rizzo, Energy statistics (2013). ValueError for fewer than two samples in either set.
    """
    a, b = _flat(x, y)
    return float(2 * torch.cdist(a, b).mean() - _mean_distance(a) - _mean_distance(b))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^½): the squared 2-Wasserstein distance of Gaussians fitted to each set.

    On pixels, or on the features of any network. Biased upwards for few samples. ValueError as for `energy_distance`.
    """
    a, b = _flat(x, y)
    C_a, C_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    root = _root(C_a)
    cross = torch.linalg.eigvalsh(root @ C_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + C_a.trace() + C_b.trace() - 2 * cross)


def nearest_neighbour_accuracy(x: Tensor, y: Tensor) -> float:
    """Share of samples of the joint set whose nearest neighbour is of their own set: .5 if nothing tells them apart.

    Source: Lopez-Paz and Oquab, Revisiting classifier two-sample tests (arXiv 1610.06545). Takes as many of x as of y.
    """
    a, b = _flat(x, y)
    n = min(len(a), len(b))
    distance = torch.cdist(joint := torch.cat([a[:n], b[:n]]), joint).fill_diagonal_(torch.inf)
    own = torch.arange(2 * n, device=a.device) < n
    return float((own == own[distance.argmin(1)]).double().mean())


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"sets of shape {tuple(x.shape)} and {tuple(y.shape)}: give two or more samples each, of one shape")
    a, b = x.flatten(1).double(), y.flatten(1).double()
    centre = a.mean(0)  # of no influence but on rounding
    return a - centre, b - centre


def _mean_distance(x: Tensor) -> Tensor:
    return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))


def _root(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
