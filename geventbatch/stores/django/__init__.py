"""`DjangoStore`: a row of a Django model as the resource of a batch, loaded and saved in one transaction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from django.db import connections
from django.db.models import Model
from django.db.transaction import atomic
from gevent import getcurrent

from geventbatch._check_callables import check_functions
from geventbatch._core.process import running
from geventbatch._safe_repr import shown
from geventbatch._watch import threads
from geventbatch.stores._sql.outcomes import seconds_to_keep
from geventbatch.stores.django._connections import check_backend, current, own, pool
from geventbatch.stores.django._model_bulks import ModelBulks
from geventbatch.stores.django._model_rows import by_name, rows_of
from geventbatch.stores.django._models import Models
from geventbatch.stores.django._scope import Scope
from geventbatch.stores.django._tenants import Place, watch
from geventbatch.stores.django._transaction import send

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from django.db.backends.base.base import BaseDatabaseWrapper

    from geventbatch.integrations.django.models import OutcomeModel

M = TypeVar("M", bound=Model)

Mode = Literal["lock", "version"]
Missing = Literal["raise"] | Callable[[Any], M]


class DjangoStore(Generic[M]):
    """Loads and saves the rows of one model, or of several: what a `Processor` takes as its ``open_resource``.

    The resource is the model instance. An operation changes its fields. The store writes the fields that differ from
    the loaded ones, even a JSON document changed in place. Whatever else an operation does through the ORM is in the
    same transaction. ``resource.save()`` inside an operation writes nothing by itself: the store saves once, at the
    end. ``resource.delete()`` is `current_batch().delete()`. `current_batch().add_row(instance)` inserts an unsaved
    instance of any model with the save, all of one model in one statement (`bulk_create`: no `save`, no signals).

    Each batch borrows a connection and returns it, so there are never more connections than running batches
    (``max_batches``). With ``batching=False`` it uses its caller's own connection. Inside an `atomic()` block, such
    a batch is a savepoint of the block: an answer means saved only when the block commits. In a
    `django.test.TestCase` this is automatic.

    SQLite locks no rows: a batch compares the row before it writes, under the database's write lock. Elsewhere it
    does so in mode "version" if there is no version to compare.

    Args:
        model: A concrete model. Or several of the same database, by name: ``{"seat": Seat, "wallet": Wallet}``. Then
            a key is a pair of a name and the row's key, such as ``("seat", 12)``; and *by*, *version*, *missing* and
            *manager* may be a dict by name too, else they are for all models.
        by: The field whose value is the key: "pk", or another unique field; or the names of several fields that are
            unique together. The key of several fields, or of a composite primary key, is a tuple.
        mode: "lock" locks the row from load to save (``SELECT … FOR UPDATE``), so that other writers wait; the default
            if the database can. "version" locks nothing, and replays the batch if another writer was faster.
        version: The name of an integer field that every save counts up, for mode "version" to compare. Without one,
            PostgreSQL's ``xmin`` is compared, which other writers change automatically; elsewhere (and for a view) the
            whole row is. It is compared with a version too, since a row that was deleted and made anew may have the
            same version.
        missing: For a key without a row: "raise" raises `ResourceMissing`; a function of the key returns a new,
            unsaved instance, which the batch inserts.
        manager: The name of the manager that finds the rows, if some are hidden (deleted softly): a hidden row counts
            as missing. By default the model's base manager. Its joins and deferred fields are not used.
        using: The alias of the database.
        allow_atomic: Allow `run` inside an `atomic()` block of the same database. The batch is then saved whether or
            not the block is rolled back. If the block has locked a row of the batch, the batch waits until its
            deadline.
        conn_max_age: Seconds that an idle connection is kept for the next batch. ``CONN_MAX_AGE``, which is for
            requests, does not count here. With Django's own pool (``OPTIONS["pool"]``), connections return to that.
        pipeline: With psycopg 3, send BEGIN with the SELECT, and COMMIT with the last statement, in one round trip
            each. Set it to False if a proxy before the server takes no pipelines.
        tenant: A function without arguments that returns the tenant, if each has a schema of its own. It is called at
            the door of `run`, in its caller's greenlet. The batch's key is then the pair of tenant and row key.
        prepare_connection: Called with the batch's Django connection and the key, inside the transaction and before
            the load: to set ``search_path``, a role, or settings for row-level security. On PostgreSQL, its SET ends
            with the transaction (it is sent as SET LOCAL). It costs two round trips.
        idempotency: A subclass of `OutcomeModel` that records the outcomes of operations with an idempotency key.
            None: such operations are refused.
        idempotency_ttl: Seconds that an outcome is kept, by default a day; only with *idempotency*.

    Attributes:
        model: The model, or the dict of them, as given.
        using: The alias of the database.
        allow_atomic: As given.

    Raises:
        TypeError: An argument is of a wrong type, or the model's own `save` takes no ``using``.
        ValueError: *by*, *version* or *manager* names no fitting field or manager, *mode* is no mode, or a name in the
            database has a %, which Django cannot send.
    Switches: no.
    """

    def __init__(  # noqa: PLR0913 - each is a keyword
        self,
        model: type[M] | Mapping[str, type[M]],
        *,
        by: str | Sequence[str] | Mapping[str, str | Sequence[str]] = "pk",
        mode: Mode | None = None,
        version: str | Mapping[str, str | None] | None = None,
        missing: Missing[M] | Mapping[str, Missing[M]] = "raise",
        manager: str | Mapping[str, str | None] | None = None,
        using: str = "default",
        allow_atomic: bool = False,
        conn_max_age: float = 60.0,
        pipeline: bool = True,
        tenant: Callable[[], Hashable] | None = None,
        prepare_connection: Callable[[BaseDatabaseWrapper, Any], object] | None = None,
        idempotency: type[OutcomeModel] | None = None,
        idempotency_ttl: float | None = None,
    ) -> None:
        """See the class."""
        if mode not in (None, "lock", "version"):
            raise ValueError(f'mode is {shown(mode)}, but must be "lock", "version" or None')
        check_functions((), tenant=tenant)
        check_functions(("connection", "key"), prepare_connection=prepare_connection)
        check_backend(using, locking=mode != "version")
        self.model: Any = model
        self.using = using
        self.allow_atomic = allow_atomic
        shared: dict[str, Any] = {
            "using": using,
            "may_lock": mode != "version",
            "pipeline": pipeline,
            "pool": pool(using, conn_max_age, prepare_connection),
            "tenant": tenant,
            "prepare_connection": prepare_connection,
            "idempotency": None if idempotency is None else _outcome_model(idempotency),
            "idempotency_ttl": seconds_to_keep(idempotency_ttl, idempotency),
        }
        of_model = {"by": by, "version": version, "missing": missing, "manager": manager}
        self._models: Models[M] = Models(
            {name: rows_of(one, name, shared, **of_one) for name, one, of_one in by_name(model, of_model)}
        )
        if tenant is not None and prepare_connection is None:
            raise ValueError("tenant is given, but the batch's connection finds its tables by prepare_connection only")
        self._place = None if prepare_connection is not None else Place(using, shared["pool"])
        if self._place is not None:
            watch(using)

    def __repr__(self) -> str:
        """Say which rows it stores, by which key."""
        return f"<DjangoStore: {self._models!r} in {self.using!r}>"

    def __call__(self, key: Any) -> AbstractContextManager[M]:
        """Return the scope of a batch on the row at *key*. Switches: no."""
        return Scope(self._models.of(key), key)

    def normalize_key(self, key: Hashable) -> Hashable:
        """Return *key* in the type of its column, so that 42 and "42" are one.

        Raises:
            TypeError: Its type cannot be such a key.
            ImpossibleKey: Its type can, and its value is none.
        Switches: no (as ``tenant`` does).
        """
        return self._models.normalize(key)

    @property
    def open_resources(self) -> ModelBulks[M]:
        """The rows of many keys in one transaction: what a `Processor` takes as its ``open_resources``.

        It is used by `run_across` too: what an operation changes at several keys is saved together or not at all.

        Raises:
            TypeError: The store has a *prepare_connection*, which prepares a transaction for one key.
        Switches: no.
        """
        if self._models.any.prepare_connection is not None:
            raise TypeError(
                f"{self!r} has no form for many keys, since prepare_connection prepares a transaction for one of them: "
                "open one key at a time"
            )
        return ModelBulks(self, self._models)

    def admit(self, key: Hashable) -> bool:
        """Return whether an operation called here runs unbatched, on its caller's connection.

        It does inside a `TestCase`, and in a process that gevent has not patched: ``runserver`` and gunicorn's
        ``--threads``, which are warned once, and a management command.

        Raises:
            RuntimeError: Called inside a transaction of the same database (and not *allow_atomic*), or with a
                connection that finds other tables than the batch would.
        Switches: the first time, to connect.
        """
        connection = current(self.using)
        alone = threads.run_unbatched()
        if connection is not None and self._place is not None and not alone:
            self._place.check(connection, key)
        if connection is None or not _in_transaction(connection):
            return alone
        if connection.in_atomic_block and all(
            getattr(one, "_from_testcase", False) for one in connection.atomic_blocks
        ):
            return True
        if self.allow_atomic:
            return alone
        outer = running.get(getcurrent())
        if outer is not None:
            raise RuntimeError(
                f"run() on key {shown(key)} was called inside the batch of key {shown(outer.batch.key)}, in a "
                f"transaction of the database {self.using!r}: each batch would be saved without the other, and "
                "might wait for rows that the other has locked. Nothing of it was run. Call it after the other; or "
                "change both resources in one operation, by run_across() of a DjangoStore of both models"
            )
        raise RuntimeError(
            f"an operation on key {shown(key)} was called inside a transaction of the database {self.using!r} "
            "(atomic(), or ATOMIC_REQUESTS): a rollback of it would not undo what the batch has saved, and the batch "
            "would wait for rows that it has locked. Leave the block first; with ATOMIC_REQUESTS, decorate the view "
            "with django.db.transaction.non_atomic_requests. (DjangoStore(allow_atomic=True) permits it all the same.)"
        )

    @property
    def on_server(self) -> bool:
        """Return whether a database server is behind it, which may take its time."""
        engine: str = connections.settings.get(self.using, {}).get("ENGINE", "sqlite3")
        return not engine.endswith("sqlite3")

    @property
    def keeps_outcomes(self) -> bool:
        """Return whether it records the outcomes of operations with an idempotency key."""
        return self._models.any.idempotency is not None

    def purge_outcomes(self, limit: int = 10_000) -> int:
        """Delete expired outcomes, in a transaction of its own: for a cron job. They count as absent anyway.

        On SQLite, the driver blocks the process while another process writes.

        Args:
            limit: The most outcomes to delete, so that no transaction waits long for it.

        Returns:
            The number of deleted outcomes. If it is *limit*, there may be more.

        Raises:
            ValueError: The store records no outcomes.
        Switches: yes.
        """
        if not self.keeps_outcomes:
            raise ValueError(f"{self!r} records no outcomes: pass idempotency=…")
        connection = own(self.using)
        table = self._models.any.outcome_table(connection)
        with atomic(using=self.using):
            return table.purge(partial(send, connection), limit)

    def stopped(self) -> None:
        """Close the store's idle connections. A later batch opens new ones. Switches: no."""
        self._models.any.pool.close()


def _outcome_model(model: Any) -> type[OutcomeModel]:
    from geventbatch.integrations.django.models import OutcomeModel  # importing it needs Django set up

    if not isinstance(model, type) or not issubclass(model, OutcomeModel) or model._meta.abstract:
        raise TypeError(
            f"idempotency is {shown(model)}, but must be a subclass of OutcomeModel in an app of yours, or None"
        )
    return model


def _in_transaction(connection: BaseDatabaseWrapper) -> bool:
    if connection.in_atomic_block:
        return True
    if connection.connection is None or connection.autocommit:  # `get_autocommit` looks for an event loop each time
        return False
    return bool(connection.settings_dict["AUTOCOMMIT"])
