"""Data sets and their batches: images, arrays, labels, degradations and augmentation.

`datamodule` and `datasets` use Lightning; the other files use only tensors. This room imports `pfgm.core`, `pfgm.files` and
`pfgm.theory`. Names load on first use, since data modules import Lightning.
"""

from typing import TYPE_CHECKING, Any

from pfgm.core.exports import lazy_names

if TYPE_CHECKING:
    from pfgm.data.augmentation import Augment
    from pfgm.data.batches import Batch, SampleSet
    from pfgm.data.datamodule import DataModule
    from pfgm.data.datasets import Arrays, Digits, ImageDataModule, Toy
    from pfgm.data.degradations import AddNoise, Degradation, Downsample, Grey

__all__ = [
    "AddNoise",
    "Arrays",
    "Augment",
    "Batch",
    "DataModule",
    "Degradation",
    "Digits",
    "Downsample",
    "Grey",
    "ImageDataModule",
    "SampleSet",
    "Toy",
]

_HOMES = {
    "augmentation": ["Augment"],
    "batches": ["Batch", "SampleSet"],
    "datamodule": ["DataModule"],
    "datasets": ["Arrays", "Digits", "ImageDataModule", "Toy"],
    "degradations": ["AddNoise", "Degradation", "Downsample", "Grey"],
}


def __getattr__(name: str) -> Any:
    return lazy_names(__name__, _HOMES, name)
