"""Measure the quality of samples: distances between sets, feature networks for images, and pictures.

This room may import every room before it. It does not import Lightning.
"""

from pfgm.evaluation.features import Classifier, fit_classifier, load_features
from pfgm.evaluation.metrics import (
    MEASURES,
    FeatureSet,
    Measure,
    copying,
    energy_distance,
    frechet_distance,
    kernel_distance,
    nearest_neighbour_accuracy,
    precision,
    recall,
)

__all__ = [
    "MEASURES",
    "Classifier",
    "FeatureSet",
    "Measure",
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
