"""Runge-Kutta methods of torchdiffeq, with adaptive steps and on fixed grids.

Adaptive steps are shared by the whole batch, and its worst sample sets their size. torchdiffeq is imported when a method
runs, so that the help of a command does not wait for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pfgm.sampling.coordinates import Sigma
from pfgm.sampling.methods import BOTH, Method, Problem, SolverStats, StepError, register, rms
from pfgm.sampling.runge_kutta import GROW, TABLEAUS, integrate_per_sample

# First words of the AssertionErrors with which torchdiffeq gives up.
GAVE_UP = ("underflow in dt", "max_num_steps exceeded", "non-finite values in state")


class _RightHandSide:
    """Call the slope over a rescaled time, and report the start of each step."""

    def __init__(self, unit: Problem):
        self.unit = unit

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        return self.unit.slope(float(t), state)

    def callback_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        self.unit.on_step(float(t), state)


class _AdaptiveRightHandSide(_RightHandSide):
    """Provide the error norm too, and collect the statistics."""

    def __init__(self, unit: Problem):
        super().__init__(unit)
        self.stats, self.ratio = SolverStats(), torch.zeros(())

    def norm(self, error: Tensor) -> Tensor:
        """Return the largest error of a sample; torchdiffeq's own norm, over the batch, lets one sample go wrong."""
        self.ratio = rms(error)
        return self.ratio.amax()

    def callback_accept_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        self.stats += SolverStats(1, 0, self.ratio * (self.unit.atol + self.unit.rtol * rms(state)))

    def callback_reject_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        self.stats.rejected += 1


def _adaptive(method: str, problem: Problem) -> tuple[Tensor, SolverStats]:
    from torchdiffeq import odeint

    unit = problem.rescaled()
    right_hand_side = _AdaptiveRightHandSide(unit)
    # With step_t the last step ends at 1. Otherwise it would pass the end, and ask the network for levels out of range.
    options = {"norm": right_hand_side.norm, "step_t": unit.at.new_ones(1), "ifactor": GROW}
    options |= {"first_step": unit.first_step, "max_num_steps": unit.max_steps}
    try:
        states = odeint(right_hand_side, unit.state, unit.at, method=method, rtol=unit.rtol, atol=unit.atol, options=options)
    except AssertionError as error:
        if not str(error).startswith(GAVE_UP):
            raise
        raise StepError(str(error)) from error
    return states, right_hand_side.stats


def _fixed(method: str, problem: Problem) -> tuple[Tensor, SolverStats]:
    from torchdiffeq import odeint

    unit = problem.rescaled()
    grid = torch.tensor(unit.times, dtype=torch.float64, device=unit.state.device)
    options: dict[str, Callable[..., Any]] = {"grid_constructor": lambda slope, state, times: grid}
    states = odeint(_RightHandSide(unit), unit.state, unit.at, method=method, options=options)
    return states, SolverStats(len(grid) - 1)


for name, order in {"dopri5": 5, "dopri8": 8, "bosh3": 3, "adaptive_heun": 2}.items():
    per_sample = partial(integrate_per_sample, TABLEAUS[name]) if name in TABLEAUS else None
    register(Method(name, order, BOTH, partial(_adaptive, name), adaptive=True, per_sample=per_sample))
for name, order in {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}.items():
    register(Method(name, order, BOTH, partial(_fixed, name), one_step=True))
# EDM's sampler (arXiv 2206.00364, algorithm 1): Heun's method over sigma itself. Its state is x, as in log_sigma coordinates.
EDM = {"log_sigma": lambda sigma_data: Sigma()}
register(Method("edm_heun", 2, EDM, partial(_fixed, "heun2"), grid="rho", one_step=True, counts_denoising=True))
