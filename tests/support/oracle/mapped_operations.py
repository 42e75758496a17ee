"""Made-up operations on mapped classes: a grammar whose sentences are lines of Python."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from tests.support.oracle.example import Grammar
from tests.support.oracle.mapped_columns import KINDS
from tests.support.oracle.mapped_model import EXTRAS, Shape

if TYPE_CHECKING:
    from tests.support.oracle.example import Lines


def _kinds(server: str) -> list[str]:
    """Those whose values change in place more often: there is more to find."""
    here = [kind for kind in KINDS if server in kind.servers]
    return [kind.name for kind in here for _ in range(3 if kind.mutable else 1)]


SHAPES = {
    server: st.builds(
        Shape,
        columns=st.lists(st.sampled_from(_kinds(server)), max_size=3).map(tuple),
        key=st.sampled_from(["id", "id", "name", "pair", "by"]),
        version=st.sampled_from(["", "", "mapper", "store"]),
        children=st.sampled_from(["", "", "select", "selectin", "joined"]),
        inherits=st.sampled_from(["", "", "", "single", "joined"]),
        extras=st.frozensets(st.sampled_from(EXTRAS), max_size=4),
    )
    for server in ("sqlite", "postgresql", "mariadb")
}


ACROSS = {
    server: shapes.map(lambda shape: replace(shape, across=True, extras=shape.extras - {"unique"}))
    for server, shapes in SHAPES.items()
}


def grammar(shape: Shape) -> Grammar:
    """What operations on an instance of it are made of."""
    if shape.across:
        return replace(
            _grammar(shape),
            plain=st.one_of(_plain(shape), _plain(shape), _own(_session(shape)), _own(_beside(shape))),
            moves=st.sampled_from(_MOVES),
            several=st.sampled_from(_SEVERAL),
        )
    return _grammar(shape)


_MOVES: list[Lines] = [
    (),
    ("resources[0].n -= 2", "resources[-1].n += 2"),
    ("for one in resources:", "    one.n += 1"),
    ("resources[0].note, resources[-1].note = resources[-1].note, resources[0].note",),
    ("resources[-1].n = sum(one.n for one in resources)",),
    ("session(resources[0]).flush()",),
    ("resources[-1].n -= 7",),
]

_SEVERAL: list[Lines] = [(), ("return [one.n for one in resources]",), ("return [one.note for one in resources]",)]


def _own(lines: st.SearchStrategy[Lines]) -> st.SearchStrategy[Lines]:
    """Those of *lines* that name no rows that another component may change: find its own row."""
    alone = lines.filter(lambda found: not any(word in one for one in found for word in _OF_ALL))
    return alone.map(lambda found: tuple([line.replace("find()", "find(r)") for line in found]))


_OF_ALL = ("get(Other", "sa.update(Other)", "select_from(Other)", "sum(Child.m)")


def _grammar(shape: Shape) -> Grammar:
    return Grammar(
        plain=st.one_of(_plain(shape), _plain(shape), _session(shape), _beside(shape)),
        bad=_bad(shape),
        answer=_answer(shape),
        enough="r.n > 6",
        much="r.n > 5",
    )


def _plain(shape: Shape) -> st.SearchStrategy[Lines]:
    """What is done to the resource."""
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
        found.append((f"r.c{i} = r.c{i}",))
    extras = shape.extras
    if "check" in extras:
        found += [("r.n -= 6",), ("r.n = abs(r.n)",)]
    if "unique" in extras:
        found += [("r.unique = 3",), ("r.unique = 2",), ("r.unique = None",)]
    if "other_id" in extras:
        found += [("r.other_id = 1",), ("r.other_id = 99",), ("r.other_id = None",)]
    if "set_by_server" in extras:
        found.append(("r.set_by_server = 'here'",))
    if "computed" in extras:
        found += [("r.note = str(r.computed)",), ("r.n = r.computed - 10",)]
    if "double" in extras:
        found.append(("r.note = str(r.double)",))
    if shape.inherits:
        found += [("r.extra += 1",), ("r.extra = 7",)]
    if shape.children:
        found += _of_children(shape)
    return st.sampled_from(found)


def _of_children(shape: Shape) -> list[Lines]:
    return [
        ("r.children.append(Child(m=3, text='new'))",),
        ("r.children.append(Child(m=4))", "r.n = len(r.children)"),
        ("for child in r.children:", "    child.m += 1"),
        ("if r.children:", "    r.children[0].text = 'changed'"),
        ("if r.children:", "    r.children.pop()"),
        (
            "if r.children:",
            "    session(r).delete(r.children[-1])",
            "    session(r).flush()",
            "    session(r).refresh(r, ['children'])",
        ),
        ("r.children = r.children[1:]",),
        ("r.n = sum(child.m for child in r.children)",),
    ]


def _session(shape: Shape) -> st.SearchStrategy[Lines]:
    """What is asked of the session."""
    found = [
        ("session(r).flush()",),
        ("session(r).refresh(r)",),
        ("session(r).refresh(r, ['n'])",),
        ("session(r).flush()", "session(r).expire(r)"),
        ("session(r).flush()", "session(r).expire_all()"),
        ("session(r).flush()", "session(r).expire(r, ['n', 'note'])"),
        ("r.n += session(r).scalar(sa.select(sa.func.count()).select_from(Other))",),
        ("r.note = str(session(r).scalars(find().with_only_columns(Thing.n)).one())",),
        ("found = session(r).scalars(find().execution_options(populate_existing=True)).unique().one()", "found.n += 1"),
        ("with session(r).begin_nested():", "    r.n += 1"),
        (
            "try:",
            "    with session(r).begin_nested():",
            "        r.n += 2",
            "        raise Dirty('undone')",
            "except Dirty:",
            "    pass",
        ),
        ("with session(r).begin_nested():", "    r.n += 2", "    if r.n > 6:", "        raise Dirty('inside')"),
        (
            "with session(r).no_autoflush:",
            "    r.n += session(r).scalar(sa.select(sa.func.count()).select_from(Other))",
        ),
    ]
    if shape.children:
        found.append(("r.n += session(r).scalar(sa.select(sa.func.coalesce(sa.func.sum(Child.m), 0)))",))
    return st.sampled_from(found)


def _beside(shape: Shape) -> st.SearchStrategy[Lines]:
    """What is done to other rows."""
    return st.sampled_from(
        [
            ("session(r).add(Other(text='added'))",),
            ("session(r).get(Other, 1).m += 1",),
            ("other = session(r).get(Other, 2)", "other.m = r.n"),
            ("session(r).execute(sa.update(Other).values(m=Other.m + 1))",),
            ("session(r).execute(sa.insert(Other).values(text='sent', m=0))",),
            ("add_row(Other(text='row', m=r.n))",),
            ("add_row((Other, {'text': 'pair', 'm': 1}))",),
            ("add_row((Other.__table__, {'text': 'pair', 'm': 2}))",),
            ("add_row(sa.insert(Other).values(text='insert', m=3))",),
        ]
    )


def _bad(shape: Shape) -> st.SearchStrategy[Lines]:
    """What no column takes, or not every server's."""
    found: list[Lines] = [
        ("r.n = None",),
        ("r.n = 2**40",),
        ("r.note = 'x' * 21",),
        ("r.note = chr(0)",),
        ("r.n = 'many'",),
    ]
    found += [
        ("add_row(Other(text='x' * 11, m=0))",),
        ("add_row((Other, {'text': chr(0), 'm': 1}))",),
        ("add_row((Other, {'text': 'null', 'm': None}))",),
    ]
    for i, kind in enumerate(shape.kinds):
        found += [(f"r.c{i} = {value}",) for value in kind.bad]
    return st.sampled_from(found)


def _answer(shape: Shape) -> st.SearchStrategy[Lines]:
    found: list[Lines] = [(), *((f"return r.{name}",) for name in shape.attributes)]
    found += [("return [r.n, r.note]",), ("return {'n': r.n, 'all': (r.note, None)}",)]
    if shape.columns:
        found += [("return {'c0': r.c0}",), ("return [r.c0]",)]
    if shape.children:
        found += [("return [(child.m, child.text) for child in r.children]",), ("return len(r.children)",)]
    if "other_id" in shape.extras:
        found.append(("return r.other.text if r.other else None",))
    return st.sampled_from(found)


def foreign(shape: Shape) -> st.SearchStrategy[Lines]:
    """What somebody else writes: everybody who writes counts the version up."""
    counted = ("r.version += 1",) if shape.version == "store" else ()
    found: list[Lines] = [
        ("r.n = r.n + 10 if isinstance(r.n, int) else 10", *counted),
        ("r.note = 'foreign'", *counted),
    ]
    for i, kind in enumerate(shape.kinds):
        found += [(f"r.c{i} = {value}", *counted) for value in kind.values[:2]]
    return st.sampled_from(found)
