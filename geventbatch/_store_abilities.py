"""The abilities of a store beyond being called, looked up once, when the processor is made (see `scopes`)."""

from __future__ import annotations

from inspect import getattr_static
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from geventbatch._wrapper import innermost

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch._check_callables import PairFacts
    from geventbatch._core.operation import Operation


class Store(NamedTuple):
    """The attributes of an ``open_resource`` or ``open_resources`` from `scopes.OF_A_STORE`; None for each it lacks."""

    normalize_key: Callable[[Any], Any] | None
    admit: Callable[[Any], bool] | None  # True: the operation runs unbatched
    stopped: Callable[[], object] | None
    check_outcomes: Callable[[Any], object] | None
    keeps_outcomes: bool | None
    on_server: bool | None
    all_or_nothing: bool | None
    check_keys: Callable[[tuple[Any, ...]], object] | None
    pair_facts: PairFacts | None
    """The facts about a load and save pair; only our own pairs have them."""


def look_at(open_resource: object) -> Store:
    """Look up the abilities of *open_resource*, also through a wrapper of an integration."""
    return Store(*(getattr(open_resource, name, None) for name in Store._fields))


def across_form(store: object) -> tuple[Any, Exception | None]:
    """Return the form for many keys of *store*, or None; and what the store raised instead."""
    try:
        found = cast("Any", store).open_resources
    except Exception as error:  # only `run_across` needs the form: it tells why a store refuses
        why = error.with_traceback(None)  # that would keep the frames of those who make the processor, and so itself
        return None, why if getattr_static(innermost(store), "open_resources", None) is not None else None
    return (found if look_at(found).all_or_nothing is True else None), None


class Door(NamedTuple):
    """Calls that each `run` makes before its operation is admitted."""

    observers: tuple[Callable[[Operation[Any]], object], ...]
    """Called with each operation, whose callable they may replace. For `_seam`."""
    normalize_key: Callable[[Any], Any] | None
    admit: Callable[[Any], bool] | None
    admit_across: Callable[[Any], bool] | None
    """For a key of an operation across keys."""

    def enter(self, key: Any, operation: Operation[Any], *, batching: bool) -> tuple[Any, bool]:
        """Return the key in its one form, and whether *operation* is to be batched."""
        for see in self.observers:
            see(operation)
        if self.normalize_key is not None:
            key = self.normalize_key(key)
        return key, batching and not (self.admit is not None and self.admit(key))

    def enter_across(
        self, keys: tuple[Any, ...], operation: Operation[Any], *, batching: bool
    ) -> tuple[tuple[Any, ...], bool]:
        """Return the keys of *operation* in their one form, and whether it is to be batched."""
        for see in self.observers:
            see(operation)
        if self.normalize_key is not None:
            keys = tuple(map(self.normalize_key, keys))
        return keys, batching and not (self.admit_across is not None and any(map(self.admit_across, keys)))


def door_of(store: Store, observers: tuple[Callable[[Operation[Any]], object], ...], across: Store) -> Door | None:
    """Return the calls for `run` and `run_across` to make; None if there are none."""
    admit_across = across.admit or store.admit
    if store.normalize_key is store.admit is admit_across is None and not observers:
        return None
    return Door(observers, store.normalize_key, store.admit, admit_across)
