"""Where training meets sampling: how the network runs, sample grids, the progress bar."""

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
    """How the network runs: `compile` translates it in `fit` (torch.compile; a minute at the start, and on a CPU it needs a C++
    compiler), `channels_last` lays out the weights of convolutions so, for GPUs in bfloat16.

    Neither changes what is stored or how a run is resumed. Validation and sample grids run uncompiled, since each new size of a
    batch would be translated anew.
    """

    @checked
    def __init__(self, compile: bool = False, channels_last: bool = False):
        self.compile, self.channels_last = compile, channels_last

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """ValueError for channels_last where there are no images or volumes."""
        assert isinstance(pl_module, PFGM)
        net, shape = cast(nn.Module, pl_module.flow.denoiser.net), pl_module.flow.shape
        if self.channels_last:
            if len(shape) not in (3, 4):
                raise ValueError(f"speed.channels_last = True: it is for images and volumes, not for samples of shape {shape}")
            net.to(memory_format=torch.channels_last if len(shape) == 3 else torch.channels_last_3d)
        if self.compile and stage == "fit":
            net.compile(dynamic=False)  # one size of batches and images, whatever else this process compiled before

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Uncompiled from here on."""
        if self.compile:
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compiled again."""
        if self.compile:
            torch.compiler.set_stance("default")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As if nothing had been validated."""
        self.on_validation_end(trainer, pl_module)


class SampleGrid(Callback):
    """After each validation, `n` samples of seed 0 as `<run_dir>/grids/<step>.png`, and the loss curve as loss.png.

    Images make a grid, of the classes in turn and under the held-out conditions, if there are any, 2-D data a scatter plot,
    other shapes nothing. Placed before EMA, so that the averaged weights draw.
    """

    @checked
    def __init__(self, n: int = 64):
        if n < 0:
            raise ValueError(f"n = {n} must not be negative")
        self.n = n

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PFGM)
        flow, folder = pl_module.flow, Path(trainer.default_root_dir)
        if trainer.sanity_checking or not self.n or not (plots.is_image(flow.shape) or flow.shape == (2,)):
            return
        (folder / "grids").mkdir(parents=True, exist_ok=True)
        classes = flow.summary.num_classes
        labels = torch.arange(self.n) % classes if classes else None
        condition = _conditions(trainer, self.n) if flow.summary.conditions else None
        if flow.summary.conditions and condition is None:
            return
        try:
            x = flow.sample(self.n, labels=labels, condition=condition).x
        except SolverError as error:
            pl.utilities.rank_zero_warn(f"no sample grid at step {trainer.global_step}: {error}")
            return
        plots.save_samples(folder / "grids" / f"{trainer.global_step:08d}.png", x, flow.summary.value_range)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log = Path(trainer.default_root_dir) / "metrics.csv"
        if log.exists():
            plots.save_loss_curve(log.with_name("loss.png"), log)


def _conditions(trainer: pl.Trainer, n: int) -> dict[str, Tensor] | None:
    """Those of `n` held-out samples, if the trainer's data module is one of this package's."""
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, DataModule):
        return None
    prepared = data.prepared(data.held_out[torch.arange(n) % len(data.held_out)])
    return {key: value for key, value in prepared.conditions.items() if key != "label"}


class StepProgressBar(TQDMProgressBar):
    """A progress bar over training steps, since the stream of batches has no epochs."""

    @property
    def total_train_batches(self) -> int | float:
        """Steps until max_steps."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches


pass


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml when training starts, after the first checkpoint; other stages leave it alone."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once, since the stream of batches is one epoch."""
        if trainer.is_global_zero:
            with atomic_write(Path(trainer.default_root_dir) / self.config_filename) as temporary:
                self.parser.save(self.config, temporary, skip_none=False, overwrite=True, multifile=False)
