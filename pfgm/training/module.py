"""PFGM: the LightningModule that trains a flow. It knows no data set and no sampler."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from pfgm.core import rng
from pfgm.core.configurable import Configurable, build
from pfgm.core.tensors import check_positive
from pfgm.data.augmentation import SIZE as AUGMENTATION_SIZE
from pfgm.data.augmentation import Augment
from pfgm.data.batches import Batch
from pfgm.flow import checkpoints
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.sampling.solvers import Start
from pfgm.theory.data_summary import DataSummary
from pfgm.theory.kernel import check_dimensions
from pfgm.training.losses import Charges, DenoisingLoss, Loss
from pfgm.training.noise import NoiseLaw, PoissonFlowNoise, recommended_sigma_min
from pfgm.training.nonfinite import MAX_SKIPPED, NonFiniteLoss, SkippedSteps

# What a stored module is made of; other classes of this package, such as data modules, read and write files.
COMPONENTS = (nn.Module, DataSummary, NoiseLaw, PoissonFlowNoise, Augment)
REMEDY = (
    "The last checkpoint precedes these steps and is kept. Unless the data are the reason, resume with --trainer.precision=32, "
    "or start again in another --run_dir with a lower model.lr or a longer model.warmup_steps"
)


class PFGM(Configurable, pl.LightningModule):
    """Train a flow: its denoiser, its objective and its optimizer (Adam with linear warm-up).

    A step whose loss or gradient is not finite leaves the weights alone and is counted; after MAX_SKIPPED of them in a row
    training stops. No step waits for an accelerator to know that: it is looked at when loss or checkpoint are written.

    Args:
        net: The network, see `pfgm.nn.Network`.
        data: What is known of the training data.
        loss: The objective; `DenoisingLoss` by default.
        D: Number of augmented dimensions, a real number from .5 to inf.
        sigma_min: Lowest noise level in model units; sigma_data / 50 by default.
        sigma_max: Highest noise level in model units; by default what the objective recommends.
        sigma_data: Root mean square of the centred data in model units; measured by default.
        data_norm: Mean norm of the centred data in model units; measured by default.
        start: "hemisphere" or "hyperplane": where sampling starts.
        lr: Learning rate after the warm-up.
        betas: Decay rates of Adam's moments.
        warmup_steps: Steps over which the learning rate rises linearly.
        decay_steps: From this step on the learning rate falls as sqrt(decay_steps / step) (EDM2, arXiv 2312.02696).
        label_dropout: Share of labels dropped in training, for classifier-free guidance (arXiv 2207.12598).
        augment: Random changes of training images, of which the network is told.
        seed: Seed of the noise.

    Stored descriptions are accepted in place of net, loss, data and augment: so `load_from_checkpoint` needs no arguments.

    Raises:
        ValueError: If settings are out of range or do not fit each other.
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
        start: Start = "hemisphere",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        label_dropout: float = 0.0,
        augment: Augment | None = None,
        seed: int = 0,
    ):
        super().__init__()
        net, summary = _built(net), _built(data)
        self.loss: Loss = _built(loss) or DenoisingLoss()
        self.augment: Augment | None = _built(augment)
        D = self._arguments["D"] = check_dimensions(D)  # "inf" and "Infinity" come as text from a command line
        _check_optimizer(lr, betas, warmup_steps, decay_steps)
        _check_conditions(summary, self.loss, label_dropout)
        if self.augment is not None:
            _check_augment(net, summary, self.loss)
        for name, value in (("sigma_data", sigma_data), ("data_norm", data_norm)):
            if value is not None:
                check_positive(name, value)
        changes = {"sigma_data": sigma_data, "norm": data_norm}
        summary = summary.replace(**{name: value for name, value in changes.items() if value is not None})
        self.lr, self.betas, self.warmup_steps, self.decay_steps = lr, betas, warmup_steps, decay_steps
        self.label_dropout, self.seed = label_dropout, rng.natural("seed", seed)
        self._losses: list[Tensor] = []
        self._batches: list[Batch] = []
        self._step = -1
        self._skips = SkippedSteps()
        self.flow = PoissonFlow(
            self.loss.make_denoiser(net, D, summary),
            summary,
            sigma_min=recommended_sigma_min(summary.sigma_data) if sigma_min is None else sigma_min,
            sigma_max=self.loss.recommended_sigma_max(summary) if sigma_max is None else sigma_max,
            unconditional=label_dropout > 0,
            start=start,
        )
        self.spec  # noqa: B018 (a network that cannot be stored is refused now, not at the first checkpoint)

    @property
    def summary(self) -> DataSummary:
        """Return the summary of the training data."""
        return self.flow.summary

    @property
    def reference_size(self) -> int:
        """The number of charges that the objective asks of each batch; 0 for none."""
        return self.loss.reference_size

    def setup(self, stage: str) -> None:
        """Forget an earlier fit."""
        self._losses, self._batches, self._step, self._skips = [], [], -1, SkippedSteps()

    def on_fit_start(self) -> None:
        """Print what the flow took from the data."""
        flow, data, noise = self.flow, self.summary, getattr(self.loss, "noise", None)
        N, norm = math.prod(flow.shape), "unknown" if data.norm is None else f"{data.norm:.4g}"
        text = f"D = {flow.kernel.D:g}, N = {N}, scale {data.scale:.4g}, sigma_data {data.sigma_data:.4g}, "
        text += f"data norm {norm}, sigma {flow.sigma_min:.4g} .. {flow.sigma_max:.4g}"
        if isinstance(noise, PoissonFlowNoise) and data.norm is not None:
            text += f", M = {noise.exponent(data.norm, N):.1f}"
        pl.utilities.rank_zero_info(text)

    def on_train_start(self) -> None:
        """Count the batches of a resumed run from an optimizer step on, where the stream starts.

        A run may have been stopped between two batches of a step, or may have accumulated another number of them.
        """
        trainer: Any = self.trainer
        limit, epochs = trainer.num_training_batches, trainer.fit_loop.epoch_progress.current
        progress, total = trainer.fit_loop.epoch_loop.batch_progress, trainer.global_step * trainer.accumulate_grad_batches
        pending = progress.current.completed >= limit and epochs.completed < epochs.ready  # the end of an epoch
        current = total if limit == math.inf else limit if pending else total % limit
        for counts, batches in ((progress.total, total), (progress.current, current)):
            counts.ready = counts.started = counts.processed = counts.completed = batches

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        torch.manual_seed(rng.seed(self.seed, rng.UNITS, batch.step, batch.rows[0]))  # what dropout draws from
        loss = self._loss(batch, rng.TRAINING).mean()
        self._losses.append(loss.detach())
        if batch.step != self._step:  # the batches of a step are kept until the next one, in case they are to blame
            self._batches, self._step = [], batch.step
        self._batches.append(batch)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient, keep one that is not finite from the weights, and log loss, learning rate and gradient norm."""
        trainer: Any = self.trainer
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss = torch.stack(self._losses).mean()
        self._skips.add(loss, norm, optimizer, trainer.world_size)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        logs = (self.global_step + 1) % trainer.log_every_n_steps == 0
        if logs or self.device.type == "cpu":
            self.check_finite()
        self._losses.clear()
        if logs:
            values = {"train_loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            self._log({name: float(value) for name, value in (values | {"skipped": self._skips.total}).items()})

    def _log(self, values: dict[str, float]) -> None:
        """Write values to all loggers, the loss averaged over ranks, and warn of newly skipped steps."""
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
        """The number of steps skipped since the last finite one; reading it waits for an accelerator."""
        return self._skips.state[1]

    def check_finite(self, saving: bool = False) -> None:
        """Raise NonFiniteLoss if training cannot go on.

        That is the case if the last MAX_SKIPPED steps were skipped, or if a weight is not finite, which is looked at after a
        skipped step and before `saving`.
        """
        row = self.skipped_in_a_row
        if row >= MAX_SKIPPED:
            raise NonFiniteLoss(
                f"the loss or its gradient was not finite in the last {row} steps, to step {self.global_step}, which were "
                f"skipped. {self._culprit()}. {REMEDY}"
            )
        if (row or saving) and not all(bool(torch.isfinite(p).all()) for p in self.parameters()):
            raise NonFiniteLoss(f"weights are not finite any more at step {self.global_step}. {self._culprit()}. {REMEDY}")

    def _culprit(self) -> str:
        """Describe the first sample of the present step whose loss or gradient is not finite, with its noise level."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        for batch in [several.single(i) for several in self._batches for i in range(len(several))]:
            with torch.enable_grad(), self.trainer.precision_plugin.train_step_context():
                (loss,) = self._loss(batch, rng.TRAINING)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            norm = get_total_norm([gradient for gradient in gradients if gradient is not None])
            if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
                y = self.flow.to_model(batch.x.float())
                sigma = self.loss.levels(y, self.summary, self._generator(rng.TRAINING, batch, y.device))
                number, of = (batch.rows[0], "step") if batch.index is None else (int(batch.index), "training data")
                return (
                    f"At step {batch.step} sample {number} of the {of}, at noise level {float(sigma):.4g} (model units), "
                    f"has loss {float(loss.detach()):.4g} and a gradient of norm {float(norm):.4g}"
                )
        return "No sample of this process is to blame alone"

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean loss on held-out data, with the same noise for each sample every time."""
        loss = self._loss(batch, rng.VALIDATION)
        self.log("val_loss", loss.mean(), prog_bar=True, batch_size=len(loss), sync_dist=True)
        self.log("step", float(self.global_step), batch_size=len(loss), sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean loss on test data."""
        loss = self._loss(batch, rng.VALIDATION)
        self.log("test_loss", loss.mean(), batch_size=len(loss), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Make Adam, in one kernel for all weights, and its learning-rate schedule."""
        # The scaler of float16 would hide the size of the gradient from a fused Adam's clipping.
        fused = self._trainer is None or self.trainer.precision != "16-mixed"
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Return the learning rate of optimizer step 0, 1, ..., as a share of lr."""
        decayed = 1.0 if self.decay_steps is None else math.sqrt(self.decay_steps / max(step, self.decay_steps))
        return min(1.0, (step + 1) / (self.warmup_steps + 1)) * decayed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what loading needs."""
        checkpoint["skipped"] = self._skips.state
        checkpoint["hyper_parameters"] = self.spec["init_args"]
        data = getattr(getattr(self.trainer, "datamodule", None), "spec", None)
        checkpoints.describe(checkpoint, self.flow.config, data)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count of skipped steps. Raise CheckpointError for a checkpoint of another package or format."""
        checkpoints.check_format(checkpoint)
        self._skips = SkippedSteps(checkpoint.get("skipped", (0, 0)))  # the first versions skipped none

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's has arguments for files that need them
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool = True,
        trust: Sequence[str] = (),
        **arguments: Any,
    ) -> "PFGM":
        """Load the module of a `.ckpt` file with its averaged weights.

        Args:
            checkpoint_path: The file.
            map_location: Device of the module.
            weights_only: Must stay True: no code of a file is run.
            trust: Modules outside this package whose networks, losses and noise laws the file may name.
            **arguments: Constructor arguments that replace stored ones.

        Raises:
            CheckpointError: If the file is damaged, of another format, or if weights and network do not match.
            ValueError: If a class is outside the trusted modules, or weights_only is False.
        """
        if not weights_only:
            raise ValueError(
                "weights_only = False would run code of the file; leave it out, checkpoints hold all that is needed"
            )
        checkpoint = checkpoints.read_checkpoint(checkpoint_path)
        stored, weights = checkpoint["hyper_parameters"] | arguments, checkpoint["state_dict"]
        module = checkpoints.restore_module(
            lambda: cls(**{name: _built(value, trust) for name, value in stored.items()}), weights, checkpoint_path
        )
        return module.to(map_location)

    def _loss(self, batch: Batch, stream: int) -> Tensor:
        """Compute the loss of each sample, with the noise of a stream of random numbers."""
        x, conditions, summary = batch.x.float(), self.summary.normalize(batch.conditions), self.summary
        if self.augment is not None and stream == rng.TRAINING:
            x, conditions["augmentation"] = self.augment(x, self._generator(rng.AUGMENTATION, batch, x.device))
        if "label" in conditions and self.label_dropout and stream == rng.TRAINING:
            u = rng.uniform(len(x), self._generator(rng.DROPOUT, batch, x.device), device=x.device)
            conditions["label"] = torch.where(u < self.label_dropout, summary.num_classes, conditions["label"])
        charges = None
        if batch.charges is not None:
            charges = Charges(self.flow.to_model(batch.charges.x.float()), batch.charges.label)
        generator = self._generator(stream, batch, x.device)
        y, denoiser = self.flow.to_model(x), self.flow.denoiser
        return self.loss(denoiser, y, conditions, summary=summary, charges=charges, generator=generator)

    def _generator(self, stream: int, batch: Batch, device: torch.device) -> rng.Rows:
        """Return the rows of `batch` among the numbers drawn for all samples of its optimizer step."""
        return rng.Rows(rng.generator(self.seed, stream, batch.step, device=device), *batch.rows)


def _check_optimizer(lr: float, betas: Sequence[float], warmup_steps: int, decay_steps: int | None) -> None:
    if not 0 < lr < math.inf or warmup_steps < 0 or (decay_steps is not None and decay_steps < 1):
        raise ValueError(
            f"lr = {lr}, warmup_steps = {warmup_steps}, decay_steps = {decay_steps}: lr must be positive and finite, "
            "warmup_steps >= 0, decay_steps >= 1 or null"
        )
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas = {betas}: Adam needs two numbers in [0, 1)")


def _check_conditions(summary: DataSummary, loss: Loss, label_dropout: float) -> None:
    if not 0 <= label_dropout < 1 or (label_dropout and not summary.num_classes):
        raise ValueError(
            f"label_dropout = {label_dropout}, num_classes = {summary.num_classes}: give a share in [0, 1), and only to data "
            "with labels"
        )
    if summary.conditions and loss.reference_size:
        raise ValueError(
            f"{type(loss).__name__} with reference_size = {loss.reference_size} takes its target from many charges, but no two "
            "samples share a condition; use DenoisingLoss with reference_size = 0, for D = 1 as well"
        )


def _check_augment(net: nn.Module, summary: DataSummary, loss: Loss) -> None:
    """Raise ValueError unless `net` is told of augmentation, and no conditions or charges would have to change with it."""
    if getattr(net, "augmentation_size", 0) != AUGMENTATION_SIZE or len(summary.shape) != 3:
        raise ValueError(
            f"augment: it changes images {summary.shape} and describes the change to the network in {AUGMENTATION_SIZE} "
            f"numbers; give a UNet with augmentation_size = {AUGMENTATION_SIZE}"
        )
    if summary.conditions or loss.reference_size:
        raise ValueError(
            f"augment: conditions ({', '.join(summary.conditions) or 'none'}) and charges (reference_size = "
            f"{loss.reference_size}) would not be changed with the images; leave it out, or use data.flip"
        )


def _built(value: Any, trust: Sequence[str] = ()) -> Any:
    """Return `value`, or build what a stored description says, from this package and the modules `trust`."""
    return build(value, trust, COMPONENTS) if isinstance(value, Mapping) else value
