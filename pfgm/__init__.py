"""Poisson flow generative models: PFGM (D = 1), PFGM++ (any real D) and diffusion (D = inf) as one model.

Data are electric charges on the plane r = 0 of a space with D more dimensions. The normalised field that they make is
learned, and followed back from a large hemisphere, by an ODE solver, down to new data. Conventions, everywhere in the code:

    y        clean data                     x          perturbed data [B, ...], event of any shape
    N        dimensions of the data         D          augmented dimensions, a real number from .5 to inf
    r        norm of the augmented part     sigma      r / sqrt(D), the noise level; everything is indexed by it
    z        r for D = 1 (= sigma)          level      the effective noise level varsigma, constant on hemispheres

`denoise(x, sigma, **conditions)` -> E[y | x, sigma] is the one interface of networks, exact denoisers and combinations. Below
`PoissonFlow` all is in centred model space, model = user / scale - mean.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from pfgm.flow.loading import load
    from pfgm.flow.poisson_flow import PoissonFlow
    from pfgm.flow.tuned_solvers import optimize_grid
    from pfgm.training.module import PFGM

__all__ = ["PFGM", "PoissonFlow", "load", "optimize_grid"]

_HOMES = {
    "PoissonFlow": "pfgm.flow.poisson_flow",
    "load": "pfgm.flow.loading",
    "PFGM": "pfgm.training.module",
    "optimize_grid": "pfgm.flow.tuned_solvers",
}
_ROOMS = ["cli", "core", "data", "evaluation", "files", "flow", "nn", "sampling", "theory", "training"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch, and for PFGM Lightning, load only where they are needed."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"pfgm.{name}")
    raise AttributeError(f"module 'pfgm' has no attribute {name!r}; public names are {', '.join((*__all__, *_ROOMS))}")
