"""Networks and their preconditioning: what is learned, and how a network's output becomes a denoised sample.

`Network` states the contract. `TimeMLP` takes vectors, `UNet` signals, images and volumes; `DiffusersUNet` adapts a network
of another package. This room imports `pfgm.core`, `pfgm.files` and `pfgm.theory`.
"""

from pfgm.nn.diffusers import DiffusersUNet
from pfgm.nn.mlp import TimeMLP
from pfgm.nn.network import Denoiser, Network
from pfgm.nn.preconditioning import FieldDenoiser, PreconditionedDenoiser
from pfgm.nn.unet import UNet

__all__ = ["Denoiser", "DiffusersUNet", "FieldDenoiser", "Network", "PreconditionedDenoiser", "TimeMLP", "UNet"]
