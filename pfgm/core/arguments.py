"""Arguments of the wrong type are refused by name, before they fail somewhere inside.

Annotations say what is meant. Those that are plain are checked: numbers, words, tensors, sequences of them, classes, unions.
"""

import collections.abc
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
Test = Callable[[Any], bool]
Array = Tensor | np.ndarray


class ArgumentTypeError(TypeError, ValueError):
    """An argument has a type with which nothing can be done."""


def checked(function: F) -> F:
    """`function`, which raises ArgumentTypeError for arguments that are not as annotated."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # whose own message it is
        check_types(function, bound.arguments)
        return function(*args, **kwargs)

    return typing.cast(F, wrapper)


def check_types(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """ArgumentTypeError that names the first of `arguments` that is not as `function` has it annotated."""
    for name, (test, words) in _tests(function).items():
        if name in arguments and not test(arguments[name]):
            raise ArgumentTypeError(f"{name} = {_short(arguments[name])}: give {words}")


@functools.cache
def _tests(function: Callable[..., Any]) -> dict[str, tuple[Test, str]]:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # names that only a type checker imports
        return {}
    found = {name: _test(hint) for name, hint in hints.items() if name in named}
    return {name: test for name, test in found.items() if test is not None}


def _test(hint: Any) -> tuple[Test, str] | None:
    """What a value of an annotated type passes, and its name in words; None for annotations that are not checked."""
    if hint is Any:
        return None
    if hint in PLAIN:
        return PLAIN[hint]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        tests = [_test(part) for part in parts]
        known = [test for test in tests if test is not None]
        if len(known) < len(tests):
            return None
        return lambda value: any(test(value) for test, _ in known), " or ".join(dict.fromkeys(words for _, words in known))
    if origin is typing.Literal:
        return lambda value: any(
            type(value) is type(part) and value == part for part in parts
        ), f"one of {', '.join(map(str, parts))}"
    if origin in (collections.abc.Sequence, list, tuple):
        return _sequence(parts[0] if parts else Any, len(parts) if origin is tuple and parts[-1] is not ... else None)
    if origin is collections.abc.Callable or hint is Callable:
        return callable, "a function"
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False) and not typing.is_typeddict(hint):
        return lambda value: isinstance(value, hint) or _is_spec(value), f"a {hint.__name__}"
    return None


def _sequence(of: Any, length: int | None) -> tuple[Test, str]:
    one = _test(of)

    def test(value: Any) -> bool:
        if isinstance(value, (Tensor, np.ndarray)):
            return value.ndim == 1 and length in (None, len(value)) and (one is None or all(map(one[0], value.tolist())))
        if not isinstance(value, collections.abc.Sequence) or isinstance(value, (str, bytes)):
            return False
        return (length is None or len(value) == length) and (one is None or all(one[0](item) for item in value))

    item = one[1] if one else "anything"
    return test, f"[{item}, ...]" if length is None else f"[{', '.join([item] * length)}]"


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0 and _is_number(value.item(), kind)
    return isinstance(value, kind) and not isinstance(value, (bool, np.bool_))


def _is_whole(value: Any) -> bool:
    return _is_number(value, numbers.Integral) and -(2**63) <= int(value) < 2**63


def is_real(value: Any) -> bool:
    """Whether it is a number, of 64 bits if it is a whole one, perhaps inf or nan."""
    return _is_number(value, numbers.Real) and (_is_whole(value) or not _is_number(value, numbers.Integral))


PLAIN: dict[Any, tuple[Test, str]] = {
    type(None): (lambda value: value is None, "nothing (None)"),
    bool: (lambda value: isinstance(value, (bool, np.bool_)), "True or False"),
    int: (_is_whole, "a whole number of 64 bits"),
    float: (is_real, "a number"),
    str: (lambda value: isinstance(value, str), "a word"),
    Path: (lambda value: isinstance(value, (str, os.PathLike)), "a path"),
    Tensor: (lambda value: isinstance(value, Tensor) and value.ndim > 0 and not value.is_complex(), "a tensor of real numbers"),
    np.ndarray: (lambda value: isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "biuf", "an array"),
}


def _is_spec(value: Any) -> bool:
    """Whether it describes an object, see `pfgm.core.configurable`."""
    return isinstance(value, Mapping) and "class_path" in value


def _short(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
