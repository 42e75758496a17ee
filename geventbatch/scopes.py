"""What a scope may have besides ``__enter__`` and ``__exit__``, and an ``open_resource`` besides its call, typed.

A scope or store that you write has what it can do of this, and nothing else: none of it is needed, and a class need not
name the protocols. Where it does not derive from them, a type checker compares it with one by an assignment, such as
``scope: TakesRows = MyScope()``. docs/stores.md says of each attribute when it is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from geventbatch.errors import NotSaved

R_co = TypeVar("R_co", covariant=True)

__all__ = [
    "Admits",
    "AfterSave",
    "ChecksOutcomes",
    "Copies",
    "Deletes",
    "HearsStop",
    "JudgesErrors",
    "JudgesReturns",
    "KeepsOutcomes",
    "MustCompare",
    "NormalizesKeys",
    "OnServer",
    "Owns",
    "Records",
    "Reuses",
    "StepByStep",
    "TakesRows",
    "Undoes",
]


@runtime_checkable
class Undoes(Protocol[R_co]):
    """A scope that brings its resource back to what it was, in memory, when an operation has raised (guarantee 18).

    Both are called between two operations, in the batch's context (`current_batch` gives it; in a scope of many keys,
    its ``key`` says of which). They must not switch: no round trip to a database. An operation that raised costs one
    `restore` at most, and what was applied since the last copy is applied again then; a `checkpoint` is asked for when
    that has become dearer than a copy.
    """

    def checkpoint(self) -> object:
        """Give a copy of the state as it is, that nothing changes any more; any object, but not None.

        Raises:
            CannotUndo: There is none to be had of this state. The next one that raises is undone from the copy before.
        Switches: no.
        """

    def restore(self, checkpoint: object | None) -> R_co:
        """Bring the resource back to what it was when `checkpoint` gave *checkpoint*, or, of None, to what was loaded.

        The same one may be restored many times.

        Returns:
            The resource to go on with: the same object, or another one, which is then saved in its place.

        Raises:
            CannotUndo: What was done since cannot be taken back in memory: something was written, say. The batch is
                loaded again then, and judged step by step, where the scope has ``steps``.
        Switches: no.
        """
        raise NotImplementedError


# -- what a scope says of its operations --------------------------------------------------------------------------


@runtime_checkable
class JudgesErrors(Protocol):
    """A scope that knows what the error of an operation has done to its transaction."""

    def operation_raised(self, error: Exception, /) -> NotSaved | None:
        """Say what *error*, which an operation has raised, means for the others.

        Returns:
            None: it is the operation's own. `Conflict`: all are replayed. `Rejected`: the transaction is spoiled, and
            all but this one are replayed. `geventbatch.errors.Undecided`: what earlier operations have changed was
            refused when this one had it sent. `geventbatch.errors.TooEarly`: what is before it is saved first. Another
            `NotSaved`: the batch ends with it.
        Switches: no.
        """


@runtime_checkable
class JudgesReturns(Protocol):
    """A scope that has called ``current_batch().ask_scope()`` in an operation, because it saw it send SQL, say."""

    def operation_returned(self) -> NotSaved | None:
        """Say whether the transaction is as good as before that operation, which has returned.

        Returns:
            None: it is. Else a `NotSaved`, as of `JudgesErrors.operation_raised`; after a `Rejected` the caller gets
            its ``__cause__``, or the `Rejected` itself.
        Switches: no.
        """


@runtime_checkable
class StepByStep(Protocol[R_co]):
    """A scope that writes each operation's changes behind a savepoint, so that each can be judged by itself.

    All three run in the context of its load and save, may switch, and commit nothing.
    """

    @property
    def steps(self) -> bool:
        """Whether it can, asked after the load."""
        raise NotImplementedError

    def begin_steps(self) -> object:
        """Be ready to go back to what was loaded. Called once, before the first operation. Switches: yes."""

    def keep(self) -> object:
        """Write what the operation that has returned has changed, and the rows added since the last `keep`.

        Raises:
            Rejected: It was refused; `undo` is called then.
            Conflict: All are to be replayed.
            NotSaved: The batch ends with it, as with anything else that it raises.
        Switches: yes.
        """

    def undo(self) -> R_co:
        """Go back to what was at the last `keep`, or at the load, in the transaction and in memory.

        Returns:
            The resource to go on with.
        Switches: yes.
        """
        raise NotImplementedError


@runtime_checkable
class Owns(Protocol):
    """A scope that knows its own: the operator is told once that operations had better return values."""

    def owns(self, value: object, /) -> bool:
        """Say whether *value*, which an operation has returned, belongs to the batch. Switches: no."""
        raise NotImplementedError


@runtime_checkable
class Copies(Protocol):
    """A scope that copies what is in its resource: callers get that, and share nothing with the batch."""

    def copied(self, value: object, /) -> object:
        """Give a copy of *value*, which is in an operation's answer; or itself, where it is not the batch's.

        What it raises is ignored, and *value* is answered. Switches: no.
        """


# -- what a scope does when it saves --------------------------------------------------------------------------------


@runtime_checkable
class TakesRows(Protocol):
    """A scope that inserts ``current_batch().rows`` when it saves; `Batch.add_row` is refused without it."""

    @property
    def takes_rows(self) -> bool:
        """Whether it does."""
        raise NotImplementedError


@runtime_checkable
class Deletes(Protocol):
    """A scope that looks at ``current_batch().deleted`` when it saves; `Batch.delete` is refused without it."""

    @property
    def deletes(self) -> bool:
        """Whether it does."""
        raise NotImplementedError


@runtime_checkable
class Records(Protocol):
    """A scope of a store that `KeepsOutcomes`."""

    def recorded(self, keys: list[str], /) -> Mapping[str, str]:
        """Give those of these idempotency keys that are recorded, each with its outcome.

        It is called in the context of load and save. Switches: yes.
        """
        raise NotImplementedError


@runtime_checkable
class Reuses(Protocol):
    """A scope whose resource may be one that an earlier batch has left.

    It is left as for a save also when ``current_batch().completed`` is 0, and has to compare then.
    """

    @property
    def reused(self) -> bool:
        """Whether it was not loaded for this batch."""
        raise NotImplementedError


@runtime_checkable
class MustCompare(Protocol):
    """A scope that knows when its operations may have been answered from two states of the database."""

    @property
    def must_compare(self) -> bool:
        """Whether more than one was applied, and some have asked for what another process may have changed by then.

        The scope is then exited as for a save, and has to compare, as one that `Reuses`.
        """
        raise NotImplementedError


@runtime_checkable
class AfterSave(Protocol):
    """A scope that has something left to do when its callers are answered."""

    def saved(self) -> object:
        """Do it: outside the deadline, with the key released. What it raises is logged. Switches: yes."""


# -- what an ``open_resource`` may have -----------------------------------------------------------------------------


@runtime_checkable
class NormalizesKeys(Protocol):
    """A store of which several keys may mean the same resource."""

    def normalize_key(self, key: Any, /) -> Hashable:
        """Give the one form of *key*: 42 and "42" are the same row. What it raises reaches the caller of `run`.

        Switches: no.
        """
        raise NotImplementedError


@runtime_checkable
class Admits(Protocol):
    """A store that looks at where an operation comes from. It is not asked with ``batching=False``."""

    def admit(self, key: Any, /) -> bool:
        """Say whether an operation on *key* from here has to run alone, as with ``batching=False``. Raises to refuse.

        Switches: no.
        """
        raise NotImplementedError


@runtime_checkable
class KeepsOutcomes(Protocol):
    """A store whose scopes record ``current_batch().outcomes`` in the transaction of the save, and are `Records`.

    They do so also where ``current_batch().completed`` is 0. If some are there already, they write nothing and raise
    `geventbatch.errors.Repeated` with those.
    """

    @property
    def keeps_outcomes(self) -> bool:
        """Whether they do, asked when the processor is made."""
        raise NotImplementedError


@runtime_checkable
class ChecksOutcomes(Protocol):
    """A store that `KeepsOutcomes`, but not of every key."""

    def check_outcomes(self, key: Any, /) -> object:
        """Raise if none can be recorded for *key*; that reaches the caller of `run`. Switches: no."""


@runtime_checkable
class OnServer(Protocol):
    """A store that knows whether it waits for a server: `check_setup` names a ``max_duration`` too short for one."""

    @property
    def on_server(self) -> bool:
        """Whether they do, asked when the processor is made."""
        raise NotImplementedError


@runtime_checkable
class HearsStop(Protocol):
    """A store that lets go what it holds when its processor has stopped."""

    def stopped(self) -> object:
        """Do so. Called once, when nothing runs any more; what it raises is logged. Switches: no."""


OF_A_SCOPE: Final[tuple[type, ...]] = (
    *(Undoes, JudgesErrors, JudgesReturns, StepByStep, Owns, Copies),
    *(TakesRows, Deletes, Records, Reuses, MustCompare, AfterSave),
)
OF_A_STORE: Final[tuple[type, ...]] = (NormalizesKeys, Admits, KeepsOutcomes, ChecksOutcomes, OnServer, HearsStop)
