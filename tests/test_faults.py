"""Hostile files, odd arguments, spoiled command lines. The bench of faults in small."""

import re
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import faults
from benchmarks.faulty import hostile_data, hostile_models, inputs, lines, patience, strangers
from pfgm.cli import arguments, main, options
from pfgm.sampling.likelihood import log_prob
from pfgm.sampling.ode import SolverError
from pfgm.sampling.sampler import Sampler
from pfgm.theory import field
from pfgm.theory.kernel import StudentTKernel

HOSTILE = [*hostile_models.corpus(), *hostile_data.corpus()]


@pytest.mark.process
@pytest.mark.parametrize("file", [f for f in HOSTILE if f.quick][::3], ids=lambda file: file.name)
def test_files_of_strangers_run_no_code_write_nothing_and_take_little_memory(file, tmp_path):
    kind, text, memory = strangers.attempt(file, tmp_path / "a")
    assert kind == "refused" or (kind == "read" and file.harmless), text
    assert memory < 1000


@pytest.mark.parametrize("text", ["0-99999999999", "1,5-1", "5-", "-3", "1,,2", ""])
def test_seeds_that_are_none_are_named(text):
    with pytest.raises(ValueError, match=re.escape(f"seeds = {text!r}: give numbers and rising ranges")):
        options.parse_seeds(text)


def test_denoisers_return_the_shape_that_they_get():
    for denoiser in (lambda x, sigma: x[:1], lambda x, sigma: None):
        with pytest.raises(SolverError, match=r"denoiser returned .* for x of shape \(3, 4\)"):
            Sampler(denoiser, StudentTKernel(8.0), shape=(4,), sigma_min=0.1, sigma_max=1.0).sample(3)
    with pytest.raises(ValueError, match=r"shape = \(-2,\)"):
        Sampler(lambda x, sigma: x, StudentTKernel(8.0), shape=(-2,), sigma_min=0.1, sigma_max=1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: StudentTKernel(4).sample(x, 1.0),
        lambda x: StudentTKernel(4).log_prob(x, x, 1.0),
        lambda x: StudentTKernel(4).renoise(x, x, 1.0, 2.0),
        lambda x: field.posterior_mean(x, 1.0, x, 4.0),
        lambda x: field.poisson_field(x, 1.0, x, 4.0),
        lambda x: field.normalized_field(x, 1.0, x),
        lambda x: field.denoised_from_field(x, 1.0, x, x, 0.1),
        lambda x: log_prob(lambda x, sigma: x, StudentTKernel(4), x, sigma_min=0.1, sigma_max=1.0),
    ],
)
def test_samples_without_a_dimension_of_their_own_are_named(call):
    with pytest.raises(ValueError, match=r"x .*has (the )?shape \(3,\).* samples \[B, \.\.\.\].* single numbers as \[B, 1\]"):
        call(torch.zeros(3))


def test_the_density_of_no_samples_is_named():
    with pytest.raises(ValueError, match=r"x has the shape \(0, 4\): no samples"):
        log_prob(lambda x, sigma: x, StudentTKernel(4), torch.zeros(0, 4), sigma_min=0.1, sigma_max=1.0)


def test_a_field_that_is_not_like_its_points_is_named():
    with pytest.raises(ValueError, match=r"v_x has shape \(3, 5\)"):
        field.denoised_from_field(torch.zeros(3, 4), 1.0, torch.zeros(3, 5), torch.ones(3), 0.1)


@pytest.mark.process
def test_odd_arguments_are_named():
    told = []
    counts = inputs.functions(150, 3, told.append)
    assert counts["tried"] == 150
    assert not told, told
    assert counts["named"] > 75


@pytest.mark.parametrize(
    ("call", "accident"),
    [
        (lambda: options.parse_seeds("a"), False),
        (lambda: arguments.read_config("nowhere"), False),
        (lambda: arguments.prepare_words(3), True),
        (lambda: np.zeros(-1), True),
    ],
)
def test_errors_that_nobody_raised_for_a_user_are_told_from_others(call, accident):
    with pytest.raises((ValueError, TypeError, OSError)) as error:
        call()
    assert lines.accidental(error.value) == accident


def test_the_bench_calls_other_what_has_no_name():
    counts = Counter({"tried": 10, "done": 1, "named": 2, "at work": 1, "of memory": 2})
    said = "1 worked, 1 at work after 20 s, 2 out of memory, 2 errors that name the argument, 4 others"
    assert faults._ends(counts, "done") == said


def test_calls_that_want_too_much_memory_are_counted_apart(monkeypatch):
    monkeypatch.setattr(main, "_sampling_command", lambda name, words, program: torch.empty(int(words[0])))
    assert lines.attempt(("sample", [str(2**60)])) == ("of memory", "")
    assert lines.attempt(("sample", ["1"])) == ("done", "")
    assert inputs.outcome(lambda size: torch.empty(size), {"size": 2**60}, []) == ("of memory", "")


@pytest.mark.process
def test_calls_without_end_are_counted_apart(monkeypatch):
    monkeypatch.setattr(patience, "SECONDS", 1)
    before = signal.getsignal(signal.SIGALRM)
    assert inputs.outcome(lambda seconds: time.sleep(seconds), {"seconds": 30}, []) == ("at work", "")
    assert signal.getsignal(signal.SIGALRM) == before
    assert inputs.outcome(lambda seconds: None, {"seconds": 30}, []) == ("result", "")
    assert signal.alarm(0) == 0, "no alarm is left"


@pytest.mark.process
def test_spoiled_command_lines_end_in_one_line(tmp_path):
    told = []
    counts = lines.command_lines(12, 7, tmp_path, told.append)
    assert counts["tried"] == 12
    assert not told, told
    assert counts["named"] > 6
    assert not counts["executed"]
