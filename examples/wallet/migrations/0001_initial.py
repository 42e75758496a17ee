"""All tables."""

from typing import ClassVar

import django.utils.timezone
from django.db import migrations, models
from django.db.models.deletion import PROTECT

KINDS = [("deposit", "Deposit"), ("transfer", "Transfer"), ("debit", "Debit"), ("credit", "Credit")]


def _id() -> "tuple[str, models.BigAutoField[int, int]]":
    return "id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")


class Migration(migrations.Migration):
    """All tables."""

    initial = True
    dependencies: ClassVar = []
    operations: ClassVar = [
        migrations.CreateModel(
            name="Account",
            fields=[
                _id(),
                ("owner", models.CharField(max_length=80)),
                ("balance", models.BigIntegerField(default=0)),
            ],
            options={
                "base_manager_name": "objects",
                "constraints": [
                    models.CheckConstraint(condition=models.Q(balance__gte=0), name="balance_not_below_zero"),
                ],
            },
        ),
        migrations.CreateModel(
            name="Pending",
            fields=[
                ("reference", models.UUIDField(primary_key=True, serialize=False)),
                ("amount", models.BigIntegerField()),
                ("at", models.DateTimeField(db_index=True, default=django.utils.timezone.now)),
                ("target", models.ForeignKey(on_delete=PROTECT, related_name="+", to="wallet.account")),
            ],
        ),
        migrations.CreateModel(
            name="Movement",
            fields=[
                _id(),
                ("reference", models.UUIDField()),
                ("kind", models.CharField(choices=KINDS, max_length=8)),
                ("amount", models.BigIntegerField()),
                ("source_balance", models.BigIntegerField(null=True)),
                ("target_balance", models.BigIntegerField(null=True)),
                ("at", models.DateTimeField(default=django.utils.timezone.now)),
                ("source", models.ForeignKey(null=True, on_delete=PROTECT, related_name="+", to="wallet.account")),
                ("target", models.ForeignKey(null=True, on_delete=PROTECT, related_name="+", to="wallet.account")),
            ],
            options={
                "constraints": [
                    models.UniqueConstraint(fields=("reference", "kind"), name="movement_once"),
                    models.CheckConstraint(condition=models.Q(amount__gt=0), name="movement_amount_above_zero"),
                ],
            },
        ),
    ]
