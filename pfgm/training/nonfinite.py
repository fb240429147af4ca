"""Counting of training steps that are skipped because their loss or gradient is not finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SKIPPED = 32  # consecutive skipped steps that end training; the scaler of float16 skips some while it finds its scale


class NonFiniteLoss(RuntimeError):
    """Signal that training cannot go on: too many skipped steps in a row, or weights that are not finite."""


class SkippedSteps:
    """Count skipped steps on the device of the loss, without waiting for an accelerator.

    Args:
        state: Skipped steps in total and in a row, as a checkpoint stores them.
    """

    def __init__(self, state: Sequence[int] = (0, 0)):
        self._counts = torch.tensor(state)
        self.reported = state[0]  # skipped steps that the user has been warned about

    @property
    def total(self) -> Tensor:
        """Return the total number of skipped steps as a tensor on the device."""
        return self._counts[0]

    @property
    def state(self) -> list[int]:
        """Return the skipped steps in total and in a row; this waits for the accelerator."""
        return self._counts.tolist()

    def add(self, loss: Tensor, norm: Tensor, optimizer: torch.optim.Optimizer, world_size: int = 1) -> None:
        """Count a step, and have a fused optimizer skip it if its loss or gradient is not finite on any rank.

        `loss` is that of this rank, and `norm` the norm of the gradient. Gradient scaling, which float16 uses, skips such steps
        by itself.
        """
        bad = (~(torch.isfinite(loss) & torch.isfinite(norm))).long()
        if world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if optimizer.defaults.get("fused", False):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as a gradient scaler does
        counts = self._counts.to(bad.device, non_blocking=True)
        self._counts = torch.stack([counts[0] + bad, (counts[1] + 1) * bad])
