"""A moving savepoint: each write after it may be refused, and earlier writes stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from geventbatch.errors import Rejected
from geventbatch.stores.sqlalchemy._transaction import cause

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.stores.sqlalchemy._transaction import Transaction

SET: Final = "SAVEPOINT geventbatch"

_SET: Final = sa.text(SET)
_RELEASE: Final = sa.text("RELEASE SAVEPOINT geventbatch")  # or they would pile up
_GO_BACK: Final = sa.text("ROLLBACK TO SAVEPOINT geventbatch")


class Savepoint:
    """The savepoint of one transaction. It needs no round trip if the transaction joins statements."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        # -- mutable state ---------------------------------------------------------------------------------
        self._is_set = False

    def write(self, writes: Callable[[], object]) -> None:
        """Write after it. Raises a `NotSaved`; a `Rejected` has undone the write. Switches: yes."""
        transaction = self._transaction
        try:
            if self._is_set:
                transaction.precede(_RELEASE, {})
            transaction.precede(_SET, {})
            self._is_set = True
            writes()
        except Exception as error:
            refused = transaction.not_saved(error)
            if isinstance(refused, Rejected):
                self.go_back()
            raise refused from cause(error)

    def go_back(self) -> None:
        """Undo the last write. Raises a `NotSaved`. Switches: yes."""
        try:
            self._transaction.connection.execute(_GO_BACK)
        except Exception as error:
            raise self._transaction.not_saved(error) from cause(error)
