"""The load of a batch, or of a bulk: what a transaction has fetched, and whose fault it is if that fails.

A load fails for the value of its key, which no row can have then, or for a value of its row. Most databases and drivers
do not tell which, so the key is asked about by itself (`Question`). Of many keys, those whose load fails by itself are
found by halves, and the others get their rows.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from sqlalchemy.exc import DBAPIError, StatementError

from geventbatch._batch import current_batch
from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict, NothingToSave, NotSaved, ResourceMissing
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.keys import shortened
from geventbatch.stores.sqlalchemy._transaction import OF_EVERYBODY

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from sqlalchemy.sql.base import Executable

    from geventbatch.stores.sqlalchemy._transaction import Transaction

LoadedT = TypeVar("LoadedT")

_FEW: Final = 4
"""Keys whose load may fail by itself while no other has succeeded: with one more, the statement is taken to fail for
any key."""

_OF_VALUE: Final = {errors.Kind.REJECTED, errors.Kind.UNSENT}
"""The kinds of a load's errors that are about a value: of the key, or of a row."""

_PLAN_IS_OLD: Final = "0A000"
"""The SQLSTATE of a statement that was prepared before a column changed its type; gone after a rollback."""


class Question(NamedTuple):
    """Asks whether a row can have a key, by a statement that has nothing else in it, and reads no row."""

    key: Hashable
    statement: Executable
    parameters: dict[str, Any]


def load(
    begin: Callable[[], Transaction],
    fetch: Callable[[Transaction], LoadedT],
    question: Callable[[], Question] | None = None,
) -> tuple[Transaction, LoadedT]:
    """Begin a transaction and fetch what a batch loads; return both.

    The server may have ended an idle connection of the pool, which the first statement finds out. SQLAlchemy has then
    given up all connections of its pool, so the load is tried once more. Raises `Conflict` for a deadlock or a
    serialization failure, and `ResourceMissing` if *question* tells that no row can have the key.
    """
    for attempt in (1, 2):
        try:
            return _load_once(begin, fetch, question)
        except StatementError as error:
            if errors.kind(error) is errors.Kind.CONFLICT:
                raise Conflict(f"{shown(current_batch().key)} could not be loaded: {error.orig}") from error
            if attempt == 2 or not _is_of_connection(error):  # noqa: PLR2004 - the second is the last
                raise
        except OSError:  # from the socket: pg8000 does not wrap it
            if attempt == 2:  # noqa: PLR2004 - likewise
                raise
    raise AssertionError


def load_each(
    begin: Callable[[Sequence[Any]], Transaction],
    fetch: Callable[[Sequence[Any], Transaction], dict[Hashable, Any]],
    keys: Sequence[Any],
    question: Callable[[Any], Question],
) -> tuple[Transaction | None, dict[Hashable, Any]]:
    """Begin a transaction and fetch the rows at *keys*; return both. If each key has failed, there is no transaction.

    The error of a key whose load fails by itself stands in place of its row. Raises the error of all if the keys fail
    only together, or if the first few fail by themselves: the statement then fails for any key.
    """
    return _Halves(begin, fetch, question).load(keys)


# -- inside ------------------------------------------------------------------------------------------------------


class _Halves:
    """Loads many keys; those whose load fails by itself are set apart, by loading each half."""

    def __init__(
        self,
        begin: Callable[[Sequence[Any]], Transaction],
        fetch: Callable[[Sequence[Any], Transaction], dict[Hashable, Any]],
        question: Callable[[Any], Question],
    ) -> None:
        self._begin, self._fetch, self._question = begin, fetch, question
        # -- mutable state ---------------------------------------------------------------------------------
        self._apart: dict[Hashable, Any] = {}  # the errors, by key
        self._has_loaded = False

    def load(self, keys: Sequence[Any]) -> tuple[Transaction | None, dict[Hashable, Any]]:
        while keys:
            transaction, found = self._some(keys)
            if not isinstance(found, Exception):
                return transaction, {**self._apart, **found}
            is_of_keys = self._set_apart(keys, found)
            left = [key for key in keys if key not in self._apart]
            if not is_of_keys or len(left) == len(keys):
                raise found
            keys = left
        return None, self._apart

    def _some(self, keys: Sequence[Any]) -> tuple[Transaction, dict[Hashable, Any] | Exception]:
        """Fetch the rows at *keys*; or return an error that one of them may have raised: the transaction has ended."""

        def fetch(transaction: Transaction) -> dict[Hashable, Any] | Exception:
            try:
                return self._fetch(keys, transaction)
            except Exception as error:
                if not _is_of_one(error):
                    raise
                return _bare(error)

        transaction, found = load(partial(self._begin, keys), fetch)
        if isinstance(found, Exception):
            transaction.end(found)
        return transaction, found

    def _set_apart(self, keys: Sequence[Any], error: Exception) -> bool:
        """Set apart those of *keys* whose load fails by itself; that of all has raised *error*.

        Return False if the statement is taken to fail for any key.
        """
        if len(keys) == 1:
            (key,) = keys
            refused = _is_of_value(error) and _is_refused(partial(self._begin, keys), self._question(key))
            self._apart[key] = _impossible(key, error) if refused else error
            return self._has_loaded or self._count_unread() <= _FEW
        for half in (keys[::2], keys[1::2]):  # neighbours are often alike: the first ones to be alone lie far apart
            transaction, found = self._some(half)
            if not isinstance(found, Exception):
                self._has_loaded = True
                transaction.end(NothingToSave())
            elif not self._set_apart(half, found):
                return False
        return True

    def _count_unread(self) -> int:
        """Return how many rows could not be read. A key that is refused tells nothing of the statement."""
        return sum(not isinstance(one, ResourceMissing) for one in self._apart.values())


def _load_once(
    begin: Callable[[], Transaction], fetch: Callable[[Transaction], LoadedT], question: Callable[[], Question] | None
) -> tuple[Transaction, LoadedT]:
    transaction = begin()
    try:
        return transaction, fetch(transaction)
    except BaseException as error:
        transaction.end(error)
        if question is not None and _is_of_value(error) and _is_refused(begin, asked := question()):
            raise _impossible(asked.key, error) from error
        raise


def _is_refused(begin: Callable[[], Transaction], asked: Question) -> bool:
    """Return whether the database, or the driver, refuses the key itself. Switches: yes."""
    try:
        transaction, _ = _load_once(
            begin, lambda begun: begun.connection.execute(asked.statement, asked.parameters).all(), None
        )
    except Exception as error:
        return _is_of_value(error)
    transaction.end(NothingToSave())
    return False


def _impossible(key: Hashable, error: BaseException) -> ResourceMissing:
    told = f"no row can have the key {shortened(key)}: {getattr(error, 'orig', None) or error}"
    missing = ResourceMissing(told, key=key)
    missing.__cause__ = error
    return missing


def _is_of_value(error: BaseException) -> bool:
    """Return whether a value has raised *error*; SQLAlchemy wraps one of the key that its type does not take."""
    if not isinstance(error, StatementError):
        return False
    return not isinstance(error, DBAPIError) or errors.kind(error) in _OF_VALUE


def _is_of_one(error: Exception) -> bool:
    """Return whether *error* may be due to one key, or its row, and not to the schema, the server, or others."""
    kind = errors.kind(error)
    if kind is errors.Kind.OTHER:  # of a column's type, which may be the user's
        return not isinstance(error, (NotSaved, OSError, DBAPIError, *OF_EVERYBODY))
    return kind in errors.OF_OPERATION and not (errors.is_of_schema(error) or _is_of_connection(error))


def _is_of_connection(error: Exception) -> bool:
    """Return whether another connection, or a new transaction, may not raise *error*."""
    is_lost: bool = getattr(error, "connection_invalidated", False)
    return is_lost or any(errors.state(one) == _PLAN_IS_OLD for one in errors.chain(error))


def _bare(error: Exception) -> Exception:
    """Return *error* without its traceback, which would refer to the rows of the other keys."""
    for one in errors.chain(error):
        one.__traceback__ = None
    return error
