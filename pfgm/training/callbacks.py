"""Callbacks for compilation, sample grids, the progress bar and the configuration file of a run."""

from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from pfgm.core.arguments import checked
from pfgm.data.datamodule import DataModule
from pfgm.evaluation import plots
from pfgm.files.atomic import atomic_write
from pfgm.sampling.ode import SolverError
from pfgm.training.module import PFGM


class Speed(Callback):
    """Compile the network, or change the memory layout of its convolutions.

    Neither changes what checkpoints contain or how a run resumes. Validation and sample grids run uncompiled, since each new
    batch size would trigger another compilation.

    Args:
        compile: Whether `fit` compiles the network with torch.compile. This takes about a minute at the start and
            needs a C++ compiler on a CPU.
        channels_last: Whether convolutions use the channels_last layout, for GPUs in bfloat16.
    """

    @checked
    def __init__(self, compile: bool = False, channels_last: bool = False):
        self.compile, self.channels_last = compile, channels_last

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Apply both options. Raise ValueError for channels_last if samples are neither images nor volumes."""
        assert isinstance(pl_module, PFGM)
        net, shape = cast(nn.Module, pl_module.flow.denoiser.net), pl_module.flow.shape
        if self.channels_last:
            if len(shape) not in (3, 4):
                raise ValueError(
                    f"speed.channels_last = True: only images and volumes have this layout, not samples of shape {shape}. "
                    "Leave it out."
                )
            net.to(memory_format=torch.channels_last if len(shape) == 3 else torch.channels_last_3d)
        if self.compile and stage == "fit":
            net.compile(dynamic=False)  # batches and images have one size, whatever else this process compiled before

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.compile:
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.compile:
            torch.compiler.set_stance("default")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)


class SampleGrid(Callback):
    """Save samples and the loss curve after each validation, as `<run_dir>/grids/<step>.png` and `<run_dir>/loss.png`.

    Images make a grid and 2-D samples a scatter plot; other shapes are not plotted. Samples have seed 0, each class in turn,
    and the conditions of held-out samples. Place this callback before EMA, so that the averaged weights make the samples.

    Args:
        n: Number of samples; 0 saves none.
    """

    @checked
    def __init__(self, n: int = 64):
        if n < 0:
            raise ValueError(f"n = {n}: the number of samples must not be negative.")
        self.n = n

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the samples; a failing solver gives a warning."""
        assert isinstance(pl_module, PFGM)
        flow, folder = pl_module.flow, Path(trainer.default_root_dir) / "grids"
        if trainer.sanity_checking or not self.n or not (plots.is_image(flow.shape) or flow.shape == (2,)):
            return
        folder.mkdir(parents=True, exist_ok=True)
        classes = flow.summary.num_classes
        labels = torch.arange(self.n) % classes if classes else None
        condition = _held_out_conditions(trainer, self.n) if flow.summary.conditions else None
        if flow.summary.conditions and condition is None:
            return
        try:
            x = flow.sample(self.n, labels=labels, condition=condition).x
        except SolverError as error:
            pl.utilities.rank_zero_warn(f"no sample grid at step {trainer.global_step}: {error}")
            return
        plots.save_samples(folder / f"{trainer.global_step:08d}.png", x, flow.summary.value_range)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plot the loss curve, if the run has a log."""
        log = Path(trainer.default_root_dir) / "metrics.csv"
        if log.exists():
            plots.save_loss_curve(log.with_name("loss.png"), log)


def _held_out_conditions(trainer: pl.Trainer, n: int) -> dict[str, Tensor] | None:
    """Return the conditions [n, ...] of held-out samples, or None without a data module of this package."""
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, DataModule):
        return None
    prepared = data.prepared(data.held_out[torch.arange(n) % len(data.held_out)])
    return {key: value for key, value in prepared.conditions.items() if key != "label"}


class StepProgressBar(TQDMProgressBar):
    """Show progress in batches of the whole run if the trainer does not limit those of an epoch."""

    @property
    def total_train_batches(self) -> int | float:
        limit, steps = super().total_train_batches, self.trainer.max_steps
        return steps * self.trainer.accumulate_grad_batches if limit == float("inf") and steps >= 0 else limit


class SaveConfig(SaveConfigCallback):
    """Write config.yaml when training starts, after the first checkpoint; other stages do not write it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Do nothing: Lightning would write the file here, before the run has a checkpoint."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file; the stream of batches is one epoch, so this happens once."""
        if trainer.is_global_zero:
            with atomic_write(Path(trainer.default_root_dir) / self.config_filename) as temporary:
                self.parser.save(self.config, temporary, skip_none=False, overwrite=True, multifile=False)
