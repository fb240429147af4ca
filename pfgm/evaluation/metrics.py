"""Distances between two sets of samples, computed on their values or on features of them (see `pfgm.evaluation.features`).

The table of `test`, test.json and the benchmark of metrics derive from `MEASURES`, so a new metric is a function and one entry
there. All distances are computed in float64 on flattened samples, in blocks of pairs that bound the memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BLOCK = 2**24  # pairs of samples whose distances are held at once


class FeatureSet:
    """Flatten a set of samples and cache the statistics that several metrics share.

    Args:
        x: Two or more samples [n, ...], all finite.

    Raises:
        ValueError: If there are fewer than two samples, or if any value is NaN or infinite.
    """

    def __init__(self, x: Tensor):
        if x.ndim < 2 or len(x) < 2:
            raise ValueError(f"x, y: a set has shape {tuple(x.shape)}. Pass two or more samples [n, ...].")
        self.x = x.flatten(1).double()
        bad = int((~torch.isfinite(self.x).all(1)).sum())
        if bad:
            raise ValueError(f"x, y: {bad} of {len(x)} samples contain NaN or infinite values. Remove them.")

    @classmethod
    def pair(cls, x: "Tensor | FeatureSet", y: "Tensor | FeatureSet") -> "tuple[FeatureSet, FeatureSet]":
        """Convert two sets and raise ValueError if their samples differ in size. Sets that are converted already are reused."""
        a, b = (s if isinstance(s, FeatureSet) else cls(s) for s in (x, y))
        if a.x.shape[1] != b.x.shape[1]:
            raise ValueError(
                f"x has {a.x.shape[1]} values per sample, y has {b.x.shape[1]}. Pass two sets of one sample shape."
            )
        return a, b

    def __len__(self) -> int:
        return len(self.x)

    def first(self, n: int) -> "FeatureSet":
        """Return the set of the first `n` samples."""
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
        """Mean Euclidean distance of two different samples, a scalar."""
        return _mean(self, self, _distances) * len(self) / (len(self) - 1)

    @cached_property
    def mean_kernel(self) -> Tensor:
        """Mean polynomial kernel of two different samples, a scalar."""
        n, diagonal = len(self), ((self.x.square().mean(1) + 1) ** 3).mean()
        return (n * _mean(self, self, _kernel) - diagonal) / (n - 1)

    @cached_property
    def radii(self) -> Tensor:
        """Distance [n] of each sample to its third nearest neighbour, or to the furthest one in a set of fewer than four."""
        return nearest(self, self, min(4, len(self)))[0][:, -1]  # the first neighbour is the sample itself


def energy_distance(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Compute the energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'| (Székely and Rizzo, Energy statistics, 2013).

    The estimate is unbiased. It is about 0, and can be slightly negative, for two sets from one distribution.

    Args:
        x: Samples [n, ...].
        y: Samples [m, ...] of the same shape and in the same units, on the same device.

    Returns:
        The distance, in the units of the samples.

    Raises:
        ValueError: If a set is not valid (see `FeatureSet`), or if the samples of `x` and `y` differ in size.
    """
    a, b = FeatureSet.pair(x, y)
    return float(2 * _mean(a, b, _distances) - a.mean_distance - b.mean_distance)


def frechet_distance(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Compute the squared 2-Wasserstein distance of Gaussians that are fitted to each set.

    It is |m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^½) with the means m and covariances C, biased upwards for small sets. On
    Inception features it is the FID (arXiv 1706.08500). See `energy_distance` for arguments and errors.
    """
    a, b = FeatureSet.pair(x, y)
    (m_a, C_a), (m_b, C_b) = a.moments, b.moments
    cross = torch.linalg.eigvalsh(b.root @ C_a @ b.root).clamp(min=0).sqrt().sum()
    return float((m_a - m_b).square().sum() + C_a.trace() + C_b.trace() - 2 * cross)


def kernel_distance(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Compute the squared maximum mean discrepancy under the kernel (a·b/F + 1)³ for F features.

    The estimate is unbiased. On Inception features it is the KID (arXiv 1801.01401). The kernel expects features of order 1
    around zero; a shift common to both sets changes the result. See `energy_distance` for arguments and errors.
    """
    a, b = FeatureSet.pair(x, y)
    return float(a.mean_kernel + b.mean_kernel - 2 * _mean(a, b, _kernel))


def precision(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Compute the share of samples x that lie on the manifold of the data y.

    A sample lies on it if it is nearer to some y than the third nearest neighbour of that y in y (arXiv 1904.06991). The value
    depends on the number of samples, so both sets are cut to the smaller size. See `energy_distance` for arguments and errors.
    """
    a, b = _equal_sizes(x, y)
    return float(torch.cat([(block <= b.radii).any(1) for block in _blocks(a, b, _distances)]).double().mean())


def recall(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Compute the share of the data y that lies on the manifold of the samples x, which is precision(y, x)."""
    return precision(y, x)


def nearest_neighbour_accuracy(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> float:
    """Compute the share of samples in the joint set whose nearest neighbour is from their own set.

    It is .5 for two sets from one distribution and 1 for sets that are far apart (arXiv 1610.06545). Both sets are cut to the
    smaller size. See `energy_distance` for arguments and errors.
    """
    a, b = _equal_sizes(x, y)
    joint = FeatureSet(torch.cat([a.x, b.x]))
    index, row = [], 0
    for block in _blocks(joint, joint, _distances):
        block.diagonal(row).fill_(torch.inf)
        index.append(block.argmin(1))
        row += len(block)
    is_x = torch.arange(len(joint), device=joint.x.device) < len(a)
    return float((is_x == is_x[torch.cat(index)]).double().mean())


@dataclass(frozen=True)
class Measure:
    """Describe a distance between two sets that `test` reports."""

    name: str  # key in test.json
    function: Callable[[FeatureSet, FeatureSet], float]
    heading: str  # column of the printed table
    sees: tuple[str, ...]  # degradations of the samples that it ranks; see benchmarks/metrics.py


MEASURES = (
    Measure("energy", energy_distance, "energy distance", ("blur", "noise", "classes")),
    Measure("frechet", frechet_distance, "Fréchet", ("blur", "noise", "classes")),
    Measure("kernel", kernel_distance, "kernel (KID)", ("blur", "noise", "classes")),
    Measure("precision", precision, "precision", ("blur", "noise")),
    Measure("recall", recall, "recall", ("classes",)),
    Measure("1-nn", nearest_neighbour_accuracy, "1-NN accuracy", ("blur", "noise", "classes")),
)


def compare(sets: list[FeatureSet], reference: FeatureSet) -> dict[str, list[float]]:
    """Return the values of all `MEASURES` by name, one for each set against `reference`."""
    return {measure.name: [measure.function(features, reference) for features in sets] for measure in MEASURES}


def nearest(x: Tensor | FeatureSet, y: Tensor | FeatureSet, k: int = 1) -> tuple[Tensor, Tensor]:
    """Find the `k` nearest neighbours in y of each sample x: distances and indices into y, [n, k] each, nearest first."""
    a, b = FeatureSet.pair(x, y)
    neighbours = [block.topk(k, largest=False) for block in _blocks(a, b, _distances)]
    return torch.cat([block.values for block in neighbours]), torch.cat([block.indices for block in neighbours])


def copying(x: Tensor | FeatureSet, train: Tensor | FeatureSet, held_out: Tensor | FeatureSet) -> float:
    """Compute the probability that a sample is nearer to the training data than a held-out sample is.

    It is .5 for samples that are as new as held-out data, 1 for copies, and lower for samples far from the data: the statistic
    of the Mann-Whitney test over the whole space (arXiv 2004.05675). See `energy_distance` for arguments and errors.
    """
    ours, others = nearest(x, train)[0][:, 0], nearest(held_out, train)[0][:, 0].sort().values
    below, upto = (torch.searchsorted(others, ours, right=right) for right in (False, True))
    return float(1 - (below + upto).double().mean() / (2 * len(others)))


def _equal_sizes(x: Tensor | FeatureSet, y: Tensor | FeatureSet) -> tuple[FeatureSet, FeatureSet]:
    """Convert two sets, and cut both to the smaller size."""
    a, b = FeatureSet.pair(x, y)
    n = min(len(a), len(b))
    return a.first(n), b.first(n)


def _blocks(a: FeatureSet, b: FeatureSet, function: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
    """Yield `function` of consecutive rows of `a` with all of `b`, [rows, m]."""
    for rows in a.x.split(max(1, BLOCK // len(b))):
        yield function(rows, b.x)


def _mean(a: FeatureSet, b: FeatureSet, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return torch.stack([block.sum() for block in _blocks(a, b, function)]).sum() / (len(a) * len(b))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    centre = b.mean(0)  # far from zero the matrix product in cdist would lose small distances
    return torch.cdist(a - centre, b - centre)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
