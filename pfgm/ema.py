"""The exponential moving average of the weights."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Average the weights as average += (1 - d) (weights - average), d = min(decay, (1 + n)/(10 + n)) after n steps.

    The average lives on the device of the model, is what validation, sample grids and `state_dict` of a checkpoint hold, and
    takes the place of the raw weights when fitting ends. Checkpoints hold the raw weights as well, so that resuming is exact.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay = {decay} must lie in [0, 1)")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, count: Tensor | int) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the average to where the model is by now."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore average and raw weights for fitting; other stages have the average from `state_dict`."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing yet: the last checkpoint must still find the raw weights."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the model."""
        self._copy_average_to_current(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the average: the next stage starts anew."""
        self._average_model = None
