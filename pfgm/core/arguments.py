"""Checks of argument types at run time, by the annotations of a function.

A wrong type fails at the call that passed it, with the argument's name. Plain annotations are checked: numbers, strings, paths,
tensors, arrays, sequences of these, literals, classes and unions. All others fit every value.
"""

import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
Array = Tensor | np.ndarray


class ArgumentTypeError(TypeError, ValueError):
    """An argument has a type that the function cannot use."""


def checked(function: F) -> F:
    """Decorate `function` so that each call first checks its arguments, see `check_types`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises Python's own message
        check_types(function, bound.arguments)
        return function(*args, **kwargs)

    return typing.cast(F, wrapper)


def check_types(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raise ArgumentTypeError naming the first of `arguments`, by parameter, that does not fit its annotation in `function`."""
    for name, (fits, text) in _annotations(function).items():
        if name in arguments and not fits(arguments[name]):
            raise ArgumentTypeError(f"{name} = {_short(arguments[name])}: expected {text}")


def is_real(value: Any, kind: type = numbers.Real) -> bool:
    """Return whether `value` is a number of `kind`, infinity and NaN included. Integers must fit into 64 bits."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind):
        return False
    return not isinstance(value, numbers.Integral) or -(2**63) <= int(value) < 2**63


class Expected(NamedTuple):
    """Test whether a value fits an annotation, and describe the values that do."""

    fits: Callable[[Any], bool]
    text: str


# Types that isinstance alone does not settle.
PLAIN: dict[Any, Expected] = {
    Any: Expected(lambda value: True, "anything"),
    type(None): Expected(lambda value: value is None, "None"),
    bool: Expected(lambda value: isinstance(value, (bool, np.bool_)), "True or False"),
    int: Expected(lambda value: is_real(value, numbers.Integral), "a 64-bit integer"),
    float: Expected(is_real, "a number"),
    str: Expected(lambda value: isinstance(value, str), "a string"),
    Path: Expected(lambda value: isinstance(value, (str, os.PathLike)), "a path"),
    Callable: Expected(callable, "a function"),
    Tensor: Expected(
        lambda value: isinstance(value, Tensor) and value.ndim > 0 and not value.is_complex(), "a tensor of real numbers"
    ),
    np.ndarray: Expected(
        lambda value: isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "biuf",
        "an array of real numbers",
    ),
}


@functools.cache
def _annotations(function: Callable[..., Any]) -> dict[str, Expected]:
    """Return what each parameter of `function` expects, except *args and **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    single = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    try:
        return {name: _expected(hint) for name, hint in typing.get_type_hints(function).items() if name in single}
    except NameError:  # annotations that only a type checker can resolve
        return {}


def _expected(hint: Any) -> Expected:
    """Return what the annotation `hint` expects; annotations of unknown kinds fit everything."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in PLAIN or origin is Callable:
        return PLAIN[origin or hint]
    if origin in (typing.Union, types.UnionType):
        options = [_expected(part) for part in parts]
        text = " or ".join(dict.fromkeys(option.text for option in options))
        return Expected(lambda value: any(option.fits(value) for option in options), text)
    if origin is typing.Literal:
        text = f"one of {', '.join(map(str, parts))}"
        return Expected(lambda value: any(type(value) is type(part) and value == part for part in parts), text)
    if origin in (Sequence, list, tuple):
        return _expected_items(parts, fixed=origin is tuple and parts[-1] is not ...)
    text = f"a {getattr(hint, '__name__', hint)}"
    if not isinstance(hint, type) or getattr(hint, "_is_protocol", False) or typing.is_typeddict(hint):
        return Expected(lambda value: True, text)
    # The spec of an object that is built later fits as well, see `pfgm.core.configurable`.
    return Expected(lambda value: isinstance(value, hint) or (isinstance(value, Mapping) and "class_path" in value), text)


def _expected_items(parts: Sequence[Any], fixed: bool) -> Expected:
    """Return what a sequence expects, with one item for each of `parts` if `fixed`, else with any number like the first."""
    items = [_expected(part) for part in (parts if fixed else parts[:1])]

    def fits(value: Any) -> bool:
        if isinstance(value, (Tensor, np.ndarray)):
            value = value.tolist() if value.ndim == 1 else None
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            return False
        expected = items if fixed else items * len(value)
        return len(value) == len(expected) and all(item.fits(v) for item, v in zip(expected, value, strict=True))

    text = ", ".join(item.text for item in items)
    return Expected(fits, f"[{text}]" if fixed else f"[{text}, ...]")


def _short(value: Any) -> str:
    """Describe `value` in less than 80 characters."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
