"""A table of outcomes as Django knows it: for the models of an application that uses idempotency keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db import models

from geventbatch.stores._sql.outcomes import ID_LENGTH

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


class OutcomeIdField(models.CharField):  # type: ignore[type-arg]  # it takes none at run time
    """A text of ASCII, compared byte by byte: any other collation is slower, or takes two texts for one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """As long as an outcome's id may be."""
        super().__init__(*args, **{**options, "max_length": ID_LENGTH})

    def deconstruct(self) -> tuple[str, str, Any, Any]:
        """For migrations."""
        name, _, args, options = super().deconstruct()
        options.pop("max_length")
        return name, "geventbatch.integrations.django.models.OutcomeIdField", args, options

    def db_type(self, connection: BaseDatabaseWrapper) -> str | None:
        """For PostgreSQL by its long name: by the other one Django would make a second index, for LIKE."""
        return f"character varying({ID_LENGTH})" if connection.vendor == "postgresql" else super().db_type(connection)

    def db_parameters(self, connection: BaseDatabaseWrapper) -> Any:
        """The collation that does that."""
        collation = {"postgresql": "C", "mysql": "ascii_bin"}.get(connection.vendor)
        return {**super().db_parameters(connection), "collation": collation}


class OutcomeModel(models.Model):
    """The outcomes of operations with an idempotency key: subclass it in an app of yours, and make its migration.

    Several stores of one database may share a subclass.
    """

    id: models.CharField[str, str] = OutcomeIdField(primary_key=True, serialize=False)
    outcome: models.TextField[str, str] = models.TextField()
    expires: models.BigIntegerField[int, int] = models.BigIntegerField(db_index=True)

    class Meta:
        """No table of its own."""

        abstract = True

    def __str__(self) -> str:
        """The idempotency key, behind what stands for the resource."""
        return self.id
