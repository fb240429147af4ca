"""Networks, by the contract of `Network`, and the preconditioning that makes denoisers of them.

This room imports `pfgm.core`, `pfgm.files` and `pfgm.theory`.
"""

from pfgm.nn.diffusers import DiffusersUNet
from pfgm.nn.mlp import TimeMLP
from pfgm.nn.network import Denoiser, Network
from pfgm.nn.preconditioning import FieldDenoiser, PreconditionedDenoiser
from pfgm.nn.unet import UNet

__all__ = ["Denoiser", "DiffusersUNet", "FieldDenoiser", "Network", "PreconditionedDenoiser", "TimeMLP", "UNet"]
