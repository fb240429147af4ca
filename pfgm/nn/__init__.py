"""Networks: `TimeMLP` for vectors, `UNet` for images. The contract is in `Network`."""

from pfgm.nn.mlp import TimeMLP
from pfgm.nn.network import Network
from pfgm.nn.unet import UNet

__all__ = ["Network", "TimeMLP", "UNet"]
