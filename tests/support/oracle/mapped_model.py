"""Made-up mapped classes: what one has, and the source that declares it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.support.oracle.mapped_columns import BY_NAME, Kind


@dataclass(frozen=True)
class Shape:
    """What a mapped class has."""

    columns: tuple[str, ...] = ()
    """The names of their kinds; the attributes are c0, c1, …"""
    key: str = "id"
    """"id", "name" (a natural one), "pair" (a composite one) or "by" (another unique column)."""
    version: str = ""
    """"" (none), "mapper" or "store"."""
    children: str = ""
    """How they are loaded: "select", "selectin" or "joined"; "": there are none."""
    inherits: str = ""
    """"single" or "joined"."""
    extras: frozenset[str] = frozenset()
    across: bool = False
    """There are operations across three keys, which name no row but their own: nothing orders them and others."""

    @property
    def kinds(self) -> list[Kind]:
        """Those of its columns."""
        return [BY_NAME[name] for name in self.columns]

    @property
    def attributes(self) -> list[str]:
        """The names of all columns that a caller may read."""
        found = ["n", "note", *(f"c{i}" for i in range(len(self.columns)))]
        found += [name for name in ("computed", "set_by_server", "double", "unique", "other_id") if name in self.extras]
        return [*found, *(["extra"] if self.inherits else [])]


EXTRAS = (
    "computed",  # a generated column
    "set_by_server",  # a column with a server default
    "stamped",  # onupdate
    "trigger",  # writes a log
    "check",  # n may not be negative
    "unique",  # and another row has one
    "other_id",  # a foreign key
    "deferrable",  # and it is checked at COMMIT
    "deferred",  # the last column is loaded when it is asked for
    "double",  # a column_property
    "delete_orphans",  # children that are taken out are deleted
    "validates",  # a hook of the model's
)


def render(shape: Shape, server: str) -> str:
    """The source of the model."""
    if server == "mariadb":  # it checks foreign keys at once
        shape = replace(shape, extras=shape.extras - {"deferrable"})
    lines = [*dict.fromkeys(kind.before for kind in shape.kinds if kind.before)]
    lines += [
        "",
        "class Base(DeclarativeBase):",
        "    pass",
        "",
        *_other(),
        *_children(shape),
        *_log(shape),
        *_thing(shape),
    ]
    lines += _special(shape)
    lines += ["", *_facts(shape), "", *_fill(shape), "", *_ddl(shape, server), ""]
    return "\n".join(lines)


def _other() -> list[str]:
    return [
        "",
        "class Other(Base):",
        '    __tablename__ = PREFIX + "other"',
        "    id: Mapped[int] = mapped_column(primary_key=True)",
        "    text: Mapped[str | None] = mapped_column(sa.String(10))",
        "    m: Mapped[int] = mapped_column(default=0)",
        "",
    ]


def _log(shape: Shape) -> list[str]:
    if "trigger" not in shape.extras:
        return []
    return [
        "",
        "class Log(Base):",
        '    __tablename__ = PREFIX + "log"',
        "    id: Mapped[int] = mapped_column(primary_key=True)",
        "    n: Mapped[int | None]",
        "",
    ]


def _children(shape: Shape) -> list[str]:
    if not shape.children:
        return []
    columns = _key_columns(shape)
    refers = [f"    thing_{name}: Mapped[{kind} | None] = mapped_column({type_})" for name, kind, type_ in columns]
    local = ", ".join([f'"thing_{name}"' for name, _, _ in columns])
    remote = ", ".join([f'PREFIX + "thing.{name}"' for name, _, _ in columns])
    return [
        "",
        "class Child(Base):",
        '    __tablename__ = PREFIX + "child"',
        "    id: Mapped[int] = mapped_column(primary_key=True)",
        *refers,
        "    m: Mapped[int] = mapped_column(sa.Integer, default=0)",
        "    text: Mapped[str | None] = mapped_column(sa.String(10))",
        f"    __table_args__ = (sa.ForeignKeyConstraint([{local}], [{remote}]),)",
        "",
    ]


def _key_columns(shape: Shape) -> list[tuple[str, str, str]]:
    if shape.key == "name":
        return [("name", "str", "sa.String(20)")]
    if shape.key == "pair":
        return [("left", "str", "sa.String(20)"), ("right", "int", "sa.Integer")]
    return [("id", "int", "sa.Integer")]


_EXTRA_LINES = {
    "computed": 'computed: Mapped[int] = mapped_column(sa.Integer, sa.Computed("n * 3"))',
    "set_by_server": 'set_by_server: Mapped[str] = mapped_column(sa.String(20), server_default="there")',
    "stamped": "stamped: Mapped[Any] = mapped_column(sa.DateTime, nullable=True, onupdate=datetime.now)",
    "unique": "unique: Mapped[int | None] = mapped_column(sa.Integer, unique=True)",
}

_VALIDATES = """
    @validates("note")
    def _shorten(self, _, note):
        return note[:15] if isinstance(note, str) else note
"""


def _thing(shape: Shape) -> list[str]:
    extras = shape.extras
    name = "Ground" if shape.inherits else "Thing"
    lines = ["", f"class {name}(Base):", '    __tablename__ = PREFIX + "thing"', *_own_columns(shape)]
    lines += [f"    {line}" for extra, line in _EXTRA_LINES.items() if extra in extras]
    lines += [f"    {line}" for line in _references(shape)]
    if shape.version:
        lines.append("    version: Mapped[int] = mapped_column(sa.Integer, default=1)")
    arguments = ['"version_id_col": version'] if shape.version == "mapper" else []
    if shape.inherits:
        lines.append("    kind: Mapped[str] = mapped_column(sa.String(20))")
        arguments.append('"polymorphic_on": kind, "polymorphic_identity": "ground"')
    if arguments:
        lines.append(f"    __mapper_args__ = {{{', '.join(arguments)}}}")
    lines.append(_VALIDATES if "validates" in extras else "")
    if "double" in extras:
        lines += ["", f"{name}.double = column_property({name}.__table__.c.n * 2)", ""]
    return lines


def _own_columns(shape: Shape) -> list[str]:
    lines = [
        f"    {name}: Mapped[{kind}] = mapped_column({type_}, primary_key=True)"
        for name, kind, type_ in _key_columns(shape)
    ]
    if shape.key == "by":
        lines.append("    code: Mapped[str] = mapped_column(sa.String(20), unique=True)")
    check = ', sa.CheckConstraint("n >= 0")' if "check" in shape.extras else ""
    lines.append(f"    n: Mapped[int] = mapped_column(sa.Integer{check}, default=0)")
    lines.append('    note: Mapped[str | None] = mapped_column(sa.String(20), default="")')
    last = len(shape.columns) - 1
    for i, kind in enumerate(shape.kinds):
        deferred = ", deferred=True" if i == last and "deferred" in shape.extras else ""
        lines.append(f"    c{i}: Mapped[Any] = mapped_column({kind.type}, nullable=True{deferred})")
    return lines


def _references(shape: Shape) -> list[str]:
    lines = []
    if "other_id" in shape.extras:
        deferrable = ', deferrable=True, initially="DEFERRED"' if "deferrable" in shape.extras else ""
        lines.append(f'other_id: Mapped[int | None] = mapped_column(sa.ForeignKey(PREFIX + "other.id"{deferrable}))')
        lines.append('other: Mapped[Other | None] = relationship("Other")')
    if shape.children:
        options = f'lazy="{shape.children}", order_by=Child.id'
        options += ', cascade="all, delete-orphan"' if "delete_orphans" in shape.extras else ""
        lines.append(f"children: Mapped[list[Child]] = relationship(Child, {options})")
    return lines


def _special(shape: Shape) -> list[str]:
    if not shape.inherits:
        return []
    lines = ["", "class Thing(Ground):"]
    if shape.inherits == "joined":
        lines.append('    __tablename__ = PREFIX + "special"')
        names = [name for name, _, _ in _key_columns(shape)]
        lines += [f"    {name} = mapped_column({type_}, primary_key=True)" for name, _, type_ in _key_columns(shape)]
        above = ", ".join([f'PREFIX + "thing.{name}"' for name in names])
        lines.append(f"    __table_args__ = (sa.ForeignKeyConstraint({names!r}, [{above}]),)")
    lines.append("    extra: Mapped[int | None] = mapped_column(sa.Integer, default=0)")
    lines.append('    __mapper_args__ = {"polymorphic_identity": "special"}')
    return [*lines, ""]


def _facts(shape: Shape) -> list[str]:
    key = {"id": "1", "name": "'a'", "pair": "('a', 1)", "by": "'a'"}[shape.key]
    names = ["code"] if shape.key == "by" else [name for name, _, _ in _key_columns(shape)]
    where = ", ".join([f"Thing.{name} == {'KEY' if len(names) == 1 else f'KEY[{i}]'}" for i, name in enumerate(names)])
    mutable = [f"c{i}" for i, kind in enumerate(shape.kinds) if kind.mutable]
    keys = {"id": "1, 2, 3", "name": "'a', 'b', 'c'", "pair": "('a', 1), ('a', 2), ('b', 1)", "by": "'a', 'b', 'c'"}
    finds = ["def find():", f"    return sa.select(Thing).where({where})", ""]
    if shape.across:
        same = ", ".join([f"Thing.{name} == thing.{name}" for name in names])
        among = (
            f"Thing.{names[0]} == key"
            if len(names) == 1
            else " & ".join([f"(Thing.{name} == key[{i}])" for i, name in enumerate(names)])
        )
        finds = [
            "def find(thing):",
            f"    return sa.select(Thing).where({same})",
            "",
            "",
            "def find_at(key):",
            f"    return sa.select(Thing).where({among})",
            "",
        ]
    return [
        f"KEY = {key}",
        f"KEYS = [{keys[shape.key]}]",
        f"BY = {'code' if shape.key == 'by' else None!r}",
        f"VERSION = {'version' if shape.version == 'store' else None!r}",
        f"MUTABLE = {{'Thing': {mutable!r}}}",
        f"ORDERED = {all(kind.ordered for kind in shape.kinds)!r}",
        "IGNORED = {'version', 'stamped'}  # what counts or stamps saves",
        "",
        "",
        *finds,
    ]


def _fill(shape: Shape) -> list[str]:
    first = ["n=5", "note='x'", *(f"c{i}={kind.values[0]}" for i, kind in enumerate(shape.kinds))]
    first += ["unique=1"] if "unique" in shape.extras else []
    first += ["children=[Child(m=1, text='one'), Child(m=2, text='two')]"] if shape.children else []
    keys = {
        "id": ("id=1", "id=2", "id=3"),
        "name": ("name='a'", "name='b'", "name='c'"),
        "pair": ("left='a', right=1", "left='a', right=2", "left='b', right=1"),
        "by": ("id=1, code='a'", "id=2, code='b'", "id=3, code='c'"),
    }[shape.key]
    second = ["n=0", *(["unique=2"] if "unique" in shape.extras else [])]
    lines = [
        "",
        "def fill(session):",
        "    session.add_all([Other(id=1, text='first'), Other(id=2, text='second')])",
        "    session.flush()",
    ]
    lines.append(f"    session.add(Thing({keys[0]}, {', '.join(first)}))")
    lines.append("    session.flush()")
    lines.append(f"    session.add(Thing({keys[1]}, {', '.join(first if shape.across else second)}))")
    if shape.across:
        lines += ["    session.flush()", f"    session.add(Thing({keys[2]}, {', '.join(first)}))"]
    return [*lines, ""]


def _ddl(shape: Shape, server: str) -> list[str]:
    """What is there beside the tables. The sequences begin behind the rows that are there."""
    found = []
    if "trigger" in shape.extras:
        insert = "INSERT INTO {p}log (n) VALUES (NEW.n)"
        if server == "sqlite":
            found.append(f"CREATE TRIGGER {{p}}remember AFTER UPDATE ON {{p}}thing BEGIN {insert}; END")
        elif server == "mariadb":
            found.append(f"CREATE TRIGGER {{p}}remember AFTER UPDATE ON {{p}}thing FOR EACH ROW {insert}")
        else:
            body = f"BEGIN {insert}; RETURN NULL; END"
            found.append(f"CREATE FUNCTION {{p}}remember() RETURNS trigger LANGUAGE plpgsql AS '{body}'")
            found.append(
                "CREATE TRIGGER {p}remember AFTER UPDATE ON {p}thing FOR EACH ROW EXECUTE FUNCTION {p}remember()"
            )
    if server == "postgresql":
        found.append("SELECT setval('{p}other_id_seq', 100)")
    return ["DDL = [", *(f"    {one!r}," for one in found), "]"]
