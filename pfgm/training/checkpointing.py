"""Checkpoints while training: when they are written, how, and what signals do."""

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
from pfgm.flow.checkpoints import LAST, PREVIOUS
from pfgm.training.module import PFGM
from pfgm.training.run_directory import checkpoint_path

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
"""What asks a run to save and stop; Windows has no SIGUSR1."""


class Stopped(SystemExit):
    """A signal stopped training, at a state that is saved. The exit code is 128 + its number, on all ranks but the first 0."""

    def __init__(self, number: int, step: int, code: int):
        super().__init__(code)
        self.number, self.step = number, step

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name}; saved is the state after step {self.step}, from which the same command resumes"


class CheckpointFiles(CheckpointIO):
    """Writes checkpoints whole and stamped, and reads none that is damaged or holds code; see `pfgm.flow.checkpoints`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """The last of a run leaves the one before beside it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_checkpoint(path, checkpoint, path.with_name(PREVIOUS) if path.name == LAST else None)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """On the CPU, always with weights_only."""
        return checkpoints.read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """If it is there."""
        Path(path).unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Keeps `<run_dir>/checkpoints/last.ckpt`: of the start, every `every_n_steps` optimizer steps, before each validation, and
    of the end; and previous.ckpt, the one before. After steps whose loss was not finite it waits for one whose loss is: what
    came before them may have ruined the weights.

    The file is written beside the old one and then takes its place, so that there is always a whole one. SIGTERM, SIGUSR1 and
    SIGINT (Ctrl-C) write one after the step in progress, and end training with `Stopped`; a second SIGINT ends it at once. A
    run that ended during a validation repeats it when resumed.
    """

    @checked
    def __init__(self, every_n_steps: int = 500):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps = {every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.saved: tuple[int, bool] | None = None
        self.unvalidated, self.signal, self.due = False, 0, False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checkpoints of this trainer go through `CheckpointFiles`."""
        trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals; a first checkpoint; a validation that had not ended."""
        self.signal, self.saved, self.due = 0, None, False
        if threading.current_thread() is threading.main_thread():  # Lightning restores the handlers when it ends
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) != signal.SIG_IGN:  # as in a job in the background of a script
                    signal.signal(number, self._ask)
        if trainer.strategy.broadcast(checkpoint_path(trainer.default_root_dir).exists()):
            self.saved = (trainer.global_step, self.unvalidated)
        else:
            self._save(trainer)
        if self.unvalidated:
            loop: Any = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting, trainer.validating = False, True
            loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Here, not at the end of the batch, since a validation may have been between."""
        number = self._asked(trainer)
        if number or self.due or trainer.global_step % self.every_n_steps == 0:
            self._save_step(trainer)
        if number:
            raise self._stopped(trainer, number)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The state before it, with a note that it is due; not at the last step, from which no run is resumed."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or 0 <= trainer.max_steps <= trainer.global_step:
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        self.unvalidated = batches == trainer.global_step * trainer.accumulate_grad_batches
        self._save_step(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Nothing is lost by stopping here, unless it is the last one."""
        if self.saved == (trainer.global_step, True) and (number := self._asked(trainer)):
            raise self._stopped(trainer, number)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was due is done."""
        self.unvalidated = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A last one, when all that belongs to the run is written."""
        self._save_step(trainer, last=True)

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation is due."""
        return {"unvalidated": self.unvalidated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """That of a run that is resumed."""
        self.unvalidated = state_dict["unvalidated"]

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(number, exits.exit_for_signal)
        self.signal = number

    def _asked(self, trainer: pl.Trainer) -> int:
        """The signal that any of the ranks got, 0 if none did."""
        number = self.signal  # of this moment: one that comes while the ranks agree is for the next time
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(bool(number), all=False):
            return number or signal.SIGTERM
        return number

    def _stopped(self, trainer: pl.Trainer, number: int) -> Stopped:
        assert self.saved is not None
        # Lightning kills all processes as soon as one of those that it started ends with another code.
        return Stopped(number, self.saved[0], 128 + number if trainer.is_global_zero else 0)

    def _save_step(self, trainer: pl.Trainer, last: bool = False) -> None:
        """The state of this step, unless it is saved, or bad and not the `last`."""
        if self.saved is not None and self.saved[0] == trainer.global_step:
            return
        assert isinstance(trainer.lightning_module, PFGM)
        trainer.lightning_module.check_finite(saving=True)
        self.due = not last and trainer.lightning_module.skipped_in_a_row > 0
        if not self.due:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(checkpoint_path(trainer.default_root_dir), weights_only=False)
        self.saved = (trainer.global_step, self.unvalidated)
