"""What a given store can do beyond being called: looked up once, when the processor is made (see `scopes`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch._check_callables import Told
    from geventbatch._core.operation import Operation


class Store(NamedTuple):
    """What an ``open_resource``, or an ``open_resources``, has of the protocols in `scopes.OF_A_STORE`; else None."""

    normalize_key: Callable[[Any], Any] | None
    admit: Callable[[Any], bool] | None
    stopped: Callable[[], object] | None
    check_outcomes: Callable[[Any], object] | None
    keeps_outcomes: bool | None
    on_server: bool | None
    told_of_pair: Told | None
    """Of a load and a save in place of a store; ours alone have it."""


def look_at(open_resource: object) -> Store:
    """Look up what *open_resource* has, through whatever an integration has put around it."""
    return Store(*(getattr(open_resource, name, None) for name in Store._fields))


class Door(NamedTuple):
    """What each `run` asks before its operation is admitted."""

    observers: tuple[Callable[[Operation[Any]], object], ...]
    """Called with each operation; one may put something else in the place of its callable. For `_seam`."""
    normalize_key: Callable[[Any], Any] | None
    admit: Callable[[Any], bool] | None

    def enter(self, key: Any, operation: Operation[Any], *, batching: bool) -> tuple[Any, bool]:
        """Give the key in its one form, and whether *operation* is to be batched."""
        for see in self.observers:
            see(operation)
        if self.normalize_key is not None:
            key = self.normalize_key(key)
        return key, batching and not (self.admit is not None and self.admit(key))


def door_of(store: Store, observers: tuple[Callable[[Operation[Any]], object], ...]) -> Door | None:
    """Give what `run` asks; None where there is nothing to ask."""
    if store.normalize_key is store.admit is None and not observers:
        return None
    return Door(observers, store.normalize_key, store.admit)
