"""Training objectives: one number for each sample.

Both take clean data in centred model space and draw their own noise. `DenoisingLoss` is PFGM++'s (D = inf: EDM's),
`PoissonFieldLoss` PFGM's own. An objective also makes the denoiser that it trains, and knows where its flow has to start.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core.configurable import Configurable
from pfgm.core.rng import Generators
from pfgm.core.tensors import expand
from pfgm.nn.network import condition_key
from pfgm.nn.preconditioning import FieldDenoiser, PreconditionedDenoiser
from pfgm.theory.data_summary import DataSummary
from pfgm.theory.field import normalized_field, posterior_mean
from pfgm.training.noise import LogNormal, NoiseLaw, PoissonFlowNoise, recommended_sigma_max


class Loss(Configurable, nn.Module, ABC):
    """An objective: compares a denoiser with data. Subclasses say how many charges and network outputs they need.

    A module, since it may have weights of its own, which are trained along and are no part of the flow.
    """

    reference_size: int
    extra_channels: int

    @abstractmethod
    def make_denoiser(self, net: nn.Module, D: float, data: DataSummary) -> nn.Module:
        """The denoiser that this objective trains, around the network `net`."""

    @abstractmethod
    def recommended_sigma_max(self, data: DataSummary) -> float:
        """Where the flow should start, in model units."""

    @abstractmethod
    def levels(self, y: Tensor, data: DataSummary, generator: Generators = None) -> Tensor:
        """The noise levels [B] that `forward` draws for clean `y` [B, ...] from a generator in the same state."""

    @abstractmethod
    def forward(
        self,
        denoiser: Any,
        y: Tensor,
        label: Tensor | None = None,
        *,
        data: DataSummary,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
        reference: Tensor | None = None,
        reference_label: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Loss [B] for clean `y` [B, ...] in centred model space, `label` [B] (data.num_classes: none), `condition` [B, ...],
        `augmentation` [B, K] that says how y was changed, and charges `reference` [L, ...] that include y (needed if
        reference_size > 0), whose `reference_label` [L] is needed if there are labels: the target of a sample comes from the
        charges of its own class, or from all if it has none."""


class DenoisingLoss(Loss):
    """|denoise(x, sigma) - y|² / (N c_out(level)²): PFGM++ (arXiv 2302.04265, eq. 9) with EDM's weight.

    x comes from the Student-t kernel of the denoiser's D at a sigma drawn by `noise`. The weight is that of the level which the
    denoiser estimates from (x, sigma). The true effective level is known here too, but a weight that depends on y would move
    the minimiser away from E[y | x, sigma]; where the noise is small against the data, 1/varsigma² raises D by 2.

    With `reference_size` L > 0 the target is not y but the posterior mean over L charges that include y, which has the same
    minimiser and less variance (stable target field, arXiv 2302.00670).

    With `log_variance`, training divides the loss by e^u and adds u for a u(sigma) that is learned along: u tends to the log of
    the loss to expect at sigma, so that all noise levels pull alike (EDM2, arXiv 2312.02696, section 2.2). Not in evaluation.
    """

    extra_channels = 0

    def __init__(self, noise: NoiseLaw | None = None, reference_size: int = 0, log_variance: bool = False):
        super().__init__()
        self.noise, self.reference_size = noise or LogNormal(), check_reference_size(reference_size, 0)
        self.log_variance = LogVariance() if log_variance else None

    def make_denoiser(self, net: nn.Module, D: float, data: DataSummary) -> PreconditionedDenoiser:
        return PreconditionedDenoiser(net, D, data.sigma_data, data.power_std)

    def recommended_sigma_max(self, data: DataSummary) -> float:
        return recommended_sigma_max(data.sigma_data)

    def levels(self, y: Tensor, data: DataSummary, generator: Generators = None) -> Tensor:
        return self.noise.sample(y, data.sigma_data, generator)

    def forward(
        self,
        denoiser: PreconditionedDenoiser,
        y: Tensor,
        label: Tensor | None = None,
        *,
        data: DataSummary,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
        reference: Tensor | None = None,
        reference_label: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        sigma = self.levels(y, data, generator)
        x = denoiser.kernel.sample(y, sigma, generator)
        target = y
        if reference is not None:
            weights = own_class(label, reference_label, data.num_classes)
            target = posterior_mean(x, sigma, reference, denoiser.kernel.D, weights, check=False)
        denoised, scale = denoiser.denoise(x, sigma, **named(label, condition, augmentation))
        value = ((denoised - target) / expand(scale, x)).square().flatten(1).mean(1)
        if self.log_variance is None or not self.training:
            return value
        u = self.log_variance(sigma)
        return value / u.exp() + u


class LogVariance(nn.Module):
    """u(sigma) [B], a constant and `waves` sines and cosines of log(sigma), of at most 3 radians for a factor e; 0 at first."""

    def __init__(self, waves: int = 32):
        super().__init__()
        self.constant, self.weight = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2, waves))

    def forward(self, sigma: Tensor) -> Tensor:
        waves = self.weight.shape[1]
        frequencies = torch.arange(1, waves + 1, device=sigma.device) * (3 / waves)
        phase = sigma.log().to(self.weight.dtype)[:, None] * frequencies
        return self.constant + (phase.cos() * self.weight[0] + phase.sin() * self.weight[1]).sum(1)  # float32 in autocast


class PoissonFieldLoss(Loss):
    """|v(x, z) - target|² / (N+1), D = 1: PFGM (arXiv 2209.11178, eq. 7) against the field of a large reference batch.

    (x, z) comes from PFGM's own perturbation `noise`; the target is the normalised field of `reference_size` charges that
    include the sample's source. `gamma` is the field's regulariser in model units.
    """

    extra_channels = 1

    def __init__(self, gamma: float = 5.0, reference_size: int = 4096, noise: PoissonFlowNoise | None = None):
        super().__init__()
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma = {gamma} must be a positive finite number, in model units")
        self.gamma, self.noise = gamma, noise or PoissonFlowNoise()
        self.reference_size = check_reference_size(reference_size, 1)

    def make_denoiser(self, net: nn.Module, D: float, data: DataSummary) -> FieldDenoiser:
        if D != 1:
            raise ValueError(f"D = {D}: PoissonFieldLoss is PFGM's objective and needs D = 1; use DenoisingLoss for other D")
        return FieldDenoiser(net, self.gamma, data.sigma_data, data.power_std)

    def recommended_sigma_max(self, data: DataSummary) -> float:
        return self.noise.z_max(data.norm, math.prod(data.shape))

    def levels(self, y: Tensor, data: DataSummary, generator: Generators = None) -> Tensor:
        return self.noise.perturb(y, data.norm, generator)[1]

    def forward(
        self,
        denoiser: FieldDenoiser,
        y: Tensor,
        label: Tensor | None = None,
        *,
        data: DataSummary,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
        reference: Tensor | None = None,
        reference_label: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        if reference is None:
            raise ValueError("reference = None: PoissonFieldLoss needs charges [L, ...] that include y")
        x, z = self.noise.perturb(y, data.norm, generator)
        weights = own_class(label, reference_label, data.num_classes)
        t_x, t_z = normalized_field(x, z, reference, self.gamma, weights, check=False)
        v_x, v_z = denoiser.field(x, z, **named(label))
        return ((v_x - t_x).square().flatten(1).sum(1) + (v_z - t_z).square()) / (y[0].numel() + 1)


def named(label: Tensor | None, condition: Tensor | None = None, augmentation: Tensor | None = None) -> dict[str, Tensor]:
    """Return the keyword conditions of a denoiser."""
    key = "image" if condition is None else condition_key(condition.ndim - 1)
    given = {"label": label, key: condition, "augmentation": augmentation}
    return {name: value for name, value in given.items() if value is not None}


def own_class(label: Tensor | None, reference_label: Tensor | None, none: int) -> Tensor | None:
    """Weights [B, L] of the charges for each sample: 1 for those of its class, for all if its label is `none`, else 0.

    None without labels.
    """
    if label is None:
        return None
    if reference_label is None:
        raise ValueError("reference_label = None: with labels, the charges need theirs, [L]")
    return ((label[:, None] == reference_label) | (label[:, None] == none)).double()


def check_reference_size(value: int, lowest: int) -> int:
    """`value`; ValueError below `lowest`."""
    if value < lowest:
        raise ValueError(f"reference_size = {value} must be at least {lowest}")
    return value
