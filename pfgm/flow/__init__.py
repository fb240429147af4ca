"""A trained model as its users meet it, in their own units, and the files that hold it.

`PoissonFlow` joins a denoiser with its data summary; checkpoints and exports are read here and run no code. This room imports
`pfgm.core`, `pfgm.files`, `pfgm.theory`, `pfgm.nn`, `pfgm.sampling` and `pfgm.data`, but no Lightning.
"""

from pfgm.flow.checkpoints import CheckpointError, DamagedCheckpointError
from pfgm.flow.loading import load
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.flow.tuned_solvers import optimize_grid

__all__ = ["CheckpointError", "DamagedCheckpointError", "PoissonFlow", "load", "optimize_grid"]
