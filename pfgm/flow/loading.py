"""Loading a flow from a checkpoint, a run folder or an export."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pfgm.core.arguments import checked
from pfgm.flow import checkpoints
from pfgm.flow.poisson_flow import PoissonFlow

PREFIX = "flow."  # of the flow's tensors in the state of the training module


@checked
def load(path: str | Path, device: str | torch.device = "cpu", ema: bool = True, trust: Sequence[str] = ()) -> PoissonFlow:
    """Load a flow in eval mode. No code of the file is run.

    Args:
        path: A checkpoint (`.ckpt`), a run folder that has one, or a folder written by `save_pretrained`.
        device: Device of the flow.
        ema: Whether to take the averaged weights of a checkpoint, not the raw ones.
        trust: Modules outside this package whose networks the file may name.

    Raises:
        FileNotFoundError: If there is nothing to load.
        CheckpointError: If the file is damaged or of another format, or if weights and network do not match.
        ValueError: If a class is outside the trusted modules.
    """
    last = checkpoints.checkpoint_path(path)
    path = last if last.is_file() else Path(path)
    if path.is_dir():
        if not ema:
            raise ValueError(f"ema = False: the export {path} holds the averaged weights only; give a .ckpt file")
        config, state = checkpoints.read_export(path)
    else:
        checkpoint = checkpoints.read_checkpoint(path)
        config = checkpoint[checkpoints.KEY]["flow"]
        weights = checkpoint["state_dict"] if ema else checkpoint.get("current_model_state", checkpoint["state_dict"])
        state = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    flow = checkpoints.restore_module(lambda: PoissonFlow.from_config(config, trust), state, path)
    return flow.to(device).eval()
