"""The one table, for Django."""

from __future__ import annotations

from django.db import models


class Account(models.Model):
    """Somebody's money."""

    number: models.IntegerField[int, int] = models.IntegerField(primary_key=True)
    balance: models.IntegerField[int, int] = models.IntegerField()

    def __str__(self) -> str:
        return f"account {self.number}"
