"""Averages of the weights over training."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor


class EMA(WeightAveraging):
    """Exponential moving average of the weights, with a half-life of min(`half_life`, `warmup` times those seen) images.

    So it forgets the first steps in time (EDM, arXiv 2206.00364, appendix F.2). It lives on the device of the model, is what
    validation, sample grids and `state_dict` of a checkpoint hold, and takes the place of the raw weights when fitting ends.
    Checkpoints hold the raw weights as well, so that resuming is exact. `half_life` = 0 averages nothing.
    """

    def __init__(self, half_life: float = 500_000.0, warmup: float = 0.05):
        if not half_life >= 0 or not warmup > 0:
            raise ValueError(f"half_life = {half_life}, warmup = {warmup}: give a number of images >= 0 and a share > 0")
        super().__init__(use_buffers=False)
        self.half_life, self.warmup = half_life, warmup

    def decay(self, seen: int, images: int) -> float:
        """The share of the average that stays in a step of so many `images`, after so many were `seen`."""
        half_life = min(self.half_life, self.warmup * seen)
        return 0.5 ** (images / half_life) if half_life else 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the average the device and the dtype that the model has by now."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device, next(pl_module.parameters()).dtype)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Average, after each optimizer step."""
        step, images = trainer.global_step, batch["rows"][1]
        if step > self._latest_update_step:
            assert self._average_model is not None
            averaged: list[Tensor] = [*self._average_model.module.parameters()]
            torch._foreach_lerp_(averaged, [*pl_module.parameters()], 1 - self.decay((step - 1) * images, images))
            self._latest_update_step = step

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
