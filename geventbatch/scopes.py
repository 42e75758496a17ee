"""Types of all that a scope may have besides ``__enter__`` and ``__exit__``, and an ``open_resource`` besides its call.

Your scope or store implements as much of this as it can. Nothing is needed, and a class need not derive from the
protocols. To have a type checker compare your class with one, write an assignment, such as
``scope: TakesRows = MyScope()``. docs/own-stores.md lists them.
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
    "AllOrNothing",
    "ChecksKeys",
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
    "OutcomeName",
    "Owns",
    "Records",
    "Reuses",
    "StepByStep",
    "TakesRows",
    "Undoes",
]


@runtime_checkable
class Undoes(Protocol[R_co]):
    """A scope that restores its resource in memory when an operation has raised (guarantee 18).

    Both methods are called between two operations, in the batch's context: `current_batch` returns the batch. In a
    scope of many keys, its ``key`` says which one is meant. Neither may switch: no round trip to a database. An
    operation that raised costs at most one `restore`, after which the operations since the last copy are applied again.
    A `checkpoint` is asked for when applying them would cost more than a copy.
    """

    def checkpoint(self) -> object:
        """Return a copy of the present state that never changes: any object but None.

        Raises:
            CannotUndo: This state cannot be copied. The next operation that raises is undone from the copy before.
        Switches: no.
        """

    def restore(self, checkpoint: object | None) -> R_co:
        """Restore the resource to the state of *checkpoint*, which `checkpoint` returned; None means the load.

        The same checkpoint may be restored many times.

        Returns:
            The resource to go on with: the same object, or another one, which is then saved in its place.

        Raises:
            CannotUndo: Memory alone cannot undo the operations since: a statement has written, say. The batch is then
                loaded again, and judged step by step if the scope has ``steps``.
        Switches: no.
        """
        raise NotImplementedError


# -- how a scope judges operations --------------------------------------------------------------------------------


@runtime_checkable
class JudgesErrors(Protocol):
    """A scope that knows how an operation's error has affected its transaction."""

    def operation_raised(self, error: Exception, /) -> NotSaved | None:
        """Return what *error*, raised by an operation, means for the other operations.

        Returns:
            None: nothing; the error is the operation's own. `Conflict`: all are replayed. `Rejected`: the transaction
            is spoiled, and all but this one are replayed. `geventbatch.errors.Undecided`: changes of earlier operations
            were refused when this one had them sent. `geventbatch.errors.TooEarly`: the earlier operations are saved
            first. Another `NotSaved`: the batch ends with it.
        Switches: no.
        """


@runtime_checkable
class JudgesReturns(Protocol):
    """A scope that called ``current_batch().ask_scope()`` in an operation, such as when it saw it send SQL."""

    def operation_returned(self) -> NotSaved | None:
        """Return whether the transaction is still sound after that operation, which has returned.

        Returns:
            None if it is. Else a `NotSaved`, as from `JudgesErrors.operation_raised`; after a `Rejected` the caller
            gets its ``__cause__``, or the `Rejected` itself.
        Switches: no.
        """


@runtime_checkable
class StepByStep(Protocol[R_co]):
    """A scope that writes each operation's changes behind a savepoint, so that each is judged by itself.

    The methods run in the context of the load and save, may switch, and commit nothing.
    """

    @property
    def steps(self) -> bool:
        """Return whether the scope can do so; read after the load."""
        raise NotImplementedError

    def begin_steps(self) -> object:
        """Make the loaded state the one to go back to. Called once, before the first operation. Switches: yes."""

    def keep(self) -> object:
        """Write the changes of the operation that has returned, and the rows added since the last `keep`.

        Raises:
            Rejected: The store refused them; `undo` is called next.
            Conflict: All operations are to be replayed.
            NotSaved: The batch ends with it, as with any other error.
        Switches: yes.
        """

    def undo(self) -> R_co:
        """Go back to the last `keep`, or to the load, in the transaction and in memory.

        Returns:
            The resource to go on with.
        Switches: yes.
        """
        raise NotImplementedError


@runtime_checkable
class Owns(Protocol):
    """A scope that recognises its own objects: the operator is told once that operations should return values."""

    def owns(self, value: object, /) -> bool:
        """Return whether *value*, the result of an operation, belongs to the batch. Switches: no."""
        raise NotImplementedError


@runtime_checkable
class Copies(Protocol):
    """A scope that copies objects of its resource for answers, so that callers share nothing with the batch."""

    def copied(self, value: object, /) -> object:
        """Return a copy of *value*, which is in an operation's answer; or *value* itself if it is not the batch's.

        If it raises, the error is ignored, and *value* is answered. Switches: no.
        """


# -- how a scope saves ----------------------------------------------------------------------------------------------


@runtime_checkable
class TakesRows(Protocol):
    """A scope that inserts ``current_batch().rows`` when it saves. Without it, `Batch.add_row` is refused."""

    @property
    def takes_rows(self) -> bool:
        """Return whether it inserts them."""
        raise NotImplementedError


@runtime_checkable
class Deletes(Protocol):
    """A scope that obeys ``current_batch().deleted`` when it saves. Without it, `Batch.delete` is refused.

    A scope of many keys asks whether each key is in ``current_batch().bulk[key].deleted_keys``.
    """

    @property
    def deletes(self) -> bool:
        """Return whether it obeys."""
        raise NotImplementedError


class OutcomeName(str):
    """What stands in place of an idempotency key in a scope of many keys: in `Batch.outcomes`, and wherever that goes.

    It is a text of 34 to 288 visible ASCII characters, the same in every process: 32 of a digest of the operation's
    keys, a colon, and the idempotency key. A scope may record outcomes under it as it is, or make a name of its own of
    the attributes. A text that is read from a database is equal to it, and does in its place.

    Attributes:
        keys: The keys of the operation, each as the store's ``normalize_key`` returned it, in an order that does not
            depend on the order in which they were named.
        idempotency_key: The idempotency key.
        across: Whether the operation was run by `run_across`. It shares no outcome with one of `run`, which has a
            single key and shares its outcomes with the store's scopes of one key.
    """

    __slots__ = ("across", "idempotency_key", "keys")

    keys: tuple[Hashable, ...]
    idempotency_key: str
    across: bool


@runtime_checkable
class Records(Protocol):
    """A scope of a store that `KeepsOutcomes`."""

    def recorded(self, keys: list[str], /) -> Mapping[str, str]:
        """Return the recorded outcomes of *keys*; leave out the others.

        They are idempotency keys; in a scope of many keys, each is an `OutcomeName`.

        Called in the context of the load and save. Switches: yes.
        """
        raise NotImplementedError


@runtime_checkable
class Reuses(Protocol):
    """A scope whose resource may be cached by an earlier batch.

    It is exited as for a save even if ``current_batch().completed`` is 0, and must compare versions then.
    """

    @property
    def reused(self) -> bool:
        """Return whether the resource was cached, not loaded for this batch."""
        raise NotImplementedError


@runtime_checkable
class MustCompare(Protocol):
    """A scope that knows whether operations may have been answered from two states of the database."""

    @property
    def must_compare(self) -> bool:
        """Return whether several operations were applied, and one has read a row that another writer may have changed.

        The scope is then exited as for a save, and has to compare, as one that `Reuses`.
        """
        raise NotImplementedError


@runtime_checkable
class AfterSave(Protocol):
    """A scope with work left when its callers are answered."""

    def saved(self) -> object:
        """Do that work, outside the deadline and with the key released. Errors are logged. Switches: yes."""


# -- an ``open_resource`` -------------------------------------------------------------------------------------------


@runtime_checkable
class NormalizesKeys(Protocol):
    """A store in which several keys may mean the same resource."""

    def normalize_key(self, key: Any, /) -> Hashable:
        """Return the one form of *key*: 42 and "42" are the same row. An error reaches the caller of `run`.

        Switches: no.
        """
        raise NotImplementedError


@runtime_checkable
class Admits(Protocol):
    """A store that checks where `run` is called. It is not asked with ``batching=False``."""

    def admit(self, key: Any, /) -> bool:
        """Return whether an operation on *key* must run unbatched in this context. Raise an error to refuse it.

        Switches: no.
        """
        raise NotImplementedError


@runtime_checkable
class KeepsOutcomes(Protocol):
    """A store whose scopes record ``current_batch().outcomes`` in the save's transaction, and are `Records`.

    They record even if ``current_batch().completed`` is 0. If some are recorded already, they write nothing and raise
    `geventbatch.errors.Repeated` with those. A scope of many keys records those of every batch in
    ``current_batch().bulk``. If it raises `Repeated`, all batches are replayed; if it has saved the others, it raises
    `geventbatch.errors.PartlySaved` with a `Repeated` for each key of the batches whose outcomes it has found.
    """

    @property
    def keeps_outcomes(self) -> bool:
        """Return whether they record; read when the processor is made."""
        raise NotImplementedError


@runtime_checkable
class ChecksOutcomes(Protocol):
    """A store that `KeepsOutcomes`, but not for every key."""

    def check_outcomes(self, key: Any, /) -> object:
        """Raise an error if *key* can have no outcomes; it reaches the caller of `run`. Switches: no."""


@runtime_checkable
class OnServer(Protocol):
    """A store that may wait for a server: `check_setup` then reports a ``max_duration`` too short for one."""

    @property
    def on_server(self) -> bool:
        """Return whether its batches wait for a server; read when the processor is made."""
        raise NotImplementedError


@runtime_checkable
class HearsStop(Protocol):
    """A store that frees what it holds when its processor has stopped."""

    def stopped(self) -> object:
        """Free it. Called once, when nothing runs any more. Errors are logged. Switches: no."""


@runtime_checkable
class AllOrNothing(Protocol):
    """An ``open_resources`` (or a ``save_resources``) that saves all keys that it is given, or none of them.

    So it saves in one transaction. Without this, `run_across` is refused. Of keys that operations have connected,
    ``current_batch().bulk`` has the same batch: these must be saved together or not at all, and the rows of such a
    batch are to be taken once. If it raises `PartlySaved`, then for one of such keys only if it has saved none of them.
    Such a key that is in ``current_batch().bulk``, and not in the dict, was only read: without a lock, it is compared.

    A store of one key may have such a form as its ``open_resources``. Then ``Processor(open_resource=store)`` takes
    `run_across`. Operations of single keys that wait behind one across keys are saved by this form too. So it has to do
    for one key all that the store does: `TakesRows`, `Deletes`, `AfterSave`. If the store `KeepsOutcomes` and the form
    does not, single keys are always left to the store.
    """

    @property
    def all_or_nothing(self) -> bool:
        """Return whether it does; read when the processor is made."""
        raise NotImplementedError


@runtime_checkable
class ChecksKeys(Protocol):
    """A store that is `AllOrNothing`, but not for any keys together."""

    def check_keys(self, keys: tuple[Any, ...], /) -> object:
        """Raise an error if one operation cannot have these *keys*; it reaches the caller of `run_across`.

        They are in the form that ``normalize_key`` returned. Switches: no.
        """


OF_A_SCOPE: Final[tuple[type, ...]] = (
    *(Undoes, JudgesErrors, JudgesReturns, StepByStep, Owns, Copies),
    *(TakesRows, Deletes, Records, Reuses, MustCompare, AfterSave),
)
OF_A_STORE: Final[tuple[type, ...]] = (
    *(NormalizesKeys, Admits, KeepsOutcomes, ChecksOutcomes, OnServer, HearsStop, AllOrNothing, ChecksKeys),
)
