"""The one table, for Django."""

from django.db import models


class Account(models.Model):
    """Somebody's money."""

    number = models.IntegerField(primary_key=True)
    balance = models.IntegerField()

    def __str__(self) -> str:
        return f"account {self.number}"
