"""The rows that operations have added with `Batch.add_row`: inserted with the save, grouped by model."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from django.db.models import Model

from geventbatch._safe_repr import shown
from geventbatch.stores.django._messages import Written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geventbatch.stores.django._transaction import Transaction


def add_rows(rows: Sequence[object], transaction: Transaction, *, commits: bool) -> None:
    """Insert *rows*, and COMMIT with the last statement if it *commits*. Switches: yes."""
    if rows:
        transaction.take_write_lock()
    groups = [(model, list(group)) for model, group in groupby(_by_model(rows), key=type)]
    for number, (model, group) in enumerate(groups, 1):
        _add_group(model, group, transaction, commits=commits and number == len(groups))


def _add_group(model: type[Model], group: list[Model], transaction: Transaction, *, commits: bool) -> None:
    connection = transaction.connection
    if model._meta.parents:  # what bulk_create cannot do
        for row in group:
            row.save(using=connection.alias, force_insert=True)
        return
    most = connection.ops.bulk_batch_size([*model._meta.concrete_fields], group)
    commits = commits and len(group) <= most and len({row.pk is None for row in group}) == 1
    with transaction.saving(commits=Written(model._meta.db_table, len(group)) if commits else None):
        model._base_manager.using(connection.alias).bulk_create(group)


def _by_model(rows: Sequence[object]) -> list[Model]:
    """Return the rows grouped by model, the models in the order of their first row."""
    order: dict[type[Model], list[Model]] = {}
    for row in rows:
        if not isinstance(row, Model):
            raise TypeError(f"add_row was given {shown(row)}, but DjangoStore inserts unsaved model instances")
        order.setdefault(type(row), []).append(row)
    return [row for group in order.values() for row in group]
