"""train.py: LightningCLI with a run directory that the same command starts and resumes."""

import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from pfgm.cli import console
from pfgm.cli.arguments import PARSER_MODE, prepare_words
from pfgm.cli.prepare import COMMANDS, prepare
from pfgm.core import exits, rng
from pfgm.core.arguments import ArgumentTypeError, check_types, is_real
from pfgm.data.datamodule import DataModule
from pfgm.files import locking
from pfgm.flow import checkpoints
from pfgm.training import run_directory
from pfgm.training.callbacks import SampleGrid, SaveConfig, Speed, StepProgressBar
from pfgm.training.checkpointing import LastCheckpoint, Stopped
from pfgm.training.csv_logger import MetricsLogger
from pfgm.training.ema import EMA, PowerAverages
from pfgm.training.evaluation_callback import Evaluation
from pfgm.training.losses import DenoisingLoss, Loss
from pfgm.training.module import PFGM
from pfgm.training.nonfinite import NonFiniteLoss
from pfgm.training.run_directory import check_same_run, load_initial_weights

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "logger": False,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "val_check_interval": 500,
    "use_distributed_sampler": False,
    "inference_mode": False,  # likelihoods need derivatives
    "enable_model_summary": False,
}


SMALLEST = {"max_steps": 0, "val_check_interval": 1, "accumulate_grad_batches": 1, "gradient_clip_val": 0}
SMALLEST |= {"log_every_n_steps": 1, "check_val_every_n_epoch": 1, "num_nodes": 1}
LIMITS = ("limit_train_batches", "limit_test_batches", "max_epochs")  # at 0 nothing would be done


class TrainCLI(LightningCLI):
    """Start or resume a run in `--run_dir` by `fit`, and evaluate it by `test`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        hidden = {"model", "datamodule", "ckpt_path", "weights_only", "verbose"}
        of_loaders = {"fit": {"train_dataloaders", "val_dataloaders"}, "test": {"dataloaders"}}
        return {name: hidden | loaders for name, loaders in of_loaders.items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, required=True, help="Folder of the run: checkpoints, log, pictures.")
        parser.add_argument(
            "--init_from", type=str | None, default=None, help="Checkpoint or export whose weights start a new run."
        )
        parser.add_lightning_class_args(Speed, "speed")
        parser.add_lightning_class_args(SampleGrid, "grid")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(PowerAverages, "averages")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("data.summary", "model.data", apply_on="instantiate")
        parser.link_arguments("data.shape", "model.net.init_args.shape", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.net.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.condition_shapes", "model.net.init_args.condition_shapes", apply_on="instantiate")
        parser.link_arguments("model.loss", "model.net.init_args.extra_channels", _extra_channels, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Raise ValueError for an unusable seed before Lightning sets it."""
        super().parse_arguments(parser, args)
        rng.natural("seed_everything", self.config[self.config.subcommand].seed_everything)

    def before_instantiate_classes(self) -> None:
        """Raise ValueError if a callback's section is not a mapping; jsonargparse does not validate these."""
        for name in self._parser(self.subcommand).callback_keys:
            settings = self._get(self.config, name)
            if not isinstance(settings, Namespace):
                raise ValueError(f"{name} = {settings!r}: give settings such as those in config.yaml of a run, or leave it out")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._get(self.config_init, "trainer")
        fitting, run_dir = self.subcommand == "fit", self._get(self.config, "run_dir")
        if not run_dir:
            raise ValueError("run_dir is empty; give a folder such as runs/mine")
        check_trainer(vars(config), fitting)
        if config["enable_progress_bar"] is not False:
            config["callbacks"] = [*(config["callbacks"] or []), StepProgressBar()]
        if config["logger"] is False and fitting:
            kwargs["logger"] = MetricsLogger(run_dir)
        if SLURMEnvironment.detect():  # signals are for LastCheckpoint, and what comes then for the batch script
            config["plugins"] = [*(config["plugins"] or []), SLURMEnvironment(auto_requeue=False)]
        try:
            return super().instantiate_trainer(**kwargs)
        except TypeError as error:
            raise ValueError(f"trainer: {error}. See pfgm fit --help") from error

    def fit(self, model: PFGM, datamodule: DataModule) -> None:
        """Resume if the run has a checkpoint, else start, from `--init_from` if given."""
        run_dir = Path(self._get(self.config, "run_dir"))
        first = self.trainer.is_global_zero
        with locking.lock_folder(run_dir) if first else nullcontext():
            if first:
                run_directory.remove_partial_files(run_dir)
            start = self._start(model, datamodule, run_dir, first)
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=start, weights_only=True)

    def _start(self, model: PFGM, datamodule: DataModule, run_dir: Path, mend: bool) -> Path | None:
        """Return the checkpoint to resume, or None for a new run, with the weights of `--init_from` if there is one."""
        source, found = self._get(self.config, "init_from"), run_directory.latest_checkpoint(run_dir, mend)
        if found is None:
            run_directory.check_no_run_files(run_dir)
            if source is not None:
                load_initial_weights(model, source)
            return None
        path, checkpoint = found
        if source is not None:
            raise ValueError(f"init_from = {source}: {run_dir} holds a run already; leave it out, or give another --run_dir")
        check_same_run(checkpoint, model, datamodule, run_dir)
        if "optimizer_states" not in checkpoint:
            raise checkpoints.CheckpointError(f"{path} holds weights only; give another --run_dir, and --init_from {path}")
        print(f"resuming {path}", file=sys.stderr)
        return path

    def test(self, model: PFGM, datamodule: DataModule) -> None:
        """Evaluate the newest checkpoint of the run."""
        last = checkpoints.checkpoint_path(self._get(self.config, "run_dir"))
        if not last.exists():
            raise FileNotFoundError(f"run_dir = {last.parent.parent} has no checkpoint to test; run fit first")
        check_same_run(checkpoints.read_checkpoint(last), model, datamodule, last.parent.parent)
        self.trainer.test(model, datamodule=datamodule, ckpt_path=last, weights_only=True, verbose=False)


def check_trainer(config: Mapping[str, Any], fitting: bool) -> None:
    """Raise ValueError for settings of the trainer that Lightning would not report, or only later."""
    try:
        check_types(pl.Trainer.__init__, config)
    except ArgumentTypeError as error:
        raise ValueError(f"trainer.{error}") from error
    for name, lowest in (SMALLEST | ({} if fitting else {"max_steps": -1})).items():
        value = config.get(name)
        if value is not None and not (is_real(value) and value >= lowest):
            raise ValueError(f"trainer.{name} = {value}: too small. Pass a number >= {lowest}")
    for name in LIMITS:
        if config.get(name) == 0:
            raise ValueError(f"trainer.{name} = {config.get(name)} leaves nothing to do. Pass more, or leave it out.")
    check_strategy(str(getattr(config.get("strategy"), "class_path", config.get("strategy"))))
    if config["accelerator"] == "cpu" or (config["accelerator"] == "auto" and not torch.cuda.is_available()):
        check_processes(config["devices"], os.cpu_count() or 1)


def check_processes(devices: Any, cores: int) -> None:
    """Raise ValueError unless `devices`, which are processes on a CPU, are no more than its `cores`."""
    if devices != "auto" and not (str(devices).isdecimal() and 1 <= int(devices) <= cores):
        raise ValueError(
            f"trainer.devices = {devices}: each is a process on the CPU; give a number from 1 to {cores}, its cores"
        )


def check_strategy(name: str) -> None:
    """Raise ValueError for strategies that keep a part of the weights on each device."""
    if any(word in name.lower() for word in ("fsdp", "deepspeed", "modelparallel", "model_parallel")):
        raise ValueError(
            f"trainer.strategy = {name}: weights that are shared out over devices can be neither averaged (ema) nor stored in "
            "one file; give ddp, with a smaller batch or network if memory is short"
        )


def _extra_channels(loss: Loss | None) -> int:
    return (loss or DenoisingLoss()).extra_channels


def main(args: list[str] | None = None, program: str = "train.py") -> TrainCLI:
    """Run `fit` or `test`; with `args` in Python, where errors are raised as they are. Help calls it `program`."""
    return TrainCLI(
        PFGM,
        DataModule,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        trainer_defaults=TRAINER_DEFAULTS,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": program,
            "description": f"Train and test a Poisson flow. Further commands: {', '.join(COMMANDS)} (each with --help).",
            "exit_on_error": False,
            "parser_mode": PARSER_MODE,
        },
        args=None if args is None else prepare_words(args),
    )


def run() -> None:
    """Run train.py: errors of the user's making are one line on stderr and exit code 2, see `pfgm.cli.console`."""
    console.run("train.py", command, sys.argv[1:], errors())


def errors() -> tuple[type[Exception], ...]:
    """Return the errors of training whose message is for the user."""
    return NonFiniteLoss, MisconfigurationException


def command(words: list[str], program: str = "train.py") -> None:
    """Run the command that `words` begin with. A run that a signal stopped says so."""
    words = prepare_words(words)
    if words and words[0] in COMMANDS:
        prepare(words, program)
        return
    sys.argv[1:] = words  # where Lightning looks, also for the processes that it starts
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated")  # Lightning 2.6 on newer torch; no user can help it
    try:
        main(program=program.split()[0])
    except Stopped as stop:
        print(f"{program}: {stop}", file=sys.stderr)
        _leave()
        raise
    except RuntimeError as error:
        if _is_of_ranks(error):
            raise exits.LostProcess(
                f"another process of this run ended, or never came ({str(error).strip().splitlines()[-1][:200]}). Look for its "
                "error; the same command resumes from the last checkpoint"
            ) from error
        raise
    _leave()


def _is_of_ranks(error: RuntimeError) -> bool:
    """Return whether the connection to the other ranks failed; gloo's errors have no class of their own."""
    if not torch.distributed.is_available():
        return False
    gloo = torch.distributed.is_initialized() and "gloo" in str(error).lower()
    return gloo or isinstance(error, torch.distributed.DistError)


def _leave() -> None:
    """End the connection to the other ranks, since gloo's threads may abort an interpreter that ends."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
