"""The connection of a batch while operations run: they cannot close it, nor end its transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import sqlalchemy as sa
from sqlalchemy import event

from geventbatch._batch import batch_at_hand
from geventbatch.stores.sqlalchemy._engines import listen

if TYPE_CHECKING:
    from sqlalchemy.pool import PoolProxiedConnection

    from geventbatch.stores.sqlalchemy._guard import Guard

_INSTEAD: Final = "the connection is the batch's, which gives it back when it has saved"


class BatchConnection(sa.Connection):
    """A connection that only its batch closes and gives up."""

    batch_guard: Any  # a `Guard`
    kind_before: type[sa.Connection]  # what it was before

    @staticmethod
    def watch(engine: sa.Engine) -> None:
        """Report what is sent on batches' connections of *engine* to their guards.

        (A listener for each connection would cost a batch as much as loading the row.)
        """
        if not event.contains(engine, "before_cursor_execute", _executes):
            listen(engine, "before_cursor_execute", _executes)
            listen(engine, "after_cursor_execute", _executed)
            listen(engine, "commit", _commits)

    @classmethod
    def hold(cls, connection: sa.Connection, guard: Guard) -> None:
        """Turn *connection* into one."""
        held: Any = connection
        held.kind_before = type(connection)
        held.__class__ = cls
        held.batch_guard = guard

    @staticmethod
    def let_go(connection: sa.Connection) -> None:
        """Turn *connection*, which is closed, into what it was: it and its guard hold each other no more."""
        if isinstance(connection, BatchConnection):
            held: Any = connection
            held.__class__ = connection.kind_before
            for name in _OWN & vars(connection).keys():
                delattr(held, name)

    def close(self) -> None:
        """Refuse it to operations."""
        self.batch_guard.refuse("connection().close()", _INSTEAD)
        super().close()

    def invalidate(self, exception: BaseException | None = None) -> None:
        """Refuse it to operations; SQLAlchemy passes an *exception*."""
        if exception is None:
            self.batch_guard.refuse("connection().invalidate()", _INSTEAD)
        super().invalidate(exception)

    def detach(self) -> None:
        """Refuse it to operations."""
        self.batch_guard.refuse("connection().detach()", _INSTEAD)
        super().detach()

    def rollback(self) -> None:
        """Refuse it to operations."""
        self.batch_guard.refuse("connection().rollback()", "use `with session.begin_nested()` for what you may undo")
        super().rollback()

    def execution_options(self, **options: Any) -> sa.Connection:
        """Refuse it to operations."""
        self.batch_guard.refuse("connection().execution_options()", "pass them to execute(), for that statement only")
        return super().execution_options(**options)

    @property
    def connection(self) -> PoolProxiedConnection:
        """The driver's connection, for the batch and SQLAlchemy: its use by an operation would not be seen."""
        guard = self.batch_guard
        if not (guard.flushing or guard.in_bulk):  # SQLAlchemy may have to roll back
            guard.refuse("connection().connection", "use exec_driver_sql() in place of the driver's own methods")
        return super().connection

    @property
    def info(self) -> dict[Any, Any]:
        """The pool's `info` of the driver's connection."""
        guard = self.batch_guard
        before, guard.ours = guard.ours, True
        try:
            return super().info
        finally:
            guard.ours = before


class SharedConnection(BatchConnection):
    """The connection of many batches, each of which has a guard of its own."""

    # -- mutable state ---------------------------------------------------------------------------------------
    guards: dict[Any, Guard]  # by batch
    guard_at_hand: Guard | None  # while the library is at work; None: the one of the batch at hand

    @classmethod
    def share(cls, connection: sa.Connection, guard: Guard) -> SharedConnection:
        """Turn *connection* into one, and return it; *guard* is of the load."""
        held: Any = connection
        held.kind_before = type(connection)
        held.guards, held.guard_at_hand = {}, guard
        held.__class__ = cls
        return cast("SharedConnection", held)

    @property
    def batch_guard(self) -> Any:  # a batch of its own has an attribute
        """The guard at hand."""
        return self.guard_at_hand or self.guards[batch_at_hand()]


_OWN: Final = {"batch_guard", "guards", "guard_at_hand", "kind_before"}


def _executes(connection: sa.Connection, *about: Any) -> None:
    if isinstance(connection, BatchConnection):
        connection.batch_guard.executes(connection, *about)


def _executed(connection: sa.Connection, cursor: Any, _: str, __: Any, context: Any, *___: Any) -> None:
    if context.isinsert and isinstance(connection, BatchConnection):
        connection.batch_guard.has_inserted(cursor, context)


def _commits(connection: sa.Connection) -> None:
    if isinstance(connection, BatchConnection):
        connection.batch_guard.refuse_commit()
