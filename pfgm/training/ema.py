"""Averages of the weights over training."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor

from pfgm.core.arguments import checked
from pfgm.flow import posthoc_ema


def lerp_(averages: list[Tensor], weights: Sequence[Tensor], share: float) -> None:
    """averages += share (weights - averages), in the dtype of the averages."""
    torch._foreach_lerp_(averages, [w.to(a.dtype) for a, w in zip(averages, weights, strict=True)], share)


class EMA(WeightAveraging):
    """Exponential moving average of the weights, with a half-life of min(`half_life`, `warmup` times those seen) images.

    So it forgets the first steps in time (EDM, arXiv 2206.00364, appendix F.2). It lives on the device of the model, is what
    validation, sample grids and `state_dict` of a checkpoint hold, and takes the place of the raw weights when fitting ends.
    Checkpoints hold the raw weights as well, so that resuming is exact. `half_life` = 0 averages nothing.
    """

    @checked
    def __init__(self, half_life: float = 500_000.0, warmup: float = 0.05):
        if not half_life >= 0 or not warmup > 0:
            raise ValueError(f"half_life = {half_life}, warmup = {warmup}: give a number of images >= 0 and a share > 0")
        super().__init__(use_buffers=False)
        self.half_life, self.warmup = half_life, warmup

    def decay(self, seen: int, images: int) -> float:
        """The share of the average that stays in a step of so many `images`, after so many were `seen`."""
        half_life = min(self.half_life, self.warmup * seen)
        return 0.5 ** (images / half_life) if half_life else 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A copy of the model, if it is to be trained. ValueError for strategies that share the weights out."""
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"strategy = {type(trainer.strategy).__name__}: weights that are shared out over devices cannot be averaged; "
                "use ddp, or leave EMA out"
            )
        super().setup(trainer, pl_module, stage)
        self._latest_update_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the average the device and the dtype that the model has by now, but no less than float32."""
        assert self._average_model is not None
        dtype = torch.promote_types(next(pl_module.parameters()).dtype, torch.float32)
        self._average_model.to(pl_module.device, dtype)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Average, after each optimizer step."""
        step, images = trainer.global_step, batch.rows[1]
        if step > self._latest_update_step:
            assert self._average_model is not None
            averaged: list[Tensor] = [*self._average_model.module.parameters()]
            lerp_(averaged, [*pl_module.parameters()], 1 - self.decay((step - 1) * images, images))
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


class PowerAverages(Callback):
    """Power-function averages of the flow's weights at the widths `sigma_rel`, for `sample.py average` (arXiv 2312.02696).

    Every `every_n_steps` optimizer steps and at the end, snapshots of them go to `<run_dir>/averages`, each as large as as many
    networks; 0 keeps no averages. They are part of the checkpoint, so that a resumed run continues them.
    """

    @checked
    def __init__(self, every_n_steps: int = 0, sigma_rel: Sequence[float] = (0.05, 0.1)):
        if every_n_steps < 0 or len(set(sigma_rel)) != len(sigma_rel) or not len(sigma_rel):
            raise ValueError(
                f"every_n_steps = {every_n_steps}, sigma_rel = {sigma_rel}: give a number >= 0 and widths that differ"
            )
        self.gammas = {float(width): posthoc_ema.exponent(width) for width in sigma_rel}
        self.every_n_steps, self.step, self.saved = every_n_steps, 0, 0
        self.averages: dict[float, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copies of the weights, or the averages of a resumed run; ValueError if it had none, or others."""
        if not self.every_n_steps:
            return
        weights = self._weights(pl_module)
        if trainer.global_step == 0:
            self.step = self.saved = 0
            self.averages = {width: dict(weights) for width in self.gammas}
        elif set(self.averages) != set(self.gammas) or self.step != trainer.global_step:
            raise ValueError(
                f"averages: this run kept widths {sorted(self.averages)} up to step {self.step} of {trainer.global_step}, "
                f"asked for are {sorted(self.gammas)}; averages of a part of a run have no meaning. Leave the options as they "
                "were, or give another --run_dir"
            )
        for part in self.averages.values():
            for name, p in weights.items():
                dtype = torch.promote_types(p.dtype, torch.float32)
                part[name] = part[name].detach().to(p.device, dtype, copy=True)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Average, after each optimizer step."""
        if not self.every_n_steps or trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        weights: list[Tensor] = [*self._weights(pl_module).values()]
        for width, gamma in self.gammas.items():
            lerp_([*self.averages[width].values()], weights, 1 - posthoc_ema.decay(gamma, self.step))
        if self.step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A last snapshot."""
        if self.every_n_steps and self.step > self.saved:
            self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The averages and the step that they have reached."""
        return {"step": self.step, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those of a run that is resumed."""
        self.step, self.averages = state_dict["step"], state_dict["averages"]

    def _weights(self, module: Any) -> dict[str, torch.nn.Parameter]:
        return dict(module.flow.named_parameters())

    @rank_zero_only
    def _save(self, trainer: pl.Trainer) -> None:
        self.saved = self.step
        posthoc_ema.write_snapshot(trainer.default_root_dir, self.step, self.averages)
