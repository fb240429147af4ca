"""The user's choice of a solver, `SolverConfig`, and the solvers that it resolves to.

The methods come from the registry of `pfgm.sampling.methods`, which the files imported here fill.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from pfgm.core.arguments import check_types
from pfgm.core.tensors import check_positive
from pfgm.sampling import multistep, torchdiffeq_solvers  # noqa: F401 (they register their methods)
from pfgm.sampling.grids import Grid, make_grid
from pfgm.sampling.methods import BOTH, METHODS, Integrator, MakeCoordinates, Method

ADAPTIVE = tuple(name for name, method in METHODS.items() if method.adaptive)
FIXED = tuple(name for name, method in METHODS.items() if not method.adaptive)
ONE_STEP = tuple(name for name, method in METHODS.items() if method.one_step)
PER_SAMPLE = tuple(name for name, method in METHODS.items() if method.per_sample)
# Named trade-offs: 6 network calls, 10 calls, and as many as it takes for the network's error to dominate.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "ab3", "steps": 4},
    "balanced": {"method": "ab3", "steps": 8},
    "reference": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4},
}
Start = Literal["hemisphere", "hyperplane"]  # surfaces on which samples start; `Sampler.prior` draws on them
RTOL, ATOL = 0.05, 0.05  # default tolerances, for a state of unit variance
Interval = tuple[float, float, int]


@dataclass(frozen=True)
class Solver:
    """Describe how the flow is solved: what a `SolverConfig` resolves to."""

    method: Method
    coordinates: MakeCoordinates
    integrate: Integrator  # one of the method's two
    grid: Grid
    rtol: float = 0.0  # tolerances of adaptive methods
    atol: float = 0.0


@dataclass(frozen=True)
class SolverConfig:
    """Choose how the flow is solved, where a draw starts, and whether noise is added on its way down.

    Without any of the first eight fields the preset is "balanced". For D < inf each addition of noise costs one network call.
    All levels are effective noise levels in model units.

    Args:
        preset: fast (6 network calls), balanced (10 calls) or reference (dopri5 at tolerance 1e-4). It excludes method,
            coordinates, rtol, atol, independent, steps and grid.
        method: one with adaptive steps ({adaptive}) or with fixed steps ({fixed}). The default is bosh3 for a tolerance and
            ab3 otherwise; dpmpp_2m, dpmpp_3m and edm_heun are there for comparison.
        coordinates: angle (default where the method has it) or log_sigma (that of dpmpp_2m, dpmpp_3m and edm_heun).
        rtol: relative tolerance of an adaptive method (default .05).
        atol: absolute tolerance of an adaptive method (default .05). The state has unit variance in angle coordinates.
        independent: adaptive steps for each sample ({per_sample}), so that it does not depend on its batch.
        steps: number of steps of a method with fixed steps. With edm_heun the final denoising is the last of them.
        grid: levels of a method with fixed steps: uniform in the coordinate's time, paced (almost uniform; default of ab3),
            rho (EDM's; default of edm_heun, dpmpp_2m and dpmpp_3m), or the falling levels themselves, without steps.
        start: surface on which a draw starts: hemisphere (default) or hyperplane.
        temperature: scale of the prior's directions. Below 1 (the default) samples are more typical and more alike; .8 to 1.2
            is useful.
        s_churn: strength of the noise added before each step of a one-step method, as in EDM (0: none).
        s_tmin: lowest level at which s_churn adds noise.
        s_tmax: highest level at which s_churn adds noise.
        restart: intervals [[t_min, t_max, K], ...] of levels. Each is passed K times more, lifted from t_min to t_max by noise.

    Raises:
        ValueError: a name is unknown, a number is out of range, or fields exclude each other.
    """

    preset: str | None = None
    method: str | None = None
    coordinates: str | None = None
    rtol: float | None = None
    atol: float | None = None
    independent: bool | None = None
    steps: int | None = None
    grid: str | list[float] | tuple[float, ...] | None = None
    start: Start | None = None
    temperature: float = 1.0
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    restart: list[Interval] | tuple[Interval, ...] = ()

    def __post_init__(self) -> None:
        if self.start is not None:
            check_start(self.start)
        check_types(type(self).__init__, vars(self))
        if self.grid is not None and not isinstance(self.grid, str):
            object.__setattr__(self, "grid", tuple(float(level) for level in self.grid))
        object.__setattr__(self, "restart", tuple(tuple(interval) for interval in self.restart))
        if self.grid != "optimized":  # which commands replace by the levels that they find or have kept
            self.solver  # noqa: B018 (reports fields that do not fit together)
        check_positive("temperature", self.temperature)
        self._check_churn()
        self._check_restart()

    @classmethod
    def resolve(cls, config: "SolverConfig | None", options: Mapping[str, Any]) -> "SolverConfig":
        """Return `config`, or the one with the fields `options`. Raise TypeError for both, and for unknown fields."""
        unknown = sorted(options.keys() - {field.name for field in fields(cls)})
        if unknown:
            names = ", ".join(field.name for field in fields(cls))
            raise TypeError(f"{unknown[0]!r} is no option here. Choose from {names}.")
        if config is not None and options:
            raise TypeError(f"config, {', '.join(options)}: a config holds all fields. Set them in it, or leave it out.")
        return config or cls(**options)

    @cached_property
    def solver(self) -> Solver:
        """The solver that these fields describe."""
        choices = {name: getattr(self, name) for name in SOLVER_FIELDS} | {"independent": self.independent or None}
        chosen = {name: value for name, value in choices.items() if value is not None}
        if self.preset is not None or not chosen:
            preset = chosen.pop("preset", "balanced")
            check_choice("preset", preset, PRESETS)
            if chosen:
                raise ValueError(f"preset = {preset!r} excludes other choices. Leave out either preset or {', '.join(chosen)}.")
            return SolverConfig(**PRESETS[preset]).solver
        name = self.method or ("bosh3" if chosen.keys() & {"rtol", "atol", "independent"} else "ab3")
        check_choice("method", name, METHODS)
        method = METHODS[name]
        default = next(iter(method.coordinates))
        coordinates = self.coordinates or default
        check_choice("coordinates", coordinates, BOTH)
        if coordinates not in method.coordinates:
            raise ValueError(f"coordinates = {coordinates!r}: {name} exists in {default} coordinates only. Leave it out.")
        return (self._adaptive if method.adaptive else self._fixed)(method, method.coordinates[coordinates])

    def _adaptive(self, method: Method, coordinates: MakeCoordinates) -> Solver:
        if self.steps is not None or self.grid is not None:
            raise ValueError(
                f"steps = {self.steps}, grid = {self.grid}: {method.name} chooses its own steps. Give rtol and atol, "
                f"or one of {', '.join(FIXED)}."
            )
        integrate = method.per_sample if self.independent else method.integrate
        if integrate is None:
            raise ValueError(
                f"independent = True: {method.name} has no steps for each sample. Choose one of {', '.join(PER_SAMPLE)}."
            )
        rtol, atol = RTOL if self.rtol is None else self.rtol, ATOL if self.atol is None else self.atol
        check_positive("rtol", rtol)
        check_positive("atol", atol)
        return Solver(method, coordinates, integrate, Grid(), rtol, atol)

    def _fixed(self, method: Method, coordinates: MakeCoordinates) -> Solver:
        tolerances = [f"{name} = {value}" for name in ("rtol", "atol") if (value := getattr(self, name)) is not None]
        if tolerances:
            raise ValueError(
                f"{', '.join(tolerances)}: {method.name} has fixed steps. Give steps, or one of {', '.join(ADAPTIVE)}."
            )
        if self.independent:
            raise ValueError(
                f"independent = True: {method.name} has fixed steps, so its samples are independent already. Leave it out."
            )
        steps = self.steps
        if method.counts_denoising and steps is not None:
            if steps < 2:
                raise ValueError(f"steps = {steps}: {method.name} needs at least 2, since the last is the final denoising.")
            steps -= 1
        grid = make_grid(method.grid if self.grid is None else self.grid, steps, method.name)
        return Solver(method, coordinates, method.integrate, grid)

    def _check_churn(self) -> None:
        if not 0 <= self.s_churn < math.inf:
            raise ValueError(f"s_churn = {self.s_churn} must be a finite number >= 0.")
        interval = f"s_tmin = {self.s_tmin}, s_tmax = {self.s_tmax}"
        if not 0 <= self.s_tmin <= self.s_tmax:
            raise ValueError(f"{interval}: noise levels must be 0 <= s_tmin <= s_tmax.")
        if not self.s_churn and (self.s_tmin, self.s_tmax) != (0.0, math.inf):
            raise ValueError(f"{interval} have no effect without s_churn. Give s_churn, or leave them out.")
        if self.s_churn and not self.solver.method.one_step:
            raise ValueError(
                f"s_churn = {self.s_churn}: noise before each step needs fixed steps that do not use earlier ones. "
                f"{self.solver.method.name} does not have them. Choose method {', '.join(ONE_STEP)}, or restart."
            )
        if self.s_churn and self.restart:
            raise ValueError(f"s_churn = {self.s_churn}, restart = {self.restart}: give one of them.")

    def _check_restart(self) -> None:
        for t_min, t_max, repeats in self.restart:
            if not 0 < t_min < t_max < math.inf or repeats < 1:
                raise ValueError(
                    f"restart has {[t_min, t_max, repeats]}: give positive finite levels t_min < t_max and a whole K >= 1."
                )


SolverConfig.__doc__ = (SolverConfig.__doc__ or "").format(
    adaptive=", ".join(ADAPTIVE), fixed=", ".join(FIXED), per_sample=", ".join(PER_SAMPLE)
)
SOLVER_FIELDS = ("preset", "method", "coordinates", "rtol", "atol", "independent", "steps", "grid")  # those of `config.solver`


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of the `choices`."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is unknown. Choose one of {', '.join(choices)}.")


def check_start(start: str) -> None:
    """Raise ValueError unless `start` is a `Start`."""
    check_choice("start", start, get_args(Start))
