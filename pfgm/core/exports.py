"""Names of a package that load on first use."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any


def lazy_names(package: str, homes: Mapping[str, Sequence[str]], name: str) -> Any:
    """Import the object or submodule `name` of `package`, for its `__getattr__`. `homes` has the names of each submodule.

    Raises:
        AttributeError: If there is neither; the message lists the public names.
    """
    for submodule, names in homes.items():
        if name in (submodule, *names):
            module = importlib.import_module(f"{package}.{submodule}")
            return getattr(module, name) if name in names else module
    public = sorted(public for names in homes.values() for public in names)
    raise AttributeError(f"module {package!r} has no attribute {name!r}; public names are {', '.join(public)}")
