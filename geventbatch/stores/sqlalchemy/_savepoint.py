"""A savepoint that goes along: what is written behind it may be refused, and what stands before it stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from geventbatch.errors import Rejected
from geventbatch.stores.sqlalchemy._transaction import cause

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.stores.sqlalchemy._transaction import Transaction

_SET: Final = sa.text("SAVEPOINT geventbatch")
_RELEASE: Final = sa.text("RELEASE SAVEPOINT geventbatch")  # or they would pile up
_GO_BACK: Final = sa.text("ROLLBACK TO SAVEPOINT geventbatch")


class Savepoint:
    """Of one transaction. It takes no round trip of its own where the transaction joins statements."""

    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        # -- mutable state ---------------------------------------------------------------------------------
        self._is_set = False

    def write(self, writes: Callable[[], object]) -> None:
        """Write behind it. What is raised is a `NotSaved`; after a `Rejected` all is as it was. Switches: yes."""
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
                self._go_back()
            raise refused from cause(error)

    def _go_back(self) -> None:
        try:
            self._transaction.connection.execute(_GO_BACK)
        except Exception as error:
            raise self._transaction.not_saved(error) from cause(error)
