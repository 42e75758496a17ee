"""What Django has for the judge: `atomic()` and `save()`, and its store. Failing programs have it in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db import connections
from django.db.transaction import atomic

from geventbatch import ResourceMissing
from geventbatch.stores import DjangoStore
from tests.support.oracle.judge import Alone, frozen, transaction_of_one

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class DjangoWorld:
    """A model, as its source has made it, in one database."""

    ordered = True

    def __init__(self, model: dict[str, Any], *, mode: Any = None, pipeline: bool = True, bulk: bool = False) -> None:
        self.model = model
        self.using: str = model["USING"]
        self.keys = model["KEYS"]
        self.key = self.keys[0]
        self.bulk = bulk
        self.ordered = model["ORDERED"]
        self.atomic_foreign = mode != "version" and connections[self.using].vendor != "sqlite"
        self._store: Any = DjangoStore(
            model["Thing"], by=model["BY"], version=model["VERSION"], mode=mode, pipeline=pipeline, using=self.using
        )

    def store(self) -> Any:
        """What a processor takes."""
        return self._store

    def fill(self) -> None:
        """Have the rows that a trial begins with, and no others."""
        with atomic(using=self.using):
            with connections[self.using].cursor() as cursor:
                for one in reversed(self.model["MODELS"]):
                    cursor.execute(f"DELETE FROM {one._meta.db_table}")  # noqa: S608 - names of our own
            self.model["fill"]()
            if connections[self.using].vendor == "postgresql":
                with connections[self.using].cursor() as cursor:
                    cursor.execute(f"SELECT setval(pg_get_serial_sequence('{self.model['PREFIX']}other', 'id'), 100)")

    def foreign(self, write: Callable[[Any], object], at: int = 0) -> None:
        """Have somebody else write, by another connection."""
        try:
            with atomic(using=self.using):
                resource = self._rows(self.keys[at]).select_for_update().first()
                if resource is not None:
                    write(resource)
                    resource.save()
        finally:
            connections[self.using].close()

    def alone(self, operations: Sequence[Any]) -> Alone:
        """What comes of these, in one transaction by Django's plain means."""
        found = Alone()
        try:
            with atomic(using=self.using), transaction_of_one() as (rows, deleted):
                for operation in operations:
                    resources = [self._found(self.keys[one]) for one in operation.at]
                    found.answers.append(frozen(operation(*resources), ordered=self.ordered))
                    for place, resource in enumerate(resources):
                        if place in deleted:
                            resource.delete()
                        else:
                            resource.save()
                    deleted.clear()
                for row in rows:
                    of: Any = type(row)
                    of._base_manager.using(self.using).bulk_create([row])
        except Exception as error:
            found.fail(error, len(operations))
        return found

    def rows(self) -> dict[str, list[Any]]:
        """All rows of all tables, frozen, without what counts or stamps saves."""
        return {one._meta.db_table: self._rows_of(one) for one in self.model["MODELS"]}

    def _rows_of(self, model: Any) -> list[Any]:
        ignored = self.model["IGNORED"]
        sequence = model.__name__ in {"Other", "Child"}  # its ids are
        names = [
            field.attname
            for field in model._meta.local_concrete_fields
            if field.name not in ignored and not (sequence and field.primary_key)
        ]
        found = model._base_manager.using(self.using).order_by("pk").values_list(*names)
        shown = [frozen(list(row), ordered=self.ordered) for row in found]
        return sorted(shown, key=repr) if model.__name__ == "Other" else shown

    def _rows(self, key: Any) -> Any:
        return self.model["Thing"]._base_manager.using(self.using).filter(**{self.model["BY"]: key})

    def _found(self, key: Any) -> Any:
        resource = self._rows(key).first()
        if resource is None:
            raise ResourceMissing("there is none", key=key)
        return resource
