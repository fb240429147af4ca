"""Callbacks that average the weights over training."""

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


def _lerp(averages: list[Tensor], weights: Sequence[Tensor], fraction: float) -> None:
    """Move `averages` towards `weights` by a `fraction` of the difference, in place and in their own dtype."""
    torch._foreach_lerp_(averages, [w.to(a.dtype) for a, w in zip(averages, weights, strict=True)], fraction)


class EMA(WeightAveraging):
    """Keep an exponential moving average of the weights, as EDM does (arXiv 2206.00364, appendix F.2).

    The half-life is min(half_life, warmup * images seen), so the average soon forgets the first steps. The average stays on the
    device of the model. Validation, sample grids and the `state_dict` of checkpoints use it, and it replaces the raw weights
    when fitting ends. Checkpoints also hold the raw weights, so that a resumed run is exact.

    Args:
        half_life: Longest half-life, in images; 0 turns averaging off.
        warmup: Half-life as a fraction of the images seen so far.
    """

    @checked
    def __init__(self, half_life: float = 500_000.0, warmup: float = 0.05):
        if not half_life >= 0 or not warmup > 0:
            raise ValueError(f"half_life = {half_life}, warmup = {warmup}: half_life must be >= 0 and warmup > 0.")
        super().__init__(use_buffers=False)
        self.half_life, self.warmup = half_life, warmup

    def decay(self, seen: int, images: int) -> float:
        """Return the factor of the old average in a step of `images` images after `seen` images."""
        half_life = min(self.half_life, self.warmup * seen)
        return 0.5 ** (images / half_life) if half_life else 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the model before fitting. Raise ValueError for strategies that shard the weights."""
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"strategy = {type(trainer.strategy).__name__}: weights that are sharded over devices cannot be averaged. "
                "Use ddp, or train without EMA."
            )
        super().setup(trainer, pl_module, stage)
        self._latest_update_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the average to the device of the model and to its dtype, at least float32."""
        assert self._average_model is not None
        dtype = torch.promote_types(next(pl_module.parameters()).dtype, torch.float32)
        self._average_model.to(pl_module.device, dtype)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after each optimizer step."""
        step, images = trainer.global_step, batch.rows[1]
        if step > self._latest_update_step:
            assert self._average_model is not None
            averages: list[Tensor] = [*self._average_model.module.parameters()]
            _lerp(averages, [*pl_module.parameters()], 1 - self.decay((step - 1) * images, images))
            self._latest_update_step = step

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore average and raw weights for fitting; other stages take the average from the checkpoint's `state_dict`."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing yet: the last checkpoint still needs the raw weights."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the average into the model."""
        self._copy_average_to_current(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Discard the average."""
        self._average_model = None


class PowerAverages(Callback):
    """Keep power-function averages of the flow's weights, from which `sample.py average` builds any other width.

    The method is the post-hoc EMA of EDM2 (arXiv 2312.02696, section 3). Every `every_n_steps` optimizer steps and at the end,
    a snapshot of all averages goes to `<run_dir>/averages`. Each average takes as much space as the network. Checkpoints hold
    the averages as well, so that a resumed run continues them.

    Args:
        every_n_steps: Optimizer steps between snapshots; 0 keeps no averages.
        sigma_rel: Relative widths of the averages, all different.
    """

    @checked
    def __init__(self, every_n_steps: int = 0, sigma_rel: Sequence[float] = (0.05, 0.1)):
        if every_n_steps < 0 or len(set(sigma_rel)) != len(sigma_rel) or not len(sigma_rel):
            raise ValueError(
                f"every_n_steps = {every_n_steps}, sigma_rel = {sigma_rel}: every_n_steps must be >= 0, and sigma_rel one or "
                "more different widths."
            )
        self.gammas = {float(width): posthoc_ema.exponent(width) for width in sigma_rel}
        self.every_n_steps, self.step, self.last_snapshot = every_n_steps, 0, 0
        self.averages: dict[float, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the weights, or continue the averages of a resumed run. Raise ValueError if it has no matching ones."""
        if not self.every_n_steps:
            return
        weights = self._weights(pl_module)
        if trainer.global_step == 0:
            self.step = self.last_snapshot = 0
            self.averages = {width: dict(weights) for width in self.gammas}
        elif set(self.averages) != set(self.gammas) or self.step != trainer.global_step:
            raise ValueError(
                f"averages.sigma_rel = {sorted(self.gammas)}: the run being resumed has averages of widths "
                f"{sorted(self.averages)} up to step {self.step} of {trainer.global_step}. Averages must cover the whole run: "
                "keep the options of the run, or choose another --run_dir."
            )
        for average in self.averages.values():
            for name, p in weights.items():
                dtype = torch.promote_types(p.dtype, torch.float32)
                average[name] = average[name].detach().to(p.device, dtype, copy=True)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Update the averages after each optimizer step."""
        if not self.every_n_steps or trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        weights: list[Tensor] = [*self._weights(pl_module).values()]
        for width, gamma in self.gammas.items():
            _lerp([*self.averages[width].values()], weights, 1 - posthoc_ema.decay(gamma, self.step))
        if self.step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a last snapshot."""
        if self.every_n_steps and self.step > self.last_snapshot:
            self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.averages = state_dict["step"], state_dict["averages"]

    def _weights(self, module: Any) -> dict[str, torch.nn.Parameter]:
        return dict(module.flow.named_parameters())

    @rank_zero_only
    def _save(self, trainer: pl.Trainer) -> None:
        self.last_snapshot = self.step
        posthoc_ema.write_snapshot(trainer.default_root_dir, self.step, self.averages)
