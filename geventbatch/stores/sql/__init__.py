"""`SQLStore`: rows of PostgreSQL, MySQL or MariaDB as resources, by statements of your own, without an ORM."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, overload

from geventbatch._safe_repr import named, shown
from geventbatch.stores._missing import checked
from geventbatch.stores._sql.keys import KEY_TYPES, KeyColumn, normalize_all
from geventbatch.stores._sql.outcomes import seconds_to_keep
from geventbatch.stores.sql import _outcome_table
from geventbatch.stores.sql._bulk import BulkRows
from geventbatch.stores.sql._connections import connections_of
from geventbatch.stores.sql._resource import Table
from geventbatch.stores.sql._rows import Row, Rows, check_kind
from geventbatch.stores.sql._scope import Scope
from geventbatch.stores.sql._statements import column_of_key, statement, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

__all__ = ["Row", "SQLStore"]

R = TypeVar("R")


class SQLStore(Generic[R]):
    """The ``open_resource`` of a `Processor` whose resources are rows, loaded and saved by your own statements.

    For psycopg 3, psycopg2 and PyMySQL. A batch takes a connection, begins a transaction, loads and locks the row,
    applies its operations to an object in memory, writes the row if that has changed, and commits::

        store = SQLStore(
            pool,
            load="SELECT id, stock FROM shows WHERE id = %(key)s FOR UPDATE",
            save="UPDATE shows SET stock = %(stock)s WHERE id = %(key)s",
        )
        processor = Processor(open_resource=store, min_duration=0, max_duration=5)

    A parameter is ``%(name)s``: ``%(key)s`` is the key, any other one a column or attribute of the resource. (Where
    only the key is possible, ``%s`` will do. A percent sign is ``%%``.) A batch that changes a column which *save* does
    not write is refused: its operation gets a ValueError.

    Statements are bounded by the time that the batch has left. If the answer to COMMIT is lost, PostgreSQL is asked
    what became of the transaction; MySQL cannot be asked, so the save fails with the driver's error, in a `SaveFailed`
    that is not ``retry_safe``. If the pool's connection is dead, the load takes another one.

    A row of `current_batch().add_row` is a pair of an INSERT and its parameters. Neighbours with the same INSERT are
    sent together.

    Args:
        pool: A ``psycopg_pool.ConnectionPool``, a ``psycopg2.pool.ThreadedConnectionPool``, a ``PooledDB`` of DBUtils;
            or a function that returns a connection for each call, whose ``close`` ends it or gives it back. It needs
            as many connections as the processor's ``max_batches``. psycopg2 has to wait in gevent's way (psycogreen).
        load: ``SELECT … FOR UPDATE`` of the row at ``%(key)s``.
        save: ``UPDATE`` of the row at ``%(key)s``. It has to find exactly one row.
        row: What operations get. None: a `Row`, with its columns as attributes, and no others. dict: a dict. A class:
            it is called with the columns as keywords, as a dataclass is; its attributes are the parameters.
        key: The type of keys, as str, int or UUID: 42 and "42" are one key. If the key has several columns, a dict of
            their names and types: keys are tuples, and the parameters have these names.
        missing: For a key without a row: "raise" raises `ResourceMissing`; a function of the key returns a new
            resource, for *insert*.
        insert: ``INSERT`` of a new row; needed with a *missing* that is a function. If another process has inserted it
            meanwhile, the batch is replayed.
        delete: ``DELETE`` of the row at ``%(key)s``, for `current_batch().delete()`; None refuses that.
        load_many: ``SELECT … FOR UPDATE`` of the rows at ``%(keys)s``, a list, with an ORDER BY of the key, which
            is its first column: for many keys in one transaction (`open_resources`, `run_across`). None refuses these.
            PostgreSQL: ``WHERE id = ANY(%(keys)s) ORDER BY id FOR UPDATE``; PyMySQL: ``WHERE id IN %(keys)s …``.
        idempotency: The name of the table that records outcomes of operations with an idempotency key, which
            `create_outcomes` creates; None: such operations are refused.
        idempotency_ttl: Seconds that an outcome is kept, a day unless given; only with *idempotency*.
        name: The name of the resources in messages and for outcomes, and of a processor that has no name; the table of
            *save* unless given.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: A statement would lose something: *load* locks nothing, *insert* overwrites, and so on.
    Switches: no.
    """

    on_server: Final = True
    """A database server is behind the store, which may take its time."""

    @overload
    def __init__(
        self: SQLStore[Any],
        pool: Any,
        *,
        load: str,
        save: str,
        row: None = None,
        key: type | Mapping[str, type] = int,
        missing: Literal["raise"] | Callable[[Any], Any] = "raise",
        insert: str | None = None,
        delete: str | None = None,
        load_many: str | None = None,
        idempotency: str | None = None,
        idempotency_ttl: float | None = None,
        name: str | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self: SQLStore[dict[str, Any]],
        pool: Any,
        *,
        load: str,
        save: str,
        row: type[dict[str, Any]],
        key: type | Mapping[str, type] = int,
        missing: Literal["raise"] | Callable[[Any], dict[str, Any]] = "raise",
        insert: str | None = None,
        delete: str | None = None,
        load_many: str | None = None,
        idempotency: str | None = None,
        idempotency_ttl: float | None = None,
        name: str | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        pool: Any,
        *,
        load: str,
        save: str,
        row: Callable[..., R],
        key: type | Mapping[str, type] = int,
        missing: Literal["raise"] | Callable[[Any], R] = "raise",
        insert: str | None = None,
        delete: str | None = None,
        load_many: str | None = None,
        idempotency: str | None = None,
        idempotency_ttl: float | None = None,
        name: str | None = None,
    ) -> None: ...

    def __init__(  # noqa: PLR0913 - every option of a store is a keyword of one constructor
        self,
        pool: Any,
        *,
        load: str,
        save: str,
        row: Any = None,
        key: type | Mapping[str, type] = int,
        missing: Any = "raise",
        insert: str | None = None,
        delete: str | None = None,
        load_many: str | None = None,
        idempotency: str | None = None,
        idempotency_ttl: float | None = None,
        name: str | None = None,
    ) -> None:
        """See the class."""
        check_kind(row)
        columns = _columns(key)
        keys = tuple(column.name for column in columns)
        making = checked(missing, rows=True)
        if (insert is None) != (making == "raise"):
            raise ValueError(
                "missing is a function that makes a resource, and insert the statement that inserts it: pass both, or "
                "neither"
            )
        if load_many is not None and len(keys) > 1:
            raise ValueError(
                f"load_many is {shown(load_many)}, but a key has several columns: {', '.join(keys)}. For operations on "
                "several keys, give the table a column that is the key by itself, as an id"
            )
        saving = statement("save", save, keys)
        inserting = None if insert is None else statement("insert", insert, keys)
        column = column_of_key(saving)
        self.keeps_outcomes: Final = idempotency is not None
        seconds = seconds_to_keep(idempotency_ttl, idempotency)
        self._table: Final = Table(
            connections=connections_of(pool),
            name=table_of(saving) if name is None else _checked_name(name),
            keys=keys,
            rows=Rows(row, saving.names, inserting.names if inserting else (), keys, column.strip('`"')),
            load=statement("load", load, keys, allowed=keys),
            load_many=None if load_many is None else statement("load_many", load_many, keys, allowed=("keys",)),
            save=saving,
            insert=inserting,
            delete=None if delete is None else statement("delete", delete, keys, allowed=keys),
            missing=making,
            outcomes=None if idempotency is None else _outcome_table.statements(idempotency, seconds),
        )
        if isinstance(key, type):
            columns = [KeyColumn(f"{self._table.name}.{column}", key)]
        self._normalized: Final = partial(normalize_all, columns=columns)
        self.__qualname__ = self._table.name  # a processor without a name is called so

    def __repr__(self) -> str:
        """Name its resources."""
        return f"<SQLStore of {self._table.name}>"

    def __call__(self, key: Any) -> Scope[R]:
        """Open the resource at *key*; called by the processor. Switches: no, but entering and exiting the scope do."""
        return Scope(self._table, key)

    @property
    def open_resources(self) -> BulkRows:
        """The bulk form: ``Processor(open_resources=store.open_resources)``, for many keys with few operations each.

        The rows of all batches that are ready are loaded together and saved together, in one transaction. A processor
        of the store uses it for `run_across`.

        Raises:
            AttributeError: The store has no *load_many*.
        Switches: no.
        """
        if self._table.load_many is None:
            mend = "pass load_many, the statement that loads many rows"
            if len(self._table.keys) > 1:
                mend = "a key has several columns; give the table a column that is the key by itself, as an id"
            raise AttributeError(f"{self!r} has no open_resources: {mend}")
        return BulkRows(self._table, self.normalize_key)

    def normalize_key(self, key: Hashable) -> Hashable:
        """Return the value for *key*: 42 and "42" are one row, and one batch. Switches: no.

        Raises:
            TypeError: Keys of this type are impossible.
            ImpossibleKey: No row can have this key.
        """
        return self._normalized(key)

    def create_outcomes(self) -> None:
        """Create the table of outcomes, unless it exists. Switches: yes.

        Raises:
            ValueError: The store records none.
        """
        _outcome_table.create(self._outcomes(), self._table.connections)

    def purge_outcomes(self, limit: int = 10_000) -> int:
        """Delete expired outcomes, in a transaction of its own: for a cron job. They count as absent anyway.

        Args:
            limit: The largest number to delete, so that no save waits for long.

        Returns:
            The number of deleted outcomes. If it is *limit*, there may be more.

        Raises:
            ValueError: The store records none.
        Switches: yes.
        """
        return _outcome_table.purge(self._outcomes(), self._table.connections, limit)

    def _outcomes(self) -> _outcome_table.Statements:
        if self._table.outcomes is None:
            raise ValueError(f"{self!r} records no outcomes: pass idempotency=…")
        return self._table.outcomes


def _columns(key: Any) -> list[KeyColumn]:
    """Check the option ``key``, and return the columns of keys."""
    kinds = {"key": key} if isinstance(key, type) else key
    if not isinstance(kinds, dict) or not kinds or not all(isinstance(name, str) for name in kinds):
        raise TypeError(
            f"key is {named(key)}, but must be the type of keys, as int or str; or a dict of the names and types of "
            "several columns"
        )
    for name, kind in kinds.items():
        if kind not in KEY_TYPES:
            told = ", ".join(sorted(one.__name__ for one in KEY_TYPES))
            raise TypeError(f"key: the type of {name} is {shown(kind)}, but must be one of {told}")
    return [KeyColumn(name, kind) for name, kind in kinds.items()]


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"name is {named(name)}, but must be a str")
    return name
