"""The types of columns that SQLAlchemy has, each with values in Python's own words, and how one may change in place."""

from __future__ import annotations

from dataclasses import dataclass

ALL = ("sqlite", "postgresql", "mariadb")
POSTGRES = ("postgresql",)


@dataclass(frozen=True)
class Kind:
    """A type of column. `{c}` stands for the attribute."""

    name: str
    type: str
    values: tuple[str, ...]
    """Of its own type; the first is there at the beginning."""
    changes: tuple[str, ...] = ()
    """Statements that change it in place."""
    bad: tuple[str, ...] = ()
    """What it takes on some servers, or nowhere; as it is read back, where it is taken."""
    before: str = ""
    """What the model needs above its classes."""
    servers: tuple[str, ...] = ALL
    mutable: bool = False
    """Whether it has to be told that it was changed in place."""
    ordered: bool = True
    """Whether it keeps the order of names."""


_COLOUR = """
class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"
"""

_SEATS = """
class Seats:
    def __init__(self, taken):
        self.taken = taken


class SeatsColumn(sa.TypeDecorator):
    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else {"taken": value.taken}

    def process_result_value(self, value, dialect):
        return None if value is None else Seats(value["taken"])
"""

_CENTS = """
class Cents(sa.TypeDecorator):
    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else round(value * 100)

    def process_result_value(self, value, dialect):
        return None if value is None else Decimal(value) / 100
"""

_JSON_VALUES = (
    "{'a': 1, 'b': 2, 'n': {'x': 1}, 'l': [1, 2]}",
    "{'a': True, 'b': 2.0, 'n': {'x': 1}, 'l': [1, 2]}",
    "{'b': 2, 'a': 1, 'n': {'x': 1.0}, 'l': [True, 2]}",
    "{'a': None, 'n': {}, 'l': []}",
    "{'a': 'é', 'n': {'x': 0}, 'l': [0]}",
)
_JSON_CHANGES = (
    "{c}['a'] = True",
    "{c}['a'] = 1",
    "{c}['b'] = 2.0",
    "{c}['b'] = 2",
    "{c}['n']['x'] = 1.0",
    "{c}['n']['x'] = not {c}['n'].get('x')",
    "{c}['l'].append(3)",
    "{c}['l'].reverse()",
    "{c}['l'][:] = [float(one) for one in {c}['l']]",
    "{c}['a'] = {c}.pop('a')",
    "{c} = dict(reversed({c}.items()))",
)
_JSON_BAD = (
    "{'a': {1, 2}, 'n': {}, 'l': []}",
    "{'a': chr(0), 'n': {}, 'l': []}",
    "{'a': chr(0xD800), 'n': {}, 'l': []}",
)

KINDS = (
    Kind(
        "integer",
        "sa.Integer",
        ("1", "0", "-7", "2**31 - 1"),
        ("{c} += 1", "{c} = -{c}"),
        ("2**31", "2**70", "'abc'", "{'a': 1}", "[1]"),
    ),
    Kind("big", "sa.BigInteger", ("1", "2**40"), ("{c} += 1",), ("2**63", "'abc'")),
    Kind("small", "sa.SmallInteger", ("1", "2"), ("{c} += 1",), ("2**15", "{'a': 1}")),
    Kind("float", "sa.Float", ("1.5", "0.0", "-2.25"), ("{c} *= 2",), ("'abc'", "[1.5]")),
    Kind(
        "numeric",
        "sa.Numeric(10, 2)",
        ("Decimal('1.50')", "Decimal('0.00')", "Decimal('-3.25')"),
        ("{c} += Decimal('0.25')",),
        ("Decimal('1e30')", "'abc'", "object()"),
    ),
    Kind(
        "string",
        "sa.String(10)",
        ("'a'", "''", "'é'"),
        ("{c} = {c}[:5] + 'x'",),
        ("'x' * 11", "chr(0)", "chr(0xD800)", "{'a': 1}", "b'x'"),
    ),
    Kind("text", "sa.Text", ("'a'", "'b' * 300"), ("{c} += 'x'",), ("chr(0)", "chr(0xDFFF)", "[1]")),
    Kind("unicode", "sa.Unicode(20)", ("'a'", "'b'"), (), ("chr(0)", "'\\N{SNOWMAN}'")),
    Kind("boolean", "sa.Boolean", ("True", "False"), ("{c} = not {c}",), ("'x'", "5")),
    Kind(
        "date", "sa.Date", ("date(2026, 1, 2)", "date(1, 1, 1)"), ("{c} += timedelta(days=1)",), ("'2026-01-02'", "5")
    ),
    Kind("time", "sa.Time", ("time(1, 2, 3)", "time(0)"), (), ("'x'", "5")),
    Kind(
        "datetime",
        "sa.DateTime",
        ("datetime(2026, 1, 2, 3, 4, 5)", "datetime(2000, 2, 29)"),
        ("{c} += timedelta(seconds=1)",),
        ("'x'", "5"),
    ),
    Kind(
        "zoned",
        "sa.DateTime(timezone=True)",
        ("datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)", "datetime(2026, 7, 2, tzinfo=timezone(timedelta(hours=2)))"),
        ("{c} += timedelta(seconds=1)",),
        ("'x'",),
        servers=POSTGRES,
    ),
    Kind("interval", "sa.Interval", ("timedelta(1)", "timedelta(seconds=-5)"), ("{c} *= 2",), ("'x'", "5")),
    Kind("binary", "sa.LargeBinary", ("b'a'", "b''", "bytes(range(256))"), ("{c} += b'x'",), ("5", "{'a': 1}")),
    Kind(
        "enum",
        "sa.Enum(Colour, native_enum=False, validate_strings=True)",
        ("Colour.RED", "Colour.BLUE"),
        (),
        ("'green'", "5"),
        _COLOUR,
    ),
    Kind(
        "native enum",
        "sa.Enum(Colour, name=PREFIX + 'colour', validate_strings=True)",
        ("Colour.RED", "Colour.BLUE"),
        (),
        ("'green'",),
        _COLOUR,
    ),
    Kind("uuid", "sa.Uuid", ("UUID(int=1)", "UUID(int=2**127)"), (), ("'x'", "5")),
    Kind("json", "sa.JSON", _JSON_VALUES, _JSON_CHANGES, _JSON_BAD, mutable=True),
    Kind("mutable json", "MutableDict.as_mutable(sa.JSON)", _JSON_VALUES, _JSON_CHANGES, _JSON_BAD, mutable=True),
    Kind(
        "pickle",
        "sa.PickleType",
        ("[1, {'a': 2}]", "[True, {'a': 2.0}]", "[]"),
        ("{c}.append(1)", "{c}[:] = [True, *{c}[1:]]", "{c} = [*{c}, {'b': {1}}]"),
        ("[lambda: 0]",),
        mutable=True,
    ),
    Kind(
        "object",
        "SeatsColumn",
        ("Seats({'1': 'Ann'})", "Seats({})"),
        ("{c}.taken['2'] = 'Bo'", "{c}.taken.clear()", "{c} = Seats(dict({c}.taken))"),
        ("5", "Seats({'1': {1}})"),
        _SEATS,
        mutable=True,
    ),
    Kind("cents", "Cents", ("Decimal('1.5')", "Decimal('0')"), ("{c} += Decimal('0.25')",), ("'x'", "[1]"), _CENTS),
    Kind(
        "array",
        "postgresql.ARRAY(sa.Integer)",
        ("[1, 2]", "[]"),
        ("{c}.append(3)", "{c}.reverse()", "{c} = [*{c}, 0]"),
        ("['x']", "5", "[2**40]"),
        servers=POSTGRES,
        mutable=True,
    ),
    Kind(
        "jsonb",
        "postgresql.JSONB",
        _JSON_VALUES,
        _JSON_CHANGES,
        _JSON_BAD,
        servers=POSTGRES,
        mutable=True,
        ordered=False,
    ),
    Kind("inet", "postgresql.INET", ("'10.0.0.1'", "'::1'"), (), ("'x'",), servers=POSTGRES),
    Kind(
        "bytes array",
        "postgresql.ARRAY(sa.Text)",
        ("['a', 'b']", "[]"),
        ("{c}.append('c')",),
        ("[chr(0)]", "['a', 5]"),
        servers=POSTGRES,
        mutable=True,
    ),
    Kind(
        "range",
        "postgresql.INT4RANGE",
        ("postgresql.Range(1, 5)", "postgresql.Range(2, 3)"),
        (),
        ("'x'",),
        servers=POSTGRES,
    ),
)

BY_NAME = {kind.name: kind for kind in KINDS}
