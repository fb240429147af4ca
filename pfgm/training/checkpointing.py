"""Checkpoints during training: when they are saved, in which files, and how signals end a run."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from pfgm.core import exits
from pfgm.core.arguments import checked
from pfgm.flow import checkpoints
from pfgm.flow.checkpoints import LAST, PREVIOUS, checkpoint_path
from pfgm.training.module import PFGM

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # requests to save and stop; Windows has no SIGUSR1


class Stopped(SystemExit):
    """End training after signal `number`, with the state after `step` saved and `code` as the exit code of this process."""

    def __init__(self, number: int, step: int, code: int):
        super().__init__(code)
        self.number, self.step = number, step

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name}. The state after step {self.step} is saved; the same command resumes from it."


class CheckpointFiles(CheckpointIO):
    """Write checkpoints atomically with a digest, and verify them on reading; see `pfgm.flow.checkpoints`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; last.ckpt keeps its previous version as previous.ckpt."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_checkpoint(path, checkpoint, path.with_name(PREVIOUS) if path.name == LAST else None)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint onto the CPU. The other arguments have no effect: no code of a file is ever run."""
        return checkpoints.read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Keep `<run_dir>/checkpoints/last.ckpt` and the checkpoint before it, previous.ckpt.

    A checkpoint is saved at the start, every `every_n_steps` optimizer steps, before each validation and at the end. A new file
    replaces the old one only when it is complete. After steps whose loss is not finite, saving waits for a finite loss, since
    the weights may be ruined.

    SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) save after the step in progress and end training with `Stopped`; a second SIGINT ends
    it at once. A run that ended during a validation repeats it when resumed.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
    """

    @checked
    def __init__(self, every_n_steps: int = 500):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps = {every_n_steps} must be at least 1.")
        self.every_n_steps = every_n_steps
        self.saved: tuple[int, bool] | None = None  # step of the last checkpoint, and whether its validation was pending
        self.validation_pending, self.save_postponed, self.signal = False, False, 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals, save a first checkpoint, and repeat a validation that did not finish."""
        self.saved, self.save_postponed, self.signal = None, False, 0
        if threading.current_thread() is threading.main_thread():  # Lightning restores the handlers when it ends
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) != signal.SIG_IGN:  # a script's background jobs ignore SIGINT
                    signal.signal(number, self._handle)
        if trainer.strategy.broadcast(checkpoint_path(trainer.default_root_dir).exists()):
            self.saved = (trainer.global_step, self.validation_pending)
        else:
            self._save(trainer)
        if self.validation_pending:
            loop: Any = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting, trainer.validating = False, True
            loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Save if a checkpoint is due, and stop after a signal.

        The end of the previous batch would be too early, since a validation may follow it.
        """
        number = self._agreed_signal(trainer)
        if number or self.save_postponed or trainer.global_step % self.every_n_steps == 0:
            self._save_step(trainer)
        if number:
            raise self._stopped(trainer, number)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save with a pending validation, except at the last step, from which no run resumes."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or 0 <= trainer.max_steps <= trainer.global_step:
            return
        self.validation_pending = not trainer.fit_loop._should_accumulate()  # not between two batches of a step
        self._save_step(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Stop after a signal if the pending validation is saved."""
        if self.saved == (trainer.global_step, True) and (number := self._agreed_signal(trainer)):
            raise self._stopped(trainer, number)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation_pending = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_step(trainer, last=True)

    def state_dict(self) -> dict[str, Any]:
        return {"unvalidated": self.validation_pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation_pending = state_dict["unvalidated"]

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(number, exits.exit_for_signal)
        self.signal = number

    def _agreed_signal(self, trainer: pl.Trainer) -> int:
        """Return the signal that any of the ranks received, or 0."""
        number = self.signal  # read once: a signal that arrives while the ranks agree counts next time
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(bool(number), all=False):
            return number or signal.SIGTERM
        return number

    def _stopped(self, trainer: pl.Trainer, number: int) -> Stopped:
        assert self.saved is not None
        # Other ranks exit with 0: Lightning kills all processes as soon as one that it started ends with another code.
        return Stopped(number, self.saved[0], 128 + number if trainer.is_global_zero else 0)

    def _save_step(self, trainer: pl.Trainer, last: bool = False) -> None:
        """Save the state of this step once; postpone it after skipped steps, unless it is the `last`."""
        if self.saved is not None and self.saved[0] == trainer.global_step:
            return
        assert isinstance(trainer.lightning_module, PFGM)
        trainer.lightning_module.check_finite(saving=True)
        self.save_postponed = not last and trainer.lightning_module.skipped_in_a_row > 0
        if not self.save_postponed:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(checkpoint_path(trainer.default_root_dir), weights_only=False)
        self.saved = (trainer.global_step, self.validation_pending)
