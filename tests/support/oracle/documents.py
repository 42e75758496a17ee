"""The oracle for documents, in tables and in Redis: made-up examples, and how one is run."""

from __future__ import annotations

import json
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import redis
import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql

from tests.support.oracle import engines
from tests.support.oracle.documents_world import DocumentWorld, RedisWorld
from tests.support.oracle.engines import EnginesPlace
from tests.support.oracle.example import KEYS, Example, Grammar, Lines, Orm, across, course, operations
from tests.support.redis_server import redis_url

if TYPE_CHECKING:
    from tests.support.oracle.judge import World

IMPORTS = """\
import json
import pickle

import redis
"""

WORLD = """
def world():
    if SERVER == "redis":
        from tests.support.redis_server import redis_url

        return RedisWorld(redis.Redis.from_url(redis_url()), redis.Redis.from_url(redis_url()), globals(), **OPTIONS)
    engine, other = engines()
    metadata.create_all(engine)
    return DocumentWorld(engine, other, globals(), **OPTIONS)
"""

ORM = Orm(world="documents_world", imports=engines.IMPORTS + IMPORTS, makes=engines.ENGINES + WORLD)

_NAMES = {
    "json": json,
    "pickle": pickle,
    "sa": sa,
    "postgresql": postgresql,
}

_CODINGS = {
    "json": ("json.dumps", "json.loads", "None", True),
    "pickle": ("pickle.dumps", "pickle.loads", "sa.LargeBinary", True),
    "sorted": ("lambda resource: json.dumps(resource, sort_keys=True)", "json.loads", "None", False),
    "jsonb": ("lambda resource: resource", "lambda state: state", "postgresql.JSONB", False),
    "column": ("lambda resource: resource", "lambda state: state", "sa.JSON", True),
}

_KEYS = {"['a', 'b', 'C']": "None", "[7, 8, 10]": "sa.Integer", "['Ä', 'b', 'c']": "None"}


def _model(coding: str, keys: str) -> str:
    encode, decode, state_type, ordered = _CODINGS[coding]
    return f"""
metadata = sa.MetaData()
KEYS = {keys}
KEY = KEYS[0]
KEY_TYPE = {_KEYS[keys]}
STATE_TYPE = {state_type}
ORDERED = {ordered}
encode = {encode}
decode = {decode}
documents = sa.Table(
    PREFIX + "documents",
    metadata,
    sa.Column("key", KEY_TYPE or sa.String(50), primary_key=True),
    sa.Column("state", STATE_TYPE or sa.Text, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
)
Other = sa.Table(
    PREFIX + "other",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("text", sa.String(10)),
    sa.Column("m", sa.Integer, nullable=False),
)


def first():
    return {{"n": 5, "a": 1, "b": 2, "names": {{"x": 1, "y": 0}}, "list": [1, [2], {{"z": None}}], "text": "x"}}
"""


_STATEMENTS: list[Lines] = [
    ("r['n'] += 1",),
    ("r['n'] += 1",),
    ("r['n'] -= 3",),
    ("r['a'] = True",),
    ("r['a'] = 1",),
    ("r['a'] = 1.0",),
    ("r['b'] = 2.0",),
    ("r['b'] = r.pop('b')",),
    ("r['names']['x'] = not r['names'].get('x')",),
    ("r['names'] = dict(reversed(r['names'].items()))",),
    ("r['list'].append(r['n'])",),
    ("r['list'][1:2] = [[2.0]]",),
    ("r['list'].reverse()",),
    ("r['text'] += 'é'",),
    ("r['new'] = dict(r['names'])",),
    ("r.pop('new', None)",),
    ("r['names']['1'] = 'text'",),
    ("r['big'] = 2**70",),
    ("r.clear()",),
]

_ROWS: list[Lines] = [
    ("add_row((Other, {'text': 'pair', 'm': 1}))",),
    ("add_row((Other, {'text': r['text'][:2], 'm': r['n']}))",),
    ("add_row(sa.insert(Other).values(text='insert', m=3))",),
]

_BAD: list[Lines] = [
    ("r['text'] = chr(0)",),
    ("r['text'] = chr(0xD800)",),
    ("r['names'].update({1: 'one'})",),
    ("r['list'].append((1, 2))",),
    ("r['list'].append({1})",),
    ("r['list'].append(object())",),
    ("r['n'] = float('nan')",),
    ("r['n'] = float('inf')",),
]

_LOST: list[Lines] = [("r['names'].update({1: 'one'})",), ("r['list'].append((1, 2))",)]
"""What JSON takes, and gives back as something else."""

_BAD_ROWS: list[Lines] = [
    ("add_row((Other, {'text': 'null', 'm': None}))",),
    ("add_row((Other, {'text': chr(0), 'm': 1}))",),
    ("add_row((Other, {'text': 'x' * 11, 'm': 1}))",),
    ("add_row((Other, {'text': {'a': 1}, 'm': 1}))",),
]

_ANSWERS: list[Lines] = [
    (),
    ("return r['n']",),
    ("return r",),
    ("return r['names']",),
    ("return [r['list'], r['a']]",),
    ("return (r['a'], r['b'])",),
    ("return sorted(r)",),
    ("return r['list'][-1]",),
]


_MOVES: list[Lines] = [
    (),
    ("resources[0]['n'] -= 2", "resources[-1]['n'] += 2"),
    ("resources[0]['n'] -= 2", "resources[-1]['n'] += 2"),
    ("resources[-1]['n'] = resources[0]['n']",),
    ("resources[-1]['list'].append(resources[0]['text'])",),
    ("resources[0]['a'], resources[-1]['a'] = resources[-1]['a'], resources[0]['a']",),
    ("resources[0]['n'] -= 4", "if resources[0]['n'] < 0:", "    raise Dirty('poor')", "resources[1]['n'] += 4"),
]

_SEVERAL: list[Lines] = [
    (),
    ("return resources",),
    ("return [one['n'] for one in resources]",),
    ("return {place: one['list'] for place, one in enumerate(resources)}",),
]


def _grammar(server: str, *, loses: bool) -> Grammar:
    beside = server != "redis"
    bad = [one for one in _BAD if one not in _LOST or not loses]  # functions of one's own promise to lose nothing
    return Grammar(
        plain=st.sampled_from([*_STATEMENTS, *(_ROWS if beside else [])]),
        bad=st.sampled_from([*bad, *(_BAD_ROWS if beside else [])]),
        answer=st.sampled_from(_ANSWERS),
        enough="r['n'] > 6",
        much="r['n'] > 5",
        moves=st.sampled_from(_MOVES),
        several=st.sampled_from(_SEVERAL),
    )


_FOREIGN: list[Lines] = [("r['n'] = 50",), ("r['a'] = True",), ("r['list'] = []",)]


@st.composite
def examples(draw: st.DrawFn, server: str) -> Example:
    """One on *server*; on SQLite, some are in Redis."""
    if server == "sqlite" and draw(st.sampled_from([False, False, True])):
        server = "redis"
    coding = draw(st.sampled_from(_codings(server)))
    made, promised = draw(operations(_grammar(server, loses=coding not in {"json", "pickle"}), most=7))
    keys = draw(st.sampled_from(list(_KEYS) if server != "redis" else ["['a', 'b', 'C']"]))
    return Example(
        ORM,
        server,
        _model(coding, keys),
        made,
        *draw(course(len(made), st.sampled_from(_FOREIGN))),
        draw(_options(server, coding)),
        promised,
    )


@st.composite
def across_examples(draw: st.DrawFn, server: str) -> Example:
    """One with operations across keys; on SQLite, some are in Redis."""
    if server == "sqlite" and draw(st.booleans()):
        server = "redis"
    coding = draw(st.sampled_from(_codings(server)))
    made, promised, at = draw(across(_grammar(server, loses=coding not in {"json", "pickle"}), most=7))
    keys = draw(st.sampled_from(list(_KEYS) if server != "redis" else ["['a', 'b', 'C']"]))
    return Example(
        ORM,
        server,
        _model(coding, keys),
        made,
        *draw(course(len(made), st.sampled_from(_FOREIGN))),
        (("bulk", draw(st.booleans())), *draw(_options(server, coding))),
        promised,
        at,
        draw(st.integers(0, KEYS - 1)),
    )


def _codings(server: str) -> list[str]:
    return {"redis": ["json", "sorted"], "postgresql": list(_CODINGS)}.get(server, ["json", "pickle", "column"])


@st.composite
def _options(draw: st.DrawFn, server: str, coding: str) -> tuple[tuple[str, Any], ...]:
    options: dict[str, Any] = {}
    if server != "redis":
        options["mode"] = draw(st.sampled_from(["version"] if server == "sqlite" else ["lock", "version"]))
    if server == "postgresql":
        options["pipeline"] = draw(st.sampled_from([True, True, False]))
    if options.get("mode", "version") == "version" and coding in {"json", "pickle", "sorted"}:
        options["reuse"] = draw(st.sampled_from([False, True]))
    return tuple(sorted(options.items()))


class DocumentPlace(EnginesPlace):
    """Two engines and a Redis, and the tables that are there."""

    def __init__(self, server: str, address: str) -> None:
        super().__init__(server, address, **_NAMES)
        self._redis = redis.Redis.from_url(redis_url()) if server == "sqlite" else None

    def world(self, example: Example, names: dict[str, Any]) -> World:
        """What the judge is given."""
        options = dict(example.options)
        if example.server == "redis":
            return RedisWorld(self._redis, self._redis, names, **options)
        return DocumentWorld(self.engine, self.other, names, **options)

    def make(self, model: dict[str, Any]) -> None:
        """Make its tables."""
        model["metadata"].create_all(self.engine)

    def drop(self, model: dict[str, Any]) -> None:
        """Drop its tables."""
        model["metadata"].drop_all(self.engine)

    def close(self) -> None:
        """Give the connections back."""
        super().close()
        if self._redis is not None:
            self._redis.close()


place = partial(engines.new, DocumentPlace)
"""A new one, on a server and in a directory."""
