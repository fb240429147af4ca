"""This room holds the mathematics: perturbation kernel, Poisson field, exact denoisers and the summary of a data set.

It contains pure functions and small modules of tensors, all in centred model space. It may import `pfgm.core` and `pfgm.files`.
"""

from pfgm.theory.analytic import CauchyBlob, EmpiricalDenoiser, GaussianBlob, PointCharge, UniformSegment
from pfgm.theory.data_summary import DataSummary
from pfgm.theory.field import denoised_from_field, normalized_field, poisson_field, posterior_mean
from pfgm.theory.kernel import StudentTKernel

__all__ = [
    "CauchyBlob",
    "DataSummary",
    "EmpiricalDenoiser",
    "GaussianBlob",
    "PointCharge",
    "StudentTKernel",
    "UniformSegment",
    "denoised_from_field",
    "normalized_field",
    "poisson_field",
    "posterior_mean",
]
