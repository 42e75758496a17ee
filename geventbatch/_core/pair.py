"""The load and save pair as a resource scope, so that every batch runs over a scope."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

from geventbatch._check_callables import LAZY, PairFacts, refuse_lazy
from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

IMMUTABLE: Final = frozenset({int, str, tuple, float, bytes, bool, frozenset, complex})

_ODD: Final = IMMUTABLE | LAZY


class PairScope:
    """Entering loads, leaving saves, leaving with an exception does nothing."""

    __slots__ = ("_key", "_pair", "_resource")

    def __init__(self, pair: Pair, key: Hashable) -> None:
        """Belong to *pair*; load nothing yet."""
        self._pair = pair
        self._key = key

    def __enter__(self) -> Any:
        """Load."""
        self._resource = self._pair.load_resource(self._key)
        if type(self._resource) in _ODD:
            refuse_lazy("load_resource", self._resource)
            self._pair.warning.warn("load_resource", self._resource)
        return self._resource

    def replace(self, resource: Any) -> None:
        """Save *resource* in place of the loaded object."""
        self._resource = resource

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Save."""
        if kind is None:
            given = self._pair.save_resource(self._key, self._resource)
            if given is not None:
                refuse_lazy("save_resource", given)


class Pair:
    """``load_resource`` and ``save_resource``, as an ``open_resource``."""

    def __init__(self, load_resource: Any, save_resource: Any, facts: PairFacts) -> None:
        """Keep both functions; None stands for one that does nothing."""
        self.load_resource: Callable[[Any], Any] = load_nothing if load_resource is None else load_resource
        self.save_resource: Callable[[Any, Any], object] = save_nothing if save_resource is None else save_resource
        self.pair_facts = facts
        self.warning = ImmutableWarning()

    def __call__(self, key: Hashable) -> PairScope:
        """Return the scope of *key*. No function of the user's is called yet."""
        return PairScope(self, key)


class ImmutableWarning:
    """Warns once that operations cannot change the loaded object."""

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self._given = False

    def warn(self, name: str, resource: object) -> None:
        """Warn that the function *name* returned *resource*, which no operation can change."""
        if not self._given:
            self._given = True
            warnings.warn(
                f"{name} returned {shown(resource)}, a {type(resource).__name__}, which no operation can change, so "
                "nothing can be saved in it: let it return an object, a dict or a list that operations change in place",
                RuntimeWarning,
                stacklevel=2,
            )


def load_nothing(key: Any) -> None:
    """Do nothing: the default ``load_resource``, for which the resource is None."""


def save_nothing(key: Any, resource: Any) -> None:
    """Do nothing: the default ``save_resource``."""
