"""`SQLAlchemyStore`: resources in a SQL database, as documents of one table or instances of a mapped class."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Never, TypeVar, overload

import sqlalchemy as sa

from geventbatch._check_callables import check_functions
from geventbatch.stores import _json
from geventbatch.stores._missing import checked
from geventbatch.stores._reuse import kept_by
from geventbatch.stores._sql.keys import normalize_all
from geventbatch.stores.sqlalchemy import _engines
from geventbatch.stores.sqlalchemy._bulk_documents import BulkDocuments
from geventbatch.stores.sqlalchemy._document_scope import DocumentScope
from geventbatch.stores.sqlalchemy._documents import (
    Documents,
    KeyText,
    Statements,
    StateText,
    check_kept,
    check_name,
    create_table,
    documents_table,
    has_steps,
)
from geventbatch.stores.sqlalchemy._key_columns import folds, key_column
from geventbatch.stores.sqlalchemy._mapped_parts import mapped_parts
from geventbatch.stores.sqlalchemy._mode import mode_of, on_server
from geventbatch.stores.sqlalchemy._outcome_table import OutcomeId, idempotency_table, outcome_table
from geventbatch.stores.sqlalchemy._parts import Parts
from geventbatch.stores.sqlalchemy._transaction import transaction_class

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping
    from contextlib import AbstractContextManager

    from sqlalchemy.orm import scoped_session, sessionmaker
    from sqlalchemy.types import TypeEngine

    from geventbatch.stores._reuse import Reuse
    from geventbatch.stores.sqlalchemy._mapped_bulk import BulkMapped
    from geventbatch.stores.sqlalchemy._mode import Mode

__all__ = ["KeyText", "OutcomeId", "SQLAlchemyStore", "StateText", "idempotency_table"]

ResourceT = TypeVar("ResourceT")
EntityT = TypeVar("EntityT")
DocumentT = TypeVar("DocumentT")


class SQLAlchemyStore(Generic[ResourceT]):
    """A `Processor`'s ``open_resource`` over a SQL database; made by `documents` or by `mapped`.

    A batch is one transaction on one connection of the engine's pool: entering takes it and loads; exiting saves,
    commits and returns it. With psycopg 3 a load is one round trip. So is the save of a document, and of a mapped class
    if the server is asked nothing: the session has no other new or changed objects, and the rows of `add_row` are
    pairs.

    What to configure:

    - The engine's ``pool_size``: not less than the processor's ``max_batches`` (with ``max_overflow=0``). A batch that
      waits for a connection of the pool holds its key, and its deadline is running.
    - ``pool_pre_ping``: not needed, and costs each batch a round trip. If the first statement finds that the server has
      closed an idle connection, the load is tried again on a new one.
    - PostgreSQL: psycopg 3 (``postgresql+psycopg://``), patched before it is imported. psycopg2 works if psycogreen
      makes it wait cooperatively, with a round trip for each statement. MySQL and MariaDB: PyMySQL. On MySQL (not on
      MariaDB) a connection keeps the ``innodb_lock_wait_timeout`` of its last batch: if other code uses the engine too,
      give the store an engine of its own.
    - SQLite: WAL mode, for files. Its driver blocks the whole process. The database is locked from the first write of a
      save to its COMMIT, and no other greenlet runs in between. While another process writes, the batch waits
      cooperatively.

    Rows of `current_batch().add_row` are mapped instances, pairs of a `Table` (or a mapped class) and a dict, or
    ``insert()`` statements. They are inserted in bulk with the save: instances first, then the others in their order,
    adjacent ones of one table together.

    Attributes:
        table: The table, for Alembic as a part of its metadata; of several classes, the first one's.
        mode: "lock" or "version", as chosen.
        keeps_outcomes: Whether it records the outcomes of operations with an idempotency key.
    """

    def __init__(self, parts: Parts[ResourceT], *_: Never, **__: Never) -> None:
        """Not for users: `documents` and `mapped` make a store."""
        if not isinstance(parts, Parts):
            raise TypeError(
                "SQLAlchemyStore() is not for users: make a store by SQLAlchemyStore.documents(engine, table), or by "
                "SQLAlchemyStore.mapped(engine, Class)"
            )
        check_functions((), tenant=parts.tenant)
        self.table: Final = parts.table
        self.mode: Final[Mode] = parts.mode
        self.keeps_outcomes: Final = parts.idempotency is not None
        self.on_server: Final = on_server(parts.engine)
        self._tables = parts.tables or (parts.table,)
        self._idempotency = parts.idempotency
        self._outcomes = parts.outcomes
        self._kept = parts.kept
        self._bulk = parts.bulk
        self._tenant = parts.tenant
        self._engine = parts.engine
        self._open_scope = parts.open_scope
        self._normalized = parts.normalized

    def __repr__(self) -> str:
        """Name its table, its mode and its database."""
        return f"<SQLAlchemyStore of {self.table.fullname} in {self._engine.url!r}: {self.mode}>"

    @overload
    @classmethod
    def documents(
        cls,
        engine: sa.Engine,
        table: str,
        *,
        mode: Mode | None = None,
        missing: Literal["raise"] | Callable[[Any], Any] = "raise",
        key_type: TypeEngine[Any] | None = None,
        state_type: TypeEngine[Any] | None = None,
        metadata: sa.MetaData | None = None,
        schema: str | None = None,
        pipeline: bool = True,
        idempotency: sa.Table | None = None,
        idempotency_ttl: float | None = None,
        reuse_resource: Reuse | None = None,
    ) -> SQLAlchemyStore[Any]: ...

    @overload
    @classmethod
    def documents(
        cls,
        engine: sa.Engine,
        table: str,
        *,
        encode: Callable[[DocumentT], Any],
        decode: Callable[[Any], DocumentT],
        mode: Mode | None = None,
        missing: Literal["raise"] | Callable[[Any], DocumentT] = "raise",
        key_type: TypeEngine[Any] | None = None,
        state_type: TypeEngine[Any] | None = None,
        metadata: sa.MetaData | None = None,
        schema: str | None = None,
        pipeline: bool = True,
        idempotency: sa.Table | None = None,
        idempotency_ttl: float | None = None,
        reuse_resource: Reuse | None = None,
    ) -> SQLAlchemyStore[DocumentT]: ...

    @classmethod
    def documents(  # noqa: PLR0913 - options are keywords of one constructor
        cls,
        engine: sa.Engine,
        table: str,
        *,
        encode: Callable[[Any], Any] = json.dumps,
        decode: Callable[[Any], Any] = json.loads,
        mode: Mode | None = None,
        missing: Literal["raise"] | Callable[[Any], Any] = "raise",
        key_type: TypeEngine[Any] | None = None,
        state_type: TypeEngine[Any] | None = None,
        metadata: sa.MetaData | None = None,
        schema: str | None = None,
        pipeline: bool = True,
        idempotency: sa.Table | None = None,
        idempotency_ttl: float | None = None,
        reuse_resource: Reuse | None = None,
    ) -> SQLAlchemyStore[Any]:
        """Make a store of documents, in a table with the columns key, state and version, which counts the saves.

        An operation changes the resource in place. A batch that leaves the encoded state unchanged writes none.

        Args:
            engine: The database. Its pool provides each batch's connection.
            table: The name of the table. `create_table` creates it, or a migration that knows `table`.
            encode: Returns the state of a resource, a value for `state_type`. What it raises is the error of the
                operation that has made the resource so, and reaches its caller. So is what JSON would lose: a name that
                is no text, a tuple.
            decode: The exact inverse: the next operation has to find what an operation has left, in the same batch or
                not. What it raises is a `LoadFailed` that names the key.
            mode: "lock" (the default except on SQLite): the row is locked from load to COMMIT, and other writers of it
                wait. "version": nothing is locked, and a save that finds another version than the loaded one is a
                `Conflict`. Every other writer has to count the version up then.
            missing: "raise" a `ResourceMissing`; or a function of the key that makes the resource. It is inserted with
                the save; if another process has inserted it meanwhile, the batch is replayed.
            key_type: The key column's type; a text of 255 characters unless given. Keys are converted to its Python
                type.
            state_type: The state column's type; a text of any length unless given. For a JSONB that SQLAlchemy itself
                encodes, pass `JSONB()` and functions that return their argument.
            metadata: Where to declare the table; a new one unless given.
            schema: The table's schema.
            pipeline: Whether to send several statements as one message, if the driver is psycopg 3.
            idempotency: The table (`idempotency_table`) that records the outcomes of operations with an idempotency
                key; None: such operations are refused.
            idempotency_ttl: Seconds that an outcome is kept, a day unless given; only with *idempotency*.
            reuse_resource: In mode "version": cache what was saved, so that the next batch of the key loads nothing
                (`Reuse`). None: no cache. Every process that writes to the table has to set it: a version is then no
                count, but a new number after each save. Only states that are a str or bytes are cached; no trigger may
                change them.

        Raises:
            ValueError: The database does not have *mode*; or *reuse_resource* is given in mode "lock", or for states
                that are neither texts nor bytes.
            TypeError: *engine* is no `Engine`, *table* no name, or *reuse_resource* no `Reuse`.
        Switches: no.
        """
        _engines.check_engine(engine)
        check_name(table)
        check_functions(("resource",), encode=encode)
        check_functions(("state",), decode=decode)
        chosen = mode_of(engine, mode)
        kept = kept_by(reuse_resource, chosen)
        check_kept(kept, state_type)
        shown = documents_table(
            table,
            sa.MetaData() if metadata is None else metadata,
            key_type or KeyText(),
            state_type or StateText(),
            schema,
        )
        outcomes = outcome_table(idempotency, engine, idempotency_ttl)
        documents = Documents(
            engine=engine,
            transaction=transaction_class(engine, pipeline=pipeline, locking=chosen == "lock"),
            statements=Statements(
                shown,
                engine.dialect,
                locking=chosen == "lock",
                marks=chosen == "version" and kept is None,
                tells_key=outcomes is not None and folds(shown.c.key),
            ),
            name=shown.fullname,
            encode=_json.encode if encode is json.dumps else encode,
            decode=decode,
            missing=checked(missing),
            locking=chosen == "lock",
            check=_json.check_of(decode),
            is_json=isinstance(shown.c.state.type, sa.JSON),
            has_steps=has_steps(shown, engine.dialect),
            outcomes=outcomes,
            kept=kept,
        )
        columns = [key_column(shown.c.key, engine.dialect)]
        parts = Parts(
            open_scope=partial(DocumentScope, documents),
            engine=engine,
            table=shown,
            normalized=partial(normalize_all, columns=columns),
            mode=chosen,
            idempotency=idempotency,
            outcomes=outcomes,
            kept=kept,
            bulk=BulkDocuments(documents, shown, columns, kept),
        )
        return SQLAlchemyStore(parts)

    @overload
    @classmethod
    def mapped(
        cls,
        bind: sa.Engine | sessionmaker[Any] | scoped_session[Any],
        entity: type[EntityT],
        *,
        by: str | None = None,
        version: str | None = None,
        mode: Mode | None = None,
        missing: Literal["raise"] | Callable[[Any], EntityT] = "raise",
        pipeline: bool = True,
        tenant: Callable[[], Hashable] | None = None,
        prepare_connection: Callable[[sa.Connection, Any], object] | None = None,
        idempotency: sa.Table | None = None,
        idempotency_ttl: float | None = None,
    ) -> SQLAlchemyStore[EntityT]: ...

    @overload
    @classmethod
    def mapped(
        cls,
        bind: sa.Engine | sessionmaker[Any] | scoped_session[Any],
        entity: Mapping[str, type[Any]],
        *,
        by: Mapping[str, str] | None = None,
        version: Mapping[str, str] | None = None,
        mode: Mode | None = None,
        missing: Literal["raise"] | Mapping[str, Callable[[Any], Any]] = "raise",
        pipeline: bool = True,
        tenant: Callable[[], Hashable] | None = None,
        prepare_connection: Callable[[sa.Connection, Any], object] | None = None,
        idempotency: sa.Table | None = None,
        idempotency_ttl: float | None = None,
    ) -> SQLAlchemyStore[Any]: ...

    @classmethod
    def mapped(  # noqa: PLR0913 - options are keywords of one constructor
        cls,
        bind: sa.Engine | sessionmaker[Any] | scoped_session[Any],
        entity: type[Any] | Mapping[str, type[Any]],
        *,
        by: str | Mapping[str, str] | None = None,
        version: str | Mapping[str, str] | None = None,
        mode: Mode | None = None,
        missing: Literal["raise"] | Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]] = "raise",
        pipeline: bool = True,
        tenant: Callable[[], Hashable] | None = None,
        prepare_connection: Callable[[sa.Connection, Any], object] | None = None,
        idempotency: sa.Table | None = None,
        idempotency_ttl: float | None = None,
    ) -> SQLAlchemyStore[Any]:
        """Make a store of instances of a mapped class, with a session for each batch.

        Operations reach the session by ``object_session(resource)``. They may query in it, add other objects and change
        those; what the session holds is flushed and committed once, at the end. An operation that raises is undone: in
        memory, or by a replay without it if it has flushed. Delete the resource by
        ``object_session(resource).delete(resource)``, or by ``current_batch().delete()``: later operations find none
        then.

        Values may be changed in place: lists, dictionaries, objects of your own, composites, in the resource and in
        other rows. Their bound forms are compared, in type and in order. When the batch has ended, its instances are
        detached: an operation has to return values, not instances whose attributes are loaded later.

        Later operations find an assigned value as a load would return it: an amount with the column's decimal places, a
        day without the time, ``"5"`` as a number.

        Other rows that operations change are locked and compared when they are written: a row that another process has
        changed since it was read is a `Conflict`. If a load reads more than the row (``lazy="joined"``, a
        `column_property`), the row is first locked by a statement of its own, with psycopg 3 in the same message.

        A statement of an operation finds what earlier operations have changed. On SQLite, where nothing can be written
        before the save, their changes are saved first, and the operation is applied to the next load. What would end
        the transaction, or set something in the database's session, raises a RuntimeError in its operation.

        Args:
            bind: An engine; or a `sessionmaker` (a `scoped_session`, Flask-SQLAlchemy's `db.session`), whose options
                the sessions of batches get.
            entity: The mapped class. Or several by name, as ``{"seat": Seat, "wallet": Wallet}``: a key is then a pair,
                such as ``("seat", 12)``, and *by*, *version* and *missing* are dicts of those names.
            by: The attribute that keys name, of a unique column. None: the primary key; if it has several columns, a
                tuple.
            version: An integer attribute that counts the saves. Not needed for a class that has a ``version_id_col``,
                which SQLAlchemy counts.
            mode: "lock" (the default except on SQLite): ``SELECT … FOR UPDATE``; other writers of the row wait.
                "version": nothing is locked between load and save. The save then locks the row (of every table of the
                class) and compares PostgreSQL's ``xmin``, elsewhere all loaded columns, the version among them. Another
                row, even one that was deleted and inserted again, is a `Conflict`.
            missing: "raise" a `ResourceMissing`; or a function of the key that makes the instance. The key is set in it
                unless it has one. If another process has inserted it meanwhile, the batch is replayed.
            pipeline: Whether to send several statements as one message, if the driver is psycopg 3.
            tenant: Returns the current tenant, where each tenant has tables of its own. Called as `run` begins, in its
                caller's greenlet. The batch's key is then the pair of the tenant and the row's key.
            prepare_connection: Called with the batch's connection and the key, inside the transaction and before the
                load: to set ``search_path``, a role, or the settings of row-level security. On PostgreSQL, its SET is
                sent as SET LOCAL, and ends with the transaction; elsewhere the setting stays on the connection until
                the next batch sets it. It costs a round trip. Settings that a request has made on a connection of its
                own reach no batch.
            idempotency: The table (`idempotency_table`) that records the outcomes of operations with an idempotency
                key; None: such operations are refused.
            idempotency_ttl: Seconds that an outcome is kept, a day unless given; only with *idempotency*.

        Raises:
            TypeError: *bind* or *entity* is of a wrong type.
            ValueError: *by* or *version* is no such attribute; or *tenant* is given without *prepare_connection*.

        Switches: no.
        """
        return SQLAlchemyStore(
            mapped_parts(
                bind,
                entity,
                by=by,
                version=version,
                mode=mode,
                missing=missing,
                pipeline=pipeline,
                tenant=tenant,
                prepare_connection=prepare_connection,
                idempotency=idempotency,
                idempotency_ttl=idempotency_ttl,
            )
        )

    def __call__(self, key: Any) -> AbstractContextManager[ResourceT]:
        """Open the resource at *key*; called by the processor. Switches: no, but entering and exiting the scope do."""
        return self._open_scope(key)

    @property
    def open_resources(self) -> BulkDocuments | BulkMapped:
        """The bulk form: ``Processor(open_resources=store.open_resources)``, for many keys with few operations each.

        The resources of all batches that are ready are loaded together and saved together, in one transaction. It
        caches nothing (``reuse_resource``). A processor of the store uses it for `run_across`.

        Raises:
            AttributeError: The store prepares its connections for each key (``prepare_connection``).
        Switches: no.
        """
        if self._bulk is None:
            raise AttributeError(
                f"{self!r} has no open_resources: it prepares the connection for each key (prepare_connection), and "
                "many keys have one connection"
            )
        return self._bulk

    def normalize_key(self, key: Hashable) -> Hashable:
        """Return the column's value for *key*: 42 and "42" are one row, and one batch.

        With ``tenant``, return the pair of the caller's tenant and that value.

        Raises:
            TypeError: Keys of this type are impossible.
            ImpossibleKey: No row can have this key.
        Switches: no (as ``tenant`` does).
        """
        found = self._normalized(key)
        return found if self._tenant is None else (self._tenant(), found)

    def stopped(self) -> None:
        """Clear the cache; called by the processor when it has stopped. Switches: no."""
        if self._kept is not None:
            self._kept.clear()

    def create_table(self) -> None:
        """Create the table (of each class), and the table of outcomes, unless they exist. Switches: yes.

        Several processes may do so at once.
        """
        for table in self._tables:
            create_table(self._engine, table)
        if self._idempotency is not None:
            create_table(self._engine, self._idempotency)

    def purge_outcomes(self, limit: int = 10_000) -> int:
        """Delete expired outcomes, in a transaction of its own: for a cron job. They count as absent anyway.

        On SQLite, the driver blocks the process while another process writes.

        Args:
            limit: The largest number to delete, so that no save waits for long.

        Returns:
            The number of deleted outcomes. If it is *limit*, there may be more.

        Raises:
            ValueError: The store records none.
        Switches: yes.
        """
        outcomes = self._outcomes
        if outcomes is None:
            raise ValueError(f"{self!r} records no outcomes: pass idempotency=…")
        with _engines.own(self._engine).begin() as connection:
            return outcomes.purge(connection.exec_driver_sql, limit)
