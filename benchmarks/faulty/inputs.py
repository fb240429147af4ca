"""Bad arguments: each call ends in a result, or in an error that names an argument."""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.faulty.hostile import flow
from benchmarks.faulty.patience import AtWork, limited
from pfgm.cli.console import is_out_of_memory
from pfgm.data import Arrays, Digits, Toy
from pfgm.data.augmentation import Augment
from pfgm.data.degradations import AddNoise, Downsample
from pfgm.flow.loading import load
from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.flow.posthoc_ema import exponent
from pfgm.flow.tuned_solvers import optimize_grid
from pfgm.nn import TimeMLP, UNet
from pfgm.sampling import likelihood
from pfgm.sampling.latents import Latent
from pfgm.sampling.ode import SolverError
from pfgm.sampling.sampler import Sampler
from pfgm.theory import kernel
from pfgm.theory.data_summary import DataSummary
from pfgm.training import noise
from pfgm.training.ema import EMA, PowerAverages
from pfgm.training.losses import DenoisingLoss, PoissonFieldLoss
from pfgm.training.module import PFGM

NAMED = (ValueError, TypeError, OSError, SolverError)


@dataclass(frozen=True)
class Target:
    """A public function, and arguments with which it works."""

    call: Callable[..., Any]
    good: dict[str, Any]


def targets() -> dict[str, Target]:
    """All that are tried."""
    torch.manual_seed(0)
    net, x, sigma = flow(), torch.randn(3, 4), torch.rand(3) + 0.1
    levels: dict[str, Any] = {"sigma_min": 0.01, "sigma_max": 40.0}
    latent = Latent(torch.randn(2, 4), 40.0, "plane")
    fast: dict[str, Any] = {"method": "ab3", "steps": 3}
    euler: dict[str, Any] = {"method": "euler", "steps": 3}
    small: dict[str, Any] = {"num_classes": 0, "extra_channels": 0, "width": 8}
    data: dict[str, Any] = {"data": Toy(size=50, batch_size=8).summary}
    exact: dict[str, Any] = {"method": "dopri5", "rtol": 0.1, "atol": 0.1}
    return {
        "StudentTKernel": Target(kernel.StudentTKernel, {"D": 3.0}),
        "Sampler": Target(
            _sampler, {"shape": (4,), "sigma_data": 0.5, "start": "hemisphere", "coordinates": "angle"} | levels | fast
        ),
        "flow.sample": Target(net.sample, {"n": 2, "seed": 0, "labels": None, "batch_size": 2, "max_calls": None} | fast),
        "flow.sample(seeds)": Target(
            net.sample, {"seeds": [1, 2], "temperature": 1.0, "grid": "paced", "start": "hemisphere"} | fast
        ),
        "flow.sample(noise)": Target(net.sample, {"n": 2, "s_churn": 1.0, "s_tmin": 0.1, "s_tmax": 9.0} | euler),
        "flow.sample(adaptive)": Target(net.sample, {"n": 2, "independent": True} | exact),
        "flow.vary": Target(net.vary, {"x": x, "level": 1.0, "seed": 0} | fast),
        "flow.denoise": Target(net.denoise, {"x": x, "sigma": sigma, "label": None}),
        "flow.encode": Target(net.encode, {"x": x, "labels": None} | exact),
        "flow.decode": Target(net.decode, {"latent": latent, "labels": None} | exact),
        "flow.interpolate": Target(net.interpolate, {"a": x, "b": x + 1, "points": 3} | exact),
        "flow.log_prob": Target(net.log_prob, {"x": x, "exact": True, "probes": 1, "seed": 0, "rtol": 0.1, "atol": 0.1}),
        "flow.trajectory": Target(net.trajectory, {"pairs": [(0, 1)], "points": 3, "batch_size": 2} | fast),
        "log_prob": Target(_log_prob, {"x": x, "sigma_data": 0.5, "probes": 1, "rtol": 0.1, "atol": 0.1} | levels),
        "optimize_grid": Target(optimize_grid, {"flow": net, "steps": 2, "n": 2}),
        "Latent": Target(Latent, {"t": torch.zeros(2, 4), "level": 1.0, "surface": "plane"}),
        "PoissonFlow": Target(_flow, {"shape": (4,), "scale": 1.0, "sigma_data": 0.5, "start": "hemisphere"} | levels),
        "load": Target(load, {"path": "none.ckpt", "device": "cpu", "ema": True, "trust": ()}),
        "UNet": Target(UNet, {"shape": (1, 8, 8), "blocks": 1, "dropout": 0.1} | small),
        "TimeMLP": Target(TimeMLP, {"shape": (4,), "depth": 1} | small),
        "PFGM": Target(_module, {"D": 2.0, "lr": 1e-3, "warmup_steps": 1, "decay_steps": None, "betas": (0.9, 0.99)} | data),
        "PFGM(levels)": Target(_module, {"sigma_data": 0.5, "data_norm": 1.0, "label_dropout": 0.0, "seed": 0} | levels | data),
        "DenoisingLoss": Target(DenoisingLoss, {"reference_size": 0, "log_variance": False}),
        "PoissonFieldLoss": Target(PoissonFieldLoss, {"gamma": 5.0, "reference_size": 10}),
        "LogNormal": Target(noise.LogNormal, {"P_mean": -1.2, "P_std": 1.2}),
        "ScaledLogNormal": Target(noise.ScaledLogNormal, {"mean": -0.5, "std": 1.2}),
        "LogUniform": Target(noise.LogUniform, {"low": 0.1, "high": 1.0}),
        "PoissonFlowNoise": Target(noise.PoissonFlowNoise, {}),
        "Augment": Target(Augment, {}),
        "EMA": Target(EMA, {"half_life": 10.0, "warmup": 0.1}),
        "PowerAverages": Target(PowerAverages, {"every_n_steps": 5, "sigma_rel": (0.05, 0.1)}),
        "exponent": Target(exponent, {"sigma_rel": 0.1}),
        "Toy": Target(Toy, {"name": "heart", "size": 50, "batch_size": 8, "seed": 0}),
        "Digits": Target(Digits, {"batch_size": 8, "seed": 0, "labels": True, "held_out": 0.1, "flip": False}),
        "Arrays": Target(Arrays, {"path": Path("none.npy"), "batch_size": 8, "scale": 1.0, "held_out": 0.1}),
        "Downsample": Target(Downsample, {"factor": 2}),
        "AddNoise": Target(AddNoise, {"std": 1.0}),
    }


def _sampler(**options: Any) -> Any:
    return Sampler(lambda x, sigma, label=None: x * 0, kernel.StudentTKernel(4.0), **options).sample(1)


def _log_prob(**options: Any) -> Any:
    return likelihood.log_prob(lambda x, sigma, label=None: x * 0.5, kernel.StudentTKernel(4.0), **options)


def _flow(shape: Any, sigma_data: Any, scale: Any, **options: Any) -> PoissonFlow:
    return PoissonFlow(flow().denoiser, DataSummary(shape, sigma_data, scale=scale), **options)


def _module(**options: Any) -> PFGM:
    return PFGM(TimeMLP((2,), 0, 0, width=4, depth=1), loss=DenoisingLoss(), **options)


def odd_values() -> st.SearchStrategy:
    """Anything a user might give."""
    numbers = st.sampled_from(
        [0, -1, 1, 3, 1.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, 10**15, 10**30, 10**400, -(2**63), True, 2j]
    )
    words = st.sampled_from(["", "3", "nan", "none", "../x", "\0", "ab3", "é" * 50])
    nothing = st.sampled_from([True, None, (), [], {}, set(), [None], [[1, 2], [3]], {"x": 1}, b"1", object(), len, float])
    lists = st.lists(st.sampled_from([0, -1, 2, 0.5, math.nan, "a", None]), max_size=3)
    return st.one_of(numbers, words, nothing, lists, tensors())


@st.composite
def tensors(draw: Any) -> Any:
    """Of odd shapes, types and values."""
    shape = draw(st.sampled_from([(), (0,), (1,), (3,), (4,), (2, 4), (3, 4), (5, 4), (0, 4), (3, 4, 1), (1, 3, 4), (3, 5)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]))
    fill = draw(st.sampled_from([0.0, 1.0, -1.0, math.nan, math.inf, 1e30]))
    integer = not (dtype.is_floating_point or dtype.is_complex)
    value = torch.full(
        shape, 1.0 if integer and not math.isfinite(fill) else min(fill, 1e4) if dtype == torch.float16 else fill
    )
    value = value.to(dtype)
    return value.numpy() if draw(st.booleans()) else value


@st.composite
def calls(draw: Any, known: dict[str, Target]) -> tuple[str, dict[str, Any], list[str]]:
    """A function, its arguments, and which of them are odd."""
    name = draw(st.sampled_from([name for name, target in known.items() if target.good]))
    good = known[name].good
    changed = draw(st.lists(st.sampled_from(sorted(good)), min_size=1, max_size=2, unique=True))
    return name, good | {key: draw(odd_values()) for key in changed}, changed


def outcome(call: Callable[..., Any], arguments: dict[str, Any], changed: list[str]) -> tuple[str, str]:
    """ "result", "at work" still, out "of memory", "named", or what went wrong; and what was said."""
    try:
        with warnings.catch_warnings(), limited():
            warnings.simplefilter("ignore")
            call(**arguments)
    except NAMED as error:
        text = str(error)
        return (
            "named" if any(name in text for name in (*arguments, "data", str(arguments.get("path")))) else "not named"
        ), f"{type(error).__name__}: {text}"
    except AtWork:
        return "at work", ""
    except Exception as error:
        if is_out_of_memory(error):
            return "of memory", ""
        return "traceback", f"{type(error).__name__}: {error}"
    return "result", ""


def functions(tries: int, number: int, report: Callable[[str], None] = print) -> Counter:
    """Counts of what `tries` calls with odd arguments end in; those that end badly are reported."""
    known, counts = targets(), Counter()

    @seed(number)
    @settings(
        max_examples=tries, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(calls(known))
    def run(case: tuple[str, dict[str, Any], list[str]]) -> None:
        name, arguments, changed = case
        kind, text = outcome(known[name].call, arguments, changed)
        counts["tried"] += 1
        counts[kind] += 1
        if kind in ("traceback", "not named"):
            report(f"{kind}: {name}({', '.join(f'{key}={arguments[key]!r}' for key in changed)}): {text[:200]}")

    run()
    return counts
