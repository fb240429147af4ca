"""Objects that remember how they were made.

A checkpoint stores of every network, loss and noise law its `spec`, {"class_path": ..., "init_args": {...}}, which is plain
JSON. Loading makes the object again from it and needs neither arguments nor pickle. Class paths are followed only into this
package and into modules that the caller names in `trust`.
"""

import importlib
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pfgm.core.arguments import ArgumentTypeError, check_types

PACKAGE = __name__.partition(".")[0]

# Class paths of version 0.1, and what the classes are called now: checkpoints, exports and configurations keep loading.
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
    """Mixin: instances know their `spec`, the class path and the arguments they were made with."""

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Configurable":
        self = super().__new__(cls)
        # bind_partial: copying calls __new__ without arguments and restores `_arguments` with the other attributes.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        check_types(cls.__init__, bound.arguments)
        bound.apply_defaults()
        object.__setattr__(self, "_arguments", dict(list(bound.arguments.items())[1:]))
        return self

    @property
    def spec(self) -> dict[str, Any]:
        """{"class_path": ..., "init_args": ...} as strict JSON data; TypeError for an argument that has no such form."""
        return {"class_path": public_path(type(self)), "init_args": to_json(self._arguments)}


def public_path(class_: type) -> str:
    """Return the path by which `class_` is imported: that of the room which exports it, or of its own module."""
    package, _, inside = class_.__module__.partition(".")
    if package == PACKAGE and inside:
        room = f"{PACKAGE}.{inside.partition('.')[0]}"
        if getattr(importlib.import_module(room), class_.__name__, None) is class_:
            return f"{room}.{class_.__qualname__}"
    return f"{class_.__module__}.{class_.__qualname__}"


def to_json(value: Any) -> Any:
    """`value` as strict JSON data: inf becomes "inf", a Recorded its spec. ArgumentTypeError for what has no such form."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # of numpy or torch
        return to_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [to_json(item) for item in value]
    if hasattr(value, "spec"):
        return value.spec
    raise ArgumentTypeError(
        f"cannot store {type(value).__name__} in a checkpoint: a network from elsewhere should inherit from pfgm.nn.Network"
    )


def renamed(value: Any) -> Any:
    """Return nested plain data with every class path of version 0.1 replaced by today's."""
    if isinstance(value, Mapping):
        return {key: ALIASES.get(item, item) if _is_path(key, item) else renamed(item) for key, item in value.items()}
    return [renamed(item) for item in value] if isinstance(value, list) else value


def _is_path(key: Any, value: Any) -> bool:
    return key == "class_path" and isinstance(value, str)


def with_defaults(old: Any, now: Any) -> Any:
    """The spec `old` with the arguments that `now` has and it does not know at their defaults, in nested specs too.

    What an earlier version did is what its missing arguments do by default.
    """
    if not (_is_spec(old) and _is_spec(now) and old["class_path"] == now["class_path"]):
        return old
    module, _, name = now["class_path"].rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name).__init__).parameters
    arguments = {key: with_defaults(value, now["init_args"].get(key)) for key, value in old["init_args"].items()}
    missing = [parameters[key] for key in now["init_args"] if key in parameters and key not in arguments]
    known = {parameter.name: to_json(parameter.default) for parameter in missing if parameter.default is not parameter.empty}
    return {**old, "init_args": arguments | known}


def _is_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}


Kind = type | tuple[type, ...]


def build(spec: Mapping[str, Any], trust: Sequence[str] = (), kind: Kind = object) -> Any:
    """The object of a subclass of `kind` that `spec` describes; nested specs, of that kind as well, are built first.

    ValueError if the class is neither in this package nor in one of the modules `trust`, or cannot be made from its arguments;
    TypeError if `spec` is none.
    """
    if not _is_spec(spec) or not isinstance(spec["class_path"], str) or not isinstance(spec["init_args"], Mapping):
        raise TypeError(f"{str(spec)[:100]} is no description of an object; it needs a class_path and init_args")
    class_ = _find_class(ALIASES.get(spec["class_path"], spec["class_path"]), trust, kind)
    arguments = {name: _build_nested(value, trust, kind) for name, value in spec["init_args"].items()}
    try:
        return class_(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{spec['class_path']} cannot be made from the stored arguments {sorted(arguments)}: {error}"
        ) from error


def _build_nested(value: Any, trust: Sequence[str], kind: Kind) -> Any:
    return build(value, trust, kind) if _is_spec(value) else value


def _find_class(class_path: str, trust: Sequence[str], kind: Kind) -> type:
    module_name, _, name = class_path.rpartition(".")
    own = module_name.partition(".")[0] == PACKAGE
    if not own and not any(module_name == t or module_name.startswith(t + ".") for t in trust):
        raise ValueError(
            f"class_path {class_path!r} is outside {PACKAGE}; "
            f"if you trust the file's author and that code, pass trust=[{module_name!r}]"
        )
    try:
        class_ = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path {class_path!r} does not exist here: {error}") from error
    if not (
        isinstance(class_, type)
        and issubclass(class_, Configurable if own else (Configurable, nn.Module))
        and issubclass(class_, kind)
    ):
        raise ValueError(f"class_path {class_path!r} is not a class that a checkpoint may name")
    return class_
