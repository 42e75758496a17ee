"""Resource scopes of many keys, which a round of a bulk enters and exits (see `round`).

Entering returns a dict of keys and resources. A key that is not in it is missing. If its value is an exception, the
load of this key alone has raised it. When the scope is exited to save, the dict holds only the keys to save. The exit
raises `PartlySaved` for keys that were not saved.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import gevent

from geventbatch._bulk.crossing import Crossing
from geventbatch._check_callables import PairFacts, check_scope, refuse_lazy
from geventbatch._core import process
from geventbatch._core.pair import IMMUTABLE, ImmutableWarning
from geventbatch._safe_repr import shown
from geventbatch.errors import PartlySaved, ResourceMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Hashable
    from contextlib import AbstractContextManager
    from types import TracebackType


class BulkPairScope:
    """Entering loads, leaving saves, leaving with an exception does nothing."""

    def __init__(self, pair: BulkPair, keys: list[Any]) -> None:
        """Belong to *pair*; load nothing yet."""
        self._pair = pair
        self._keys = keys

    def __enter__(self) -> dict[Any, Any]:
        """Load."""
        self._resources = self._pair.load(self._keys)
        return self._resources

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Save."""
        if kind is None:
            refuse_lazy("save_resources", self._pair.save_resources(self._resources))


class BulkPair:
    """``load_resources`` and ``save_resources``, as an ``open_resources``."""

    def __init__(
        self, load_resources: Callable[[list[Any]], Any], save_resources: Callable[[Any], object], *, compares: bool
    ) -> None:
        """Keep both functions."""
        self.pair_facts = PairFacts(load_resources, saves=True, compares=compares)
        self.warning = ImmutableWarning()
        self.all_or_nothing = getattr(save_resources, "all_or_nothing", None)
        self.load_resources = load_resources
        self.save_resources = save_resources

    def __call__(self, keys: list[Any]) -> BulkPairScope:
        """Return the scope of *keys*. No function of the user's is called yet."""
        return BulkPairScope(self, keys)

    def load(self, keys: list[Any]) -> dict[Any, Any]:
        """Load, and check what the user's function returned."""
        found = self.load_resources(keys)
        refuse_lazy("load_resources", found)
        if not isinstance(found, Mapping):
            raise TypeError(f"load_resources returned {shown(found)}, but must return a mapping of keys to resources")
        for resource in found.values():
            if type(resource) in IMMUTABLE:
                self.warning.warn("load_resources", resource)
        return dict(found)


class OneOfBulk:
    """The scope of one key, or of the keys of a crossing, by a scope of many: for an unbatched operation."""

    def __init__(self, open_resources: Callable[[list[Any]], AbstractContextManager[Any]], key: Hashable) -> None:
        """Open the scope of *key* and no other; or of all keys of the operation across keys."""
        attempt = process.running[gevent.getcurrent()]
        self._across = type(attempt.batch) is Crossing
        self._keys = attempt.batch.loads if self._across else (key,)
        attempt.bulk = dict.fromkeys(self._keys, attempt.batch)
        self.of_many = self._scope = open_resources([*self._keys])
        check_scope("open_resources", self._scope)
        self.takes_rows = getattr(self._scope, "takes_rows", False)
        self.deletes = getattr(self._scope, "deletes", False)
        self.deletes_if = getattr(self._scope, "deletes_if", None)
        self.recorded = getattr(self._scope, "recorded", None)
        self.saved = getattr(self._scope, "saved", None)
        self.operation_raised = getattr(self._scope, "operation_raised", None)
        self.operation_returned = getattr(self._scope, "operation_returned", None)
        self.owns = getattr(self._scope, "owns", None)
        self.copied = getattr(self._scope, "copied", None)

    def __enter__(self) -> Any:
        """Load."""
        self._resources = resources = self._scope.__enter__()
        try:
            return self._found(resources)
        except BaseException as error:
            with suppress(Exception):  # only the error of the load counts
                self._scope.__exit__(type(error), error, error.__traceback__)
            raise

    def _found(self, resources: Any) -> Any:
        fault = fault_of(resources, {*self._keys})
        found = tuple(fault or loaded(resources, key) for key in self._keys)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return found if self._across else found[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Save."""
        if kind is None and not process.running[gevent.getcurrent()].completed:  # only outcomes are to be recorded
            for key in self._keys:
                self._resources.pop(key, None)
        try:
            self._scope.__exit__(kind, error, traceback)
        except PartlySaved as lost:
            for raised in errors_of(lost, {*self._keys}).values():
                raise raised from raised.__cause__


def fault_of(resources: Any, keys: Container[Hashable]) -> TypeError | None:
    """Return a `TypeError` if *resources*, loaded for *keys*, are no dict of these keys; else None."""
    if not isinstance(resources, MutableMapping):
        return TypeError(
            f"the load of a bulk returned {shown(resources)}, but must return a dict of keys and their resources"
        )
    for key in resources:
        if key not in keys:  # else it would be saved outside of its own batch
            return TypeError(f"the load of a bulk returned the key {shown(key)}, for which it was not asked")
    return None


def loaded(resources: Any, key: Hashable) -> Any:
    """Return the resource of *key*, or the exception of its load.

    The exception is not raised here, since its traceback would refer to the resources of the others.
    """
    return resources[key] if key in resources else ResourceMissing(f"there is nothing at {shown(key)}", key=key)


def errors_of(lost: PartlySaved, keys: Container[Hashable]) -> Mapping[Any, Exception]:
    """Return the error of each of *keys* that was not saved. Raise a `TypeError` if *lost* is malformed."""
    errors: Any = lost.errors
    if not isinstance(errors, Mapping):
        raise TypeError(
            f"PartlySaved has {shown(errors)}, but must have a mapping of keys to their exceptions"
        ) from lost
    for key, error in errors.items():
        if key not in keys:
            raise TypeError(
                f"PartlySaved names the key {shown(key)}, which is not among those that were to be saved"
            ) from lost
        if not isinstance(error, Exception):
            raise TypeError(
                f"PartlySaved has {shown(error)} for the key {shown(key)}, but must have an exception"
            ) from lost
    return errors
