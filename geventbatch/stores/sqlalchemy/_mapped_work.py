"""The work of one batch in a session: what operations do there, how it is undone, and what a flush writes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import sqlalchemy as sa
from sqlalchemy.orm import InstanceState
from sqlalchemy.orm.exc import StaleDataError

from geventbatch._batch import batch_at_hand
from geventbatch._safe_repr import shown
from geventbatch.errors import CannotUndo, NotSaved, ResourceMissing
from geventbatch.stores.sqlalchemy._added_rows import insert_rows, is_instance
from geventbatch.stores.sqlalchemy._collections import asks_later, is_collection, plain
from geventbatch.stores.sqlalchemy._session_snapshot import SessionSnapshot
from geventbatch.stores.sqlalchemy._transaction import cause

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from geventbatch.stores.sqlalchemy._guard import Guard
    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._session import BatchSession
    from geventbatch.stores.sqlalchemy._transaction import Transaction

_EVENTS: Final = ("before_commit", "before_flush", "after_flush_postexec")
"""Session events in which a user's listener may send or add something."""


class MappedWork:
    """The work of one batch: of a key, or of a component."""

    # -- mutable state ---------------------------------------------------------------------------------------
    _transaction: Transaction
    _session: BatchSession
    _guard: Guard
    _loaded: Any  # a `LoadedResource`, or `LoadedResources`
    _first: SessionSnapshot | None  # of the load

    def __init__(self, mapping: Mapping, key: Hashable) -> None:
        self._mapping = mapping
        self._key = key

    def operation_raised(self, error: Exception) -> NotSaved | None:
        """Expunge what the operation has added, or return why its attempt cannot be saved any more. Switches: no."""
        return self._guard.raised(error)

    def operation_returned(self) -> NotSaved | None:
        """Return why an operation that has returned cannot be saved, or None. Switches: no."""
        return self._guard.returned()

    @property
    def must_compare(self) -> bool:
        """Return whether operations may have been answered from two states of the database. Switches: no."""
        return self._guard.asked and not self._mapping.locking and len(batch_at_hand().operations) > 1

    def copied(self, value: object) -> object:
        """Return a copy of *value* if it is in a column, or a relationship's collection; else itself. Switches: no."""
        if is_collection(value):
            return plain(value)
        copy = self._loaded.copier_of(value)
        return value if copy is None else copy(value)

    def owns(self, value: object) -> bool:
        """Return whether *value* belongs to the session: an instance, a value in a column, a query. Switches: no."""
        if isinstance(sa.inspect(value, raiseerr=False), InstanceState):
            return value in self._session
        return is_collection(value) or asks_later(value) or self._loaded.copier_of(value) is not None

    # -- undo --------------------------------------------------------------------------------------------------

    def checkpoint(self) -> object:
        """Return a snapshot of the session. Raises `CannotUndo`. Switches: no."""
        with self._guard.own():
            return SessionSnapshot(self._guard, self._loaded, plain=True, columns=True)

    def restore(self, checkpoint: object | None) -> Any:
        """Restore the session from *checkpoint*, or as loaded. Raises `CannotUndo`. Switches: no."""
        snapshot = self._first if checkpoint is None else cast("SessionSnapshot", checkpoint)
        if snapshot is None:
            self._mapping.keeps = True
            raise CannotUndo(f"of what was loaded of {shown(self._key)} nothing was copied", once=True)
        with self._guard.own():
            snapshot.restore()
        return self._loaded.resources[0]

    # -- save --------------------------------------------------------------------------------------------------

    def _flush(self, rows: Sequence[object]) -> None:
        """Send the changes of the session, and *rows*. Raises a `NotSaved`, or the database's error."""
        try:
            self._session.flush()
            self._guard.check_inserted(self._is_inserted)
            insert_rows(self._transaction.connection, rows, self._session)
        except StaleDataError as error:
            raise self._guard.stale(error) from error

    def _end_savepoints(self) -> None:
        """Release the savepoints of the steps, and those that an operation has left open, as COMMIT would.

        Each release flushes; a value is then refused as in a save.
        """
        try:
            while (nested := self._session.get_nested_transaction()) is not None:
                with self._session.silence():
                    nested.commit()
        except StaleDataError as error:
            raise self._guard.stale(error) from error
        except Exception as error:
            raise self._transaction.not_saved(error) from cause(error)

    def _is_inserted(self) -> bool:
        """Return whether the batch's own transaction sees a row for each new resource."""
        raise NotImplementedError

    def has_only_our_listeners(self) -> bool:
        """Return whether no listener of the user's may send something during a flush, or between it and COMMIT."""
        dispatch = self._session.dispatch
        return all(len(getattr(dispatch, name)) == 1 for name in _EVENTS) and not len(dispatch.after_flush)

    def _needs_no_answer(self, rows: Sequence[object]) -> bool:
        """Return whether no statement of the flush needs an answer."""
        return not self._session.adds_or_deletes() and not any(is_instance(row) for row in rows)


def made(mapping: Mapping, key: Hashable) -> Any:
    """Return the resource that ``missing`` makes for *key*. Raises `ResourceMissing`, or a `TypeError`."""
    if mapping.missing == "raise":
        raise ResourceMissing(f"there is no {mapping.name} {shown(key)}", key=key)
    resource = mapping.missing(mapping.own_key(key))
    if not isinstance(resource, mapping.mapper.class_):
        raise TypeError(f"missing made {shown(resource)} for {shown(key)}: it has to be a {mapping.name}")
    for attribute, value in zip(mapping.by, mapping.parameters(key).values(), strict=True):
        if getattr(resource, attribute.key) is None:
            setattr(resource, attribute.key, value)
    if mapping.version is not None and getattr(resource, mapping.version) is None:
        setattr(resource, mapping.version, 1)
    return resource
