"""Checks of argument types at run time, by the annotations of a function.

A wrong type then fails at the call that passed it, with the argument's name, and not somewhere inside. Only plain annotations
are checked: numbers, strings, paths, tensors, arrays, sequences of these, literals, classes and unions.
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
    """Check arguments of `function` against its annotations.

    Args:
        function: A function whose annotations are types or strings of them.
        arguments: Values by parameter name; parameters without a value are skipped.

    Raises:
        ArgumentTypeError: If a value does not fit its annotation; the message names the first such argument.
    """
    for name, hint in _annotations(function).items():
        if name in arguments and not _fits(arguments[name], hint):
            raise ArgumentTypeError(f"{name} = {_short(arguments[name])}: expected {_describe(hint)}")


def is_real(value: Any, kind: type = numbers.Real) -> bool:
    """Return whether `value` is a number of `kind`, infinity and NaN included. Integers must fit into 64 bits."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind):
        return False
    return not isinstance(value, numbers.Integral) or -(2**63) <= int(value) < 2**63


# Test and description of the types that isinstance alone does not settle.
PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    type(None): (lambda value: value is None, "None"),
    bool: (lambda value: isinstance(value, (bool, np.bool_)), "True or False"),
    int: (lambda value: is_real(value, numbers.Integral), "a 64-bit integer"),
    float: (is_real, "a number"),
    str: (lambda value: isinstance(value, str), "a string"),
    Path: (lambda value: isinstance(value, (str, os.PathLike)), "a path"),
    Tensor: (lambda value: isinstance(value, Tensor) and value.ndim > 0 and not value.is_complex(), "a tensor of real numbers"),
    np.ndarray: (
        lambda value: isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "biuf",
        "an array of real numbers",
    ),
}


@functools.cache
def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    single = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    try:
        return {name: hint for name, hint in typing.get_type_hints(function).items() if name in single}
    except NameError:  # annotations that only a type checker can resolve
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether `value` fits the annotation `hint`; annotations of unknown kinds fit everything."""
    if hint is Any:
        return True
    if hint in PLAIN:
        return PLAIN[hint][0](value)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (collections.abc.Sequence, list, tuple):
        return _items_fit(value, parts, fixed=origin is tuple and parts[-1] is not ...)
    if origin is collections.abc.Callable or hint is Callable:
        return callable(value)
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False) and not typing.is_typeddict(hint):
        spec = isinstance(value, Mapping) and "class_path" in value  # an object that is built later, see core.configurable
        return spec or isinstance(value, hint)
    return True


def _items_fit(value: Any, hints: tuple[Any, ...], fixed: bool) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist() if value.ndim == 1 else None
    if not isinstance(value, collections.abc.Sequence) or isinstance(value, (str, bytes)):
        return False
    hints = hints if fixed else hints[:1] * len(value)
    return len(value) == len(hints) and all(map(_fits, value, hints))


def _describe(hint: Any) -> str:
    if hint in PLAIN:
        return PLAIN[hint][1]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe, parts)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (collections.abc.Sequence, list, tuple):
        fixed = origin is tuple and parts[-1] is not ...
        return f"[{', '.join(map(_describe, parts)) if fixed else f'{_describe(parts[0])}, ...'}]"
    if origin is collections.abc.Callable or hint is Callable:
        return "a function"
    return f"a {getattr(hint, '__name__', hint)}"


def _short(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
