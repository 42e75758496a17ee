"""The table of outcomes as a Django model, for applications that use idempotency keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db import models

from geventbatch.stores._sql.outcomes import ID_LENGTH

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


class OutcomeIdField(models.CharField):  # type: ignore[type-arg]  # it takes none at run time
    """An ASCII text that is compared byte by byte. Another collation would be slower, or take two texts for one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Set the longest length of an outcome's id."""
        super().__init__(*args, **{**options, "max_length": ID_LENGTH})

    def deconstruct(self) -> tuple[str, str, Any, Any]:
        """Return the arguments for migrations."""
        name, _, args, options = super().deconstruct()
        options.pop("max_length")
        return name, "geventbatch.integrations.django.models.OutcomeIdField", args, options

    def db_type(self, connection: BaseDatabaseWrapper) -> str | None:
        """Return the type's long name on PostgreSQL: with ``varchar``, Django would add a second index, for LIKE."""
        return f"character varying({ID_LENGTH})" if connection.vendor == "postgresql" else super().db_type(connection)

    def db_parameters(self, connection: BaseDatabaseWrapper) -> Any:
        """Return the parameters with a byte-by-byte collation."""
        collation = {"postgresql": "C", "mysql": "ascii_bin"}.get(connection.vendor)
        return {**super().db_parameters(connection), "collation": collation}


class OutcomeModel(models.Model):
    """The outcomes of operations with an idempotency key. Subclass it in an app of yours, and make its migration.

    Several stores of one database may share a subclass.
    """

    id: models.CharField[str, str] = OutcomeIdField(primary_key=True, serialize=False)
    outcome: models.TextField[str, str] = models.TextField()
    expires: models.BigIntegerField[int, int] = models.BigIntegerField(db_index=True)

    class Meta:
        """Options of the model: it is abstract."""

        abstract = True

    def __str__(self) -> str:
        """Return the id: a mark of the resource, then the idempotency key."""
        return self.id
