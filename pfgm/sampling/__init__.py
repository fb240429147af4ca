"""From noise to samples and densities: solvers of the flow's ODE, guidance, measurements and likelihoods.

Works with any `denoise(x, sigma)`, trained or exact, in centred model space. This room imports `pfgm.core`, `pfgm.files` and
`pfgm.theory`, and no network.
"""

from pfgm.sampling.guidance import ClassifierGuidedDenoiser, ConditionedDenoiser, GuidedDenoiser
from pfgm.sampling.inverse import Mask, MeasuredDenoiser, Measurement
from pfgm.sampling.latents import Latent, interpolate
from pfgm.sampling.likelihood import estimate_log_prob, log_prob
from pfgm.sampling.ode import SolverError
from pfgm.sampling.sampler import Sampler, Samples, Trajectory
from pfgm.sampling.solvers import METHODS, PRESETS

__all__ = [
    "METHODS",
    "PRESETS",
    "ClassifierGuidedDenoiser",
    "ConditionedDenoiser",
    "GuidedDenoiser",
    "Latent",
    "Mask",
    "MeasuredDenoiser",
    "Measurement",
    "Sampler",
    "Samples",
    "SolverError",
    "Trajectory",
    "estimate_log_prob",
    "interpolate",
    "log_prob",
]
