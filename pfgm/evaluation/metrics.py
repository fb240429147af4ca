"""Distances between two sets of samples, of their values or of features of them (`pfgm.evaluation.features`).

x [n, ...] and y [m, ...] are tensors in the same units, or `Points`, which keep what several measures need of a set. All is
computed in float64 on flattened samples, a block of pairs at a time.
"""

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from pfgm.core.arguments import checked
from pfgm.evaluation import metrics

BLOCK = 2**24
"""Pairs of samples of which distances are held at once."""


class FeatureSet:
    """A set of samples [n, ...], flattened. ValueError for fewer than two, or for values that are not finite."""

    def __init__(self, x: Tensor):
        if x.ndim < 2 or len(x) < 2:
            raise ValueError(f"x, y: a set of shape {tuple(x.shape)}: give two or more samples")
        self.x = x.flatten(1).double()
        if not bool(torch.isfinite(self.x).all()):
            bad = int((~torch.isfinite(self.x).all(1)).sum())
            raise ValueError(f"x, y: {bad} of {len(x)} samples hold NaN or infinite values; nothing can be compared with them")

    @classmethod
    def of(cls, x: "Tensor | FeatureSet") -> "FeatureSet":
        """`x` itself if it is one."""
        return x if isinstance(x, FeatureSet) else cls(x)

    def __len__(self) -> int:
        return len(self.x)

    def first(self, n: int) -> "FeatureSet":
        """The first `n`."""
        return self if n >= len(self) else FeatureSet(self.x[:n])

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [F] and covariance [F, F]."""
        return self.x.mean(0), torch.atleast_2d(torch.cov(self.x.T))

    @cached_property
    def root(self) -> Tensor:
        """Square root of the covariance, [F, F]."""
        values, vectors = torch.linalg.eigh(self.moments[1])
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    @cached_property
    def mean_distance(self) -> Tensor:
        """Of two different samples."""
        return _mean(self, self, _distances) * len(self) / (len(self) - 1)

    @cached_property
    def mean_kernel(self) -> Tensor:
        """Polynomial kernel of two different samples."""
        n, own = len(self), _polynomial(self.x.square().mean(1)).mean()
        return (n * _mean(self, self, _kernel) - own) / (n - 1)

    @cached_property
    def radii(self) -> Tensor:
        """Distance [n] of each sample to its third nearest neighbour, or in a smaller set the furthest."""
        k = min(4, len(self))  # the first is itself
        return torch.cat([block.kthvalue(k, dim=1).values for block in _blocks(self, self, _distances)])


@checked
def energy_distance(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'|, unbiased: about 0, or a little below, for two samples of one distribution.

    Source: Székely and Rizzo, Energy statistics (2013). ValueError for fewer than two samples in either set.
    """
    a, b = _pair(x, y)
    return float(2 * _mean(a, b, _distances) - a.mean_distance - b.mean_distance)


@checked
def frechet_distance(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """|m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^½): the squared 2-Wasserstein distance of Gaussians fitted to each set.

    FID if the features are Inception's (arXiv 1706.08500). Biased upwards for few samples. ValueError as for
    `energy_distance`.
    """
    a, b = _pair(x, y)
    (m_a, C_a), (m_b, C_b) = a.moments, b.moments
    cross = torch.linalg.eigvalsh(b.root @ C_a @ b.root).clamp(min=0).sqrt().sum()
    return float((m_a - m_b).square().sum() + C_a.trace() + C_b.trace() - 2 * cross)


@checked
def kernel_distance(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Squared maximum mean discrepancy of the kernel (a·b/F + 1)³, unbiased: 0 on average for one distribution.

    KID if the features are Inception's (arXiv 1801.01401). It is for features of size 1 about zero; a common shift changes
    it. ValueError as for `energy_distance`.
    """
    a, b = _pair(x, y)
    return float(a.mean_kernel + b.mean_kernel - 2 * _mean(a, b, _kernel))


@checked
def precision(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Share of samples x that lie among the data y: nearer to some of y than its third nearest neighbour in y.

    The recall of x is precision(y, x). Both depend on the number of samples: takes as many of x as of y. Source: Kynkäänniemi
    et al. (arXiv 1904.06991). ValueError as for `energy_distance`.
    """
    a, b = _pair(x, y)
    n = min(len(a), len(b))
    a, b = a.first(n), b.first(n)
    return float(torch.cat([(block <= b.radii).any(1) for block in _blocks(a, b, _distances)]).double().mean())


@checked
def recall(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Share of the data y that lies among the samples x: see `precision`."""
    return precision(y, x)


@checked
def nearest_neighbour_accuracy(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Share of samples of the joint set whose nearest neighbour is of their own set: .5 if nothing tells them apart.

    Source: Lopez-Paz and Oquab, Revisiting classifier two-sample tests (arXiv 1610.06545). Takes as many of x as of y.
    """
    a, b = _pair(x, y)
    n = min(len(a), len(b))
    joint = FeatureSet(torch.cat([a.x[:n], b.x[:n]]))
    index, row = [], 0
    for block in _blocks(joint, joint, _distances):
        block.diagonal(row).fill_(torch.inf)
        index.append(block.argmin(1))
        row += len(block)
    own = torch.arange(2 * n, device=joint.x.device) < n
    return float((own == own[torch.cat(index)]).double().mean())


def nearest(x: Tensor | FeatureSet, y: Tensor | FeatureSet, k: int = 1) -> tuple[Tensor, Tensor]:
    """The `k` nearest of y for each of x: distances and positions in y, [n, k] each, nearest first."""
    a, b = _pair(x, y)
    found = [block.topk(k, largest=False) for block in _blocks(a, b, _distances)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


@checked
def copying(x: Tensor | FeatureSet, train: Tensor | FeatureSet, held_out: Tensor | FeatureSet) -> float:
    """Probability that a sample is nearer to its nearest training sample than a held-out one is to its own.

    .5 for samples that are as new as held-out data, 1 for copies, less for samples away from the data. The statistic of Mann
    and Whitney's test, as in Meehan et al. (arXiv 2004.05675) over the whole space. ValueError as for `energy_distance`.
    """
    ours, others = nearest(x, train)[0][:, 0], nearest(held_out, train)[0][:, 0].sort().values
    below, upto = (torch.searchsorted(others, ours, right=right) for right in (False, True))
    return float(1 - (below + upto).double().mean() / (2 * len(others)))


def _pair(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> tuple[FeatureSet, FeatureSet]:
    a, b = FeatureSet.of(x), FeatureSet.of(y)
    if a.x.shape[1] != b.x.shape[1]:
        raise ValueError(f"x has {a.x.shape[1]} numbers a sample, y {b.x.shape[1]}; give two sets of one shape")
    return a, b


def _blocks(a: FeatureSet, b: FeatureSet, of_pairs: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
    """`of_pairs` of some of a, in order, with all of b: [rows, m]."""
    for rows in a.x.split(max(1, BLOCK // len(b))):
        yield of_pairs(rows, b.x)


def _mean(a: FeatureSet, b: FeatureSet, of_pairs: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return torch.stack([block.sum() for block in _blocks(a, b, of_pairs)]).sum() / (len(a) * len(b))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    centre = b.mean(0)  # far from zero the matrix product in cdist would lose small distances
    return torch.cdist(a - centre, b - centre)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return _polynomial(a @ b.T / a.shape[1])


def _polynomial(product: Tensor) -> Tensor:
    return (product + 1) ** 3


pass

MEASURES: dict[str, Callable[[FeatureSet, FeatureSet], float]] = {
    "energy": metrics.energy_distance,
    "frechet": metrics.frechet_distance,
    "kernel": metrics.kernel_distance,
    "precision": metrics.precision,
    "recall": metrics.recall,
    "1-nn": metrics.nearest_neighbour_accuracy,
}

HEADS = ("energy distance", "Fréchet", "kernel (KID)", "precision", "recall", "1-NN accuracy")


def compare(sets: list[FeatureSet], reference: FeatureSet) -> dict[str, list[float]]:
    """Every measure of each set against `reference`."""
    return {name: [measure(points, reference) for points in sets] for name, measure in MEASURES.items()}
