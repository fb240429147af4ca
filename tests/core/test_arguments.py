"""Run-time checks of argument types."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytest
import torch

from pfgm.core.arguments import ArgumentTypeError, check_types, checked, is_real


class Drawable(Protocol):
    def draw(self) -> None: ...


class Thing:
    pass


@checked
def function(
    n: int = 0,
    name: Literal["a", 1] = "a",
    pair: tuple[float, float] = (0.0, 1.0),
    x: torch.Tensor | None = None,
    restart: Sequence[tuple[float, int]] = (),
    y: np.ndarray = np.zeros(1),  # noqa: B008
    path: Path = Path(),
    rule: Callable[[int], int] = abs,
    thing: Thing | None = None,
    drawable: Drawable | None = None,
    anything: Any = None,
    table: Mapping[str, int] = {},
    flag: bool = False,
    words: list[str] | str = "",
    *rest: int,
    **others: int,
):
    return True


@pytest.mark.parametrize(
    "good",
    [
        {"n": 2**63 - 1, "name": 1, "pair": np.array([1.0, 2.0]), "x": torch.ones(1)},
        {"n": np.int32(3), "pair": [torch.tensor(1.0), np.float32(2)], "x": None},
        {"n": torch.tensor(3), "pair": torch.ones(2), "flag": np.bool_(True)},
        {"restart": [(0.1, 2), [3, 4]], "path": "a", "rule": lambda n: n, "words": ["a", "b"]},
        {"y": np.ones(3, np.uint8), "path": Path("a"), "thing": Thing(), "words": ("a",)},
        {"thing": {"class_path": "pfgm.nn.UNet"}, "drawable": 3, "anything": object(), "table": 5},
    ],
)
def test_values_that_fit_their_annotations_pass(good):
    assert function(**good)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"n": True}, "a 64-bit integer"),
        ({"n": 2**63}, "a 64-bit integer"),
        ({"n": -(2**63) - 1}, "a 64-bit integer"),
        ({"n": 1.0}, "a 64-bit integer"),
        ({"n": np.array(True)}, "a 64-bit integer"),
        ({"n": torch.ones(1, dtype=torch.int64)}, "a 64-bit integer"),
        ({"name": True}, "one of a, 1"),
        ({"pair": [10**400, 1.0]}, "[a number, a number]"),
        ({"pair": np.ones(3)}, "[a number, a number]"),
        ({"pair": np.ones((2, 2))}, "[a number, a number]"),
        ({"pair": [1.0]}, "[a number, a number]"),
        ({"x": torch.ones(1, dtype=torch.cfloat)}, "a tensor of real numbers or None"),
        ({"x": torch.tensor(1.0)}, "a tensor of real numbers or None"),
        ({"restart": [(0.1, 0.5)]}, "[[a number, a 64-bit integer], ...]"),
        ({"y": np.array(["a"])}, "an array of real numbers"),
        ({"path": 3}, "a path"),
        ({"rule": 3}, "a function"),
        ({"thing": 3}, "a Thing or None"),
        ({"flag": 1}, "True or False"),
        ({"words": b"a"}, "[a string, ...] or a string"),
    ],
)
def test_values_of_other_types_are_named_with_what_is_expected(bad, expected):
    with pytest.raises(ArgumentTypeError) as error:
        function(**bad)
    name = next(iter(bad))
    assert str(error.value).startswith(f"{name} = ")
    assert str(error.value).endswith(f": expected {expected}")


def test_an_argument_of_the_wrong_type_is_a_type_error_and_a_value_error():
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(ArgumentTypeError, ValueError)


def test_wrong_names_keep_pythons_own_message():
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'm'"):
        checked(lambda n: n)(m=1)


def test_long_values_are_cut_and_tensors_described():
    with pytest.raises(ArgumentTypeError, match=r"n = \[0, 0, .*\.\.\.: expected"):
        function(n=[0] * 1000)
    with pytest.raises(ArgumentTypeError, match=r"n = Tensor \(2, 3\) torch\.float32: expected"):
        function(n=torch.zeros(2, 3))


def test_annotations_that_cannot_be_resolved_are_not_checked():
    def later(x: "Nowhere") -> None:  # noqa: F821
        pass

    check_types(later, {"x": 3})


@pytest.mark.parametrize(
    ("value", "real"),
    [
        *((value, True) for value in (1, 1.5, float("nan"), np.float32(1), torch.tensor(2), np.array(2.0))),
        *((value, False) for value in (True, "1", 1j, None, 2**63, torch.ones(1), torch.tensor(True))),
    ],
)
def test_real_numbers_are_told_from_other_values(value, real):
    assert is_real(value) == real
