"""The sampler: start on the prior, follow the flow down, denoise once. Everything is in centred model space."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pfgm.core import rng
from pfgm.core.arguments import checked
from pfgm.core.tensors import check_levels, check_positive, check_shape, expand, norm
from pfgm.sampling.guidance import cost
from pfgm.sampling.latents import Latent
from pfgm.sampling.methods import SolverStats
from pfgm.sampling.ode import CountedDenoiser, OnCall, OutOfCalls, Solution, follow
from pfgm.sampling.solvers import Solver, SolverConfig
from pfgm.sampling.stochastic import Plan, check_restart_levels, churn, restart
from pfgm.theory.kernel import StudentTKernel

Conditions = Mapping[str, Tensor] | None


@dataclass
class Samples:
    """Hold the samples of a draw and what they cost.

    Args:
        x: samples [n, ...].
        calls: network calls for each batch (the most, if batches differ), the final denoising included.
        seconds: wall-clock time.
        accepted: steps that the solver took.
        rejected: steps that an adaptive solver tried in vain; those of an interrupted run are not counted.
        error: estimated root mean square error [n] of the solver, in the unit of x, mostly too high. None for Runge-Kutta
            methods with fixed steps, and for incomplete draws.
        complete: False if `max_calls` ended the draw. Then x is the denoised state at which it ended.
    """

    x: Tensor
    calls: int
    seconds: float
    accepted: int = 0
    rejected: int = 0
    error: Tensor | None = None
    complete: bool = True

    @classmethod
    def joined(cls, parts: "Sequence[Samples]") -> "Samples":
        """Join the samples of several batches; calls and steps are those of the most expensive batch."""
        largest = {name: max(getattr(part, name) for part in parts) for name in ("calls", "accepted", "rejected")}
        errors = [part.error for part in parts if part.error is not None]
        error = torch.cat(errors) if len(errors) == len(parts) else None
        complete, seconds = all(part.complete for part in parts), sum(part.seconds for part in parts)
        return cls(torch.cat([part.x for part in parts]), seconds=seconds, error=error, complete=complete, **largest)


@dataclass
class Trajectory:
    """Hold the states of samples on the way from the prior to the data, float64.

    Args:
        x: noisy states [points, n, ...].
        denoised: the denoiser's output for them, [points, n, ...].
        sigma: noise levels [points, n], `level` over each sample's ratio.
        level: effective noise levels [points].
    """

    x: Tensor
    denoised: Tensor
    sigma: Tensor
    level: Tensor


class Sampler:
    """Draw from any denoiser by following its flow down from `sigma_max`, then denoising once.

    On the hemisphere start each sample starts at the height where its direction t meets the hemisphere of level sigma_max:
    sigma_0 = sigma_max/ratio, ratio² = a + (1-a)|t|²/N. The batch shares one clock, level = ratio sigma. The network is asked
    for sigma = level/ratio, in heavy tails below sigma_min, which is not clamped since c_out is small there. The hyperplane
    start puts all samples at sigma_max.

    With fixed steps a sample depends on its seed alone, up to the rounding of the network (1e-6 on a CPU in float32). Adaptive
    methods share the steps that the worst sample needs, unless they are `independent`.

    Args:
        denoiser: `denoise(x, sigma, **conditions)`, a trained network or any callable.
        kernel: perturbation kernel for which the denoiser was made.
        shape: shape of one sample.
        sigma_min: lowest noise level, in model units.
        sigma_max: highest noise level, in model units.
        sigma_data: standard deviation of the data, in model units.
        config: choice of the solver, the start and the added noise.
        **fields: fields of a `SolverConfig`, instead of `config`.

    Raises:
        ValueError: the levels are not 1e-30 <= sigma_min < sigma_max <= 1e30, or the config does not fit them.
        TypeError: a keyword is no field of `SolverConfig`, or there are both a config and fields.
    """

    @checked
    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        kernel: StudentTKernel,
        *,
        shape: Sequence[int],
        sigma_min: float,
        sigma_max: float,
        sigma_data: float = 0.5,
        config: SolverConfig | None = None,
        **fields: Any,
    ):
        self.config = SolverConfig.resolve(config, fields)
        check_levels(sigma_min, sigma_max)
        check_positive("sigma_data", sigma_data)
        check_shape(shape)
        self.denoiser, self.kernel, self.shape = denoiser, kernel, tuple(shape)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.coordinates = self.solver.coordinates(sigma_data)
        if self.config.restart:
            check_restart_levels(self.config.restart, self.last_level, sigma_max)

    @property
    def solver(self) -> Solver:
        """The solver that the config describes."""
        return self.config.solver

    @property
    def start(self) -> str:
        """The surface on which a draw starts."""
        return self.config.start or "hemisphere"

    @property
    def last_level(self) -> float:
        """The level of the final denoising: sigma_min, or a little above if the solver's grid says so."""
        return self.solver.grid.last(self.coordinates, self.sigma_max, self.sigma_min)

    @property
    def plan(self) -> Plan:
        """The levels of a draw from sigma_max to `last_level`, as falling runs between which noise is added."""
        levels, config = self.solver.grid.levels(self.coordinates, self.sigma_max, self.last_level), self.config
        if config.s_churn:
            return churn(levels, config.s_churn, config.s_tmin, config.s_tmax)
        return restart(levels, config.restart) if config.restart else [levels]

    def with_denoiser(self, denoiser: Callable[..., Tensor]) -> "Sampler":
        """Copy the sampler with another denoiser."""
        other = copy.copy(self)
        other.denoiser = denoiser
        return other

    def sample(
        self,
        n: int | None = None,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        labels: Tensor | Sequence[int] | None = None,
        max_calls: int | None = None,
        on_call: OnCall | None = None,
    ) -> Samples:
        """Draw `n` samples of one seed, or one sample for each of `seeds`.

        Args:
            n: number of samples; sample i is a function of (seed, i).
            seed: seed of all `n` samples (default 0).
            seeds: instead of n and seed, the seeds k of single samples (k, 0).
            labels: class of each sample, [n].
            max_calls: network calls after which the draw denoises the state reached, see `Samples`.
            on_call: called after each network call with the number of calls so far and the level.

        Returns:
            Samples with x [n, *shape] in float32, or in the network's dtype if that is wider.

        Raises:
            ValueError: an argument is out of range.
            SolverError: the denoiser's values are not finite, or the tolerance cannot be met.
        """
        pairs = seed_pairs(n, seed, seeds)
        if labels is None:
            return self.draw(pairs, None, max_calls, on_call)
        label = torch.as_tensor(labels, dtype=torch.long)
        if label.shape != (len(pairs),):
            raise ValueError(f"labels has shape {tuple(label.shape)}. Give one label for each of the {len(pairs)} samples.")
        return self.draw(pairs, {"label": label}, max_calls, on_call)

    @torch.no_grad()
    def draw(
        self,
        pairs: Sequence[tuple[int, int]],
        conditions: Conditions = None,
        max_calls: int | None = None,
        on_call: OnCall | None = None,
        source: Tensor | None = None,
    ) -> Samples:
        """Draw one sample for each (seed, index) of `pairs`; see `sample`.

        Args:
            conditions: tensors [n, ...] for the denoiser, by name.
            source: points [n, *shape] around which the prior's noise lies (default 0).
        """
        started, final = time.perf_counter(), cost(self.denoiser)
        check_max_calls(max_calls, final)
        denoise = self._counted(conditions, torch.float32, on_call)
        if len(pairs) == 0:
            return Samples(torch.empty(0, *self.shape, dtype=denoise.dtype, device=self._device), 0, 0.0)
        x, ratio = self._lift(self.prior(pairs))
        if source is not None:
            x = x + source.to(x)
        level: float | Tensor = self.sigma_max
        stats, complete = SolverStats(), True
        denoise.max_calls = math.inf if max_calls is None else max_calls - final
        try:
            for k, run in enumerate(self._runs(denoise, x, ratio, pairs)):
                if run.complete or k == 0:  # otherwise the state before the last lift is nearer to the data
                    x, level = run.states[-1], run.level
                stats, complete = stats + run.stats, run.complete
        except OutOfCalls:
            complete = False
        denoise.max_calls = math.inf
        x = denoise(x, level, ratio).to(denoise.dtype)
        if x.is_cuda:
            torch.cuda.synchronize()
        error = stats.error if complete else None
        return Samples(x, denoise.calls, time.perf_counter() - started, stats.accepted, stats.rejected, error, complete)

    def _runs(
        self, denoise: CountedDenoiser, x: Tensor, ratio: Tensor, pairs: Sequence[tuple[int, int]], points: int = 2
    ) -> Iterator[Solution]:
        """Solve the plan's runs from `x` at sigma_max. The last solution yielded is where the draw ends."""
        level, plan = self.sigma_max, self.plan
        for k, levels in enumerate(plan):
            if levels[0] > level:
                source = x if math.isinf(self.kernel.D) else denoise(x, level, ratio)
                noise = [rng.generator(*pair, 0, k, rng.RENOISING) for pair in pairs]
                x = self.kernel.renoise(x, source, level / ratio, levels[0] / ratio, noise)
            solution = follow(denoise, x, levels, self.solver, self.coordinates, ratio, max(2, points // len(plan)))
            yield solution
            if not solution.complete:
                return
            x, level = solution.states[-1], levels[-1]

    def prior(self, pairs: Sequence[tuple[int, int]]) -> Latent:
        """Return the latents of (seed, index) `pairs`. Directions are drawn on the CPU in float64, from one generator each."""
        like = torch.empty(0, dtype=torch.float64)
        t = self.kernel.direction((len(pairs), *self.shape), [rng.generator(*pair) for pair in pairs], like=like)
        surface = "plane" if self.start == "hyperplane" else "hemisphere"
        return Latent(self.config.temperature * t.to(self._device), self.sigma_max, surface)

    @torch.no_grad()
    def decode(self, latent: Latent, conditions: Conditions = None) -> Tensor:
        """Follow the flow from `latent` down to sigma_min, without denoising: [n, ...] in the dtype of latent.t."""
        x, ratio = self._lift(latent)
        return self._flow(x, latent.level, self.sigma_min, conditions, latent.t.dtype, ratio)

    def encode(self, x: Tensor, conditions: Conditions = None) -> Latent:
        """Follow the flow on the plane from `x` [n, ...] at sigma_min up to sigma_max; `decode` inverts it."""
        top = self.integrate(x, self.sigma_min, self.sigma_max, conditions)
        return Latent(top / self.sigma_max, self.sigma_max, "plane")

    @torch.no_grad()
    def integrate(self, x: Tensor, sigma_from: float, sigma_to: float, conditions: Conditions = None) -> Tensor:
        """Map `x` [n, ...] from the plane sigma_from to the plane sigma_to, in either direction."""
        check_positive("sigma_from", sigma_from)
        check_positive("sigma_to", sigma_to)
        return self._flow(x, sigma_from, sigma_to, conditions, x.dtype)

    @torch.no_grad()
    def trajectory(self, pairs: Sequence[tuple[int, int]], points: int, conditions: Conditions = None) -> Trajectory:
        """Return the states of the samples of `pairs` at `points` times equally spaced in the coordinates' time.

        The last state is the one that a draw denoises. With added noise each run gets its share of the points, at least 2.
        """
        if len(pairs) == 0:
            raise ValueError("pairs is empty: a trajectory needs at least one sample.")
        denoise = self._counted(conditions, torch.float32)
        x, ratio = self._lift(self.prior(pairs))
        runs = list(self._runs(denoise, x, ratio, pairs, points))
        states, levels = torch.cat([run.states for run in runs]), torch.cat([run.levels for run in runs])
        denoised = torch.stack([denoise(state, float(level), ratio) for state, level in zip(states, levels, strict=True)])
        return Trajectory(states, denoised, levels[:, None] / ratio, levels)

    def _lift(self, latent: Latent) -> tuple[Tensor, Tensor]:
        """Return the points x [n, ...] of a latent and their ratios level/sigma [n]."""
        t = latent.t.to(self._device, torch.float64)
        ratio = torch.ones(len(t), dtype=torch.float64, device=t.device)
        if latent.surface == "hemisphere":
            ratio = self.kernel.effective_level(norm(t), ratio, t[0].numel())
        return expand(latent.level / ratio, t) * t, ratio

    def _flow(
        self, x: Tensor, start: float, end: float, conditions: Conditions, dtype: torch.dtype, ratio: Tensor | None = None
    ) -> Tensor:
        """Map `x` from level `start` to level `end`. Raise ValueError if the config adds noise, which is not invertible."""
        if self.config.s_churn or self.config.restart:
            raise ValueError(
                "s_churn, restart: only samples have noise added, not encode, decode and integrate. Leave them out."
            )
        if start != end:
            levels = self.solver.grid.levels(self.coordinates, start, end)
            x = follow(self._counted(conditions, dtype), x, levels, self.solver, self.coordinates, ratio).states[-1]
        return x.to(dtype)

    def _counted(self, conditions: Conditions, dtype: torch.dtype, on_call: OnCall | None = None) -> CountedDenoiser:
        tensors = {name: value.to(self._device) for name, value in (conditions or {}).items()}
        return CountedDenoiser(self.denoiser, tensors, dtype=dtype, on_call=on_call)

    @property
    def _device(self) -> torch.device:
        tensors = [*self.denoiser.parameters(), *self.denoiser.buffers()] if isinstance(self.denoiser, nn.Module) else []
        return tensors[0].device if tensors else torch.device("cpu")


def seed_pairs(n: int | None = None, seed: int | None = None, seeds: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Return (seed, 0), ..., (seed, n-1) for `n` samples of `seed` (default 0), or (k, 0) for each k of `seeds`."""
    if (n is None) == (seeds is None) or (seeds is not None and seed is not None):
        raise ValueError(f"n = {n}, seed = {seed}, seeds = {seeds}: give either a number n (and a seed for all), or seeds.")
    if seeds is None:
        one = rng.natural("seed", 0 if seed is None else seed)
        return [(one, i) for i in range(rng.natural("n", n))]
    return [(rng.natural("seeds", k), 0) for k in seeds]


def check_max_calls(max_calls: int | None, final: int = 1) -> None:
    """Raise ValueError if `max_calls` is below `final`, the network calls of the final denoising."""
    if max_calls is not None and max_calls < final:
        raise ValueError(f"max_calls = {max_calls} must be at least {final}, for the final denoising.")
