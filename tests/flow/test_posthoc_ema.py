"""Averages of the weights, and what else is trained along: against quadrature and the averages themselves."""

import copy
import itertools
import math
import shutil

import numpy as np
import pytest
import scipy.integrate
import torch

import pfgm
from pfgm.cli import main
from pfgm.core import rng
from pfgm.flow import checkpoints, posthoc_ema
from pfgm.nn import TimeMLP
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.theory.data_summary import DataSummary
from pfgm.training.losses import DenoisingLoss, LogVariance
from pfgm.training.module import PFGM
from pfgm.training.noise import LogUniform
from tests.helpers import ROOT, fit, last

FAST = "--model.lr=0.02"
AVERAGES = ["--averages.every_n_steps=10", "--averages.sigma_rel=[0.05,0.1]"]


def profile(gamma, step):
    return lambda tau: (gamma + 1) * tau**gamma / step ** (gamma + 1) if tau <= step else 0.0


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 12**-0.5])
def test_the_width_of_a_profile_is_its_standard_deviation(sigma_rel):
    p = profile(posthoc_ema.exponent(sigma_rel), 1.0)
    mean, square = (scipy.integrate.quad(lambda tau, k=k: tau**k * p(tau), 0, 1, epsabs=1e-13)[0] for k in (1, 2))
    assert np.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-6)


def test_overlaps_are_integrals():
    cases = list(itertools.product((0.0, 2.5, 17.0), (3.0, 8.0)))
    for (g, t), (h, s) in itertools.product(cases, cases):
        p, q = profile(g, t), profile(h, s)
        exact = scipy.integrate.quad(lambda tau, p=p, q=q: p(tau) * q(tau), 0, min(t, s), epsabs=1e-13)[0]
        found = posthoc_ema.overlap(*(np.array([v]) for v in (g, t, h, s)))[0]
        assert found == pytest.approx(exact, rel=1e-8)


def test_the_running_average_has_its_profile():
    """The weight of step i at step t is the profile's mass between i-1 and i."""
    gamma, weights = 4.3, np.zeros(30)
    for step in range(1, 31):
        beta = posthoc_ema.decay(gamma, step)
        weights *= beta
        weights[step - 1] = 1 - beta
    mass = [scipy.integrate.quad(profile(gamma, 30), i - 1, i)[0] for i in range(1, 31)]
    assert weights == pytest.approx(mass, rel=1e-9)


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.05, 2000), (0.07, 2000), (0.15, 2000), (0.2, 2000), (0.08, 1200)])
def test_any_width_is_reconstructed_from_two(sigma_rel, step):
    """On a random walk with a drift, against the average taken directly; and far better than the nearer of the two."""
    g = np.random.default_rng(0)
    theta = np.cumsum(g.standard_normal((2000, 50)), axis=0) / 30 + np.log(np.arange(1, 2001))[:, None]
    gammas = [posthoc_ema.exponent(width) for width in (0.05, 0.1)]
    wanted, kept, direct, snapshots = posthoc_ema.exponent(sigma_rel), [0.0, 0.0], 0.0, []
    for k in range(1, step + 1):
        for i, gamma in enumerate(gammas):
            beta = posthoc_ema.decay(gamma, k)
            kept[i] = beta * kept[i] + (1 - beta) * theta[k - 1]
        beta = posthoc_ema.decay(wanted, k)
        direct = beta * direct + (1 - beta) * theta[k - 1]
        if k % 100 == 0:
            snapshots += [(gammas[i], k, kept[i]) for i in (0, 1)]
    x, error = posthoc_ema.combination([s[0] for s in snapshots], [s[1] for s in snapshots], wanted, step)
    found = sum(factor * s[2] for factor, s in zip(x, snapshots, strict=True))
    distance = np.abs(found - direct).max()
    assert error < 0.02
    nearest = min(np.abs(s[2] - direct).max() for s in snapshots)
    assert distance < (1e-9 if sigma_rel == 0.05 else 0.05 * nearest)


def test_a_snapshot_is_reconstructed_as_itself():
    x, error = posthoc_ema.combination([20.0, 8.0, 20.0, 8.0], [50, 50, 100, 100], 8.0, 100)
    assert x == pytest.approx([0, 0, 0, 1], abs=1e-9)
    assert error < 1e-6


@pytest.mark.process
def test_the_command_exports_the_average_of_any_width(tmp_path, capsys):
    """Against a second run of the same seed that kept this width itself; a run that was stopped has the same snapshots."""
    fit(tmp_path / "a", "--trainer.max_steps=60", *AVERAGES, FAST)
    fit(tmp_path / "b", "--trainer.max_steps=60", FAST, "--averages.every_n_steps=60", "--averages.sigma_rel=[0.13]")
    for stop in ("25", "60"):
        fit(tmp_path / "c", f"--trainer.max_steps={stop}", *AVERAGES, FAST)
    direct = checkpoints.read_tensors(tmp_path / "b" / "averages" / "00000060.safetensors")
    main.sample(["average", str(tmp_path / "a"), "0.13", "--out", str(tmp_path / "out")])
    assert "average of width 0.13 at step 60" in capsys.readouterr().out
    flow, raw = pfgm.load(tmp_path / "out"), pfgm.load(tmp_path / "a" / "checkpoints" / "last.ckpt", ema=False)
    assert flow.sample(3).x.shape == (3, 2)
    moved = largest = 0.0
    for name, p in flow.named_parameters():
        exact = direct[f"0.13/{name}"]
        largest = max(largest, float((p - exact).detach().abs().max()))
        moved = max(moved, float((raw.get_parameter(name) - exact).detach().abs().max()))
    assert moved > 0.01
    assert largest < 0.1 * moved
    a, c = (checkpoints.read_tensors(tmp_path / run / "averages" / "00000060.safetensors") for run in ("a", "c"))
    assert all(torch.equal(a[name], c[name]) for name in a)
    assert sorted(p.name for p in (tmp_path / "c" / "averages").iterdir()) == [
        f"{step:08d}.safetensors" for step in (10, 20, 25, 30, 40, 50, 60)
    ]
    early, step, _ = posthoc_ema.reconstruct(tmp_path / "a", 0.1, 30)
    thirty = checkpoints.read_tensors(tmp_path / "a" / "averages" / "00000030.safetensors")
    assert step == 30
    assert all(torch.allclose(early[name].float(), thirty[f"0.1/{name}"], atol=1e-5) for name in early)


@pytest.mark.process
def test_what_cannot_be_averaged_is_named(tmp_path, capsys):
    fit(tmp_path / "a", "--trainer.max_steps=10", *AVERAGES)
    run, out = str(tmp_path / "a"), str(tmp_path / "out")
    for arguments, message in [
        ([run, "0.3", "--out", out], "sigma_rel = 0.3 must lie between"),
        ([run, "0.1", "--out", out, "--step", "7"], "step = 7: there are snapshots of steps 10"),
        ([run, "0.1", "--out", run], "exists; give a new folder"),
        ([run, "0.01", "--out", out], "sigma_rel = 0.01: the 2 snapshots to step 10 miss its profile"),
        ([str(tmp_path), "0.1", "--out", out], "checkpoints"),
    ]:
        with pytest.raises(SystemExit):
            main.sample(["average", *arguments])
        assert message in capsys.readouterr().err
    snapshot = tmp_path / "a" / "averages" / "00000010.safetensors"
    content = bytearray(snapshot.read_bytes())
    content[-3] ^= 64
    snapshot.write_bytes(content)
    with pytest.raises(checkpoints.CheckpointError, match="has been altered"):
        posthoc_ema.reconstruct(run, 0.1)
    snapshot.write_bytes(content[:100])
    with pytest.raises(checkpoints.CheckpointError, match="cannot be read"):
        posthoc_ema.reconstruct(run, 0.1)
    for header in ({}, {"step": "10"}, {"step": 0, "sigma_rel": [0.1]}, {"step": 10, "sigma_rel": [math.nan]}):
        checkpoints.write_tensors(snapshot, {}, header)
        with pytest.raises(checkpoints.CheckpointError, match=r"00000010\.safetensors: step = .* is no step and its widths"):
            posthoc_ema.reconstruct(run, 0.1)
    snapshot.unlink()
    with pytest.raises(FileNotFoundError, match=r"averages\.every_n_steps"):
        posthoc_ema.reconstruct(run, 0.1)
    with pytest.raises(ValueError, match=r"sigma_rel = \[0.2\]: .* has averages of widths \[0.05, 0.1\] up to step 10 of 10"):
        fit(tmp_path / "a", "--trainer.max_steps=12", "--averages.every_n_steps=5", "--averages.sigma_rel=[0.2]")
    fit(tmp_path / "b", "--trainer.max_steps=5")
    with pytest.raises(ValueError, match=r"has averages of widths \[\]"):
        fit(tmp_path / "b", "--trainer.max_steps=12", *AVERAGES)
    for bad in ("--averages.every_n_steps=-1", "--averages.sigma_rel=[0.1,0.1]", "--averages.sigma_rel=[0.5]"):
        with pytest.raises(ValueError, match=r"every_n_steps = -1|sigma_rel = "):
            fit(tmp_path / "d", "--trainer.max_steps=5", bad)


def test_an_average_that_was_interrupted_is_made_again(tmp_path, monkeypatch):
    fit(tmp_path / "a", "--trainer.max_steps=60", *AVERAGES, FAST)
    out, save = tmp_path / "out", checkpoints.save_file
    arguments = ["average", str(tmp_path / "a"), "0.1", "--out", str(out)]

    def die(tensors, path, metadata):
        save(tensors, path, metadata)
        shutil.copy(path, out / ".partial-of-a-killed-process")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", die)
        with pytest.raises(SystemExit, match="130"):
            main.sample(arguments)
    assert [path.name for path in out.iterdir()] == [".partial-of-a-killed-process"]
    main.sample(arguments)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    pfgm.load(out)
    with pytest.raises(SystemExit, match="2"):
        main.sample(arguments)


def test_the_learning_rate_decays_as_an_inverse_root():
    module = PFGM(TimeMLP((2,), width=8), DataSummary.from_data(torch.randn(9, 2)), lr=0.5, warmup_steps=3, decay_steps=100)
    parts, rates = module.configure_optimizers(), []
    for _ in range(901):
        rates.append(parts["optimizer"].param_groups[0]["lr"])
        parts["optimizer"].step()
        parts["lr_scheduler"]["scheduler"].step()
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[100] == pytest.approx(0.5)
    assert rates[400] == pytest.approx(0.25)
    assert rates[900] == pytest.approx(0.5 / 3)
    with pytest.raises(ValueError, match="decay_steps = 0"):
        PFGM(TimeMLP((2,), width=8), DataSummary.from_data(torch.randn(9, 2)), decay_steps=0)


@pytest.mark.process
def test_the_learned_log_variance_is_the_log_of_the_expected_loss():
    """u minimises L e^-u + u at u = log L: with a network of zeros on Gaussian data L(sigma) is known by quadrature."""
    torch.manual_seed(0)
    y = 0.7 * torch.randn(4000, 4)
    data = DataSummary.from_data(y)
    loss = DenoisingLoss(LogUniform(0.05, 20.0), log_variance=True)
    denoiser = PreconditionedDenoiser(TimeMLP((4,), width=8, depth=1), torch.inf, 0.5, 0.1)
    optimizer = torch.optim.Adam(loss.parameters())
    for k in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + k / 10)
        optimizer.zero_grad()
        loss(denoiser, y, {}, summary=data, generator=rng.generator(k)).mean().backward()
        optimizer.step()
    sigma = torch.tensor([0.05, 0.2, 1.0, 3.0], dtype=torch.float64)
    skip = 0.25 / (sigma**2 + 0.25)
    expected = ((1 - skip) ** 2 * 0.49 + skip**2 * sigma**2) / (sigma**2 * 0.25 / (sigma**2 + 0.25))
    assert torch.allclose(loss.log_variance(sigma).double(), expected.log(), atol=0.05)


def test_the_learned_log_variance_weighs_training_only():
    y, net = torch.randn(8, 2), TimeMLP((2,), width=8, depth=1)
    torch.nn.init.normal_(net.last.weight)
    denoiser, plain, learned = PreconditionedDenoiser(net, 8.0, 1.0, 0.1), DenoisingLoss(), DenoisingLoss(log_variance=True)
    torch.nn.init.constant_(learned.log_variance.constant, 2.0)
    data, values = DataSummary.from_data(y), []
    for loss in (plain, learned, copy.deepcopy(learned).eval()):
        values.append(loss(denoiser, y, {}, summary=data, generator=rng.generator(1)).detach())
    assert torch.allclose(values[1], values[0] * np.exp(-2) + 2)
    assert torch.equal(values[2], values[0])
    assert LogVariance()(torch.tensor([0.1, 5.0], dtype=torch.float64)).tolist() == [0, 0]
    waves, sigma = LogVariance(4), torch.tensor([0.3, 2.0])
    torch.nn.init.ones_(waves.weight)
    phases = [k * 0.75 * sigma.log() for k in (1, 2, 3, 4)]
    expected = sum(phase.cos() + phase.sin() for phase in phases)
    assert torch.allclose(waves(sigma).detach(), expected, atol=1e-5)


@pytest.mark.process
def test_a_run_with_learned_weights_of_the_loss_resumes_and_samples(tmp_path):
    base = ["--config", str(ROOT / "configs" / "digits_pfgmpp.yaml"), "--model.net.init_args.width=8"]
    base += ["--data.init_args.batch_size=16", "--model.loss.init_args.log_variance=true", "--trainer.accelerator=cpu"]
    base += ["--grid.n=0", "--trainer.enable_progress_bar=false"]
    fit(tmp_path / "a", "--trainer.max_steps=6", base=base)
    for stop in ("3", "6"):
        fit(tmp_path / "b", f"--trainer.max_steps={stop}", base=base)
    a, b = last(tmp_path / "a")["current_model_state"], last(tmp_path / "b")["current_model_state"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert bool(a["loss.log_variance.weight"].any())
    assert PFGM.load_from_checkpoint(tmp_path / "a" / "checkpoints" / "last.ckpt").loss.log_variance is not None
    assert pfgm.load(tmp_path / "a" / "checkpoints" / "last.ckpt").sample(2).x.shape == (2, 1, 8, 8)
