"""Networks and their preconditioning: what is learned, and how its output becomes a denoised sample.

`Network` states the contract; `TimeMLP` takes vectors, `UNet` signals, images and volumes, `DiffusersUNet` adapts another
package's network. This room imports `pfgm.core`, `pfgm.files` and `pfgm.theory`.
"""

from pfgm.nn.diffusers import DiffusersUNet
from pfgm.nn.mlp import TimeMLP
from pfgm.nn.network import Denoiser, Network
from pfgm.nn.preconditioning import FieldDenoiser, PreconditionedDenoiser
from pfgm.nn.unet import UNet

__all__ = ["Denoiser", "DiffusersUNet", "FieldDenoiser", "Network", "PreconditionedDenoiser", "TimeMLP", "UNet"]
