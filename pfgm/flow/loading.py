"""Loading a flow from a file."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pfgm.core.arguments import checked
from pfgm.flow import checkpoints
from pfgm.flow.poisson_flow import PoissonFlow

PREFIX = "flow."
"""Of the flow's tensors in the state of the training module."""


@checked
def load(path: str | Path, device: str | torch.device = "cpu", ema: bool = True, trust: Sequence[str] = ()) -> PoissonFlow:
    """The flow of a checkpoint (`.ckpt`) or of a folder written by `save_pretrained`, in eval mode on `device`.

    `ema` takes the averaged weights of a checkpoint, otherwise the raw ones. No code of the file is run; networks from other
    packages are made only if their module is in `trust`. FileNotFoundError if there is nothing, CheckpointError if it is
    damaged, altered, of another format, or if weights and network do not match; ValueError for a class path not trusted.
    """
    if Path(path).is_dir():
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
