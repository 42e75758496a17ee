"""Names that were renamed: each old one is there for one release more, and warns of the new one."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def renamed(module: str, name: str, names: Mapping[str, str]) -> Any:
    """Return the object of the old *name*, for the ``__getattr__`` of *module*; *names* maps old names to new ones.

    Raises:
        AttributeError: It has never been a name of *module*.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(
        f"{module}.{name} is now {module}.{names[name]}, and the old name ends with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(sys.modules[module], names[name])
