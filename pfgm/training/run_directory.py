"""The folder of a run: who writes to it, and where it is resumed from."""

import math
import os
import sys
from pathlib import Path
from typing import Any

from pfgm.core.configurable import with_defaults
from pfgm.data.datamodule import DataModule
from pfgm.files.atomic import clear_partial
from pfgm.flow import checkpoints
from pfgm.flow.checkpoints import LAST, PREVIOUS, CheckpointError, DamagedCheckpointError, read_checkpoint
from pfgm.flow.loading import load
from pfgm.training.module import PFGM

DAMAGED = "damaged.ckpt"
"""What a last checkpoint that cannot be read is called from then on."""
PARTS = ("config.yaml", "metrics.csv", "loss.png", "grids", "averages", "checkpoints")
"""What a run writes."""


def checkpoint_path(run_dir: str | Path, name: str = LAST) -> Path:
    """The newest checkpoint of a run, or another."""
    return Path(run_dir) / "checkpoints" / name


def clear(run_dir: str | Path) -> None:
    """Remove what killed processes left unfinished in a run that this process holds."""
    clear_partial(*(Path(run_dir) / name for name in ("", "checkpoints", "grids", "averages")))


def latest_checkpoint(run_dir: str | Path, mend: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Where a run is resumed: its last checkpoint, or the one before if that is damaged, and what it holds; None for a new run.

    A damaged one is said on stderr and, to `mend`, kept as damaged.ckpt. CheckpointError if none can be read.
    """
    last, previous = checkpoint_path(run_dir), checkpoint_path(run_dir, PREVIOUS)
    if not last.exists() and not previous.exists():
        return None
    try:
        return last, read_checkpoint(last)
    except (FileNotFoundError, DamagedCheckpointError) as error:
        try:
            found = previous, read_checkpoint(previous)
        except (FileNotFoundError, CheckpointError) as other:
            raise CheckpointError(
                f"run_dir = {run_dir} cannot be resumed: {error}; the one before: {other}. Restore one of them, or give "
                "another --run_dir"
            ) from error
        print(f"warning: {error}. Resuming from {previous} instead", file=sys.stderr)
    if mend and last.exists():
        os.replace(last, checkpoint_path(run_dir, DAMAGED))
    return found


def check_no_other_files(run_dir: str | Path) -> None:
    """FileExistsError if a new run would write over files of others; those of a run come after its first checkpoint."""
    found = [name for name in PARTS if (Path(run_dir) / name).exists()]
    if found and found != ["checkpoints"]:
        raise FileExistsError(
            f"run_dir = {run_dir} has {', '.join(found)} but no checkpoints/{LAST}; restore that, or give another --run_dir"
        )


def check_same_run(checkpoint: dict[str, Any], model: PFGM, data: DataModule, run_dir: Path) -> None:
    """ValueError naming what differs, if `checkpoint` was made with another model, loss or data than these."""
    # What is known of the data is no setting; an earlier version may have known less of it.
    old = {**checkpoint["hyper_parameters"]}
    known = model.spec["init_args"]["data"]["init_args"] | old["data"]["init_args"]
    old["data"] = {**old["data"], "init_args": known}
    old_model = with_defaults({**model.spec, "init_args": old}, model.spec)
    old_data = with_defaults(checkpoint[checkpoints.KEY]["data"], data.spec)
    before = flatten({"model": old_model["init_args"], "data": old_data})
    now = flatten({"model": model.spec["init_args"], "data": data.spec})
    changes = [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted({*before, *now} - {f"data.{place}" for place in data.PLACES})
        if not same(before.get(name, "absent"), now.get(name, "absent"))
    ]
    if changes:
        raise ValueError(
            f"run_dir = {run_dir} holds a run with other settings ({'; '.join(changes)}). Repeat its command to resume it, or "
            "give another --run_dir (with --init_from to start from its weights)"
        )


def same(before: Any, now: Any) -> bool:
    """Equality, of floating point but for rounding: another machine adds the same data up in another order."""
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-6)
    return bool(before == now)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {"a.b": value}, with the level "init_args" left out."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    items = (flatten(value, prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")) for key, value in tree.items())
    return {name: value for item in items for name, value in item.items()}


def initialize(model: PFGM, source: str) -> None:
    """Load the averaged weights of a checkpoint or export into the network of `model`; mean and units stay the data's.

    ValueError if the networks differ.
    """
    weights = load(source).denoiser.state_dict()
    try:
        model.flow.denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"init_from = {source}: its network is not that of this configuration: {error}") from error
