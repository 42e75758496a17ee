"""Runs operations one by one and in batches, and compares what came of both. Failing programs have all of it in them.

A `World` is what one ORM has: how an operation runs alone, the store, the rows. Here is what they have in common.
"""

from __future__ import annotations

import enum
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import gevent

from geventbatch import BatchError, Processor, current_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from geventbatch import BatchMetric

Operation = Any
"""Takes the resource, and gives its answer."""

REFUSALS = (
    # SQLite, which is locked as a whole from a first write on.
    (RuntimeError, r"an operation on .* would (write|begin a savepoint) to SQLite"),
    (RuntimeError, r"an operation on .* would load .* anew, and forget what operations have changed"),
    # What would end the transaction, reach the other operations, or change the row behind the resource's back.
    (RuntimeError, r"an operation on .* called commit\(\) of its batch's session"),
    (RuntimeError, r"an operation on .* (took|would take) .* out of its batch's session"),
    (RuntimeError, r"an operation on .* was refused a statement"),
    (RuntimeError, r"an operation on .* changed the row of its resource by a query or another instance"),
    (RuntimeError, r"refresh_from_db\(\) on the resource of a batch"),
    (TypeError, r"an operation assigned an expression to"),
    # What would not come back as it is.
    (ValueError, r"it could not be read back"),
    (TypeError, r"Nothing of this operation was saved: make it of what JSON has"),
)
"""How a store refuses what it cannot keep as if alone (docs/as-if-alone.md): kind of error, and what it says."""


class Clean(Exception):
    """Where processors are told so (`clean_errors`), an operation raises it before it changes anything."""


class Dirty(Exception):
    """An operation raises it wherever it likes."""


@dataclass
class Alone:
    """What comes of operations in one transaction; an error is that of the last one."""

    answers: list[Any] = field(default_factory=list)
    refused: bool = False
    """All of them had returned, and the save has raised."""

    def fail(self, error: BaseException, count: int) -> None:
        """One of so many operations, or the save of all, has raised it."""
        self.refused = len(self.answers) == count
        self.answers[count - 1 :] = [frozen(error)]


@dataclass(frozen=True)
class Step:
    """An operation, as a world is given it: it takes the resources of its keys, in their order."""

    operation: Operation
    at: tuple[int, ...] = (0,)
    """The numbers of its keys."""
    across: bool = False

    def __call__(self, *resources: Any) -> Any:
        return self.operation(resources if self.across else resources[0])


class World(Protocol):
    """What one ORM has.

    For operations across keys it has *keys*, sees to `Step.at`, has a second argument *at* of `foreign` (a key's
    number), and says by *bulk* whether its processor takes the form for many keys.
    """

    ordered: bool  # whether its columns keep the order of names
    atomic_foreign: bool  # nobody can write while a batch runs

    def fill(self) -> None:
        """Have the rows that a trial begins with, and no others."""

    def alone(self, operations: Sequence[Step]) -> Alone:
        """What comes of these, in one transaction by the ORM's plain means."""

    def foreign(self, write: Callable[[Any], object]) -> None:
        """Have somebody else write, by another connection."""

    def store(self) -> Any:
        """What a processor takes."""

    @property
    def key(self) -> Any:
        """Of the resource."""

    def rows(self) -> dict[str, list[Any]]:
        """All rows of all tables, frozen, without what counts or stamps saves."""


@dataclass
class Trial:
    """What is run: operations, in batches, with somebody else's writes between and in them."""

    operations: Sequence[Operation]
    batches: Sequence[int] = ()
    """How many operations are in each; what is left is in a last one."""
    between: dict[int, Operation] = field(default_factory=dict)
    """Somebody else's writes, by the number of the batch that they come before."""
    during: dict[int, Operation] = field(default_factory=dict)
    """Somebody else's writes, by the number of the operation that is running."""
    clean_errors: tuple[type[Exception], ...] = ()
    """What is raised before any change only."""
    at: Sequence[int | tuple[int, ...]] = ()
    """The number of the key of each operation; or of several, for one across keys. Empty: all are of one key."""
    foreign_at: int = 0
    """The number of the key that somebody else writes to."""

    def step(self, number: int) -> Step:
        """The operation of that number."""
        at = self.at[number] if self.at else 0
        return Step(self.operations[number], at if isinstance(at, tuple) else (at,), isinstance(at, tuple))

    def parts(self) -> list[list[int]]:
        """The numbers of the operations of each batch."""
        left = list(range(len(self.operations)))
        found = []
        for size in self.batches:
            found.append(left[:size])
            left = left[size:]
        return [part for part in [*found, left] if part]


@dataclass(frozen=True)
class Outcome:
    """What was answered, and what is in the database."""

    answers: tuple[Any, ...]
    rows: dict[str, list[Any]]
    refused: frozenset[int] = frozenset()
    """Operations that returned alone, and could not be saved so."""


class Undecided(Exception):
    """What operations that a later one heals would have given cannot be told: one between them raised."""


class Mismatch(AssertionError):
    """A batch gave what its operations alone would not have given."""


# -- one value ---------------------------------------------------------------------------------------------------


def frozen(value: Any, *, ordered: bool = True) -> Any:
    """What can be compared and shown of *value*: its exact type and all that is in it."""
    if isinstance(value, BaseException):
        return _frozen_error(value)
    if isinstance(value, memoryview):  # of a driver: what it is told to be is bytes
        value = bytes(value)
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return (type(value).__name__, *_frozen_parts(value, ordered=ordered))
    if isinstance(value, enum.Enum) or value is None or _has_repr(value):
        return (type(value).__name__, _shown(value))
    return (type(value).__name__, frozen(getattr(value, "__dict__", None), ordered=ordered))


def _frozen_parts(value: Any, *, ordered: bool) -> list[Any]:
    if isinstance(value, dict):
        parts = [(frozen(name, ordered=ordered), frozen(one, ordered=ordered)) for name, one in value.items()]
        return parts if ordered else sorted(parts, key=repr)
    parts = [frozen(one, ordered=ordered) for one in value]
    return parts if isinstance(value, (list, tuple)) else sorted(parts, key=repr)


def _has_repr(value: object) -> bool:
    own: Any = type(value).__repr__
    return own is not object.__repr__


def _shown(value: Any) -> str:
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC).isoformat()  # which zone it is told in is the driver's
    return repr(value)


def _frozen_error(error: BaseException) -> tuple[Any, ...]:
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return ("raised", name, str(error)) if isinstance(error, (Clean, Dirty)) else ("raised", name)


def _answer_of(call: Callable[..., object], *args: object) -> BaseException | None:
    try:
        call(*args)
    except BaseException as error:
        return error
    return None


def is_refusal(error: object) -> bool:
    """Whether a store has refused the operation by name."""
    return any(isinstance(error, kind) and re.search(told, str(error)) for kind, told in REFUSALS)


# -- in batches --------------------------------------------------------------------------------------------------


class InBatches:
    """Runs a trial in batches, each of which is one."""

    def __init__(self, world: World, trial: Trial, **options: Any) -> None:
        self.world = world
        self.trial = trial
        self.answers: list[Any] = [None] * len(trial.operations)
        self.errors: dict[int, BaseException] = {}
        self.metrics: list[BatchMetric] = []
        self.begun: set[int] = set()  # during which somebody else has written
        self._foreign: list[gevent.Greenlet[..., BaseException | None]] = []
        self._options = {"min_duration": 0, "max_duration": 20, "workers": 1, **options}
        if self.in_bulk:  # what comes together runs together
            self._options["max_batches"] = 1
        if trial.clean_errors:
            self._options["clean_errors"] = trial.clean_errors

    @property
    def in_bulk(self) -> bool:
        return bool(self.trial.at) and getattr(self.world, "bulk", False)

    def run(self) -> Outcome:
        world: Any = self.world
        world.fill()
        store = world.store()
        opens = {"open_resources": store.open_resources} if self.in_bulk else {"open_resource": store}
        with Processor(**opens, **self._options) as processor:
            metrics = processor.subscribe_batch_metrics()
            for number, part in enumerate(self.trial.parts()):
                if number in self.trial.between:
                    write_to(world, self.trial, self.trial.between[number])
                callers = [gevent.spawn(self._call, processor, one) for one in part]
                gevent.joinall(callers, raise_error=True)
                for write in self._foreign:
                    failed = write.get()
                    if failed is not None:
                        raise failed
        self.metrics = list(metrics)
        return Outcome(tuple(self.answers), world.rows())

    def _call(self, processor: Processor[Any], number: int) -> None:
        step = self.trial.step(number)
        world: Any = self.world
        try:
            if step.across:
                answer = processor.run_across([world.keys[one] for one in step.at], self._applied, number)
            else:
                key = world.keys[step.at[0]] if self.trial.at else world.key
                answer = processor.run(key, self._applied, number)
            self.answers[number] = frozen(answer, ordered=self.world.ordered)
        except Exception as error:
            self.answers[number] = frozen(error)
            self.errors[number] = error

    def _applied(self, resource: Any, number: int) -> Any:
        write = self.trial.during.get(number)
        if write is not None and number not in self.begun:
            self.begun.add(number)
            self._foreign.append(gevent.spawn(_answer_of, write_to, self.world, self.trial, write))
            # It is through at once, or it waits for the row and comes after the batch.
            gevent.joinall(self._foreign[-1:], timeout=0.02 if self.world.atomic_foreign else 0.5)
        return self.trial.operations[number](resource)


def write_to(world: Any, trial: Trial, write: Operation) -> None:
    """Have somebody else write."""
    world.foreign(write, *[trial.foreign_at] * bool(trial.at))


# -- one by one --------------------------------------------------------------------------------------------------


def one_by_one(world: World, trial: Trial, left_out: set[int], after: dict[int, int], joined: set[int]) -> Outcome:
    """Run the operations alone, without those in *left_out*.

    Those in *joined* are not judged by themselves, but in one transaction with the next one. Somebody else's write that
    came while a batch ran came before so many of its operations as *after* says.
    """
    world.fill()
    answers: list[Any] = [None] * len(trial.operations)
    refused: set[int] = set()
    for number, part in enumerate(trial.parts()):
        if number in trial.between:
            write_to(world, trial, trial.between[number])
        writes = [trial.during[one] for one in part if one in trial.during]
        before = part[: after.get(number, 0)]
        for turn in (before, part[len(before) :]):
            if turn is not before:
                for write in writes:
                    write_to(world, trial, write)
            for group in _groups([one for one in turn if one not in left_out], joined):
                found = world.alone([trial.step(one) for one in group])
                if len(group) > 1 and _is_error(found.answers[-1]):
                    raise Undecided
                refused.update(group if found.refused else ())
                for one, answer in zip(group, found.answers, strict=True):
                    answers[one] = answer
    return Outcome(tuple(answers), world.rows(), frozenset(refused))


def _groups(numbers: Sequence[int], joined: set[int]) -> Iterator[list[int]]:
    group: list[int] = []
    for one in numbers:
        group.append(one)
        if one not in joined:
            yield group
            group = []
    if group:
        yield group


# -- and both ----------------------------------------------------------------------------------------------------


def judge(world: World, trial: Trial, **options: Any) -> None:
    """Raise a `Mismatch` when the batches give what the operations alone would not."""
    batched = InBatches(world, trial, **options)
    found = batched.run()
    _are_batches(batched)
    during = {number: write for number, write in trial.during.items() if number in batched.begun}
    trial = replace(trial, during=during)  # without those of operations that could not be applied
    refused = {one for one, error in batched.errors.items() if is_refusal(error)}
    expected = None
    for after in _orders(trial):
        try:
            alone = _healed(world, trial, refused, after, found)
        except Undecided:
            return
        if _same(alone, found, refused):
            return
        expected = expected or alone
    assert expected is not None
    raise Mismatch(_difference(expected, found, batched, refused))


def _orders(trial: Trial) -> Iterator[dict[int, int]]:
    """When somebody else's writes came, as it may have been: before a batch, after it, or between its parts."""
    parts = trial.parts()
    numbers = [n for n, part in enumerate(parts) if any(one in trial.during for one in part)]
    for chosen in product(*[(0, *range(len(parts[n]), 0, -1)) for n in numbers]):
        yield dict(zip(numbers, chosen, strict=True))


def _healed(world: World, trial: Trial, refused: set[int], after: dict[int, int], found: Outcome) -> Outcome:
    """What the operations alone give, where a constraint judges what is saved, and not the states between.

    An operation that alone is refused by the database, but was answered in the batch, is put into one transaction with
    the next one: that is what the page says of it.
    """
    joined: set[int] = set()
    while True:
        alone = one_by_one(world, trial, refused, after, joined)
        healed = {
            one
            for part in trial.parts()
            for one in part[:-1]
            if one in alone.refused - joined and not _is_error(found.answers[one])
        }
        if not healed:
            return alone
        joined = joined | {min(healed)}


def _is_error(answer: Any) -> bool:
    return isinstance(answer, tuple) and answer[:1] == ("raised",)


def _same(alone: Outcome, found: Outcome, refused: set[int]) -> bool:
    pairs = enumerate(zip(alone.answers, found.answers, strict=True))
    return alone.rows == found.rows and all(one == two for number, (one, two) in pairs if number not in refused)


def _are_batches(batched: InBatches) -> None:
    """See that the operations really ran together."""
    if batched.trial.at and not batched.in_bulk:
        return  # what is of one key is a batch of its own there
    if not any(isinstance(error, BatchError) for error in batched.errors.values()):  # what a deletion leaves is others
        counts = [metric.operation_count for metric in batched.metrics]
        parts = [len(part) for part in batched.trial.parts()]
        if batched.trial.at:
            counts = sorted(counts)
            parts = sorted(one for part in batched.trial.parts() for one in _connected(batched.trial, part))
        assert counts == parts, f"batches of {counts} operations in place of {parts}"


def _connected(trial: Trial, part: Sequence[int]) -> list[int]:
    """How many operations are in each component of a part."""
    groups: list[tuple[set[int], int]] = []
    for number in part:
        keys, count = set(trial.step(number).at), 1
        for group in [one for one in groups if one[0] & keys]:
            groups.remove(group)
            keys, count = keys | group[0], count + group[1]
        groups.append((keys, count))
    return [count for _, count in groups]


def _difference(alone: Outcome, found: Outcome, batched: InBatches, refused: set[int]) -> str:
    lines = []
    for number, (one, two) in enumerate(zip(alone.answers, found.answers, strict=True)):
        if number in refused:
            lines.append(f"operation {number} was refused: {batched.errors[number]!r}")
        elif one != two:
            lines.append(f"operation {number}: alone {one!r}, in a batch {two!r}")
            if number in batched.errors:
                lines.append(f"    {batched.errors[number]!r} from {batched.errors[number].__cause__!r}")
    for table in alone.rows:
        if alone.rows[table] != found.rows[table]:
            lines.append(f"{table}: alone    {alone.rows[table]!r}")
            lines.append(f"{table}: in batch {found.rows[table]!r}")
    return "\n".join(lines)


# -- what operations call ----------------------------------------------------------------------------------------

_rows: list[list[object]] = []
_deleted: list[list[int]] = []


@contextmanager
def transaction_of_one() -> Iterator[tuple[list[object], list[int]]]:
    """Where an operation runs alone: what it adds with `add_row`, and which of its resources it has deleted."""
    _rows.append([])
    _deleted.append([])
    try:
        yield _rows[-1], _deleted[-1]
    finally:
        _rows.pop()
        _deleted.pop()


def add_row(row: object) -> None:
    """Insert it with the save."""
    _rows[-1].append(row) if _rows else current_batch().add_row(row)


def delete(place: int = 0) -> None:
    """Delete the resource, or the one at that place."""
    if _deleted:
        _deleted[-1].append(place)
    else:
        current_batch().delete(current_batch().keys[place])
