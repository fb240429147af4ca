"""From noise to samples: the start, the way down, the last denoising.

All in centred model space. Every sample has noise of its own, a function of (seed, i), so that it does not depend on which
batch it is drawn in.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pfgm.core import rng
from pfgm.core.arguments import checked
from pfgm.core.tensors import check_levels, check_positive, check_shape, expand, norm
from pfgm.sampling.guidance import cost
from pfgm.sampling.latents import Latent
from pfgm.sampling.ode import CountedDenoiser, OutOfCalls, Solution, follow
from pfgm.sampling.solvers import SolverOptions, SolverStats, make_solver
from pfgm.sampling.stochastic import Plan, check_churn, check_restart, churn, restart
from pfgm.theory.kernel import StudentTKernel

STARTS = ("hemisphere", "hyperplane")


@dataclass
class Samples:
    """What a draw returns: `x` [n, ...] and what it cost.

    `calls` of the network for each batch (the most, if batches differ), the final denoising included, wall-clock `seconds`, the
    steps that the solver `accepted` and `rejected`, and its estimate of each sample's root mean square `error` [n] in the units
    of x (mostly too high; None for Runge-Kutta methods with fixed steps). Not `complete` if max_calls ended the draw: then x is
    the denoised state at which that was, and rejected steps of the last run are not counted.
    """

    x: Tensor
    calls: int
    seconds: float
    accepted: int = 0
    rejected: int = 0
    error: Tensor | None = None
    complete: bool = True


@dataclass
class Trajectory:
    """The way of samples: `x` and the network's `denoised` of it, both float64 [points, n, ...], at `sigma` [points, n], which
    is `level` [points] over each sample's ratio."""

    x: Tensor
    denoised: Tensor
    sigma: Tensor
    level: Tensor


class SamplerOptions(SolverOptions, total=False):
    """How to draw: the arguments of `Sampler` that are not the model's, and where to start."""

    sigma_max: float
    start: str
    temperature: float
    s_churn: float
    s_tmin: float
    s_tmax: float
    restart: Sequence[tuple[float, float, int]]


class Sampler:
    """Draw from any denoiser by following its flow down from `sigma_max`, then denoising once.

    `denoiser(x, sigma, label=None)` is a trained network or any callable, `kernel` the StudentTKernel it was made for,
    `shape` the event's. With `start` = "hemisphere" each sample starts at the height where its direction t meets the
    hemisphere of level sigma_max: sigma_0 = sigma_max/ratio, ratio² = a + (1-a)|t|²/N. Nothing is clipped, and the whole batch
    runs on one clock, level = ratio sigma. The network is asked for sigma = level/ratio, below sigma_min for samples of heavy
    tails; this is not clamped, since c_out is small there. "hyperplane" starts all samples at sigma_max, for comparison
    and for data that is itself heavy-tailed. `temperature` scales the directions of the prior: below 1 samples are more typical
    and more alike. The other arguments are those of `pfgm.sampling.solvers.make_solver`.

    With fixed steps a sample is a function of its seed alone, whatever the size, the members and the order of its batch, up to
    the rounding of the network (1e-6 on a CPU in float32). Adaptive methods share their steps, those that the worst sample
    needs, so that batch mates change a sample within its tolerance; with `independent` they do not.

    Noise may be added on the way, of the kernel and so for every D (see `stochastic`; levels in model units): before each
    step of a one-step method between the levels s_tmin and s_tmax, as EDM does with `s_churn`, or by `restart`, intervals
    (t_min, t_max, K) that are passed K times more. For D < inf each of these lifts asks the network once for the source.

    ValueError for levels that are not 0 < sigma_min < sigma_max < inf, and for unknown names.
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
        start: str = "hemisphere",
        temperature: float = 1.0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        restart: Sequence[tuple[float, float, int]] = (),
        **options: Unpack[SolverOptions],
    ):
        self.solver = make_solver(**options)
        check_levels(sigma_min, sigma_max)
        check_positive("sigma_data", sigma_data)
        check_start(start)
        check_shape(shape)
        check_positive("temperature", temperature)
        check_churn(self.solver, s_churn, s_tmin, s_tmax)
        self.denoiser, self.kernel, self.shape = denoiser, kernel, tuple(shape)
        self.start, self.temperature = start, temperature
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.churn, self.restarts = (s_churn, s_tmin, s_tmax), [*restart]
        if s_churn and self.restarts:
            raise ValueError(f"s_churn = {s_churn}, restart = {self.restarts}: give one of them")
        if self.restarts:
            check_restart(self.restarts, self.last_level, sigma_max)

    @property
    def last_level(self) -> float:
        """Where a draw hands over to the final denoising: at sigma_min, or a little above if the solver's grid says so."""
        return self.solver.last_level(self.sigma_data, self.sigma_max, self.sigma_min)

    @property
    def plan(self) -> Plan:
        """The levels of a draw, from sigma_max to `last_level`: falling runs, between which noise is added."""
        levels = self.solver.levels(self.sigma_data, self.sigma_max, self.last_level)
        if self.churn[0]:
            return churn(levels, *self.churn)
        return restart(levels, self.restarts) if self.restarts else [levels]

    def sample(
        self,
        n: int | None = None,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        labels: Tensor | Sequence[int] | None = None,
        max_calls: int | None = None,
        on_call: Callable[[int, float], None] | None = None,
    ) -> Samples:
        """`n` samples of `seed` (default 0), sample i from (seed, i), or one sample (k, 0) for each k of `seeds`.

        float32 [n, *shape] (the network's dtype if that is wider); `labels` [n] or None. After `max_calls` of the network the
        draw ends where it is, see `Samples`. `on_call(calls, level)` follows the progress.
        """
        return self.draw(seed_pairs(n, seed, seeds), labels, max_calls, on_call)

    def with_denoiser(self, denoiser: Callable[..., Tensor]) -> "Sampler":
        """The same sampler for another denoiser."""
        other = copy.copy(self)
        other.denoiser = denoiser
        return other

    @torch.no_grad()
    def draw(
        self,
        pairs: Sequence[tuple[int, int]],
        labels: Tensor | Sequence[int] | None = None,
        max_calls: int | None = None,
        on_call: Callable[[int, float], None] | None = None,
        source: Tensor | None = None,
    ) -> Samples:
        """One sample for each (seed, index) of `pairs`; with `source` [n, *shape] its noise is around that, not around 0."""
        began, most = time.perf_counter(), cost(self.denoiser)
        check_max_calls(max_calls, most)
        denoise = self._counted(labels, len(pairs), torch.float32, on_call)
        if len(pairs) == 0:
            return Samples(torch.empty(0, *self.shape, dtype=denoise.dtype, device=self._device), 0, 0.0)
        latent = self.prior(pairs)
        x, ratio = self._lift(latent)
        if source is not None:
            x = x + source.to(x)
        level: float | Tensor = latent.level
        denoise.max_calls, steps, complete = math.inf if max_calls is None else max_calls - most, SolverStats(), True
        try:
            for k, way in enumerate(self._runs(denoise, x, ratio, pairs)):
                if way.complete or k == 0:  # otherwise the state before the last lift is nearer to the data
                    x, level = way.end, way.level
                steps, complete = steps + way.steps, way.complete
        except OutOfCalls:
            complete = False
        denoise.max_calls = math.inf
        x = denoise(x, level, ratio).to(denoise.dtype)
        if x.is_cuda:
            torch.cuda.synchronize()
        error = steps.error if complete else None
        return Samples(x, denoise.calls, time.perf_counter() - began, steps.accepted, steps.rejected, error, complete)

    def _runs(
        self, denoise: CountedDenoiser, x: Tensor, ratio: Tensor, pairs: Sequence[tuple[int, int]], points: int = 2
    ) -> Iterator[Solution]:
        """The ways of the plan's runs, from `x` on the level sigma_max: what is yielded last is where the draw ends."""
        level, plan = self.sigma_max, self.plan
        for k, run in enumerate(plan):
            if run[0] > level:
                source = x if math.isinf(self.kernel.D) else denoise(x, level, ratio)
                noise = [rng.generator(*pair, 0, k, rng.RENOISING) for pair in pairs]
                x = self.kernel.renoise(x, source, level / ratio, run[0] / ratio, noise)
            way = self._follow(denoise, x, run, ratio, max(2, points // len(plan)))
            yield way
            if not way.complete:
                return
            x, level = way.end, run[-1]

    def prior(self, pairs: Sequence[tuple[int, int]]) -> Latent:
        """The latents of (seed, index) `pairs`: directions drawn on the CPU in float64, one generator each."""
        like = torch.empty(0, dtype=torch.float64)
        t = self.kernel.direction((len(pairs), *self.shape), [rng.generator(*pair) for pair in pairs], like=like)
        return Latent(
            self.temperature * t.to(self._device), self.sigma_max, "plane" if self.start == "hyperplane" else "hemisphere"
        )

    @torch.no_grad()
    def decode(self, latent: Latent, labels: Tensor | Sequence[int] | None = None) -> Tensor:
        """Follow the flow from `latent` down to the level sigma_min, without denoising: [n, ...] in the dtype of latent.t."""
        denoise = self._counted(labels, len(latent.t), latent.t.dtype)
        x, ratio = self._lift(latent)
        return self._flow(denoise, x, latent.level, self.sigma_min, ratio).to(latent.t.dtype)

    def encode(self, x: Tensor, labels: Tensor | Sequence[int] | None = None) -> Latent:
        """Follow the flow from `x` [n, ...] at sigma_min up the plane clock to sigma_max; `decode` inverts it."""
        top = self.integrate(x, self.sigma_min, self.sigma_max, labels)
        return Latent(top / self.sigma_max, self.sigma_max, "plane")

    @torch.no_grad()
    def integrate(self, x: Tensor, sigma_from: float, sigma_to: float, labels: Tensor | Sequence[int] | None = None) -> Tensor:
        """The flow's map from the plane sigma_from to the plane sigma_to, in either direction: like `x` [n, ...]."""
        for name, sigma in (("sigma_from", sigma_from), ("sigma_to", sigma_to)):
            check_positive(name, sigma)
        denoise = self._counted(labels, len(x), x.dtype)
        return self._flow(denoise, x, sigma_from, sigma_to, None).to(x.dtype)

    @torch.no_grad()
    def trajectory(
        self, pairs: Sequence[tuple[int, int]], points: int, labels: Tensor | Sequence[int] | None = None
    ) -> Trajectory:
        """The way of the samples (seed, index) of `pairs`, at `points` equally spaced in the coordinate's time.

        The last is the one that a draw would denoise. With added noise each run has its share of the points, 2 at least.
        ValueError if there are no pairs.
        """
        if len(pairs) == 0:
            raise ValueError("pairs is empty: a trajectory needs one sample at least")
        denoise, latent = self._counted(labels, len(pairs), torch.float32), self.prior(pairs)
        x, ratio = self._lift(latent)
        ways = list(self._runs(denoise, x, ratio, pairs, points))
        states, levels = (torch.cat(parts) for parts in zip(*((way.states, way.levels) for way in ways), strict=True))
        denoised = torch.stack([denoise(state, float(level), ratio) for state, level in zip(states, levels, strict=True)])
        return Trajectory(states, denoised, levels[:, None] / ratio, levels)

    def _lift(self, latent: Latent) -> tuple[Tensor, Tensor]:
        """The point x [n, ...] of a latent and its ratio level/sigma [n]."""
        t = latent.t.to(self._device, torch.float64)
        ones = torch.ones(len(t), dtype=torch.float64, device=t.device)
        ratio = ones if latent.surface == "plane" else self.kernel.effective_level(norm(t), ones, t[0].numel())
        return expand(latent.level / ratio, t) * t, ratio

    def _flow(self, denoise: CountedDenoiser, x: Tensor, start: float, end: float, ratio: Tensor | None) -> Tensor:
        """The flow's map from one level to another. ValueError if noise is to be added, which would be no map."""
        if self.churn[0] or self.restarts:
            raise ValueError(
                "s_churn, restart: only samples have noise added, not encode, decode and integrate; leave them out"
            )
        if start == end:
            return x
        return self._follow(denoise, x, self.solver.levels(self.sigma_data, start, end), ratio).end

    def _follow(
        self, denoise: CountedDenoiser, x: Tensor, levels: Sequence[float], ratio: Tensor | None, points: int = 2
    ) -> Solution:
        return follow(denoise, x, levels, solver=self.solver, sigma_data=self.sigma_data, ratio=ratio, points=points)

    def _counted(self, labels: Any, n: int, dtype: torch.dtype, on_call: Any = None) -> CountedDenoiser:
        label = None if labels is None else torch.as_tensor(labels, dtype=torch.long, device=self._device)
        if label is not None and label.shape != (n,):
            raise ValueError(f"labels has shape {tuple(label.shape)}; give one label for each of the {n} samples")
        return CountedDenoiser(self.denoiser, {} if label is None else {"label": label}, dtype=dtype, on_call=on_call)

    @property
    def _device(self) -> torch.device:
        tensors = [*self.denoiser.parameters(), *self.denoiser.buffers()] if isinstance(self.denoiser, nn.Module) else []
        return tensors[0].device if tensors else torch.device("cpu")


def seed_pairs(n: int | None = None, seed: int | None = None, seeds: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """(seed, 0), ..., (seed, n-1), or (k, 0) for each k of `seeds`. ValueError unless exactly one is given and none is < 0."""
    if (n is None) == (seeds is None) or (seeds is not None and seed is not None):
        raise ValueError(f"n = {n}, seed = {seed}, seeds = {seeds}: give either a number n (and a seed for all), or seeds")
    if seeds is None:
        one = rng.natural("seed", 0 if seed is None else seed)
        return [(one, i) for i in range(rng.natural("n", n))]
    return [(rng.natural("seeds", k), 0) for k in seeds]


def check_start(start: str) -> None:
    """ValueError unless `start` is known."""
    if start not in STARTS:
        raise ValueError(f"start = {start!r} is unknown; choose one of {', '.join(STARTS)}")


def check_max_calls(max_calls: int | None, last: int = 1) -> None:
    """ValueError if `max_calls` is given and below `last`, the calls of the final denoising."""
    if max_calls is not None and max_calls < last:
        raise ValueError(f"max_calls = {max_calls} must be at least {last}: the final denoising")
