"""The load of a bulk: the rows of many keys, of each model with one statement, in the order of their primary keys."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from django.db import Error
from django.db.models import IntegerField, Model, Q, UUIDField
from django.db.transaction import atomic

from geventbatch._batch import batch_at_hand
from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict
from geventbatch.stores._sql import errors
from geventbatch.stores.django._fields import referenced
from geventbatch.stores.django._models import tables_of
from geventbatch.stores.django._row import Row, identity_of
from geventbatch.stores.django._selection import Selection
from geventbatch.stores.django._transaction import send

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper

    from geventbatch.stores.django._model_rows import ModelRows
    from geventbatch.stores.django._models import Models
    from geventbatch.stores.django._transaction import Transaction

Loaded = dict[Any, "Row[Any] | Exception"]

_AT_ONCE: Final = 500
"""Rows of one statement, where the database limits the number of its parameters."""


class BulkLoad:
    """Loads the rows of one attempt."""

    def __init__(self, models: Models[Any], connection: BaseDatabaseWrapper, transaction: Transaction) -> None:
        self._models = models
        self._connection = connection
        self._transaction = transaction
        # -- mutable state ---------------------------------------------------------------------------------
        self.model: ModelRows[Any] = models.any
        """The model at hand."""
        self.selections: dict[str | None, Selection[Any]] = {}
        """By the model's name."""
        self._begun = False

    def load(self, keys: Sequence[Hashable]) -> Loaded:
        """Return the row of each key, or the error of its load. Switches: yes."""
        found: Loaded = {}
        for rows, of_model in self._by_model(keys):
            found |= self._load(rows, of_model)
        return self._each_once(found)

    def load_singly(self, keys: Sequence[Hashable]) -> Loaded:
        """Load each row by itself, since the database refuses some key. Switches: yes."""
        with self._transaction.loading():
            pass
        found: Loaded = {}
        for rows, of_model in self._by_model(keys):
            for key in of_model:
                try:
                    with atomic(using=rows.using):
                        row = self._row(rows, key)
                        found[key] = self._taken(row, row.find())
                except Error as error:
                    if errors.kind(error) not in errors.OF_OPERATION:
                        raise
                    found[key] = error
                except Exception as error:
                    found[key] = error
        return self._each_once(found)

    def _each_once(self, found: Loaded) -> Loaded:
        """Put errors in place of rows that are those of other keys too: two models may have the same rows."""
        taken: dict[object, Any] = {}
        for key, row in found.items() if self._models.share_rows else ():
            if isinstance(row, Row) and not row.new:
                tables = tables_of(type(row.instance))
                rows = [(table, identity_of(row.instance, one, self._connection)) for table, one in tables.items()]
                other = next((taken[one] for one in rows if one in taken), None)
                if other is None:
                    taken.update(dict.fromkeys(rows, key))
                else:
                    found[key] = _same_row(key, other)
        return found

    def _by_model(self, keys: Sequence[Hashable]) -> Iterator[tuple[ModelRows[Any], list[Any]]]:
        for rows in self._models.in_order:
            of_model = [key for key in keys if self._models.of(key) is rows]
            if of_model:
                self.model = rows
                self.selections[rows.name] = Selection(rows, self._connection)
                yield rows, of_model

    def _row(self, rows: ModelRows[Any], key: Any) -> Row[Any]:
        return Row(rows, key, self._connection, self._transaction, self.selections[rows.name])

    def _load(self, rows: ModelRows[Any], keys: list[Any]) -> Loaded:
        try:
            instances = [one for some in self._chunks(keys) for one in self._fetch(rows, some)]
        except Error:
            raise
        except Exception:  # raised by a field that converts a column's value: it is the error of one key
            return {key: self._found(self._row(rows, key), {}) for key in keys}
        by_part: dict[Any, Model] = {}
        for instance in instances:
            by_part[_part_of(rows, instance)] = instance
        found: Loaded = {}
        left: list[Any] = []
        taken: dict[tuple[object, ...], Any] = {}
        for key in keys:
            matched = by_part.pop(rows.key_of_row(key), None)
            if matched is None:
                left.append(key)
            else:
                found[key] = self._taken(self._row(rows, key), matched)
                taken[identity_of(matched, rows.model, self._connection)] = key
        asks = bool(by_part) or _folds(rows, self._connection)
        for key in left:
            row = self._row(rows, key)
            found[key] = self._found(row, taken) if asks else self._taken(row, None)
        return found

    def _chunks(self, keys: list[Any]) -> Iterator[list[Any]]:
        limited = self._connection.features.max_query_params is not None
        most = _AT_ONCE if limited else len(keys)
        for first in range(0, len(keys), most):
            yield keys[first : first + most]

    def _fetch(self, rows: ModelRows[Any], keys: list[Any]) -> list[Model]:
        fields = rows.row_key.fields
        parts = [rows.key_of_row(key) for key in keys]
        if len(fields) == 1:
            first, query = self.selections[rows.name].to_load(**{f"{fields[0].attname}__in": parts})
        else:
            where = Q(*(Q(**rows.row_key.where(part)) for part in parts), _connector=Q.OR)
            first, query = self.selections[rows.name].to_load(where)
        query = query.order_by("pk")
        if self._begun:
            for statement in first:
                send(self._connection, *statement)
        with nullcontext() if self._begun else self._transaction.loading(*first):
            self._begun = True
            return list(query)

    def _found(self, row: Row[Any], taken: dict[tuple[object, ...], Any]) -> Row[Any] | Exception:
        """Load one row by itself: the database may take several keys for one. A bulk has each row once."""
        try:
            instance = row.find()
        except Error:
            raise
        except Exception as error:
            return error
        found = self._taken(row, instance)
        if instance is None or isinstance(found, Exception):
            return found
        other = taken.setdefault(found.identity, found.key)
        if other is not found.key:
            return Conflict(f"{shown(row.key)} names a row that the bulk has loaded for {shown(other)}")
        return found

    def _taken(self, row: Row[Any], instance: Model | None) -> Row[Any] | Exception:
        try:
            row.take(instance)
        except Error:
            raise
        except Exception as error:
            return error
        return row


def _same_row(key: Hashable, other: Hashable) -> Exception:
    """Return the error of *key*, which names the row that *other* has."""
    told = f"{shown(key)} names the same row as {shown(other)}"
    bulk = batch_at_hand().bulk
    if bulk[key] is not bulk[other]:
        return Conflict(f"{told}, of the same bulk")
    # A replay would find the same.
    return ValueError(f"{told}, which operations connect with it: always name it by one of the models")


def _part_of(rows: ModelRows[Any], instance: Model) -> Any:
    """Return the row's own key in the form of a batch's; else any object that is no key."""
    try:
        return rows.row_key.normalize(rows.row_key.of(instance))
    except Exception:
        return object()


def _folds(rows: ModelRows[Any], connection: BaseDatabaseWrapper) -> bool:
    """Return whether the database may take several keys for one, by a collation or a type of its own."""
    for field in map(referenced, rows.row_key.fields):
        plain: Any = field
        if isinstance(field, IntegerField | UUIDField):
            continue
        is_text = field.get_internal_type() in {"CharField", "TextField", "SlugField", "EmailField", "URLField"}
        by_bytes = connection.vendor in {"postgresql", "sqlite"} and not getattr(plain, "db_collation", None)
        if not (is_text and by_bytes and type(field).__module__.startswith("django.db.models.")):
            return True
    return False
