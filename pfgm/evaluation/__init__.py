"""Is it good? Distances between sets of samples, features in which to compare images, and pictures.

This room imports every room before it, and no Lightning.
"""

from pfgm.evaluation.features import Classifier, fit_classifier, load_features
from pfgm.evaluation.metrics import (
    copying,
    energy_distance,
    frechet_distance,
    kernel_distance,
    nearest_neighbour_accuracy,
    precision,
    recall,
)

__all__ = [
    "Classifier",
    "copying",
    "energy_distance",
    "fit_classifier",
    "frechet_distance",
    "kernel_distance",
    "load_features",
    "nearest_neighbour_accuracy",
    "precision",
    "recall",
]
