"""The connection of one attempt: lent by the store's pool, or its caller's own if the operation runs unbatched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch.stores._sql import errors
from geventbatch.stores.django._connections import current, own
from geventbatch.stores.django._on_commit import call_back

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper

    from geventbatch.stores.django._connections import Pool


class Lease:
    """Lends a connection, from `begin` to `end`; and another one, if the server had ended the first."""

    # -- mutable state, from `begin` on ---------------------------------------------------------------------
    _connection: BaseDatabaseWrapper

    def __init__(self, alias: str, pool: Pool, *, alone: bool) -> None:
        """Lend from *pool*; or, for an operation that runs *alone*, use the caller's connection to *alias*."""
        self._alias = alias
        self._pool = pool
        self._alone = alone
        self._before: BaseDatabaseWrapper | None = None
        self._reused = False
        self._renewed = False  # idle connections were closed once, since the server had ended one

    def begin(self) -> BaseDatabaseWrapper:
        """Return the connection, which is this greenlet's until `end`. Switches: the first time in a process."""
        if not self._alone:
            self._before = current(self._alias)
            self._connection, self._reused = self._pool.lend()
            return self._connection
        self._connection = own(self._alias)
        if not self._connection.in_atomic_block:
            self._connection.close_if_unusable_or_obsolete()
        self._reused = self._connection.connection is not None and not self._connection.in_atomic_block
        return self._connection

    def renews(self, error: Exception) -> bool:
        """Return whether to begin again after *error* of the load: the server had ended an idle connection.

        All other idle ones are closed too. Switches: yes.
        """
        if not self._reused or self._renewed or errors.kind(error) is not errors.Kind.LOST:
            return False
        self._renewed = True
        self._pool.renew(self._connection)
        return True

    def end(self) -> None:
        """Return the connection, in any state. Switches: no."""
        if not self._alone:
            self._pool.give_back(self._connection, self._before)

    def call_back(self, callbacks: Sequence[Callable[[], object]], key: Any) -> None:
        """Call *callbacks*, given to `on_commit` by the batch of *key*. Switches: as they do."""
        if not callbacks:
            return
        if self._alone:
            call_back(callbacks, key)
            return
        before = current(self._alias)
        connection, _ = self._pool.lend()  # connects only if a callback uses it
        try:
            call_back(callbacks, key)
        finally:
            self._pool.give_back(connection, before)
