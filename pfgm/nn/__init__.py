"""Networks: `TimeMLP` for vectors, `UNet` for images, `DiffusersUNet` from elsewhere. The contract is in `Network`."""

from pfgm.nn.adapter import DiffusersUNet
from pfgm.nn.mlp import TimeMLP
from pfgm.nn.network import Network
from pfgm.nn.unet import UNet

__all__ = ["DiffusersUNet", "Network", "TimeMLP", "UNet"]
