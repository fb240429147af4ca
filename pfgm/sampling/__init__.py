"""Turn noise into samples and densities: solvers of the flow's ODE, guidance, measurements and likelihoods.

This room works with any `denoise(x, sigma, **conditions)`, trained or exact, in centred model space. It imports `pfgm.core`,
`pfgm.files` and `pfgm.theory`, and no network.
"""

from pfgm.sampling.guidance import ClassifierGuidedDenoiser, ConditionedDenoiser, GuidedDenoiser
from pfgm.sampling.inverse import Mask, MeasuredDenoiser, Measurement
from pfgm.sampling.latents import Latent, interpolate
from pfgm.sampling.likelihood import estimate_log_prob, log_prob
from pfgm.sampling.methods import METHODS, Method, SolverStats, register
from pfgm.sampling.ode import SolverError
from pfgm.sampling.sampler import Sampler, Samples, Trajectory
from pfgm.sampling.solvers import PRESETS, SolverConfig

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
    "Method",
    "Sampler",
    "Samples",
    "SolverConfig",
    "SolverError",
    "SolverStats",
    "Trajectory",
    "estimate_log_prob",
    "interpolate",
    "log_prob",
    "register",
]
