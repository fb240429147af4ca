"""Train flows with Lightning: the module, its objectives and noise laws, weight averages, checkpoints, logs and callbacks.

This room may import every other room but `cli`. Names load on first use, since most of them import Lightning.
"""

from typing import TYPE_CHECKING, Any

from pfgm.core.exports import lazy_names

if TYPE_CHECKING:
    from pfgm.training.callbacks import SampleGrid, Speed
    from pfgm.training.checkpointing import LastCheckpoint
    from pfgm.training.ema import EMA, PowerAverages
    from pfgm.training.evaluation_callback import Evaluation
    from pfgm.training.losses import DenoisingLoss, Loss, PoissonFieldLoss
    from pfgm.training.module import PFGM
    from pfgm.training.noise import LogNormal, LogUniform, NoiseLaw, PoissonFlowNoise, ScaledLogNormal

__all__ = [
    "EMA",
    "PFGM",
    "DenoisingLoss",
    "Evaluation",
    "LastCheckpoint",
    "LogNormal",
    "LogUniform",
    "Loss",
    "NoiseLaw",
    "PoissonFieldLoss",
    "PoissonFlowNoise",
    "PowerAverages",
    "SampleGrid",
    "ScaledLogNormal",
    "Speed",
]

_HOMES = {
    "callbacks": ["SampleGrid", "Speed"],
    "checkpointing": ["LastCheckpoint"],
    "ema": ["EMA", "PowerAverages"],
    "evaluation_callback": ["Evaluation"],
    "losses": ["DenoisingLoss", "Loss", "PoissonFieldLoss"],
    "module": ["PFGM"],
    "noise": ["LogNormal", "LogUniform", "NoiseLaw", "PoissonFlowNoise", "ScaledLogNormal"],
}


def __getattr__(name: str) -> Any:
    return lazy_names(__name__, _HOMES, name)
