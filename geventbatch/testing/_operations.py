"""A checker of operations: whether they can be replayed, and change nothing but what they should."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

from geventbatch._batch import batch_at_hand, current_batch
from geventbatch._bulk.component import Component
from geventbatch._bulk.crossing import Crossing
from geventbatch._check_values import check_callable
from geventbatch._safe_repr import said, shown
from geventbatch._seam import each_of, observing
from geventbatch._values.answers import unfinished
from geventbatch.testing._computed import reads_of_computed
from geventbatch.testing._values import changeable, copied, difference, held_twice, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator

    from geventbatch._core.operation import Operation
    from geventbatch._seam import AnyProcessor

Check = Literal[
    "aliases", "arguments", "computed", "differs", "raised", "read_only", "replaces", "shares", "unfinished"
]
_CHECKS: Final[frozenset[str]] = frozenset(get_args(Check))


class ImpureOperation(AssertionError):
    """A finding of `check_operations`. The operation's caller gets it, and nothing of the operation was saved."""


@contextmanager
def check_operations(
    *processors: AnyProcessor,
    copy: Callable[[Any], Any] = copied,
    state: Callable[[Any], Any] = state_of,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    skip: Collection[Check] = (),
) -> Iterator[None]:
    """Try each operation of *processors* twice on copies of its resource before it is applied; refuse bad ones.

    A batch may be replayed, and its operations' changes are saved together. So an operation is refused, with an
    `ImpureOperation` that says why, if

    - ``differs``: the second run returned or raised something else than the first, left the resource in another state,
      or added other rows: it depends on more than the resource and its arguments;
    - ``arguments``: it changed a list, dict or set among its arguments: its caller sees the first run's changes, and
      any other run gets the original arguments;
    - ``raised``: it raised one of the processor's ``clean_errors`` after it had changed the resource: the change would
      be saved with the others';
    - ``read_only``: it changed the resource in spite of ``run(…, read_only=True)``;
    - ``replaces``: it returned a new object in place of the resource (of the same class, in another state; for a dict,
      list or set, one with all that the resource has, and more) and left the resource as it was: the new object is
      lost, so change the resource in place;
    - ``aliases``: it put a list, dict, set or object among its arguments into the resource, which its caller still
      holds; or it put one list, dict or set into two places of the resource, which stay one object until the next
      load and are two afterwards;
    - ``computed``: it read an attribute that the database, or the ORM at each save, computes (a generated column, an
      ``onupdate``, Django's ``auto_now``): behind an operation that has changed the row, that is the loaded value,
      or costs a load. What a model's own ``save`` or a trigger computes is not found;
    - ``unfinished``: it returned a coroutine, a generator, or something else still to be run;
    - ``shares``: its result is, or holds, an object of the resource that can change: later operations have changed
      it by the time the caller looks. Return values, or copies.

    Without *processors*, all in this process are checked, those made inside the block too. Operations admitted before
    the block are not checked.

    Args:
        *processors: The processors whose operations are checked.
        copy: Copies a resource; of an operation across keys, each. By default `copy.deepcopy`, with which a Django
            instance keeps its class. A copy of a mapped instance of SQLAlchemy is in no session then: give a function
            that returns a new instance if operations read relationships or deferred columns that are not loaded.
        state: Returns the part that is compared, by ``==``, of a resource (of each, as *copy*), a result, or an added
            row. By default `state_of`: all that is in it, by value. Give one for objects that hold more than their
            state, such as caches, or the time.
        around: Returns the context manager around both runs on copies: a savepoint that is rolled back, if
            operations send statements that write.
        skip: Names of checks, as above, that are left out.

    Raises:
        ImpureOperation: At the end of the block, unless the block raises: an operation was refused, and its caller has
            not let the error come here.
        TypeError: An argument is of a wrong type.
        ValueError: *skip* has a name of no check.
    Switches: no.
    """
    for name, value in (("copy", copy), ("state", state), ("around", around)):
        check_callable(name, value)
    if unknown := set(skip) - _CHECKS:
        raise ValueError(f"skip has {shown(min(unknown))}, but must have names of checks: {', '.join(sorted(_CHECKS))}")
    checker = _Checker(copy, state, around, frozenset(skip))
    with each_of(processors, lambda one: observing(one, checker.see_operation)):
        yield
    if checker.complaints:
        raise checker.complaints[0]


class _Run(NamedTuple):
    """The result of one run on a copy."""

    value: Any
    error: Exception | None
    resource: Any
    state: Any
    beside: tuple[Any, tuple[Hashable, ...]]  # the rows that it added; the keys that it deletes
    aliases: str | None  # an object that it put into the resource, and that is also elsewhere
    computed: list[str]  # computed attributes that it read
    unfinished: str | None  # a part of its value that is still to be run

    def outcome(self, state: Callable[[Any], Any]) -> Any:
        """Return the part that is compared with another run's."""
        return state(self.value) if self.error is None else state_of(self.error)

    def __str__(self) -> str:
        """Say what it returned or raised."""
        return f"returned {shown(self.value)}" if self.error is None else f"raised {shown(self.error)}"


class _Checker:
    """Runs each operation three times: twice on copies, then as its caller wants it."""

    def __init__(
        self,
        copy: Callable[[Any], Any],
        state: Callable[[Any], Any],
        around: Callable[[], AbstractContextManager[object]],
        skip: frozenset[str],
    ) -> None:
        self._copy = copy
        self._state = state
        self._around = around
        self._skip = skip
        # -- mutable state ---------------------------------------------------------------------------------
        self.complaints: list[ImpureOperation] = []

    def see_operation(self, operation: Operation[Any]) -> None:
        """Check *operation* whenever it is applied."""
        from geventbatch._idempotency.once import Once  # slow to import

        once: Any = operation.callable
        if type(once) is Once:  # the idempotency key is tied to its operation's name
            once.operation = partial(self.run, once.operation, operation.read_only)
        else:
            operation.callable = partial(self.run, once, operation.read_only)

    def run(self, operation: Callable[..., Any], read_only: bool, resource: Any, *args: Any) -> Any:  # noqa: FBT001 - bound by a partial
        """Apply *operation*, unless a check refuses it."""
        called = f"{_name(operation)}({', '.join(['resource', *map(shown, args)])})"
        before = self._state_of(resource)
        given = state_of(_containers(args))
        first, second = (self._try(operation, resource, args) for _ in range(2))
        if state_of(_containers(args)) != given:
            told = (
                "changed its arguments: its caller sees what the first run makes of them, and any other run gets "
                "them as they were. Let it change the resource only"
            )
            self._complain(called, "arguments", told)
        for check, told in self._findings(first, second, before, read_only=read_only):
            self._complain(called, check, told)
        return operation(resource, *args)

    def _try(self, operation: Callable[..., Any], resource: Any, args: tuple[Any, ...]) -> _Run:
        """Run it on a copy, and take back its rows and deletion."""
        twin = self._copied(resource)
        twice = held_twice(twin, "resource")
        batch = batch_at_hand()
        rows = len(batch.rows)
        value, error = None, None
        try:
            with self._around(), reads_of_computed(twin) as computed:
                try:
                    value = copy_context().run(operation, twin, *args)
                except Exception as raised:
                    error = raised.with_traceback(None)
            beside = [_row(one, self._state) for one in batch.rows[rows:]], batch.deleted_keys
        finally:
            batch.forget_operation()
        aliases = _aliases(twin, args, twice)
        return _Run(value, error, twin, self._state_of(twin), beside, aliases, computed, unfinished(value))

    def _copied(self, resource: Any) -> Any:
        try:
            return self._copy(resource) if self._copy is copied else _of_each(self._copy, resource)
        except Exception as error:
            raise TypeError(
                f"check_operations cannot copy the resource {shown(resource)} ({said(error)}): pass copy=…, which "
                "returns another one in the same state"
            ) from error

    def _state_of(self, resource: Any) -> Any:
        return self._state(resource) if self._state is state_of else _of_each(self._state, resource)

    def _findings(self, first: _Run, second: _Run, before: Any, *, read_only: bool) -> Iterator[tuple[Check, str]]:
        if first.unfinished is not None:
            yield "unfinished", f"returned {first.unfinished}"
            return
        yield from self._differences(first, second)
        if first.computed:
            told = "computes at a save: behind an operation that has changed the row it is what was loaded, or costs a"
            yield "computed", f"read {first.computed[0]}, which the database or the ORM {told} load. Compute it here"
        if first.error is None:
            yield from self._of_answer(first, before, read_only=read_only)
        elif isinstance(first.error, batch_at_hand().dispatcher.options.clean_errors) and first.state != before:
            where, was, now = difference(before, first.state, "resource")
            yield "raised", f"{first}, and had changed {where} by then, from {shown(was)} to {shown(now)}"

    def _differences(self, first: _Run, second: _Run) -> Iterator[tuple[Check, str]]:
        if first.outcome(self._state) != second.outcome(self._state):
            yield "differs", f"{first}, and in a second run on the same resource {second}"
        elif first.state != second.state:
            where, one, other = difference(first.state, second.state, "resource")
            told = f"left {where} as {shown(one)}, and in a second run on the same resource as {shown(other)}"
            yield "differs", told
        elif first.beside != second.beside:
            yield "differs", "added other rows to the batch, or deleted otherwise, in a second run on the same resource"

    def _of_answer(self, run: _Run, before: Any, *, read_only: bool) -> Iterator[tuple[Check, str]]:
        changed = run.state != before or run.beside != ([], ())
        if read_only and changed:
            where, was, now = difference(before, run.state, "resource")
            told = (
                f"changed {where}, from {shown(was)} to {shown(now)}"
                if run.state != before
                else "added rows, or deleted it"
            )
            yield "read_only", f"is read_only=True, and has {told}"
        if run.aliases is not None:
            yield "aliases", run.aliases
        if not (read_only or changed) and self._replaces(run):
            yield "replaces", f"{run} in place of the resource, and left that as it was: change it in place"
        shared = _shared(run.value, run.resource)
        if shared is not None:
            yield "shares", f"returned what is part of the resource and can change: {shared}"

    def _replaces(self, run: _Run) -> bool:
        value, resource = run.value, run.resource
        if type(value) is not type(resource) or _is_of_several(resource) or self._state(value) == run.state:
            return False
        if isinstance(value, (dict, set)):
            return bool(resource) and set(resource) <= set(value)
        return not isinstance(value, list) or (resource != [] and value[: len(resource)] == resource)

    def _complain(self, called: str, check: Check, told: str) -> None:
        if check in self._skip:
            return
        complaint = ImpureOperation(
            f"the operation {called} on key {shown(current_batch().key)} {told} ({check}); nothing of it was saved"
        )
        self.complaints.append(complaint)
        raise complaint


def _is_of_several(resource: Any) -> bool:
    """Return whether *resource* is the tuple of resources of an operation across keys."""
    return type(resource) is tuple and type(batch_at_hand()) in {Component, Crossing}


def _of_each(call: Callable[[Any], Any], resource: Any) -> Any:
    """Call a function of the user's, which takes one resource, with each resource of the operation."""
    return tuple(map(call, resource)) if _is_of_several(resource) else call(resource)


def _containers(args: tuple[Any, ...]) -> list[Any]:
    return [one for one in args if isinstance(one, (dict, list, set))]


def _aliases(resource: Any, args: tuple[Any, ...], before: dict[tuple[str, str], Any]) -> str | None:
    """Describe the first object in *resource* that is also in an argument or elsewhere in it; None if none is."""
    given: dict[int, tuple[Any, str]] = {}
    for number, one in enumerate(args, 1):
        changeable(one, f"argument {number}", given)
    for where, (_, path) in changeable(resource, "resource").items():
        if where in given:
            return (
                f"put {given[where][1]} into the resource, as {path}: its caller has it too, and the operations behind "
                "change it under its hands. Put a copy there"
            )
    for one, other in held_twice(resource, "resource"):
        if (one, other) in before:
            continue
        return (
            f"put one object into {one} and {other}: what an operation behind changes in one is changed in both, until "
            "the next load. Put a copy there"
        )
    return None


def _row(row: Any, state: Callable[[Any], Any]) -> Any:
    """Return the part of an added row that is compared: of a statement or table of SQLAlchemy's, the type only."""
    if isinstance(row, tuple):
        return [_row(one, state) for one in row]
    return type(row) if type(row).__module__.startswith("sqlalchemy.") else state(row)


def _shared(value: Any, resource: Any) -> str | None:
    """Describe the first object that *value* shares with *resource*; None if none is."""
    theirs = changeable(resource, "resource")
    for where, (_, path) in changeable(value, "result").items():
        if where in theirs:
            return f"{path} is {theirs[where][1]}"
    return None


def _name(operation: Any) -> str:
    while isinstance(operation, partial):  # made by this module
        inner = [one for one in operation.args if callable(one)]
        operation = inner[0] if inner else operation.func
    operation = getattr(operation, "stands_for", operation)
    return getattr(operation, "__qualname__", None) or shown(operation)
