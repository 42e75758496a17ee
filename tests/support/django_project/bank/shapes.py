"""Models of many shapes, for what DjangoStore takes. Their tables are made by the tests that need them."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from django.db import models
from django.db.models import Count
from django.db.models.fields.json import KT
from django.db.models.functions import Coalesce, Concat, Now, Upper

from tests.support.django_project.bank.models import Savings

if TYPE_CHECKING:
    from datetime import datetime
    from decimal import Decimal


class Agent(models.Model):
    name: models.CharField[str, str] = models.CharField(max_length=20)
    active: models.BooleanField[bool, bool] = models.BooleanField(default=True)

    class Meta:
        app_label = "bank"


class Joined(models.Manager):  # type: ignore[type-arg]  # it takes none at run time
    def get_queryset(self) -> Any:
        return super().get_queryset().select_related("agent").defer("note")


class Active(models.Manager):  # type: ignore[type-arg]
    def get_queryset(self) -> Any:
        return super().get_queryset().filter(agent__active=True)


class Kept(models.Manager):  # type: ignore[type-arg]
    def get_queryset(self) -> Any:
        return super().get_queryset().filter(deleted=False)


class Counted(models.Manager):  # type: ignore[type-arg]
    def get_queryset(self) -> Any:
        return super().get_queryset().annotate(branches=Count("branch"))


class Nowhere(models.Manager):  # type: ignore[type-arg]
    def get_queryset(self) -> Any:
        return super().get_queryset().none()


class Client(models.Model):
    """Whose managers join, leave out, count and sort."""

    number: models.CharField[str, str] = models.CharField(max_length=20, unique=True)
    balance: models.IntegerField[int, int] = models.IntegerField(default=0)
    note: models.TextField[str, str] = models.TextField(default="a note")
    deleted: models.BooleanField[bool, bool] = models.BooleanField(default=False)
    agent: models.ForeignKey[Agent | None, Agent | None] = models.ForeignKey(Agent, models.SET_NULL, null=True)

    objects: models.Manager[Client] = models.Manager()
    joined = Joined()
    active = Active()
    kept = Kept()
    counted = Counted()
    nowhere = Nowhere()

    class Meta:
        app_label = "bank"
        base_manager_name = "joined"
        ordering = ("agent__name",)


class Branch(models.Model):
    client: models.ForeignKey[Client, Client] = models.ForeignKey(Client, models.CASCADE)

    class Meta:
        app_label = "bank"


class Seat(models.Model):
    """With a primary key of two columns, and two others that are unique together."""

    pk = models.CompositePrimaryKey("line", "number")
    line: models.CharField[str, str] = models.CharField(max_length=20)
    number: models.IntegerField[int, int] = models.IntegerField()
    coach: models.IntegerField[int, int] = models.IntegerField(default=1)
    window: models.IntegerField[int, int] = models.IntegerField(default=1)
    sold: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"
        constraints = (models.UniqueConstraint(fields=("coach", "window"), name="one_seat"),)


class Limited(models.Model):
    """With values that the database gives to a new row."""

    number: models.CharField[str, str] = models.CharField(max_length=20, unique=True)
    balance: models.IntegerField[int, int] = models.IntegerField(default=0)
    opened: models.DateTimeField[datetime, datetime] = models.DateTimeField(db_default=Now())
    limit: models.IntegerField[int, int] = models.IntegerField(db_default=100)

    class Meta:
        app_label = "bank"


class Odd(models.Model):
    """Whose names have to be quoted."""

    number: models.IntegerField[int, int] = models.IntegerField(unique=True, db_column="the number; of it")
    balance: models.IntegerField[int, int] = models.IntegerField(default=0, db_column="balance in €")

    class Meta:
        app_label = "bank"
        db_table = "an odd table; select"


class Percent(models.Model):
    """Whose names Django cannot put into a statement with parameters."""

    share: models.IntegerField[int, int] = models.IntegerField(default=0, db_column="share in %")

    class Meta:
        app_label = "bank"


class Deaf(models.Model):
    total: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"

    def save(self) -> None:  # type: ignore[override]
        super().save()


class OneOfUs(Savings):
    class Meta:
        app_label = "bank"
        proxy = True


class Vault(models.Model):
    """Whose primary key is that of another one."""

    agent: models.OneToOneField[Agent, Agent] = models.OneToOneField(Agent, models.CASCADE, primary_key=True)
    gold: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"


class Order(models.Model):
    """Whose own `save` computes a column."""

    pieces: models.IntegerField[int, int] = models.IntegerField(default=0)
    price: models.IntegerField[int, int] = models.IntegerField(default=7)
    total: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.total = self.pieces * self.price
        super().save(*args, **kwargs)


class Heard(models.Model):
    """Of which a listener computes a column."""

    pieces: models.IntegerField[int, int] = models.IntegerField(default=0)
    price: models.IntegerField[int, int] = models.IntegerField(default=7)
    total: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"


class Sum(models.IntegerField):  # type: ignore[type-arg]
    """Which computes itself."""

    def pre_save(self, model_instance: Any, add: bool) -> int:
        value = int(model_instance.pieces * model_instance.price)
        setattr(model_instance, self.attname, value)
        return value


class Computed(models.Model):
    pieces: models.IntegerField[int, int] = models.IntegerField(default=0)
    price: models.IntegerField[int, int] = models.IntegerField(default=7)
    total: Any = Sum(default=0)

    class Meta:
        app_label = "bank"


class Point:
    """A value of one's own, which is equal to itself only."""

    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y

    def __getstate__(self) -> dict[str, int]:
        return {"x": self.x}


class PointField(models.TextField):  # type: ignore[type-arg]
    """Points as texts; pickle would lose half of one."""

    def from_db_value(self, value: str | None, *_: object) -> Point | None:
        return None if value is None else Point(*map(int, value.split()))

    def get_prep_value(self, value: Any) -> Any:
        return value if value is None or isinstance(value, str) else f"{value.x} {value.y}"


class PickledField(models.BinaryField):  # type: ignore[type-arg]
    """Whatever pickle takes."""

    def from_db_value(self, value: Any, *_: object) -> Any:
        return None if value is None else pickle.loads(bytes(value))  # noqa: S301 - our own

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        return super().get_db_prep_value(pickle.dumps(value), connection, prepared)


class SecretField(models.TextField):  # type: ignore[type-arg]
    """A document that looks different each time it is written."""

    def from_db_value(self, value: str | None, *_: object) -> Any:
        return None if value is None else Secret(json.loads(value.partition(" ")[2]))

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        return f"{uuid4().hex} {json.dumps(value.plain if isinstance(value, Secret) else value)}"


class Secret:
    def __init__(self, plain: Any) -> None:
        self.plain = plain


class Untold:
    """Whether it has changed nobody can tell."""

    def __reduce__(self) -> Any:
        raise TypeError("it stays here")


class UntoldField(models.TextField):  # type: ignore[type-arg]
    def from_db_value(self, value: str | None, *_: object) -> Any:
        return Untold()

    def get_prep_value(self, value: Any) -> Any:
        return uuid4().hex


class Wide(models.Model):
    """A column of every type that is the same everywhere."""

    document: models.JSONField[Any, Any] = models.JSONField(default=dict)
    share: models.FloatField[float, float] = models.FloatField(default=0.0)
    price: models.DecimalField[Decimal, Decimal] = models.DecimalField(max_digits=10, decimal_places=2, default=0)
    seen: models.DateTimeField[datetime, datetime] = models.DateTimeField(null=True)
    blob: models.BinaryField[Any, Any] = models.BinaryField(default=b"")
    paper: models.FileField = models.FileField(blank=True)
    point: Any = PointField(default="1 2")
    pickled: Any = PickledField(default=set)
    secret: Any = SecretField(default=list)

    class Meta:
        app_label = "bank"


class Mystery(models.Model):
    untold: Any = UntoldField(default="")
    total: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"


class Train(models.Model):
    """Of which the database computes a column."""

    places: models.IntegerField[int, int] = models.IntegerField(default=2)
    sold: models.IntegerField[int, int] = models.IntegerField(default=0)
    cars: models.IntegerField[int, int] = models.IntegerField(default=1)
    name: models.CharField[str, str] = models.CharField(max_length=20, default="ice")
    left: Any = models.GeneratedField(
        expression=models.F("places") - models.F("sold"), output_field=models.IntegerField(), db_persist=True
    )
    each: Any = models.GeneratedField(
        expression=models.F("places") / models.F("cars"), output_field=models.IntegerField(), db_persist=True
    )
    shown: Any = models.GeneratedField(
        expression=Upper("name"), output_field=models.CharField(max_length=20), db_persist=True
    )

    class Meta:
        app_label = "bank"


class Form(models.Model):
    """What a view puts values of all types into."""

    number: models.IntegerField[Any, Any] = models.IntegerField(default=0)
    text: models.CharField[Any, Any] = models.CharField(max_length=20, default="")
    yes: models.BooleanField[Any, Any] = models.BooleanField(default=False)
    price: models.DecimalField[Any, Any] = models.DecimalField(max_digits=10, decimal_places=2, default=0)
    share: models.FloatField[Any, Any] = models.FloatField(default=0.0)
    day: models.DateField[Any, Any] = models.DateField(null=True)
    seen: models.DateTimeField[Any, Any] = models.DateTimeField(null=True)
    length: models.DurationField[Any, Any] = models.DurationField(null=True)
    uuid: models.UUIDField[Any, Any] = models.UUIDField(null=True)
    document: models.JSONField[Any, Any] = models.JSONField(default=dict)
    blob: models.BinaryField[Any, Any] = models.BinaryField(default=b"")
    address: models.GenericIPAddressField[Any, Any] = models.GenericIPAddressField(null=True)
    path: models.FilePathField[Any, Any] = models.FilePathField(path="/tmp", default="")  # noqa: S108 - never read

    class Meta:
        app_label = "bank"


class Shown(models.Model):
    """A view of accounts."""

    name: models.CharField[str, str] = models.CharField(max_length=50, unique=True)
    balance: models.IntegerField[int, int] = models.IntegerField(default=0)
    number: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"
        managed = False
        db_table = "bank_shown"


class Folded(models.Model):
    """Whose key is one for "Ann" and "ANN"."""

    name: models.CharField[str, str] = models.CharField(max_length=20, unique=True, db_collation="NOCASE")
    total: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"


class Sums(models.Model):
    """With columns of many types that the database computes."""

    number: models.IntegerField[int, int] = models.IntegerField(default=3)
    price: models.DecimalField[Decimal, Decimal] = models.DecimalField(max_digits=10, decimal_places=2, default=1)
    name: models.CharField[str, str] = models.CharField(max_length=20, default="a")
    day: models.DateField[Any, Any] = models.DateField(null=True)
    document: models.JSONField[Any, Any] = models.JSONField(default=dict)
    cost: Any = models.GeneratedField(
        expression=models.F("price") * models.F("number"),
        output_field=models.DecimalField(max_digits=12, decimal_places=2),
        db_persist=True,
    )
    many: Any = models.GeneratedField(
        expression=cast("Any", models.Q(number__gt=3)), output_field=models.BooleanField(), db_persist=True
    )
    shown: Any = models.GeneratedField(
        expression=Concat("name", models.Value(": "), "name"), output_field=models.TextField(), db_persist=True
    )
    next_day: Any = models.GeneratedField(
        expression=Coalesce("day", "day"), output_field=models.DateField(null=True), db_persist=True
    )
    inner: Any = models.GeneratedField(
        expression=KT("document__a"), output_field=models.TextField(null=True), db_persist=True
    )
    share: Any = models.GeneratedField(
        expression=models.F("number") / 2.0, output_field=models.FloatField(), db_persist=True
    )

    class Meta:
        app_label = "bank"


class Counting(models.Model):
    """Whose own `save` counts rows beside it."""

    seats: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.seats = Seat.objects.using(kwargs.get("using") or self._state.db).count()
        super().save(*args, **kwargs)


class Marked(models.Model):
    """Whose `delete` only marks it, and saves that."""

    number: models.IntegerField[int, int] = models.IntegerField(default=0)
    deleted: models.BooleanField[bool, bool] = models.BooleanField(default=False)

    class Meta:
        app_label = "bank"

    def delete(self, using: Any = None, keep_parents: bool = False) -> tuple[int, dict[str, int]]:
        self.deleted = True
        self.save(using=using, update_fields=["deleted"])
        return 1, {}


class Updated(models.Model):
    """Whose `delete` only marks it, by a query."""

    number: models.IntegerField[int, int] = models.IntegerField(default=0)
    deleted: models.BooleanField[bool, bool] = models.BooleanField(default=False)

    class Meta:
        app_label = "bank"

    def delete(self, using: Any = None, keep_parents: bool = False) -> tuple[int, dict[str, int]]:
        return Updated.objects.using(using).filter(pk=self.pk).update(deleted=True), {}


class Choosy(models.Model):
    """Whose `save` does not take every number, and says nothing."""

    number: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"

    def save(self, *args: Any, **kwargs: Any) -> None:
        if self.number < 100:
            super().save(*args, **kwargs)
