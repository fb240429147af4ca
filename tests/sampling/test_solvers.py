"""SolverConfig: what it resolves to, and the settings that it refuses."""

import dataclasses
import math

import jsonargparse
import numpy as np
import pytest
import torch

from pfgm.sampling import solvers
from pfgm.sampling.methods import METHODS
from pfgm.sampling.sampler import Sampler
from pfgm.sampling.solvers import SolverConfig
from pfgm.theory.analytic import CauchyBlob
from pfgm.theory.kernel import StudentTKernel
from tests.helpers import make_sampler

FIELDS = [field.name for field in dataclasses.fields(SolverConfig)]


def test_tolerances_keep_their_names_and_defaults():
    solver = SolverConfig(rtol=1e-3, atol=1e-6).solver
    assert (solver.rtol, solver.atol) == (1e-3, 1e-6)
    assert SolverConfig(rtol=1e-3).solver.atol == solvers.ATOL == 0.05


def test_a_config_and_its_fields_are_the_same_sampler():
    fields = {"method": "heun2", "steps": 5, "start": "hyperplane", "temperature": 0.8, "s_churn": 2.0}
    levels = {"shape": (3,), "sigma_min": 0.01, "sigma_max": 40.0}
    by_config = Sampler(CauchyBlob(0.3), StudentTKernel(1), config=SolverConfig(**fields), **levels)
    assert torch.equal(by_config.sample(4).x, make_sampler(CauchyBlob(0.3), **fields).sample(4).x)
    assert by_config.plan == make_sampler(CauchyBlob(0.3), **fields).plan


def test_configs_are_values():
    config = SolverConfig(grid=[3.0, 1.0], restart=[[0.1, 1.0, 2]], method="rk4")
    same = SolverConfig(grid=np.array([3.0, 1.0]), restart=((0.1, 1.0, 2),), method="rk4")
    assert config == same
    assert len({config, same}) == 1
    assert (config.grid, config.restart) == ((3.0, 1.0), ((0.1, 1.0, 2),))
    assert config.solver is config.solver
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3


def test_unknown_fields_are_named_with_those_that_exist():
    with pytest.raises(TypeError, match=f"'stepz' is no option here. Choose from {', '.join(FIELDS)}"):
        make_sampler(CauchyBlob(0.3), stepz=3)
    with pytest.raises(TypeError, match="config, steps: a config holds all fields"):
        make_sampler(CauchyBlob(0.3), config=SolverConfig(), steps=3)


def test_command_lines_are_made_from_the_config():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SolverConfig, "solver")
    words = ["--solver.method=euler", "--solver.grid=[3,1,0.5]", "--solver.restart=[[0.1,2,3]]", "--solver.start=hyperplane"]
    made = parser.instantiate_classes(parser.parse_args(words)).solver
    assert made == SolverConfig(method="euler", grid=(3.0, 1.0, 0.5), restart=((0.1, 2.0, 3),), start="hyperplane")
    words = ["--solver.rtol=0.1", "--solver.independent=true", "--solver.temperature=0.9"]
    assert parser.instantiate_classes(parser.parse_args(words)).solver == SolverConfig(
        rtol=0.1, independent=True, temperature=0.9
    )
    documented = parser.format_help()
    assert all(f"--solver.{name}" in documented for name in FIELDS)
    assert "falling levels themselves" in " ".join(documented.split())
    assert all(name in documented for name in METHODS)
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_args(["--solver.start=sphere"])


# Coordinates, grid (None: adaptive), and whether noise may be added before a step and samples may have steps of their own.
DEFAULTS = {
    "dopri5": ("Angle", None, False, True),
    "dopri8": ("Angle", None, False, False),
    "bosh3": ("Angle", None, False, True),
    "adaptive_heun": ("Angle", None, False, True),
    "euler": ("Angle", "UniformGrid", True, False),
    "midpoint": ("Angle", "UniformGrid", True, False),
    "heun2": ("Angle", "UniformGrid", True, False),
    "rk4": ("Angle", "UniformGrid", True, False),
    "ab2": ("Angle", "UniformGrid", False, False),
    "ab3": ("Angle", "PacedGrid", False, False),
    "dpmpp_2m": ("LogSigma", "KarrasGrid", False, False),
    "dpmpp_3m": ("LogSigma", "KarrasGrid", False, False),
    "edm_heun": ("Sigma", "KarrasGrid", True, False),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_methods_have_the_documented_defaults_and_capabilities(name):
    coordinates, grid, one_step, per_sample = DEFAULTS[name]
    solver = SolverConfig(method=name, steps=grid and 4).solver
    assert type(solver.coordinates(0.5)).__name__ == coordinates
    assert type(solver.grid).__name__ == (grid or "Grid")
    assert (name in solvers.ADAPTIVE, name in solvers.FIXED) == (grid is None, grid is not None)
    assert (name in solvers.ONE_STEP, name in solvers.PER_SAMPLE) == (one_step, per_sample)


def test_the_default_method_depends_on_the_fields():
    chosen = ({}, {"steps": 3}, {"grid": [2.0, 1.0]}, {"rtol": 0.1}, {"atol": 0.1}, {"independent": True})
    assert [SolverConfig(**fields).solver.method.name for fields in chosen] == ["ab3", "ab3", "ab3", "bosh3", "bosh3", "bosh3"]
    assert SolverConfig(independent=False).solver == SolverConfig(preset="balanced").solver


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk45"}, r"method = 'rk45' is unknown\. Choose one of .*dopri5"),
        ({"method": "ab2", "steps": 5, "coordinates": "log_sigma"}, "ab2 exists in angle coordinates only"),
        ({"method": "dpmpp_2m", "steps": 5, "coordinates": "angle"}, "dpmpp_2m exists in log_sigma coordinates only"),
        ({"method": "edm_heun", "steps": 1}, "steps = 1: edm_heun needs at least 2"),
        ({"preset": "best"}, r"preset = 'best' is unknown\. Choose one of fast, balanced, reference"),
        ({"preset": "fast", "steps": 3}, "Leave out either preset or steps"),
        ({"grid": "cosine", "steps": 3}, "grid = 'cosine' is unknown"),
        ({"grid": [40.0, 1.0], "steps": 3}, "steps = 3: the grid of 2 levels"),
        ({"grid": [40.0]}, "at least two levels"),
        ({"grid": [40.0, 50.0]}, "decreasing"),
        ({"grid": [40.0, 0.0]}, "positive"),
        ({"grid": [math.inf, 1.0]}, "finite"),
        ({"grid": "rho", "method": "dopri5"}, "chooses its own steps"),
        ({"coordinates": "z"}, "coordinates = 'z' is unknown"),
        ({"start": "sphere"}, "start = 'sphere' is unknown"),
        ({"temperature": 0.0}, "temperature = 0"),
        ({"steps": 2.5}, r"steps = 2\.5: expected a 64-bit integer or None"),
        ({"method": "dopri8", "rtol": 0.1, "independent": True}, "dopri8 has no steps for each sample. Choose one of dopri5"),
        ({"method": "euler", "steps": 3, "independent": True}, "euler has fixed steps, so its samples are independent"),
        ({"restart": [(0.1, math.inf, 1)]}, "restart has"),
        ({"restart": [(0.1, 1.0, 1.5)]}, "restart = .* expected"),
        ({"sigma_min": 40.0}, "sigma_min = 40.0"),
        ({"sigma_min": math.nan}, "sigma_min = nan"),
        ({"sigma_min": 9e-31}, r"sigma_min = 9e-31, .* from 1e-30 to 1e30"),
        ({"sigma_max": 2e30}, r"sigma_max = 2e\+30"),
        ({"sigma_max": math.inf}, "sigma_max = inf"),
        ({"sigma_data": 0.0}, "sigma_data = 0"),
        ({"method": "euler"}, "steps = None"),
        ({"method": "euler", "steps": 0}, "steps = 0"),
        ({"method": "euler", "steps": 3, "rtol": 0.1}, "has fixed steps"),
        ({"method": "adaptive_heun", "steps": 3}, "steps = 3"),
        ({"steps": 0}, "steps = 0"),
        ({"rtol": -1.0}, "rtol = -1"),
        ({"atol": math.nan}, "atol = nan"),
    ],
)
def test_invalid_settings_are_named_before_any_call(options, message):
    def never(*args):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=message):
        make_sampler(never, **options)
