"""Made-up Django models: what one has, the source that declares it, and operations on it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from tests.support.oracle import mapped_columns
from tests.support.oracle.example import Grammar, Lines
from tests.support.oracle.mapped_columns import ALL, POSTGRES, Kind

_CENTS = """
class Cents(models.IntegerField):
    def from_db_value(self, value, *_):
        return None if value is None else Decimal(value) / 100

    def get_prep_value(self, value):
        return None if value is None else round(value * 100)

    def to_python(self, value):
        return None if value is None else Decimal(value)
"""

_SEATS = """
class Seats:
    def __init__(self, taken):
        self.taken = taken


class SeatsField(models.TextField):
    def from_db_value(self, value, *_):
        return None if value is None else Seats(json.loads(value))

    def get_prep_value(self, value):
        return None if value is None else json.dumps(value.taken)
"""

_COLOUR = """
class Colour(models.TextChoices):
    RED = "r"
    BLUE = "b"
"""

_JSON = mapped_columns.BY_NAME["json"]

KINDS = (
    Kind("integer", "models.IntegerField", ("1", "0", "-7"), ("{c} += 1",), ("2**31", "'abc'", "{'a': 1}", "[1]")),
    Kind("big", "models.BigIntegerField", ("1", "2**40"), ("{c} += 1",), ("2**63", "'abc'")),
    Kind("small", "models.SmallIntegerField", ("1", "2"), ("{c} += 1",), ("2**15",)),
    Kind("positive", "models.PositiveIntegerField", ("1", "0"), ("{c} += 1",), ("-1", "'abc'")),
    Kind("float", "models.FloatField", ("1.5", "0.0"), ("{c} *= 2",), ("'abc'", "[1.5]")),
    Kind(
        "decimal",
        "models.DecimalField:max_digits=10, decimal_places=2",
        ("Decimal('1.50')", "Decimal('-3.25')"),
        ("{c} += Decimal('0.25')",),
        ("Decimal('1e30')", "'abc'", "object()"),
    ),
    Kind(
        "char",
        "models.CharField:max_length=10",
        ("'a'", "''", "'é'"),
        ("{c} = {c}[:5] + 'x'",),
        ("'x' * 11", "chr(0)", "chr(0xD800)"),
    ),
    Kind("text", "models.TextField", ("'a'", "'b' * 300"), ("{c} += 'x'",), ("chr(0)", "chr(0xDFFF)")),
    Kind("boolean", "models.BooleanField", ("True", "False"), ("{c} = not {c}",), ("'x'",)),
    Kind(
        "date", "models.DateField", ("date(2026, 1, 2)", "date(1, 1, 1)"), ("{c} += timedelta(days=1)",), ("'x'", "5")
    ),
    Kind("time", "models.TimeField", ("time(1, 2, 3)", "time(0)"), (), ("'x'",)),
    Kind(
        "datetime",
        "models.DateTimeField",
        ("datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)", "datetime(2026, 7, 2, tzinfo=UTC)"),
        ("{c} += timedelta(seconds=1)",),
        ("'x'",),
    ),
    Kind("duration", "models.DurationField", ("timedelta(1)", "timedelta(seconds=-5)"), ("{c} *= 2",), ("'x'",)),
    Kind("binary", "models.BinaryField", ("b'a'", "b''", "bytes(range(256))"), ("{c} = bytes({c}) + b'x'",), ("5",)),
    Kind("uuid", "models.UUIDField", ("UUID(int=1)", "UUID(int=2**127)"), (), ("'x'",)),
    Kind("json", "models.JSONField", _JSON.values, _JSON.changes, _JSON.bad, ordered=False),
    Kind("ip", "models.GenericIPAddressField", ("'10.0.0.1'", "'::1'"), (), ("'x'",)),
    Kind(
        "choices", "models.CharField:max_length=10, choices=Colour.choices", ("'r'", "'b'"), (), ("'x' * 11",), _COLOUR
    ),
    Kind("slug", "models.SlugField", ("'a'", "'b-c'"), (), ("'x' * 51",)),
    Kind(
        "cents",
        "Cents",
        ("Decimal('1.5')", "Decimal('0')"),
        ("{c} = Decimal(round({c} * 100) + 25) / 100",),  # as it is loaded: the library leaves it as it is assigned
        ("'x'", "[1]"),
        _CENTS,
    ),
    Kind(
        "object",
        "SeatsField",
        ("Seats({'1': 'Ann'})", "Seats({})"),
        ("{c}.taken['2'] = 'Bo'", "{c}.taken.clear()"),
        ("5",),
        _SEATS,
    ),
    Kind(
        "array",
        "ArrayField:models.IntegerField()",
        ("[1, 2]", "[]"),
        ("{c}.append(3)", "{c}.reverse()"),
        ("['x']", "[2**40]"),
        servers=POSTGRES,
    ),
)

BY_NAME = {kind.name: kind for kind in KINDS}

EXTRAS = ("computes", "generated", "stamped", "set_by_server", "check", "unique", "other")


@dataclass(frozen=True)
class Shape:
    """What a model has."""

    columns: tuple[str, ...] = ()
    key: str = "id"
    """"id", "name" (a natural one), or "by" (another unique field)."""
    version: bool = False
    children: bool = False
    parent: bool = False
    """It has a table above."""
    extras: frozenset[str] = frozenset()

    @property
    def kinds(self) -> list[Kind]:
        """Those of its columns."""
        return [BY_NAME[name] for name in self.columns]


SHAPES = {
    server: st.builds(
        Shape,
        columns=st.lists(st.sampled_from([kind.name for kind in KINDS if server in kind.servers]), max_size=3).map(
            tuple
        ),
        key=st.sampled_from(["id", "name", "by"]),
        version=st.booleans(),
        children=st.booleans(),
        parent=st.sampled_from([False, False, True]),
        extras=st.frozensets(st.sampled_from(EXTRAS), max_size=3),
    )
    for server in ALL
}


def render(shape: Shape) -> str:
    """The source of the model."""
    lines = ["REGISTRY = Apps()", "", *dict.fromkeys(kind.before for kind in shape.kinds if kind.before)]
    lines += ["", "class Other(models.Model):", "    text = models.CharField(max_length=10, null=True)"]
    lines += ["    m = models.IntegerField(default=0)", *_meta("other"), ""]
    lines += _thing(shape)
    names = ["Other", *(["Ground"] if shape.parent else []), "Thing"]
    if shape.children:
        names.append("Child")
        lines += ["", "class Child(models.Model):", "    m = models.IntegerField(default=0)"]
        lines += ["    text = models.CharField(max_length=10, null=True)"]
        lines += [
            "    thing = models.ForeignKey(Thing, models.CASCADE, related_name='children', null=True)",
            *_meta("child"),
            "",
        ]
    lines += [f"MODELS = [{', '.join(names)}]", "", *_facts(shape), "", *_fill(shape)]
    return "\n".join(lines)


def _meta(table: str, *more: str) -> list[str]:
    return [
        "",
        "    class Meta:",
        "        app_label = 'oracle'",
        "        apps = REGISTRY",
        f"        db_table = PREFIX + '{table}'",
        *(f"        {one}" for one in more),
    ]


_KEYS = {
    "id": "id = models.IntegerField(primary_key=True)",
    "name": "name = models.CharField(max_length=20, primary_key=True)",
    "by": "code = models.CharField(max_length=20, unique=True)",
}

_EXTRA_LINES = {
    "computes": "total = models.IntegerField(default=0)",
    "generated": "generated = models.GeneratedField("
    "expression=models.F('n') * 3, output_field=models.IntegerField(), db_persist=True)",
    "stamped": "stamped = models.DateTimeField(auto_now=True)",
    "set_by_server": "set_by_server = models.CharField(max_length=20, db_default='there')",
    "unique": "unique = models.IntegerField(unique=True, null=True)",
    "other": "other = models.ForeignKey(Other, models.SET_NULL, null=True)",
}


def _thing(shape: Shape) -> list[str]:
    key = _KEYS[shape.key]
    lines = []
    if shape.parent:
        lines += [
            "",
            "class Ground(models.Model):",
            f"    {key}",
            "    above = models.IntegerField(default=0)",
            *_meta("ground"),
            "",
        ]
    lines += ["", f"class Thing({'Ground' if shape.parent else 'models.Model'}):"]
    lines += [] if shape.parent else [f"    {key}"]
    lines += [
        "    n = models.IntegerField(default=0)",
        "    note = models.CharField(max_length=20, null=True, default='')",
    ]
    for i, kind in enumerate(shape.kinds):
        field, _, arguments = kind.type.partition(":")
        lines.append(f"    c{i} = {field}({arguments}{', ' if arguments else ''}null=True)")
    lines += ["    version = models.IntegerField(default=1)"] if shape.version else []
    lines += [f"    {line}" for extra, line in _EXTRA_LINES.items() if extra in shape.extras]
    check = ["constraints = [models.CheckConstraint(condition=models.Q(n__gte=0), name=PREFIX + 'least')]"]
    lines += _meta("thing", *(check if "check" in shape.extras else []))
    if "computes" in shape.extras:
        lines += [
            "",
            "    def save(self, *args, **kwargs):",
            "        self.total = (self.n or 0) * 7 if isinstance(self.n, int) else 0",
            "        super().save(*args, **kwargs)",
        ]
    return [*lines, ""]


def _facts(shape: Shape) -> list[str]:
    keys = {"id": "[1, 2, 3]", "name": "['a', 'b', 'c']", "by": "['a', 'b', 'c']"}[shape.key]
    field = {"id": "pk", "name": "pk", "by": "code"}[shape.key]
    return [
        f"KEYS = {keys}",
        f"BY = {field!r}",
        f"VERSION = {'version' if shape.version else None!r}",
        f"ORDERED = {all(kind.ordered for kind in shape.kinds)!r}",
        "IGNORED = {'version', 'stamped'}  # what counts or stamps saves",
        "",
        "",
        "def others():",
        "    return Other.objects.using(USING)",
        "",
    ]


def _fill(shape: Shape) -> list[str]:
    first = ["n=5", "note='x'", *(f"c{i}={kind.values[0]}" for i, kind in enumerate(shape.kinds))]
    first += ["unique=1"] if "unique" in shape.extras else []
    keys = {
        "id": ("id=1", "id=2", "id=3"),
        "name": ("name='a'", "name='b'", "name='c'"),
        "by": ("id=1, code='a'", "id=2, code='b'", "id=3, code='c'"),
    }[shape.key]
    second = ["n=0", *(["unique=2"] if "unique" in shape.extras else [])]
    lines = ["", "def fill():", "    others().bulk_create([Other(id=1, text='first'), Other(id=2, text='second')])"]
    lines += [f"    thing = Thing({keys[0]}, {', '.join(first)})", "    thing.save(using=USING, force_insert=True)"]
    lines += [f"    Thing({keys[1]}, {', '.join(second)}).save(using=USING, force_insert=True)"]
    lines += [f"    Thing({keys[2]}, n=8).save(using=USING, force_insert=True)"]
    if shape.children:
        lines += [
            f"    Child(thing=thing, m={m}, text='{text}').save(using=USING)" for m, text in ((1, "one"), (2, "two"))
        ]
    return [*lines, ""]


# -- operations --------------------------------------------------------------------------------------------------


_MOVES: list[Lines] = [
    (),
    ("resources[0].n -= 2", "resources[-1].n += 2"),
    ("resources[0].n -= 2", "resources[-1].n += 2"),
    ("resources[-1].n = resources[0].n",),
    ("resources[0].note, resources[-1].note = resources[-1].note, resources[0].note",),
    ("resources[0].n -= 4", "if resources[0].n < 0:", "    raise Dirty('poor')", "resources[1].n += 4"),
]

_SEVERAL: list[Lines] = [
    (),
    ("return [one.n for one in resources]",),
    ("return {one.note: one.n for one in resources}",),
]

_IN_ORDER = ("others().count()", "other = others()")
"""In what an operation does with rows that others' operations may change, whose keys it has not: it needs an order."""


def grammar(shape: Shape, *, across: bool = False) -> Grammar:
    """What operations on an instance of it are made of."""
    of_the_orm = [one for one in _of_the_orm(shape) if not (across and any(text in one[0] for text in _IN_ORDER))]
    return Grammar(
        moves=st.sampled_from(_MOVES),
        several=st.sampled_from(_SEVERAL),
        plain=st.one_of(_plain(shape), _plain(shape), st.sampled_from(of_the_orm)),
        bad=_bad(shape),
        answer=_answer(shape),
        enough="r.n > 6",
        much="r.n > 5",
    )


def _plain(shape: Shape) -> st.SearchStrategy[Lines]:
    found: list[Lines] = [
        ("r.n += 1",),
        ("r.n += 1",),
        ("r.n -= 3",),
        ("r.note = 'y'",),
        ("r.note = (r.note or '') + 'z'",),
    ]
    for i, kind in enumerate(shape.kinds):
        found += [(f"r.c{i} = {value}",) for value in kind.values]
        found += [(change.replace("{c}", f"r.c{i}"),) for change in kind.changes] * 2
    if "check" in shape.extras:
        found += [("r.n -= 6",), ("r.n = abs(r.n)",)]
    if "unique" in shape.extras:
        found += [("r.unique = 3",), ("r.unique = 2",), ("r.unique = None",)]
    if "other" in shape.extras:
        found += [("r.other_id = 1",), ("r.other_id = 99",), ("r.other = others().get(id=2)",)]
    if "set_by_server" in shape.extras:
        found.append(("r.set_by_server = 'here'",))
    if shape.parent:
        found += [("r.above += 1",)]
    return st.sampled_from(found)


def _of_the_orm(shape: Shape) -> list[Lines]:
    found: list[Lines] = [
        ("r.save()",),
        ("r.refresh_from_db()",),
        ("r.n = F('n') + 1",),
        ("Thing.objects.using(USING).filter(pk=r.pk).update(n=1)",),
        ("r.n += others().count()",),
        ("with atomic(using=USING):", "    r.n += 1"),
        ("with atomic(using=USING):", "    others().create(text='inside')"),
        (
            "try:",
            "    with atomic(using=USING):",
            "        others().create(text='undone')",
            "        raise Dirty('undone')",
            "except Dirty:",
            "    pass",
        ),
        ("with atomic(using=USING):", "    others().create(text='inside')", "    raise Dirty('inside')"),
        (
            "try:",
            "    with atomic(using=USING):",
            "        others().create(id=1, text='twice')",
            "except IntegrityError:",
            "    r.note = 'twice'",
        ),
        ("others().create(text='made')",),
        ("others().filter(id=1).update(m=F('m') + 1)",),
        ("other = others().get(id=2)", "other.m = r.n", "other.save()"),
        ("add_row(Other(text='row', m=r.n))",),
    ]
    if shape.children:
        found += [
            ("r.children.create(m=3, text='new')",),
            ("for child in r.children.order_by('id'):", "    child.m += 1", "    child.save()"),
            ("r.children.filter(m__gt=1).delete()",),
            ("r.n = sum(child.m for child in r.children.all())",),
        ]
    return found


def _bad(shape: Shape) -> st.SearchStrategy[Lines]:
    found: list[Lines] = [
        ("r.n = None",),
        ("r.n = 2**40",),
        ("r.note = 'x' * 21",),
        ("r.note = chr(0)",),
        ("r.n = 'many'",),
    ]
    found += [("add_row(Other(text='x' * 11, m=0))",), ("add_row(Other(text='null', m=None))",)]
    found += [("others().create(id=1, text='twice')",), ("others().create(text=chr(0))",)]
    for i, kind in enumerate(shape.kinds):
        found += [(f"r.c{i} = {value}",) for value in kind.bad]
    return st.sampled_from(found)


def _answer(shape: Shape) -> st.SearchStrategy[Lines]:
    names = ["n", "note", *(f"c{i}" for i in range(len(shape.columns)))]
    names += [name for name in ("unique", "set_by_server", "other_id") if name.removesuffix("_id") in shape.extras]
    names += ["above"] if shape.parent else []
    found: list[Lines] = [(), *((f"return r.{name}",) for name in names), ("return [r.n, r.note]",)]
    if shape.columns:
        found += [("return {'c0': r.c0}",)]
    if shape.children:
        found += [("return sorted(r.children.values_list('m', 'text'), key=repr)",), ("return r.children.count()",)]
    return st.sampled_from(found)


def foreign(shape: Shape) -> st.SearchStrategy[Lines]:
    """What somebody else writes: everybody who writes counts the version up."""
    counted = ("r.version += 1",) if shape.version else ()
    found: list[Lines] = [
        ("r.n = r.n + 10 if isinstance(r.n, int) else 10", *counted),
        ("r.note = 'foreign'", *counted),
    ]
    found += [(f"r.c{i} = {kind.values[1]}", *counted) for i, kind in enumerate(shape.kinds)]
    return st.sampled_from(found)
