"""Models with much in memory, for what is undone there. Their tables are made by the tests that need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.files.storage import InMemoryStorage
from django.db import models
from django.utils.functional import cached_property

if TYPE_CHECKING:
    from django.db.models.fields.related_descriptors import RelatedManager

# Which types the fields have is said without a plugin of mypy's, which would import the settings.


class Depot(models.Model):
    name: models.CharField[str, str] = models.CharField(max_length=20)
    sold: models.IntegerField[int, int] = models.IntegerField(default=0)

    class Meta:
        app_label = "bank"


class Point:
    """A value that is changed in place."""

    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y


class PointField(models.CharField):  # type: ignore[type-arg]  # it takes none at run time
    """Of a type of the user's own."""

    def from_db_value(self, value: str, *_: object) -> Point:
        return Point(*map(int, value.split(",")))

    def to_python(self, value: Any) -> Any:
        return value if isinstance(value, Point) else Point(*map(int, value.split(",")))

    def get_prep_value(self, value: Any) -> Any:
        return f"{value.x},{value.y}" if isinstance(value, Point) else value


class Lean(models.Manager):  # type: ignore[type-arg]
    def get_queryset(self) -> Any:
        return super().get_queryset().only("name", "sold")


class Joined(models.Manager):  # type: ignore[type-arg]
    def get_queryset(self) -> Any:
        return super().get_queryset().select_related("depot")


class Prefetched(models.Manager):  # type: ignore[type-arg]
    def get_queryset(self) -> Any:
        full = models.Prefetch("lines", queryset=Line.objects.order_by("text"), to_attr="all_lines")
        return super().get_queryset().prefetch_related("lines", full)


class Wagon(models.Model):
    name: models.CharField[str, str] = models.CharField(max_length=20, unique=True)
    sold: models.IntegerField[int, int] = models.IntegerField(default=0)
    note: models.TextField[str, str] = models.TextField(default="")
    document: models.JSONField[Any, Any] = models.JSONField(default=dict)
    depot: models.ForeignKey[Depot | None, Depot | None] = models.ForeignKey(Depot, models.CASCADE, null=True)
    plan: Any = models.FileField(storage=InMemoryStorage(), null=True)
    version: models.IntegerField[int, int] = models.IntegerField(default=0)
    twice: Any = models.GeneratedField(
        expression=models.F("sold") * 2, output_field=models.IntegerField(), db_persist=True
    )

    objects: Any = models.Manager()
    lean = Lean()
    joined = Joined()
    prefetched = Prefetched()

    if TYPE_CHECKING:
        depot_id: int | None
        lines: RelatedManager[Line]

    class Meta:
        app_label = "bank"
        base_manager_name = "objects"

    @cached_property
    def seen(self) -> list[int]:
        return [self.sold]


class Line(models.Model):
    """A row beside a wagon."""

    wagon: models.ForeignKey[Wagon, Wagon] = models.ForeignKey(Wagon, models.CASCADE, related_name="lines")
    text: models.CharField[str, str] = models.CharField(max_length=60)

    class Meta:
        app_label = "bank"


class Telling(Wagon):
    """Whose instances have events beside their columns, which its save writes down; and it saves its depot."""

    class Meta:
        app_label = "bank"
        proxy = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[Any] = []
        self.at_load = {"sold": self.sold, "me": self}

    def save(self, *args: Any, **kwargs: Any) -> None:
        if "depot" in self._state.fields_cache and self.depot is not None:
            self.depot.save(using=kwargs["using"])
        self.note = f"{self.at_load['sold']} {self.events} {self.__dict__.get('seen')}"
        super().save(*args, **kwargs)


class Placed(Wagon):
    """With a value of a type of the user's own, in a table of its own."""

    corner: Any = PointField(max_length=20, default="0,0")

    class Meta:
        app_label = "bank"
        base_manager_name = "objects"


class Marks:
    """What instances have beside their columns is in no dict."""

    __slots__ = ("mark", "marks")


class Pier(Marks, models.Model):
    name: models.CharField[str, str] = models.CharField(max_length=20)

    class Meta:
        app_label = "bank"


class Boat(Marks, models.Model):
    """With a mark that is there from the load on."""

    sold: models.IntegerField[int, int] = models.IntegerField(default=0)
    pier: models.ForeignKey[Pier, Pier] = models.ForeignKey(Pier, models.CASCADE)

    class Meta:
        app_label = "bank"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marks: list[Any] = []


class Writing(Boat):
    """Whose save writes of what is in slots."""

    class Meta:
        app_label = "bank"
        proxy = True

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.sold += 100 * len(self.marks) + 1000 * hasattr(self, "mark") + 10_000 * hasattr(self.pier, "mark")
        super().save(*args, **kwargs)


SHAPES: tuple[type[models.Model], ...] = (Depot, Wagon, Line, Placed)
