"""One example of the oracle, and the program that it is.

Model and operations are Python's source. What the test runs is what is printed when it fails.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Lines = tuple[str, ...]
Course = tuple[tuple[int, ...], tuple[tuple[int, Lines], ...], tuple[tuple[int, Lines], ...]]
At = int | tuple[int, ...]
"""The number of a key; or of several, for an operation across keys."""

HERE = Path(__file__).parent

IMPORTS = """\
import enum
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
"""


MAIN = """
def main():
    try:
        judge(world(), trial())
    except Mismatch as mismatch:
        print(mismatch)
        print("FAIL")
        raise SystemExit(1)
    print("PASS")


if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class Orm:
    """What is particular to programs on one ORM."""

    world: str
    """The module of its `World`."""
    imports: str
    makes: str
    """The source of `world()`, which makes one in a new database."""


@dataclass(frozen=True, repr=False)
class Example:
    """A model, operations on it, and how they are run."""

    orm: Orm
    server: str
    model: str
    operations: tuple[Lines, ...]
    batches: tuple[int, ...] = ()
    between: tuple[tuple[int, Lines], ...] = ()
    during: tuple[tuple[int, Lines], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    """Of the world."""
    promised: bool = False
    """Whether `Clean` is named in `clean_errors`."""
    at: tuple[At, ...] = ()
    """Of each operation; empty: all are of the first key."""
    foreign_at: int = 0
    """The number of the key that somebody else writes to."""

    @property
    def calls(self) -> str:
        """The source of the operations and of what somebody else writes."""
        functions = [
            _function(f"operation_{n}({'resources' if self._is_across(n) else 'r'})", lines)
            for n, lines in enumerate(self.operations)
        ]
        functions += [_function(f"between_{n}(r)", lines) for n, lines in self.between]
        functions += [_function(f"during_{n}(r)", lines) for n, lines in self.during]
        return "\n\n".join(functions)

    @property
    def trial(self) -> str:
        """The source of what is run."""
        operations = ", ".join([f"operation_{n}" for n in range(len(self.operations))])
        between = ", ".join([f"{n}: between_{n}" for n, _ in self.between])
        during = ", ".join([f"{n}: during_{n}" for n, _ in self.during])
        clean = "(Clean,)" if self.promised else "()"
        across = f", {self.at!r}, {self.foreign_at!r}" if self.at else ""
        return f"Trial([{operations}], {self.batches!r}, {{{between}}}, {{{during}}}, {clean}{across})"

    def _is_across(self, number: int) -> bool:
        return bool(self.at) and isinstance(self.at[number], tuple)

    def program(self) -> str:
        """All of it, to be saved and run in a clone."""
        return "\n".join(
            [
                '"""Run this in a clone, with PYTHONPATH=. It prints PASS or FAIL last."""',
                "from gevent import monkey",
                "",
                "monkey.patch_all()",
                "",
                IMPORTS,
                f"SERVER = {self.server!r}",
                self.orm.imports,
                f"OPTIONS = {dict(self.options)!r}",
                'PREFIX = ""',
                "",
                "# -- the model " + "-" * 80,
                self.model,
                "# -- the operations " + "-" * 80,
                "",
                self.calls,
                "",
                f"def trial():\n    return {self.trial}\n",
                "# -- how they are judged " + "-" * 80,
                _embedded("judge"),
                _embedded(self.orm.world),
                self.orm.makes,
                MAIN,
            ]
        )


@dataclass(frozen=True)
class Grammar:
    """What the operations on one resource are made of."""

    plain: st.SearchStrategy[Lines]
    bad: st.SearchStrategy[Lines]
    answer: st.SearchStrategy[Lines]
    enough: str
    """A condition that holds for some values of the resource."""
    much: str
    """Likewise, for others."""
    moves: st.SearchStrategy[Lines] = field(default_factory=lambda: st.just(()))
    """Of operations across keys: what is done to several of *resources*."""
    several: st.SearchStrategy[Lines] = field(default_factory=lambda: st.just(()))
    """Of operations across keys: their answers."""


@st.composite
def operations(draw: st.DrawFn, grammar: Grammar, most: int = 6) -> tuple[tuple[Lines, ...], bool]:
    """Some operations; and whether they keep a promise of `clean_errors`, to raise those before any change."""
    promised = draw(st.sampled_from([False, False, True]))
    return tuple(draw(st.lists(_operation(grammar, promised=promised), min_size=2, max_size=most))), promised


KEYS = 3
"""Of a world with operations across keys."""


@st.composite
def across(draw: st.DrawFn, grammar: Grammar, most: int = 6) -> tuple[tuple[Lines, ...], bool, tuple[At, ...]]:
    """Some operations on one key or on several; whether they keep a promise, as above; and their keys."""
    promised = draw(st.sampled_from([False, False, True]))
    several = st.permutations(range(KEYS)).flatmap(lambda keys: st.integers(1, KEYS).map(lambda n: tuple(keys[:n])))
    at: list[At] = draw(st.lists(st.integers(0, KEYS - 1) | several | several, min_size=2, max_size=most))
    made = [
        draw(
            _across(grammar, len(keys), promised=promised)
            if isinstance(keys, tuple)
            else _operation(grammar, promised=promised)
        )
        for keys in at
    ]
    return tuple(made), promised, tuple(at)


@st.composite
def _across(draw: st.DrawFn, grammar: Grammar, count: int, *, promised: bool) -> Lines:
    """The lines of one on so many keys: one of these has what an operation on one key has, the others are changed."""
    main = draw(st.integers(0, count - 1))
    lines: list[str] = []
    if not promised:  # by which nothing may change before an error
        for place in range(count):
            if place != main:
                body = draw(st.lists(grammar.plain, max_size=2))
                lines += [f"r = resources[{place}]", *(line for one in body for line in one)]
        if count > 1:
            lines += draw(grammar.moves)
    own = [line.replace("delete()", f"delete({main})") for line in draw(_operation(grammar, promised=promised))]
    answer = draw(grammar.several) if own[-1:] and not own[-1].startswith("return") else ()
    return (*lines, f"r = resources[{main}]", *own, *answer)


@st.composite
def _operation(draw: st.DrawFn, grammar: Grammar, *, promised: bool) -> Lines:
    """The lines of one: at most one bad value is in it, since nobody says which of two is told first."""
    clean, dirty = [(f"if {grammar.enough}:", "    raise Clean('enough')"), ("raise Clean('no')",)], _dirty(grammar)
    first = draw(st.sampled_from([(), (), (), *clean]))
    body = draw(st.lists(grammar.plain, max_size=3))
    ends: list[Lines] = [()] * 6
    wrong: Lines = ()
    if draw(st.sampled_from([False, False, False, True])):
        place, wrong = draw(st.integers(0, len(body))), draw(grammar.bad)
        body[place:] = [wrong, *(lines for lines in body[place:] if not _uses(lines, wrong))]
    else:  # with which nothing else of the resource is saved
        ends += [("delete()",), ("delete()", "raise Dirty('kept')")]
    body.sort(key=lambda lines: not _forgets(lines))
    if draw(st.sampled_from([False, False, True])):
        raises = draw(st.sampled_from([*dirty, *([] if promised else clean)]))
        if not wrong or not _uses(raises, wrong):
            body.insert(draw(st.integers(0, len(body))), raises)
    last = draw(st.sampled_from(ends))
    return (*first, *(line for one in body for line in one), *last, *draw(grammar.answer))


def _dirty(grammar: Grammar) -> list[Lines]:
    return [("raise Dirty('no')",), (f"if {grammar.much}:", "    raise Dirty('much')")]


def _uses(lines: Lines, wrong: Lines) -> bool:
    """Whether *lines* use what is *wrong*: which error is told then depends on what sends it to the database first."""
    name = wrong[0].partition(" =")[0]
    return name in "".join(lines)


def _forgets(lines: Lines) -> bool:
    """Whether SQLAlchemy forgets by it what the same operation has changed before: a store writes that first."""
    text = "".join(lines)
    return ("refresh(r" in text or "populate_existing" in text) and "flush()" not in text


@st.composite
def course(draw: st.DrawFn, made: int, foreign: st.SearchStrategy[Lines]) -> Course:
    """In one batch, or in several, with somebody else beside them."""
    if draw(st.sampled_from([False, True])):
        return (), (), ()
    batches: tuple[int, ...] = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    between: tuple[tuple[int, Lines], ...] = ()
    during: tuple[tuple[int, Lines], ...] = ()
    if batches and made > batches[0] and draw(st.sampled_from([False, True])):
        between = ((1, draw(foreign)),)
    if draw(st.sampled_from([False, True])):
        during = ((draw(st.integers(0, made - 1)), draw(foreign)),)
    return batches, between, during


def _function(signature: str, lines: Lines) -> str:
    body = "\n".join([f"    {line}" for line in lines]) or "    pass"
    return f"def {signature}:\n{body}\n"


def _embedded(name: str) -> str:
    """The source of a module of this folder, without what a program has at its top."""
    source = (HERE / f"{name}.py").read_text()
    source = re.sub(r"^from tests\.support\.oracle\..*\n", "", source, flags=re.MULTILINE)
    return re.sub(r"^from __future__ .*\n", "", source, flags=re.MULTILINE).replace("if TYPE_CHECKING:", "if True:")
