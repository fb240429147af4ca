"""Steps that are not finite: kept from the weights, counted on the device, traced to a sample when training stops."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SKIPPED = 32
"""Steps in a row after which training stops; float16's scaler needs some to find its scale."""


class NonFiniteLoss(RuntimeError):
    """The training loss or its gradient was NaN or infinite for MAX_SKIPPED steps."""


class SkippedSteps:
    """How many steps were skipped, in all and in a row. Only `state` waits for an accelerator."""

    def __init__(self, state: Sequence[int] = (0, 0)):
        self._counts, self.told = torch.tensor(state), state[0]

    @property
    def total(self) -> Tensor:
        """In all, on the device."""
        return self._counts[0]

    @property
    def state(self) -> list[int]:
        """In all, and in a row."""
        return self._counts.tolist()

    def add(self, loss: Tensor, norm: Tensor, optimizer: torch.optim.Optimizer, world: int = 1) -> None:
        """Count a step with this loss and norm of the gradient, on any of `world` ranks; if it is not finite, a fused
        optimizer then leaves the weights alone. float16 has a scaler that does so by itself."""
        bad = (~(torch.isfinite(loss) & torch.isfinite(norm))).long()
        if world > 1:  # the loss is that of this rank
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if optimizer.defaults.get("fused", False):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as a gradient scaler does
        counts = self._counts.to(bad.device, non_blocking=True)
        self._counts = torch.stack([counts[0] + bad, (counts[1] + 1) * bad])
