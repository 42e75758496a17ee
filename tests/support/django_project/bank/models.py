from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from django.db import models
from django.utils.functional import cached_property

from geventbatch.integrations.django.models import OutcomeModel

if TYPE_CHECKING:
    from datetime import datetime

    from django.db.models.fields.related_descriptors import RelatedManager


# Which types the fields have is said without a plugin of mypy's, which would import the settings.


class Account(models.Model):
    name: models.CharField[str, str] = models.CharField(max_length=200, unique=True)
    balance: models.IntegerField[int, int] = models.IntegerField(default=0)
    document: models.JSONField[Any, Any] = models.JSONField(default=dict)
    note: models.TextField[str, str] = models.TextField(default="")
    changed_at: models.DateTimeField[datetime, datetime] = models.DateTimeField(auto_now=True)

    if TYPE_CHECKING:
        entries: RelatedManager[Entry]

    class Meta:
        app_label = "bank"


class Number(models.TextField):  # type: ignore[type-arg]  # it takes none at run time
    """A number as a text, which may be none."""

    def from_db_value(self, value: str | None, *_: object) -> int | None:
        return None if value is None else int(value)

    def to_python(self, value: Any) -> Any:
        return None if value is None else int(value)

    def get_prep_value(self, value: Any) -> Any:
        return None if value is None else str(int(value))


class Purse(models.Model):
    """What the contract suite has its totals in."""

    name: models.CharField[str, str] = models.CharField(max_length=200, unique=True)
    version: models.IntegerField[int, int] = models.IntegerField(default=0)
    total: Any = Number(default=0)

    class Meta:
        app_label = "bank"


class Entry(models.Model):
    """A row beside an account."""

    account: models.ForeignKey[Account | None, Account | None] = models.ForeignKey(
        Account, models.CASCADE, null=True, related_name="entries"
    )
    text: models.CharField[str, str] = models.CharField(max_length=200, unique=True)

    class Meta:
        app_label = "bank"


class Ticket(models.Model):
    """With a version column, and a key of numbers."""

    number: models.IntegerField[int, int] = models.IntegerField(primary_key=True)
    version: models.IntegerField[int, int] = models.IntegerField(default=0)
    total: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"


class Audited(models.Model):
    """Whose `save` does more than one statement."""

    name: models.CharField[str, str] = models.CharField(max_length=200, unique=True)
    total: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"

    def save(self, *args: Any, **kwargs: Any) -> None:
        super().save(*args, **kwargs)
        Entry.objects.using(kwargs["using"]).create(text=f"{self.name} {self.total}")


class Savings(Account):
    """In a table of its own, beside that of its parent."""

    rate: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"


class Card(models.Model):
    """With a relation, and what is computed once for each instance."""

    owner: models.ForeignKey[Account | None, Account | None] = models.ForeignKey(Account, models.CASCADE, null=True)
    spent: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"

    @cached_property
    def twice(self) -> int:
        return 2 * self.spent

    @functools.cached_property
    def thrice(self) -> int:
        return 3 * self.spent


class Outcome(OutcomeModel):
    class Meta:
        app_label = "bank"


MODELS: tuple[type[models.Model], ...] = (Account, Purse, Entry, Ticket, Audited, Savings, Card, Outcome)


class Noting(Account):
    """An account whose save writes what operations have left in an attribute that is no column."""

    class Meta:
        proxy = True

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.note = " ".join(self.__dict__.get("noted", ()))
        super().save(*args, **kwargs)
