"""Problems in the set-up of processors, which would lose changes or time out.

They are looked for when a processor is made, when an integration learns how many processes serve, and by `check_setup`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from geventbatch._check_callables import PairFacts
from geventbatch._core import process
from geventbatch._misspelt import problem_of
from geventbatch._watch.log import place_of
from geventbatch._watch.problem import SetupProblem, warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from geventbatch._options import Options
    from geventbatch._processor import Processor

_SHORT: Final = 1.0
"""Seconds; under it, a batch over a server has no time for one slow statement."""

_SEVERAL: Final = 2
"""Processes, if all that is known is that there is more than one."""


class _Workers:
    """The processes that serve side by side."""

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self.seen = 0  # their number; 0 if no integration knows it
        self.warned: WeakSet[Processor[Any]] = WeakSet()  # processors whose pair was warned of

    def number(self) -> int:
        """Return their number, as far as it is known; else 1."""
        if self.seen:
            return self.seen
        uwsgi = getattr(sys.modules.get("uwsgi"), "numproc", None)
        if isinstance(uwsgi, int):
            return uwsgi
        number = os.environ.get("WEB_CONCURRENCY", "")  # read by gunicorn, and set by platforms
        return int(number) if number.isdecimal() else 1


_workers: Final = _Workers()


def know_workers(number: int) -> list[SetupProblem]:
    """Note that so many processes serve. Return the problems that follow, once for each processor."""
    _workers.seen = number
    return [problem for processor in live() for problem in _unwarned(processor)]


def see_environment(environ: Mapping[str, Any]) -> None:
    """Learn from the *environ* of a WSGI request whether several processes serve; warn of the problems that follow."""
    if environ.get("wsgi.multiprocess") and _workers.seen < _SEVERAL:
        for problem in know_workers(_SEVERAL):
            warn(problem)


def warn_of(processor: Processor[Any]) -> None:
    """Warn of *processor*, which has been made."""
    options, name = processor._options, processor.name  # noqa: SLF001 - it is the library's own
    for problem in (*_unsaved(options, name), *_misspelt(options, name), *_unwarned(processor)):
        warn(problem)


def problems(names: Mapping[int, str] | None = None) -> Iterator[SetupProblem]:
    """Return the problems of all processors that are not stopped.

    *names* has names by the identity of processors; the others are called by their own name.
    """
    for processor in live():
        options = processor._options  # noqa: SLF001 - likewise
        name = (names or {}).get(id(processor), options.name)
        for look in (_unsaved, _uncompared, _short, _misspelt):
            yield from look(options, name)


def live() -> list[Processor[Any]]:
    """Return the processors that are not stopped: a stopped one has no more problems."""
    return [one for one in process.processors() if not one._current().stopping]  # noqa: SLF001 - likewise


def _unwarned(processor: Processor[Any]) -> list[SetupProblem]:
    if processor in _workers.warned:
        return []
    found = list(_uncompared(processor._options, processor.name))  # noqa: SLF001 - likewise
    if found:
        _workers.warned.add(processor)
    return found


def _pair(options: Options) -> PairFacts | None:
    """Return the pair of the options, if they have one that loads."""
    facts = options.store.pair_facts
    return facts if isinstance(facts, PairFacts) and facts.load is not None else None


def _found(name: str, pair: PairFacts) -> str:
    """Return *name*; for a lambda, with the place of the function that loads."""
    return f"{name} ({place_of(pair.load)})" if name.endswith("<lambda>") else name


def _unsaved(options: Options, name: str) -> Iterator[SetupProblem]:
    pair = _pair(options)
    if pair is not None and not pair.saves:
        yield SetupProblem(
            "unsaved",
            f"The processor {_found(name, pair)} has a load_resource without save_resource: what operations change is "
            "answered, and never saved.",
            "Pass save_resource; or, where nothing is to be saved, save_resource=lambda key, resource: None.",
        )


def _uncompared(options: Options, name: str) -> Iterator[SetupProblem]:
    pair = _pair(options)
    if pair is not None and pair.saves and not pair.compares and _workers.number() > 1:
        yield SetupProblem(
            "uncompared",
            f"The processor {_found(name, pair)} loads and saves by a pair of functions, which compares nothing, and "
            "more than one worker process serves: what one of them saves, and answers, is written over by another that "
            "has loaded before.",
            "Use a store (SQLAlchemyStore, DjangoStore, RedisStore, SQLStore), which locks or compares; or let the "
            "save compare what was loaded, raise geventbatch.Conflict where it is another by now, and pass "
            "compares=True.",
        )


def _short(options: Options, name: str) -> Iterator[SetupProblem]:
    if options.max_duration < _SHORT and options.store.on_server:
        yield SetupProblem(
            "short-deadline",
            f"The processor {name} has a max_duration of {options.max_duration:g} s over a database server: "
            "one slow statement, or a wait for a lock, and all callers of the batch get a BatchTimeout.",
            "Pass max_duration, in seconds: what the slowest load and save may take together, such as 5. (By default "
            "it is twice min_duration.)",
        )


def _misspelt(options: Options, _: str) -> Iterator[SetupProblem]:
    store = options.open_resource if options.open_resources is None else options.open_resources
    problem = problem_of(store, scope=False)
    if problem is not None:
        yield problem
