"""Training objectives: one number for each sample.

Each takes clean data in centred model space and draws its own noise. `DenoisingLoss` is PFGM++'s (D = inf: EDM's),
`PoissonFieldLoss` PFGM's own. An objective also makes the denoiser that it trains, and knows where its flow has to start.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core.configurable import Configurable
from pfgm.core.rng import Generators
from pfgm.core.tensors import expand
from pfgm.nn.preconditioning import FieldDenoiser, PreconditionedDenoiser
from pfgm.theory.data_summary import DataSummary
from pfgm.theory.field import normalized_field, posterior_mean
from pfgm.training.noise import NoiseLaw, PoissonFlowNoise, ScaledLogNormal, recommended_sigma_max


@dataclass(frozen=True)
class Charges:
    """Clean samples whose field is the target.

    Args:
        y: Samples [L, ...] in centred model space, those of the batch among them.
        label: The class of each, [L]: the target of a sample comes from the charges of its own class.
    """

    y: Tensor
    label: Tensor | None = None

    def weights(self, label: Tensor | None, num_classes: int) -> Tensor | None:
        """Return weights [B, L]: 1 for the charges of each sample's class, and for all if its label is `num_classes`."""
        if label is None:
            return None
        if self.label is None:
            raise ValueError("charges.label = None: with labels, the charges need theirs, [L]")
        return ((label[:, None] == self.label) | (label[:, None] == num_classes)).double()


class Loss(Configurable, nn.Module, ABC):
    """Compare a denoiser with data: the base class of objectives.

    It is a module, since it may have weights of its own, which are trained along and are no part of the flow.
    """

    reference_size: int  # charges that it asks of each batch, 0 for none
    extra_channels: int  # outputs of the network beyond those of a sample

    @abstractmethod
    def make_denoiser(self, net: nn.Module, D: float, summary: DataSummary) -> nn.Module:
        """Make the denoiser that this objective trains, around the network `net`."""

    @abstractmethod
    def recommended_sigma_max(self, summary: DataSummary) -> float:
        """Return the noise level at which the flow should start, in model units."""

    @abstractmethod
    def levels(self, y: Tensor, summary: DataSummary, generator: Generators = None) -> Tensor:
        """Return the noise levels [B] that `forward` draws for clean `y` [B, ...] from a generator in the same state."""

    @abstractmethod
    def forward(
        self,
        denoiser: Any,
        y: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        summary: DataSummary,
        charges: Charges | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Compute the loss of each sample.

        Args:
            denoiser: What `make_denoiser` made.
            y: Clean samples [B, ...] in centred model space.
            conditions: Normalised conditions [B, ...], passed to the denoiser by their keys.
            summary: What is known of the data.
            charges: Samples whose field is the target; needed if reference_size > 0.
            generator: Source of the noise.

        Returns:
            The loss, [B].
        """


class DenoisingLoss(Loss):
    """Denoise x = y + noise: |denoise(x, sigma) - y|² / (N c_out(level)²), PFGM++ (arXiv 2302.04265, eq. 9) with EDM's weight.

    The noise comes from the Student-t kernel of the denoiser's D. The weight is that of the level which the denoiser estimates
    from (x, sigma). The true effective level is known here too, but a weight that depends on y would move the minimiser away
    from E[y | x, sigma]; where the noise is small against the data, 1/varsigma² raises D by 2.

    Args:
        noise: Law of sigma; `ScaledLogNormal` by default.
        reference_size: With L > 0 the target is the posterior mean over L charges that include y, which has the same minimiser
            and less variance (stable target field, arXiv 2302.00670).
        log_variance: Whether training divides the loss by e^u and adds u, for a u(sigma) that is learned along: it tends to the
            logarithm of the expected loss, so that all noise levels pull alike (EDM2, arXiv 2312.02696, section 2.2).
    """

    extra_channels = 0

    def __init__(self, noise: NoiseLaw | None = None, reference_size: int = 0, log_variance: bool = False):
        super().__init__()
        if reference_size < 0:
            raise ValueError(f"reference_size = {reference_size} must be at least 0")
        self.noise, self.reference_size = noise or ScaledLogNormal(), reference_size
        self.log_variance = LogVariance() if log_variance else None

    def make_denoiser(self, net: nn.Module, D: float, summary: DataSummary) -> PreconditionedDenoiser:
        return PreconditionedDenoiser(net, D, summary.sigma_data, summary.power_std)

    def recommended_sigma_max(self, summary: DataSummary) -> float:
        return recommended_sigma_max(summary.sigma_data)

    def levels(self, y: Tensor, summary: DataSummary, generator: Generators = None) -> Tensor:
        return self.noise.sample(y, summary.sigma_data, generator)

    def forward(
        self,
        denoiser: PreconditionedDenoiser,
        y: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        summary: DataSummary,
        charges: Charges | None = None,
        generator: Generators = None,
    ) -> Tensor:
        sigma = self.levels(y, summary, generator)
        x = denoiser.kernel.sample(y, sigma, generator)
        target = y
        if charges is not None:
            weights = charges.weights(conditions.get("label"), summary.num_classes)
            target = posterior_mean(x, sigma, charges.y, denoiser.kernel.D, weights, check=False)
        denoised, scale = denoiser.denoise(x, sigma, **conditions)
        value = ((denoised - target) / expand(scale, x)).square().flatten(1).mean(1)
        if self.log_variance is None or not self.training:
            return value
        u = self.log_variance(sigma)
        return value / u.exp() + u


class LogVariance(nn.Module):
    """Learn u(sigma), a constant and sines and cosines of log(sigma) of at most 3 radians for a factor e; 0 at first."""

    def __init__(self, waves: int = 32):
        super().__init__()
        self.constant, self.weight = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2, waves))

    def forward(self, sigma: Tensor) -> Tensor:
        waves = self.weight.shape[1]
        frequencies = torch.arange(1, waves + 1, device=sigma.device) * (3 / waves)
        phase = sigma.log().to(self.weight.dtype)[:, None] * frequencies
        return self.constant + (phase.cos() * self.weight[0] + phase.sin() * self.weight[1]).sum(1)  # float32 in autocast


class PoissonFieldLoss(Loss):
    """Match the normalised field: |v(x, z) - target|² / (N+1) at D = 1, PFGM (arXiv 2209.11178, eq. 7).

    (x, z) comes from PFGM's own perturbation; the target is the field of a large batch of charges, the sample's source among
    them.

    Args:
        gamma: Regulariser of the field, in model units.
        reference_size: Number of charges.
        noise: PFGM's perturbation.
    """

    extra_channels = 1

    def __init__(self, gamma: float = 5.0, reference_size: int = 4096, noise: PoissonFlowNoise | None = None):
        super().__init__()
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma = {gamma} must be a positive finite number, in model units")
        if reference_size < 1:
            raise ValueError(f"reference_size = {reference_size} must be at least 1")
        self.gamma, self.noise, self.reference_size = gamma, noise or PoissonFlowNoise(), reference_size

    def make_denoiser(self, net: nn.Module, D: float, summary: DataSummary) -> FieldDenoiser:
        if D != 1:
            raise ValueError(f"D = {D}: PoissonFieldLoss is PFGM's objective and needs D = 1; use DenoisingLoss for other D")
        return FieldDenoiser(net, self.gamma, summary.sigma_data, summary.power_std)

    def recommended_sigma_max(self, summary: DataSummary) -> float:
        return self.noise.z_max(summary.mean_norm, math.prod(summary.shape))

    def levels(self, y: Tensor, summary: DataSummary, generator: Generators = None) -> Tensor:
        return self.noise.perturb(y, summary.mean_norm, generator)[1]

    def forward(
        self,
        denoiser: FieldDenoiser,
        y: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        summary: DataSummary,
        charges: Charges | None = None,
        generator: Generators = None,
    ) -> Tensor:
        if charges is None:
            raise ValueError("charges = None: PoissonFieldLoss needs charges [L, ...] that include y")
        x, z = self.noise.perturb(y, summary.mean_norm, generator)
        weights = charges.weights(conditions.get("label"), summary.num_classes)
        t_x, t_z = normalized_field(x, z, charges.y, self.gamma, weights, check=False)
        v_x, v_z = denoiser.field(x, z, **conditions)
        return ((v_x - t_x).square().flatten(1).sum(1) + (v_z - t_z).square()) / (y[0].numel() + 1)
