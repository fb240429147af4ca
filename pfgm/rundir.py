"""The folder of a run: who writes to it, and where it is resumed from."""

import os
import sys
from pathlib import Path
from typing import Any

from pfgm.files.atomic import clear_partial
from pfgm.flow.checkpoints import LAST, PREVIOUS, CheckpointError, DamagedCheckpointError, read_checkpoint

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


def newest(run_dir: str | Path, mend: bool = True) -> tuple[Path, dict[str, Any]] | None:
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
