"""What the contract suite (tests/stores/test_stores.py) asks of a store: a `Case` for each store, mode and server.

`sqlalchemy.py`, `django.py`, `redis.py` and `sql.py` beside this each have a tuple ``CASES``. A test takes the cases
that have what it needs, by their flags, so that nothing is skipped. A `Case` makes a fresh place (a database, a schema,
a prefix of keys), whose address is a text that another process can open too. For each test its `Adapter` is opened
there.

In the suite a key is a text, a resource is whatever the store gives, and what the suite looks at in it is one whole
number, its total. (A key column of integers is for a store's own tests.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal

from geventbatch import Processor, current_batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    import pytest

    from tests.support.proxy import Proxy

Step = Literal["load", "operation", "save", "commit"]
"""What a batch sends: SELECT, an operation's own `Adapter.insert`, UPDATE (or INSERT, DELETE), COMMIT. A store whose
save is one message (Redis) has "load" and "commit" only."""

Missing = Literal["raise", "make"]
"""What the store is told to do about a key that has no resource: raise, or make one whose total is 0."""

ELSEWHERE: Final = frozenset({"mariadb", "pgbouncer"})
"""Servers that are not from PyPI, by the mark of their tests."""

MODULES: Final = ("sqlalchemy", "django", "redis", "sql")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One store in one mode on one server, not opened yet; making one starts nothing."""

    name: str
    """As it stands in the names of tests: "sqlalchemy-document-lock-postgresql"."""

    fresh: Callable[[Path], AbstractContextManager[str]]
    """The address of a new, empty place; the directory is the test's own. It is gone when the block is left."""

    opens: Callable[[str], AbstractContextManager[Adapter]]
    """The store at such an address, in this process or in another. Leaving the block closes its connections."""

    marks: tuple[pytest.MarkDecorator, ...] = field(default=(), compare=False)
    """Of all its tests: a server that not everybody has."""

    has_locks: bool = False
    """Mode "lock": a batch and a foreign writer of its key wait for each other. Without it: mode "version"."""

    has_rows: bool = False
    """`current_batch().add_row` works (`Adapter.row`, `rows`)."""

    has_outcomes: bool = True
    """It takes operations with idempotency keys."""

    has_across: bool = False
    """Its processors take operations across keys (`run_across`)."""

    has_sql: bool = False
    """An operation can send SQL of its own in the batch's transaction (`Adapter.insert`)."""

    has_pool: bool = True
    """There are connections to count and to end (`open_connections`, `busy_connections`, `terminate`)."""

    has_proxy: bool = False
    """`Adapter.proxy` is there: the store's connections, and only those, lead through it."""

    can_corrupt: bool = False
    """`Adapter.corrupt` works: a state is something that may be undecodable."""

    can_restart: bool = False
    """`Adapter.restart` works, on the server that is in use."""

    knows_outcome: bool = False
    """When the answer to COMMIT is lost, the store finds out what became of it, and answers that."""

    slow_steps: tuple[Step, ...] = ()
    """What `Adapter.slow` can slow down."""

    nul_in_keys: bool = False
    """The server takes a key with a NUL in it. (PostgreSQL does not.)"""

    longest_key: int = 200
    """Characters."""


class TooLittle(LookupError):
    """What `Adapter.take` raises. Its arguments are not those that it was made with."""

    def __init__(self, left: int) -> None:
        super().__init__(f"only {left} left")
        self.left = left


class Adapter(ABC):
    """A store that is opened, and what the tests do behind its back.

    What is done behind its back goes to the server directly, on connections of its own, which are not counted.
    """

    address: str
    """Where it is, for `Case.opens` in another process."""

    proxy: Proxy | None = None
    """What the store's connections lead through, in a case that ``has_proxy``."""

    commit_marker: bytes = b"COMMIT\x00"  # others say READ COMMITTED
    """What is in the message with which the store commits, as the proxy sees it, and in no other."""

    commit_answer: bytes = b"COMMIT"
    """What is in the server's answer to it; nothing when any answer is that."""

    pool_size: int = 4
    """So many batches can run at once, each with a connection of its own."""

    trips: int = 2
    """Round trips of a load and a save, of a bulk too, where a message may have several statements."""
    bulk: bool = False
    """Its processors take the bulk form of the store."""

    # -- the store ------------------------------------------------------------------------------------------

    @abstractmethod
    def store(self, *, missing: Missing = "raise") -> Callable[[Any], AbstractContextManager[Any]]:
        """What a processor takes as its ``open_resource``. All of them share the connections."""

    def processor(self, *, missing: Missing = "raise", **options: Any) -> Processor[Any]:
        """A processor over it, with natural batching, and patience unless the test has none."""
        store: Any = self.store(missing=missing)
        opens: Any = {"open_resources": store.open_resources} if self.bulk else {"open_resource": store}
        return Processor(**opens, **{"min_duration": 0, "max_duration": 30, "workers": 4, **options})

    # -- operations -----------------------------------------------------------------------------------------

    @abstractmethod
    def add(self, resource: Any, amount: int) -> int:
        """Add to the total, and return the new total."""

    def total(self, resource: Any) -> int:
        """Change nothing, and return the total."""
        return self.add(resource, 0)

    def take(self, resource: Any, amount: int) -> int:
        """Take from the total, and return the new total; or raise `TooLittle`."""
        left = self.total(resource)
        if left < amount:
            raise TooLittle(left)
        return self.add(resource, -amount)

    def transfer(self, resources: tuple[Any, ...], amount: int) -> list[int]:
        """Take from the first total, and add to the second; return both."""
        source, target = resources
        return [self.take(source, amount), self.add(target, amount)]

    def row(self, text: str) -> object:
        """A row for `current_batch().add_row`. *text* is unique in its table: a second one violates a constraint."""
        raise NotImplementedError

    def add_with_row(self, resource: Any, amount: int, text: str) -> int:
        """Add to the total, and have a row inserted with the save."""
        total = self.add(resource, amount)
        current_batch().add_row(self.row(text))
        return total

    def insert(self, resource: Any, text: str) -> None:
        """Insert such a row here and now, by a statement in the batch's own transaction."""
        raise NotImplementedError

    # -- behind its back, as a foreign writer: each in a transaction of its own ------------------------------

    @abstractmethod
    def get(self, key: str) -> int | None:
        """The total that is committed; None when there is no such resource."""

    @abstractmethod
    def put(self, key: str, total: int) -> None:
        """Insert or overwrite, and wait while a batch has the row locked.

        In mode "version" it counts the version up, as everybody must there. In mode "lock" it does what an admin does
        that knows nothing of us.
        """

    def remove(self, key: str) -> None:
        """Delete it."""
        raise NotImplementedError

    def corrupt(self, key: str) -> None:
        """Make its state something that nobody can decode."""
        raise NotImplementedError

    def rows(self) -> list[str]:
        """The texts of the rows that are committed, in the order they were inserted."""
        raise NotImplementedError

    def holding(self, key: str, total: int) -> AbstractContextManager[None]:
        """A foreign transaction that has written *total* to the row of *key*, locked so; leaving commits it."""
        raise NotImplementedError

    @abstractmethod
    def outcomes(self) -> int:
        """How many outcomes are recorded, those that have expired too."""

    @abstractmethod
    def expire_outcomes(self) -> None:
        """Have all outcomes expire."""

    def clear(self) -> None:
        """Delete all resources and rows. Where it is not there, every test makes a place of its own, which is slow."""
        raise NotImplementedError

    # -- how it breaks --------------------------------------------------------------------------------------

    def slow(self, step: Step) -> AbstractContextManager[Callable[[], bool]]:
        """While in the block, this statement of a batch (of any key) gets no answer.

        The block is given a function that says whether a batch waits for that answer right now. What became of the
        statement later, once the block has been left, is the server's business: it may still be carried out. `get` and
        `busy_connections` work meanwhile.
        """
        raise NotImplementedError

    def terminate(self) -> None:
        """Have the server end all connections of the store, in whatever state they are."""
        raise NotImplementedError

    def restart(self) -> None:
        """Stop the server at once, start it again with all that was committed, and wait until it answers."""
        raise NotImplementedError

    def flush(self) -> None:  # noqa: B027 - most have nothing to do
        """Have all that was committed so far survive a crash."""

    def crash(self) -> None:
        """The same as `restart`, without anything that a server does in order before it stops."""
        self.restart()

    def open_connections(self) -> int:
        """How many connections of the store the server has."""
        raise NotImplementedError

    def busy_connections(self) -> int:
        """How many are not at rest: lent by the pool, or in the middle of a statement or transaction for the server."""
        raise NotImplementedError


def cases() -> list[Case]:
    """All there are."""
    return [
        case for name in MODULES if _is_there(name) for case in import_module(f"tests.support.adapters.{name}").CASES
    ]


def _is_there(name: str) -> bool:
    return find_spec(f"tests.support.adapters.{name}") is not None


def case_named(name: str) -> Case:
    """For a program that was told a name."""
    return next(case for case in cases() if case.name == name)
