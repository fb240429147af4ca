"""PFGM: the LightningModule that trains a flow. It knows no data set and no sampler."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from pfgm.core import rng
from pfgm.core.configurable import Configurable, build
from pfgm.core.tensors import check_positive
from pfgm.data.augmentation import SIZE as AUGMENTED
from pfgm.data.augmentation import Augment
from pfgm.data.batches import one_of
from pfgm.flow import checkpoints
from pfgm.flow.conditioning import normalized_condition
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.theory.data_summary import DataSummary
from pfgm.theory.kernel import check_dimensions
from pfgm.training.losses import DenoisingLoss, Loss
from pfgm.training.noise import NoiseLaw, PoissonFlowNoise, recommended_sigma_min
from pfgm.training.nonfinite import MAX_SKIPPED, NonFiniteLoss, SkippedSteps


class PFGM(Configurable, pl.LightningModule):
    """A flow, its objective and its optimizer (Adam with linear warm-up).

    A step whose loss or gradient is not finite leaves the weights alone and is counted; after MAX_SKIPPED of them in a row
    training stops. No step waits for an accelerator to know that: it is looked at when loss or checkpoint are written.

    `net` is the network (see `pfgm.nn.Network`), `data` the summary of the training data, `loss` the objective (default
    DenoisingLoss), `D` the number of augmented dimensions, a real number from .5 to inf. `sigma_min`, `sigma_max`, `sigma_data`
    and `data_norm`, in model units, come from the data unless given. Adam with `betas` reaches `lr` after `warmup_steps`; with
    `decay_steps` it falls as sqrt(decay_steps / step) after these (EDM2, arXiv 2312.02696). `seed` fixes the noise. Stored
    specs are accepted in place of net, loss and data, which is how `load_from_checkpoint` makes the module without arguments. A
    share `label_dropout` of the labels is dropped in training, for classifier-free guidance (arXiv 2207.12598).
    """

    def __init__(
        self,
        net: nn.Module,
        data: DataSummary,
        loss: Loss | None = None,
        *,
        D: float | str = 128.0,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        data_norm: float | None = None,
        start: str = "hemisphere",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        label_dropout: float = 0.0,
        augment: Augment | None = None,
        seed: int = 0,
    ):
        super().__init__()
        net, data = _made(net), _made(data)
        self.loss: Loss = _made(loss) or DenoisingLoss()
        self.augment: Augment | None = _made(augment)
        D = self._arguments["D"] = check_dimensions(D)  # "inf" and "Infinity" come as text from a command line
        if not 0 < lr < math.inf or warmup_steps < 0 or (decay_steps is not None and decay_steps < 1):
            raise ValueError(
                f"lr = {lr}, warmup_steps = {warmup_steps}, decay_steps = {decay_steps}: lr must be positive and finite, "
                "warmup_steps >= 0, decay_steps >= 1 or null"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas = {betas}: Adam needs two numbers in [0, 1)")
        for name, value in (("sigma_data", sigma_data), ("data_norm", data_norm)):
            if value is not None:
                check_positive(name, value)
        if not 0 <= label_dropout < 1 or (label_dropout and not data.num_classes):
            raise ValueError(
                f"label_dropout = {label_dropout}, num_classes = {data.num_classes}: give a share in [0, 1), and only to data "
                "with labels"
            )
        if data.condition_shape is not None and self.loss.reference_size:
            raise ValueError(
                f"{type(self.loss).__name__} with reference_size = {self.loss.reference_size} takes its target from many "
                "charges, but no two samples share a condition; use DenoisingLoss with reference_size = 0, for D = 1 as well"
            )
        if self.augment is not None:
            check_augment(net, data, self.loss)
        self.data = dataclasses.replace(
            data,
            sigma_data=data.sigma_data if sigma_data is None else sigma_data,
            norm=data.norm if data_norm is None else data_norm,
        )
        self.lr, self.betas, self.warmup_steps, self.decay_steps = lr, betas, warmup_steps, decay_steps
        self.label_dropout, self.seed = label_dropout, rng.natural("seed", seed)
        self._losses: list[Tensor] = []
        self._batches: list[dict[str, Any]] = []
        self._step = -1
        self._skips = SkippedSteps()
        self.flow = PoissonFlow(
            self.loss.make_denoiser(net, D, self.data),
            shape=data.shape,
            sigma_min=recommended_sigma_min(self.data.sigma_data) if sigma_min is None else sigma_min,
            sigma_max=self.loss.recommended_sigma_max(self.data) if sigma_max is None else sigma_max,
            sigma_data=self.data.sigma_data,
            mean=data.mean,
            scale=data.scale,
            value_range=data.value_range,
            num_classes=data.num_classes,
            unconditional=label_dropout > 0,
            levels=data.levels,
            dequantized=data.dequantized,
            condition_shape=data.condition_shape,
            condition_mean=data.condition_mean,
            condition_std=data.condition_std,
            start=start,
        )
        self.spec  # noqa: B018 (a network that cannot be stored is refused now, not at the first checkpoint)

    @property
    def reference_size(self) -> int:
        """Charges that the objective asks of each batch; 0 if none."""
        return self.loss.reference_size

    def setup(self, stage: str) -> None:
        """Forget an earlier fit."""
        self._losses, self._batches, self._step, self._skips = [], [], -1, SkippedSteps()

    def on_fit_start(self) -> None:
        """Say what the flow took from the data."""
        flow, data, noise = self.flow, self.data, getattr(self.loss, "noise", None)
        text = f"D = {flow.kernel.D:g}, N = {math.prod(flow.shape)}, scale {data.scale:.4g}, sigma_data {data.sigma_data:.4g}, "
        text += f"data norm {data.norm:.4g}, sigma {flow.sigma_min:.4g} .. {flow.sigma_max:.4g}"
        if isinstance(noise, PoissonFlowNoise):
            text += f", M = {noise.exponent(data.norm, math.prod(flow.shape)):.1f}"
        pl.utilities.rank_zero_info(text)

    def on_train_start(self) -> None:
        """Take up the batches of a resumed run at an optimizer step, where the stream does.

        A run may have been stopped between two batches of a step, or accumulated another number of them.
        """
        trainer: Any = self.trainer
        progress, batches = trainer.fit_loop.epoch_loop.batch_progress, trainer.global_step * trainer.accumulate_grad_batches
        for part in (progress.total, progress.current):
            part.ready = part.started = part.processed = part.completed = batches

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of a batch."""
        torch.manual_seed(rng.seed(self.seed, rng.UNITS, batch["step"], batch["rows"][0]))  # what dropout draws from
        loss = self._loss(batch, rng.TRAINING).mean()
        self._losses.append(loss.detach())
        if batch["step"] != self._step:  # those of the last step are kept until now, in case it is to blame
            self._batches, self._step = [], batch["step"]
        self._batches.append(batch)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient, keep one that is not finite from the weights, and log loss, learning rate and gradient's norm."""
        trainer: Any = self.trainer
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss = torch.stack(self._losses).mean()
        self._skips.add(loss, norm, optimizer, trainer.world_size)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        logs = (self.global_step + 1) % trainer.log_every_n_steps == 0
        if logs or self.device.type == "cpu":
            self.check_finite()
        self._losses.clear()
        if logs:
            values = {"train_loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            self._log({name: float(value) for name, value in (values | {"skipped": self._skips.total}).items()})

    def _log(self, values: dict[str, float]) -> None:
        """To all loggers, and a warning if steps were skipped since the last time; the loss is the mean over ranks."""
        values["train_loss"] = float(self.trainer.strategy.reduce(torch.tensor(values["train_loss"]).to(self.device)))
        self.log_dict(values, logger=False)
        for logger in self.loggers:
            logger.log_metrics(values, self.global_step)
        if self._skips.reported < values["skipped"] and self.trainer.precision != "16-mixed":
            self._skips.reported = int(values["skipped"])
            pl.utilities.rank_zero_warn(
                f"{self._skips.reported} of {self.global_step + 1} steps were skipped so far: "
                "their loss or gradient was not finite"
            )

    @property
    def skipped_in_a_row(self) -> int:
        """Steps that were skipped since the last that was not; waits for an accelerator."""
        return self._skips.state[1]

    def check_finite(self, saving: bool = False) -> None:
        """NonFiniteLoss, which says where, if the last MAX_SKIPPED steps were skipped, or if the last was, or this is for
        `saving`, and a weight is not finite."""
        row = self.skipped_in_a_row
        if row >= MAX_SKIPPED:
            raise NonFiniteLoss(
                f"the loss or its gradient was not finite in the last {row} steps, to step {self.global_step}, which were "
                f"skipped. {self._culprit()}. {REMEDY}"
            )
        if (row or saving) and not all(bool(torch.isfinite(p).all()) for p in self.parameters()):
            raise NonFiniteLoss(f"weights are not finite any more at step {self.global_step}. {self._culprit()}. {REMEDY}")

    def _culprit(self) -> str:
        """The first sample of the present step whose loss, or its gradient, is not finite, and its noise level."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        for batch in [one_of(part, i) for part in self._batches for i in range(len(part["x"]))]:
            with torch.enable_grad(), self.trainer.precision_plugin.train_step_context():
                (loss,) = self._loss(batch, rng.TRAINING)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
            if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
                y = self.flow.to_model(batch["x"].float())
                sigma = self.loss.levels(y, self.data, self._generator(rng.TRAINING, batch, y.device))
                number, of = (int(batch["index"]), "training data") if "index" in batch else (batch["rows"][0], "step")
                return (
                    f"At step {batch['step']} sample {number} of the {of}, at noise level {float(sigma):.4g} (model units), "
                    f"has loss {float(loss.detach()):.4g} and a gradient of norm {float(norm):.4g}"
                )
        return "No sample of this process is to blame alone"

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Mean loss on held-out data, with the same noise for each sample every time."""
        loss = self._loss(batch, rng.VALIDATION)
        self.log("val_loss", loss.mean(), prog_bar=True, batch_size=len(loss), sync_dist=True)
        self.log("step", float(self.global_step), batch_size=len(loss), sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same on the test data."""
        loss = self._loss(batch, rng.VALIDATION)
        self.log("test_loss", loss.mean(), batch_size=len(loss), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam, in one kernel for all weights, and its learning rate."""
        # The scaler of float16 would hide the size of the gradient from a fused Adam's clipping.
        fused = self._trainer is None or self.trainer.precision != "16-mixed"
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Learning rate of optimizer step 0, 1, ..., as a share of lr."""
        decayed = 1.0 if self.decay_steps is None else math.sqrt(self.decay_steps / max(step, self.decay_steps))
        return min(1.0, (step + 1) / (self.warmup_steps + 1)) * decayed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what loading needs."""
        checkpoint["skipped"] = self._skips.state
        checkpoint["hyper_parameters"] = self.spec["init_args"]
        checkpoints.describe(checkpoint, self.flow.config, getattr(getattr(self.trainer, "datamodule", None), "spec", None))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count of skipped steps. Raise CheckpointError for a checkpoint of another package or format."""
        checkpoints.check_format(checkpoint)
        self._skips = SkippedSteps(checkpoint.get("skipped", (0, 0)))  # earlier versions skipped none

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's has arguments for files that need them
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool = True,
        trust: Sequence[str] = (),
        **arguments: Any,
    ) -> "PFGM":
        """The module of a `.ckpt` file with its averaged weights; `arguments` replace stored ones.

        Networks, losses and noise laws of other packages are made only if their module is in `trust`.

        CheckpointError if it is damaged, of another format, or if weights and network do not match. ValueError for
        `weights_only` = False: no code of a file is run.
        """
        if not weights_only:
            raise ValueError(
                "weights_only = False would run code of the file; leave it out, checkpoints hold all that is needed"
            )
        checkpoint = checkpoints.read_checkpoint(checkpoint_path)
        stored, weights = checkpoint["hyper_parameters"] | arguments, checkpoint["state_dict"]
        module = checkpoints.restore_module(
            lambda: cls(**{name: _made(value, trust) for name, value in stored.items()}), weights, checkpoint_path
        )
        return module.to(map_location)

    def _loss(self, batch: dict[str, Any], stream: int) -> Tensor:
        x, augmentation = batch["x"].float(), None
        if self.augment is not None and stream == rng.TRAINING:
            x, augmentation = self.augment(x, self._generator(rng.AUGMENTATION, batch, x.device))
        y = self.flow.to_model(x)
        reference, label, condition = (batch.get(name) for name in ("reference", "label", "condition"))
        if label is not None and self.label_dropout and stream == rng.TRAINING:
            u = rng.uniform(len(y), self._generator(rng.DROPOUT, batch, y.device), device=y.device)
            label = torch.where(u < self.label_dropout, self.data.num_classes, label)
        return self.loss(
            self.flow.denoiser,
            y,
            label,
            data=self.data,
            condition=None if condition is None else normalized_condition(self.flow, condition.float()),
            augmentation=augmentation,
            reference=None if reference is None else self.flow.to_model(reference.float()),
            reference_label=batch.get("reference_label"),
            generator=self._generator(stream, batch, y.device),
        )

    def _generator(self, stream: int, batch: dict[str, Any], device: torch.device) -> rng.Rows:
        """Of what is drawn for all samples of an optimizer step, the part for `batch`."""
        return rng.Rows(rng.generator(self.seed, stream, batch["step"], device=device), *batch["rows"])


REMEDY = (
    "The last checkpoint is of before, and is kept. If it is not the data, resume with --trainer.precision=32, or begin anew "
    "with a lower model.lr or a longer model.warmup_steps, in another --run_dir"
)


def check_augment(net: nn.Module, data: DataSummary, loss: Loss) -> None:
    """ValueError unless augmented images can be told from others by `net`, and neither condition nor charges belong to them."""
    if getattr(net, "augmentation_size", 0) != AUGMENTED or len(data.shape) != 3:
        raise ValueError(
            f"augment: it changes images {data.shape} and tells the network how, in {AUGMENTED} numbers; give a UNet with "
            f"augmentation_size = {AUGMENTED}"
        )
    if data.condition_shape is not None or loss.reference_size:
        raise ValueError(
            f"augment: conditions (shape {data.condition_shape}) and charges (reference_size = {loss.reference_size}) would "
            "not be changed with the images; leave it out, or data.flip instead"
        )


PARTS = (nn.Module, DataSummary, NoiseLaw, PoissonFlowNoise, Augment)
"""What a stored module is made of; other classes of this package, such as data modules, read and write files."""


def _made(value: Any, trust: Sequence[str] = ()) -> Any:
    """`value`, or what a stored spec describes; its classes are of this package or of the modules `trust`."""
    return build(value, trust, PARTS) if isinstance(value, Mapping) else value
