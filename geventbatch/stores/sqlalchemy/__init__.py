"""Resources in a SQL database, through SQLAlchemy: documents of one table, or instances of one's own mapped classes."""

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
from geventbatch.stores.sqlalchemy._batch_connection import BatchConnection
from geventbatch.stores.sqlalchemy._bulk_documents import BulkDocuments
from geventbatch.stores.sqlalchemy._change_tracker import track_loads
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
from geventbatch.stores.sqlalchemy._mapped_scope import MappedScope
from geventbatch.stores.sqlalchemy._mapping import (
    Mapping,
    key_attributes,
    mapper_of,
    refuse_joined,
    token_of,
    version_attribute,
)
from geventbatch.stores.sqlalchemy._mode import mode_of, on_server
from geventbatch.stores.sqlalchemy._outcome_table import idempotency_table, outcome_table
from geventbatch.stores.sqlalchemy._parts import Parts
from geventbatch.stores.sqlalchemy._session import session_factory
from geventbatch.stores.sqlalchemy._tenants import prepared
from geventbatch.stores.sqlalchemy._transaction import transaction_class

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextlib import AbstractContextManager

    from sqlalchemy.orm import scoped_session, sessionmaker
    from sqlalchemy.types import TypeEngine

    from geventbatch.stores._reuse import Reuse
    from geventbatch.stores.sqlalchemy._mode import Mode

__all__ = ["SQLAlchemyStore", "idempotency_table"]

ResourceT = TypeVar("ResourceT")
EntityT = TypeVar("EntityT")
DocumentT = TypeVar("DocumentT")


class SQLAlchemyStore(Generic[ResourceT]):
    """What a `Processor` takes as its ``open_resource``; made by `documents` or by `mapped`.

    A batch is one transaction on one connection of the engine's pool: entering takes it and loads, leaving saves,
    commits and gives it back. With psycopg 3 a load is one round trip. So is a save of a document, and one of a mapped
    class in which nothing is asked of the server: no other object was added to the session or changed in it, and the
    rows beside the resource are pairs.

    What to set:

    - ``pool_size`` of the engine, not less than the processor's ``max_batches`` (with ``max_overflow=0``): a batch that
      waits for a connection in the pool holds its key, and its deadline is running.
    - ``pool_pre_ping`` is not needed here, and costs each batch a round trip: when the first statement finds that the
      server has closed a connection that was at rest, the load is tried again on a new one.
    - PostgreSQL through psycopg 3 (``postgresql+psycopg://``), patched before it is imported. psycopg2 works where
      psycogreen has made it wait in gevent's way, with a round trip for each statement. MySQL and MariaDB through
      PyMySQL. On MySQL (not on MariaDB) the connections keep the ``innodb_lock_wait_timeout`` of the last batch: where
      others use them too, give the store an engine of its own.
    - SQLite in WAL mode, for files: its driver blocks the whole process. It is locked from the first write of a save to
      its COMMIT, and no other greenlet runs in between. While another process writes, the batch waits in gevent's way.

    Rows beside the resource (`current_batch().add_row`) are mapped instances, pairs of a `Table` (or a mapped class)
    and a dict, or ``insert()`` statements. They are inserted in bulk with the save: instances first, the others in
    their order, neighbours of one table together.

    Attributes:
        table: The table, to be shown to Alembic as a part of its metadata.
        mode: "lock" or "version", as it was chosen.
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
        self._idempotency = parts.idempotency
        self._outcomes = parts.outcomes
        self._kept = parts.kept
        self._bulk = parts.bulk
        self._tenant = parts.tenant
        self._engine = parts.engine
        self._open_scope = parts.open_scope
        self._columns = [key_column(column, parts.engine.dialect) for column in parts.columns]

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
        """Keep documents in a table with the columns key, state and version, of which each save adds one.

        An operation changes the resource in place. A batch that leaves the encoded state as it was writes none.

        Args:
            engine: Where. Its pool gives each batch a connection.
            table: The name of the table; `create_table` makes it, or a migration that knows `table`.
            encode: Makes the state, what `state_type` takes, of a resource. What it raises is the fault of the
                operation that made the resource so: that one's caller gets it. What JSON would lose (a name that is no
                text, a tuple) is such a fault too.
            decode: The other way round, and exactly: what an operation leaves there is what the next one has to find,
                in the same batch or not. What it raises is a `LoadFailed` that names the key.
            mode: "lock" (the default but on SQLite): the row is locked from load to COMMIT, and other writers of it
                wait. "version": nothing is locked, and a save that finds another version than it has loaded is a
                `Conflict`. Everybody who writes has to count the version up then.
            missing: "raise" a `ResourceMissing`; or called with the key, to make the resource. It is inserted with the
                save; when somebody else has inserted it meanwhile, the batch is replayed.
            key_type: Of the column; a text of 255 characters unless given. Keys are converted to its Python type.
            state_type: Of the column; a text of any length unless given. For a JSONB that SQLAlchemy itself encodes,
                pass `JSONB()` and functions that return what they are given.
            metadata: Where to declare the table; a new one unless given.
            schema: Of the table.
            pipeline: Whether to send what belongs together as one message, where the driver is psycopg 3.
            idempotency: The table (`idempotency_table`) that records the outcomes of operations with an idempotency
                key; None: such operations are refused.
            idempotency_ttl: Seconds that an outcome is kept, a day unless given; only with *idempotency*.
            reuse_resource: In mode "version": keep what was saved, so that the next batch of the key loads nothing
                (`Reuse`); None keeps nothing. Every process that writes to the table has to have it: a version is then
                no count, but another number after each save. Only states that are a str or bytes are kept; no trigger
                may change them.

        Raises:
            ValueError: *mode* is none that the database has, or *reuse_resource* is given in mode "lock", or where the
                states are no text and no bytes.
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
        parts = Parts(
            open_scope=partial(DocumentScope, documents),
            engine=engine,
            table=shown,
            columns=[shown.c.key],
            mode=chosen,
            idempotency=idempotency,
            outcomes=outcomes,
            kept=kept,
            bulk=BulkDocuments(documents, shown, [key_column(shown.c.key, engine.dialect)]),
        )
        return SQLAlchemyStore(parts)

    @classmethod
    def mapped(  # noqa: PLR0913 - options are keywords of one constructor
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
    ) -> SQLAlchemyStore[EntityT]:
        """Have instances of a mapped class as resources, each batch in a session of its own.

        The session is at hand in operations: ``object_session(resource)``. They may query in it, add other objects and
        change those; what the session holds is flushed and committed once, at the end. An operation that raises has to
        have left all objects as they were, as always; what it has added is taken out again. If it has flushed, it is
        replayed out. Delete the resource by ``object_session(resource).delete(resource)``, or by
        ``current_batch().delete()``: the operations behind it find none then.

        Whatever a column has may be changed in place: lists, dictionaries, objects of one's own, composites, in the
        resource and in other rows. What the column's type binds of it is compared, in type and in order. When the batch
        has ended, its instances are detached: an operation returns values, not instances whose attributes are loaded
        later.

        What an operation has assigned is found by those behind it as a load would give it: an amount with the places of
        its column, a day without the time, ``"5"`` as a number.

        Other rows that operations change are locked and compared when they are written: a row that somebody else has
        changed since it was read is a `Conflict`. Where a load reads more than the row (``lazy="joined"``, a
        `column_property`), the row is locked by a statement of its own before, in the same message where the driver is
        psycopg 3.

        A statement of an operation finds what those before it have changed; on SQLite, where nothing can be written
        before the batch saves, that is saved first, and the operation is applied to what the next load gives. What
        would end the transaction, or set something in the session of the database, is a RuntimeError in the operation
        that does it.

        Args:
            bind: An engine; or a `sessionmaker` (a `scoped_session`, Flask-SQLAlchemy's `db.session`) whose options
                the sessions of batches are to have.
            entity: The mapped class.
            by: The attribute that keys name: of a unique column. None: the primary key; of several columns: a tuple.
            version: An attribute, a whole number, that counts the saves. Not needed for a class that has a
                ``version_id_col``, which SQLAlchemy counts.
            mode: "lock" (the default but on SQLite): ``SELECT … FOR UPDATE``; other writers of the row wait.
                "version": nothing is locked between load and save. The save then locks the row (of every table of the
                class) and compares PostgreSQL's ``xmin``, elsewhere all columns that were loaded, the version among
                them. Another row, one that was made anew included, is a `Conflict`.
            missing: "raise" a `ResourceMissing`; or called with the key, to make the instance, in which the key is set
                unless it has one. When somebody else has inserted it meanwhile, the batch is replayed.
            pipeline: Whether to send what belongs together as one message, where the driver is psycopg 3.
            tenant: Called at the door of `run`, in its caller's greenlet: whose row it is, where each tenant has tables
                of its own. The key of the batch is then the pair of that and the row's key.
            prepare_connection: Called with the batch's connection and the key, inside the transaction and before the
                load: to set ``search_path``, a role, or what row-level security asks for. On PostgreSQL, what its SET
                sets is gone with the transaction (it is sent as SET LOCAL); elsewhere it stays on the connection until
                the next batch sets it anew. It costs a round trip. What a request has set on a connection of its own
                reaches no batch.
            idempotency: The table (`idempotency_table`) that records the outcomes of operations with an idempotency
                key; None: such operations are refused.
            idempotency_ttl: Seconds that an outcome is kept, a day unless given; only with *idempotency*.

        Raises:
            TypeError: *bind* or *entity* are of a wrong type.
            ValueError: *by* or *version* are not such attributes; or *tenant* is given without *prepare_connection*.

        Switches: no.
        """
        mapper = mapper_of(entity)
        makes = checked(missing, rows=True)
        engine, sessions = session_factory(bind, mapper)
        chosen = mode_of(engine, mode)
        if tenant is not None and prepare_connection is None:
            raise ValueError("tenant is given, but the batch's connection finds its tables by prepare_connection only")
        check_functions(("connection", "key"), prepare_connection=prepare_connection)
        refuse_joined(mapper)
        attributes = key_attributes(mapper, by)
        outcomes = outcome_table(idempotency, engine, idempotency_ttl)
        mapping = Mapping(
            engine=engine,
            sessions=sessions,
            transaction=prepared(
                transaction_class(engine, pipeline=pipeline, locking=chosen == "lock"), prepare_connection
            ),
            mapper=mapper,
            by=attributes,
            missing=makes if tenant is None or makes == "raise" else lambda key: makes(key[1]),
            locking=chosen == "lock",
            version=version_attribute(mapper, version),
            counts_itself=mapper.version_id_col is not None,
            token=() if chosen == "lock" else token_of(mapper, engine.dialect),
            outcomes=outcomes,
            prepare=prepare_connection,
            has_tenants=tenant is not None,
        )
        track_loads(sessions, mapping)
        BatchConnection.watch(engine)
        scope: Any = partial(MappedScope, mapping)
        columns = [attribute.property.columns[0] for attribute in attributes]
        parts = Parts(
            open_scope=scope,
            engine=engine,
            table=mapper.local_table,
            columns=columns,
            mode=chosen,
            idempotency=idempotency,
            outcomes=outcomes,
            tenant=tenant,
        )
        return SQLAlchemyStore(parts)

    def __call__(self, key: Any) -> AbstractContextManager[ResourceT]:
        """Open the resource at *key*: what a processor calls. Switches: no; entering and leaving what it gives does."""
        return self._open_scope(key)

    @property
    def open_resources(self) -> BulkDocuments:
        """The bulk form: ``Processor(open_resources=store.open_resources)``, for many keys with few operations each.

        The documents of all batches that are ready are loaded together and saved together, in one transaction. It takes
        no operations with idempotency keys, and keeps nothing (``reuse_resource``).

        Raises:
            AttributeError: The store is one of mapped classes.
        Switches: no.
        """
        if self._bulk is None:
            raise AttributeError(
                f"{self!r} has no open_resources: a mapped class has no bulk form, only SQLAlchemyStore.documents"
            )
        return self._bulk

    def normalize_key(self, key: Hashable) -> Hashable:
        """The value of the column that *key* stands for: 42 and "42" are one row, and one batch.

        Where there are tenants: the pair of the caller's, and that.

        Raises:
            TypeError: Its type cannot stand for one.
            ValueError: Its type can, and its value does not.
        Switches: no (as ``tenant`` does).
        """
        found = normalize_all(key, self._columns)
        return found if self._tenant is None else (self._tenant(), found)

    def stopped(self) -> None:
        """Let go what is kept: what a processor calls when it has stopped. Switches: no."""
        if self._kept is not None:
            self._kept.clear()

    def create_table(self) -> None:
        """Create the table, and that of the outcomes, unless they are there. Switches: yes.

        It is safe when several processes do so at once.
        """
        create_table(self._engine, self.table)
        if self._idempotency is not None:
            create_table(self._engine, self._idempotency)

    def purge_outcomes(self, limit: int = 10_000) -> int:
        """Delete outcomes that have expired, in a transaction of its own: for a cron job. They count as absent anyway.

        On SQLite, the driver blocks the process while another one writes.

        Args:
            limit: So many at the most, so that nobody waits long for it.

        Returns:
            How many there were. While it is *limit*, there may be more.

        Raises:
            ValueError: The store records none.
        Switches: yes.
        """
        outcomes = self._outcomes
        if outcomes is None:
            raise ValueError(f"{self!r} records no outcomes: pass idempotency=…")
        with _engines.own(self._engine).begin() as connection:
            return outcomes.purge(connection.exec_driver_sql, limit)
