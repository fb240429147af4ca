"""The folder of a run: the checkpoint from which it resumes, and whether the settings are still the same."""

import math
import os
import sys
from pathlib import Path
from typing import Any

from pfgm.core.configurable import with_defaults
from pfgm.data.datamodule import DataModule
from pfgm.files.atomic import clear_partial
from pfgm.flow import checkpoints
from pfgm.flow.checkpoints import LAST, PREVIOUS, CheckpointError, DamagedCheckpointError, checkpoint_path, read_checkpoint
from pfgm.flow.loading import load
from pfgm.training.module import PFGM

DAMAGED = "damaged.ckpt"  # new name of a last checkpoint that cannot be read
RUN_FILES = ("config.yaml", "metrics.csv", "loss.png", "grids", "averages", "checkpoints")


def remove_partial_files(run_dir: str | Path) -> None:
    """Remove unfinished files of killed processes. The caller must hold the lock of the run."""
    clear_partial(*(Path(run_dir) / name for name in ("", "checkpoints", "grids", "averages")))


def latest_checkpoint(run_dir: str | Path, rename_damaged: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint from which a run resumes: the last, or the previous one with a warning if the last is damaged.

    Args:
        run_dir: Folder of the run.
        rename_damaged: Whether to rename a damaged last checkpoint to damaged.ckpt.

    Returns:
        Path and content of the checkpoint, or None for a new run.

    Raises:
        CheckpointError: If there are checkpoints, but none can be read.
    """
    last, previous = checkpoint_path(run_dir), checkpoint_path(run_dir, PREVIOUS)
    if not last.exists() and not previous.exists():
        return None
    try:
        return last, read_checkpoint(last)
    except (FileNotFoundError, DamagedCheckpointError) as error:
        try:
            content = read_checkpoint(previous)
        except (FileNotFoundError, CheckpointError) as other:
            raise CheckpointError(
                f"run_dir = {run_dir} cannot be resumed: {error}; the previous checkpoint: {other}. Restore one of them, or "
                "choose another --run_dir."
            ) from error
        print(f"warning: {error}. Resuming from {previous} instead", file=sys.stderr)
    if rename_damaged and last.exists():
        os.replace(last, checkpoint_path(run_dir, DAMAGED))
    return previous, content


def check_no_run_files(run_dir: str | Path) -> None:
    """Raise FileExistsError if a new run would overwrite files in `run_dir`.

    An empty folder of checkpoints is accepted: a run that was killed at its start leaves no more than that.
    """
    found = [name for name in RUN_FILES if (Path(run_dir) / name).exists()]
    if found and found != ["checkpoints"]:
        raise FileExistsError(
            f"run_dir = {run_dir} has {', '.join(found)} but no checkpoints/{LAST}. Restore that file, or choose another "
            "--run_dir."
        )


def check_same_run(checkpoint: dict[str, Any], model: PFGM, data: DataModule, run_dir: Path) -> None:
    """Compare the settings of a run with those of its checkpoint.

    Arguments that an earlier version did not have count as their defaults, and floats may differ by rounding. The location of
    the data may change.

    Args:
        checkpoint: Content of the checkpoint.
        model: Module made from the present settings.
        data: Data module made from the present settings.
        run_dir: Folder of the run, for the message.

    Raises:
        ValueError: If model, loss or data differ; the message lists each change.
    """
    old = {**checkpoint["hyper_parameters"]}
    # The summary of the data is not a setting, and checkpoints of earlier versions lack some of its fields.
    summary = model.spec["init_args"]["data"]["init_args"] | old["data"]["init_args"]
    old["data"] = {**old["data"], "init_args": summary}
    old_model = with_defaults({**model.spec, "init_args": old}, model.spec)
    old_data = with_defaults(checkpoint[checkpoints.KEY]["data"], data.spec)
    before = _flatten({"model": old_model["init_args"], "data": old_data})
    now = _flatten({"model": model.spec["init_args"], "data": data.spec})
    changes = [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted({*before, *now} - {f"data.{key}" for key in data.PLACES})
        if not _equal(before.get(name), now.get(name))
    ]
    if changes:
        raise ValueError(
            f"run_dir = {run_dir} holds a run with other settings ({'; '.join(changes)}). Repeat its command to resume it, or "
            "choose another --run_dir (with --init_from to start from its weights)."
        )


def _equal(before: Any, now: Any) -> bool:
    """Compare two values, floats up to rounding: sums over the data depend on the machine."""
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-6)
    return bool(before == now)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to {"a.b": value}, without the level "init_args"."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    items = (_flatten(value, prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")) for key, value in tree.items())
    return {name: value for item in items for name, value in item.items()}


def load_initial_weights(model: PFGM, source: str) -> None:
    """Copy the averaged weights of a checkpoint or export into `model`, which keeps mean and units of its own data.

    Args:
        model: Module of a new run.
        source: Path of the checkpoint or export.

    Raises:
        ValueError: If the networks differ.
    """
    weights = load(source).denoiser.state_dict()
    try:
        model.flow.denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"init_from = {source}: its network differs from that of this configuration: {error}") from error
