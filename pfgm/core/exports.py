"""Names of a package that load on first use."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any


def lazy_names(package: str, homes: Mapping[str, Sequence[str]], name: str) -> Any:
    """Import `name` from the submodule of `package` that holds it, for the `__getattr__` of the package.

    Args:
        package: The importable name of the package.
        homes: The public names of each submodule.
        name: The attribute that was asked for.

    Returns:
        The object of that name, or the submodule of that name.

    Raises:
        AttributeError: If the package has neither; the message lists the names that exist.
    """
    for submodule, names in homes.items():
        if name in names:
            return getattr(importlib.import_module(f"{package}.{submodule}"), name)
        if name == submodule:
            return importlib.import_module(f"{package}.{submodule}")
    public = sorted(public for names in homes.values() for public in names)
    raise AttributeError(f"module {package!r} has no attribute {name!r}; public names are {', '.join(public)}")
