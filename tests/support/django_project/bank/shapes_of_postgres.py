"""Models with columns that only PostgreSQL has."""

from __future__ import annotations

from typing import Any

from django.contrib.postgres.fields import ArrayField, DateTimeRangeField, IntegerRangeField
from django.db import models


class Series(models.Model):
    numbers: Any = ArrayField(models.IntegerField(), default=list)
    flags: Any = ArrayField(ArrayField(models.BooleanField()), default=list)
    span: Any = IntegerRangeField(null=True)
    time: Any = DateTimeRangeField(null=True)
    document: Any = ArrayField(models.JSONField(), default=list)

    class Meta:
        app_label = "bank"
