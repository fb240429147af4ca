"""Objects that record their constructor arguments.

A checkpoint stores the `spec` of every network, loss and noise law: {"class_path": ..., "init_args": {...}} in plain JSON.
Loading builds the object from its spec, without pickle, and imports only from this package and from modules in `trust`.
"""

import importlib
import inspect
import math
import os
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pfgm.core.arguments import ArgumentTypeError, check_types

PACKAGE = __name__.partition(".")[0]

# Class paths of version 0.1 and their present names, so that its checkpoints, exports and configurations keep loading.
ALIASES = {
    "pfgm.augment.Augment": "pfgm.data.Augment",
    "pfgm.degrade.AddNoise": "pfgm.data.AddNoise",
    "pfgm.degrade.Downsample": "pfgm.data.Downsample",
    "pfgm.degrade.Grey": "pfgm.data.Grey",
    "pfgm.denoiser.FieldDenoiser": "pfgm.nn.FieldDenoiser",
    "pfgm.denoiser.PreconditionedDenoiser": "pfgm.nn.PreconditionedDenoiser",
    "pfgm.features.Classifier": "pfgm.evaluation.Classifier",
    "pfgm.loss.DenoisingLoss": "pfgm.training.DenoisingLoss",
    "pfgm.loss.PoissonFieldLoss": "pfgm.training.PoissonFieldLoss",
    "pfgm.nn.adapter.DiffusersUNet": "pfgm.nn.DiffusersUNet",
    "pfgm.nn.mlp.TimeMLP": "pfgm.nn.TimeMLP",
    "pfgm.nn.unet.UNet": "pfgm.nn.UNet",
    "pfgm.noise.DataSummary": "pfgm.theory.DataSummary",
    "pfgm.noise.LogNormal": "pfgm.training.ScaledLogNormal",
    "pfgm.noise.LogUniform": "pfgm.training.LogUniform",
    "pfgm.noise.PoissonFlowNoise": "pfgm.training.PoissonFlowNoise",
}


class Configurable:
    """Record the constructor arguments of instances: plain data, paths, arrays or other `Configurable`s.

    Raises:
        ArgumentTypeError: On construction, if an argument does not fit its annotation.
    """

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Configurable":
        self = super().__new__(cls)
        # bind_partial, since copy() calls __new__ without arguments and restores `_arguments` with the other attributes.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        check_types(cls.__init__, bound.arguments)
        bound.apply_defaults()
        object.__setattr__(self, "_arguments", dict(list(bound.arguments.items())[1:]))
        return self

    @property
    def spec(self) -> dict[str, Any]:
        """Return class path and constructor arguments as strict JSON data, {"class_path": ..., "init_args": {...}}."""
        return {"class_path": public_path(type(self)), "init_args": to_json(self._arguments)}


def public_path(class_: type) -> str:
    """Return the path to import `class_` from: the sub-package that exports it if there is one, else its module."""
    package, _, inside = class_.__module__.partition(".")
    if package == PACKAGE and inside:
        room = f"{PACKAGE}.{inside.partition('.')[0]}"
        if getattr(importlib.import_module(room), class_.__name__, None) is class_:
            return f"{room}.{class_.__qualname__}"
    return f"{class_.__module__}.{class_.__qualname__}"


def to_json(value: Any) -> Any:
    """Convert `value` to strict JSON data: infinity to the string "inf", a `Configurable` to its spec.

    Raises:
        ArgumentTypeError: If a part of `value` has no JSON form.
    """
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy or torch
        return to_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [to_json(item) for item in value]
    if hasattr(value, "spec"):
        return value.spec
    raise ArgumentTypeError(
        f"cannot store {type(value).__name__} in a checkpoint. Networks of other packages should inherit from pfgm.nn.Network."
    )


def renamed(value: Any) -> Any:
    """Return nested plain data with the class paths of version 0.1 replaced by the present ones."""
    if isinstance(value, Mapping):
        return {
            key: ALIASES.get(item, item) if key == "class_path" and isinstance(item, str) else renamed(item)
            for key, item in value.items()
        }
    return [renamed(item) for item in value] if isinstance(value, list) else value


def with_defaults(old: Any, now: Any) -> Any:
    """Complete `old`, if it is a spec of the class of `now`, with the arguments that only `now` has, and nested specs too.

    Their defaults keep the behaviour of the earlier versions, which did not have the arguments.
    """
    if not (_is_spec(old) and _is_spec(now) and old["class_path"] == now["class_path"]):
        return old
    arguments = {key: with_defaults(value, now["init_args"].get(key)) for key, value in old["init_args"].items()}
    for name, parameter in inspect.signature(pkgutil.resolve_name(now["class_path"]).__init__).parameters.items():
        if name in now["init_args"] and name not in arguments and parameter.default is not parameter.empty:
            arguments[name] = to_json(parameter.default)
    return {**old, "init_args": arguments}


def _is_spec(value: Any) -> bool:
    """Return whether `value` has the keys of a spec, and no others."""
    return isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}


Kind = type | tuple[type, ...]


def build(spec: Mapping[str, Any], trust: Sequence[str] = (), kind: Kind = object) -> Any:
    """Build the object that `spec` describes, after those of its nested specs.

    Args:
        spec: {"class_path": ..., "init_args": {...}}, of version 0.1 too.
        trust: Modules outside this package whose classes may be imported. Their code runs.
        kind: Base class, or several, of the object and of those of nested specs.

    Raises:
        TypeError: If `spec` is not a spec.
        ValueError: If a class is not trusted, missing, of another kind, or refuses its arguments.
    """
    if not _is_spec(spec) or not isinstance(spec["class_path"], str) or not isinstance(spec["init_args"], Mapping):
        raise TypeError(f"spec = {str(spec)[:100]}: expected a mapping with class_path and init_args")
    class_ = _find_class(ALIASES.get(spec["class_path"], spec["class_path"]), trust, kind)
    arguments = {name: build(value, trust, kind) if _is_spec(value) else value for name, value in spec["init_args"].items()}
    try:
        return class_(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{spec['class_path']} cannot be made from the stored arguments {sorted(arguments)}: {error}"
        ) from error


def _find_class(class_path: str, trust: Sequence[str], kind: Kind) -> type:
    """Import the class at `class_path`: a `Configurable` of this package, or also a module of torch of a trusted one."""
    module_name, _, name = class_path.rpartition(".")
    own = module_name.partition(".")[0] == PACKAGE
    if not own and not any(module_name == t or module_name.startswith(t + ".") for t in trust):
        raise ValueError(
            f"class_path = {class_path!r} is outside {PACKAGE}. "
            f"If you trust the file's author and that code, pass trust=[{module_name!r}]."
        )
    try:
        class_ = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path = {class_path!r} cannot be imported: {error}") from error
    storable = Configurable if own else (Configurable, nn.Module)
    if not (isinstance(class_, type) and issubclass(class_, storable) and issubclass(class_, kind)):
        raise ValueError(f"class_path = {class_path!r} is not a class that a checkpoint may name")
    return class_
