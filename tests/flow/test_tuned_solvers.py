"""Grids found for a flow."""

import itertools
import json
import math
import shutil

import pytest
import torch

import pfgm
from pfgm.cli import main
from pfgm.flow.tuned_solvers import grid_file, optimize_grid, store_grid, stored_grid
from pfgm.nn import TimeMLP
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.theory.analytic import EmpiricalDenoiser
from pfgm.theory.kernel import StudentTKernel
from tests.helpers import flow_of

CHARGES = torch.randn(12, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Exact(torch.nn.Module):
    """The denoiser of a few charges, with labels or without."""

    kernel = StudentTKernel(4.0)

    def forward(self, x, sigma, label=None):
        assert (label is None) == (self.num_classes == 0)
        return EmpiricalDenoiser(CHARGES, 4.0)(x, sigma)


def flow(num_classes=0):
    denoiser = Exact()
    denoiser.num_classes = num_classes
    return flow_of(denoiser, shape=(3,), sigma_min=0.02, sigma_max=80.0, sigma_data=1.0, scale=2.0, num_classes=num_classes)


@pytest.fixture
def export(tmp_path):
    net = TimeMLP((2,), width=16, depth=1)
    torch.nn.init.normal_(net.last.weight, std=0.1)
    model = flow_of(PreconditionedDenoiser(net, 4.0, 0.5, 0.1), shape=(2,), sigma_min=0.01, sigma_max=40.0)
    model.save_pretrained(tmp_path / "export")
    return str(tmp_path / "export")


def error(grid, seed):
    """On held-out samples, of a grid or a number of steps."""
    f = flow()
    exact = f.sample(200, seed=seed, method="dopri5", rtol=1e-6, atol=1e-6).x
    options = {"steps": grid} if isinstance(grid, int) else {"grid": grid}
    return float((f.sample(200, seed=seed, method="ab3", **options).x - exact).square().mean(1).sqrt().mean())


@pytest.mark.process
@pytest.mark.parametrize("steps", [3, 7])
def test_optimized_grids_win_on_other_seeds(steps):
    levels = optimize_grid(flow(), steps)
    assert len(levels) == steps + 1
    assert levels[0] == 80.0
    assert all(a > b for a, b in itertools.pairwise(levels))
    assert 0.02 <= levels[-1] != flow().sampler(method="ab3", steps=steps).last_level
    assert all(error(levels, seed) < 0.97 * error(steps, seed) for seed in (0, 1))
    assert optimize_grid(flow(), steps) == levels


def test_conditional_flows_have_grids_too():
    assert len(optimize_grid(flow(num_classes=3), 2, n=8)) == 3


@pytest.mark.parametrize(("arguments", "message"), [((0,), "steps = 0"), ((3, 0), "n = 0 must be at least 1")])
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimize_grid(flow(), *arguments)


def test_grids_are_kept_beside_the_checkpoint(export, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(export, folder)
    arguments = [str(folder), "--n=3", f"--out={tmp_path}/x.npz", "--grid=optimized", "--steps=2"]
    main.sample(arguments)
    assert "looking for the best grid of 2 steps" in capsys.readouterr().err
    main.sample([*arguments, "--dtype=float64"])
    output = capsys.readouterr()
    assert "looking for" not in output.err
    assert "3 samples in 4 network calls" in output.out
    model, path = pfgm.load(folder), grid_file(folder)
    levels = stored_grid(path, model, 2)
    assert levels == optimize_grid(model, 2)
    assert stored_grid(path, model, 3) is None
    store_grid(path, model, [9.0, 3.0, 2.0, 1.0])
    assert stored_grid(path, model, 3) == [9.0, 3.0, 2.0, 1.0]
    assert stored_grid(path, model, 2) == levels
    with torch.no_grad():
        next(model.denoiser.parameters()).mul_(1.01)
    assert stored_grid(path, model, 2) is None, "other weights"
    other = pfgm.load(folder)
    other.sigma_max = 50.0
    assert stored_grid(path, other, 2) is None, "another range"
    store_grid(path, model, [9.0, 1.0])
    assert len(json.loads(path.read_text())) == 1
    for text in ("[3]", '{"x": {"2": 5}}', '{"x": {"2": [1' + 400 * "0" + "]}}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no file of grids"):
            stored_grid(path, model, 2)
    store_grid(path := tmp_path / "other.json", model, [9.0, 3.0, 1.0])
    path.write_text(path.read_text().replace('"2": ', '"3": '))
    with pytest.raises(ValueError, match=r"other\.json has a grid of 2 steps for 3\. Delete it"):
        stored_grid(path, model, 3)
    with pytest.raises(SystemExit, match="2"):
        main.sample(arguments)
    assert "is no file of grids" in capsys.readouterr().err
    assert grid_file(tmp_path / "last.ckpt").name == "last.grids.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=midpoint", "--steps=3"], "such grids are for ab3, not midpoint"),
        (["--preset=fast"], "Leave out either preset or"),
        ([], "takes fixed steps"),
        (["--steps=3", "--max_calls=0"], "max_calls = 0"),
    ],
)
def test_bad_arguments_are_found_before_the_search(export, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("pfgm.cli.generate.optimize_grid", lambda *_, **__: math.nan)
    with pytest.raises(SystemExit, match="2"):
        main.sample([export, "--grid=optimized", *arguments])
    assert message in capsys.readouterr().err
