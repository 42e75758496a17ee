"""Errors of the library, and whether it is safe to run the operation again.

Callers get a `BatchError`, and no other error of the library. `NotSaved`, `Conflict`, `Rejected`, `Undecided`,
`TooEarly`, `Apart`, `CannotUndo`, `PartlySaved`, `Repeated` and `NothingToSave` pass between the library and a resource
scope. `ResourceMissing` is both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

Phase = Literal["load", "operations", "save"]

E = TypeVar("E", bound="BatchError")


class BatchError(Exception):
    """The parent of every error of the library that `Processor.run` raises.

    Attributes:
        retry_safe: True when certainly nothing of the operation was saved: running it again cannot apply it twice.
        key: The key of the operation. Of an operation across keys, the one that failed or that it waited for, if that
            is known, or else the first.
        keys: All keys of the operation.
    """

    retry_safe: bool = False
    key: Hashable = None
    keys: tuple[Hashable, ...] = ()


class ProcessorStopped(BatchError):
    """`stop` was called before the operation was admitted: it never ran. Safe to run again, on another processor."""

    retry_safe = True


class ProcessorOverloaded(BatchError):
    """``max_pending`` operations are waiting already, so this one was refused at the door. Safe to run again, later.

    Attributes:
        retry_after: Seconds until the operations that wait now will be answered, at the rate of the last ten seconds;
            ``max_duration`` if none was answered in these.
    """

    retry_safe = True

    def __init__(self, *args: object, retry_after: float = 0.0) -> None:
        """Keep the estimate."""
        super().__init__(*args)
        self.retry_after = retry_after


class OperationCancelled(BatchError, TimeoutError):
    """``start_timeout`` passed before the operation started; it never will. Safe to run again."""

    retry_safe = True


class IdempotencyKeyReused(BatchError):
    """The idempotency key was used before on this key (or these), for another operation or with other arguments.

    Nothing of this operation was saved. It is safe to run again, but only with another idempotency key: the client has
    given one idempotency key to two operations.

    Attributes:
        idempotency_key: The idempotency key that was used before.
    """

    retry_safe = True

    def __init__(self, *args: object, key: Hashable = None, idempotency_key: str = "") -> None:
        """Keep both keys."""
        super().__init__(*args)
        self.key = key
        self.keys = (key,)
        self.idempotency_key = idempotency_key


class BatchAborted(BatchError):
    """The operation's batch failed as a whole; ``__cause__`` is the reason.

    The class itself, not a child: a worker or an operation was killed (`GreenletExit`, `SystemExit`,
    `KeyboardInterrupt`), in a load or save too. Safe to run again unless the save had begun.
    """

    def __init__(self, *args: object, key: Hashable = None, retry_safe: bool = False) -> None:
        """Keep the key, and whether it is safe to run the operation again."""
        super().__init__(*args)
        self.key = key
        self.keys = (key,)
        self.retry_safe = retry_safe


class LoadFailed(BatchAborted):
    """Loading raised ``__cause__``: any error but a kill. Nothing was saved: safe to run again."""


class ResourceMissing(LoadFailed):
    """There is no resource at the key. A load raises it, and each caller then gets one. Safe to run again."""

    def __init__(self, *args: object, key: Hashable = None, retry_safe: bool = True) -> None:
        """Keep the key."""
        super().__init__(*args, key=key, retry_safe=retry_safe)


class ImpossibleKey(ResourceMissing, ValueError):
    """No resource can be at the key: its column has no such value. Raised at the door: nothing is loaded.

    It is a `ResourceMissing`, since a client that asks for ``/accounts/abc`` asks for what is not there.
    """


class SaveFailed(BatchAborted):
    """Saving raised ``__cause__``: any error but a kill. Safe to run again only if that is a `NotSaved`."""


class BatchTimeout(BatchAborted, TimeoutError):
    """``max_duration`` passed before the batch had ended.

    Attributes:
        phase: What the batch was doing: 'load' or 'operations' (nothing was saved, safe to run again), or 'save'
            (the outcome is unknown). While the batch is saved in parts, it is 'operations' in the later ones.
    """

    def __init__(self, *args: object, key: Hashable = None, retry_safe: bool = False, phase: Phase = "load") -> None:
        """Keep the phase too."""
        super().__init__(*args, key=key, retry_safe=retry_safe)
        self.phase: Phase = phase


class NotSaved(Exception):
    """For a save to raise: certainly nothing was written, and a replay would not help."""


class Conflict(NotSaved):
    """For a save or load to raise: another writer changed the resource; nothing was written. The batch replays."""


class Rejected(NotSaved):
    """For a save to raise: the store refused the state that operations made (a constraint, say). Nothing was written.

    The batch finds the culprits by saving in parts, or step by step. A culprit's caller gets the ``__cause__`` of this
    error, which is the store's own error, or this error itself. The other operations are saved. Only ``max_duration``
    limits the number of culprits.
    """

    of_schema = False
    """True if a column, a table or a right is missing: an operator is told of that."""


class Undecided(Rejected):
    """For a scope's verdict on an operation: the store refused what *earlier* operations may have made.

    The batch is replayed step by step, and finds the culprit. If the scope has no steps, the earlier operations are
    saved first, and this one is applied to the next load. If it has many keys, and only operations on others were
    earlier, this one is applied in a scope without those.
    """


class TooEarly(Undecided):
    """For a scope's verdict on an operation: it has used what *earlier* operations had left in memory.

    A save would have changed that state. So the earlier operations are saved first, even if the scope has steps, and
    this one is applied to the next load.
    """


class Apart(Undecided):
    """For the verdict of a scope of many keys on an operation: it needs a transaction without the other keys.

    The transaction goes on for the others as if the operation's key (with all keys that operations connect with it) had
    not been loaded. All operations of that are applied again, in a scope of its own.

    The save raises it if it finds that out last: in a `PartlySaved`, if the other keys are saved; or by itself, if
    nothing was. Then the operations of the other keys are applied again too, together.

    Args:
        keys: Those that need a transaction of their own, if the save raises this by itself.
    """

    def __init__(self, *args: object, keys: Iterable[Hashable] = ()) -> None:
        super().__init__(*args)
        self.keys = list(keys)


class CannotUndo(NotSaved):
    """For a scope's ``restore`` or ``checkpoint`` to raise: an operation cannot be undone in memory.

    The batch is loaded again, and all its operations are applied again: step by step, if the scope has ``steps``.

    Args:
        once: True if the scope can undo such operations from its next load on, so that there is nothing to warn of.
    """

    def __init__(self, *args: object, once: bool = False) -> None:
        super().__init__(*args)
        self.once = once


class PartlySaved(Exception):
    """For the save of a bulk to raise: some keys were not saved, and all the others were.

    Each key in *errors* is answered by its error: a `Conflict` replays its batch; after a `Rejected` the batch finds
    the culprits; any other `NotSaved` becomes a `SaveFailed` that is safe to run again. Any other error becomes a
    `SaveFailed` with an unknown outcome.

    Args:
        errors: The error of each key that was not saved. If it has a key that was not to be saved, or a value
            that is no exception, the outcome of all keys of the bulk is unknown.
    """

    def __init__(self, errors: Mapping[Any, Exception]) -> None:
        """Keep *errors*."""
        super().__init__(f"not saved: {', '.join(map(shown, errors))}")
        self.errors = errors


class Repeated(NotSaved):
    """For a save to raise: some idempotency keys of `Batch.outcomes` are recorded already. Nothing was written.

    The batch answers those operations' callers with the recorded outcomes, and replays without them. If there are none
    (expired ones were in the way, and are deleted now), it replays all. No attempt is counted for that.
    """

    def __init__(self, *args: object, outcomes: Mapping[str, str]) -> None:
        """Keep the recorded outcomes of those keys, in the form of `Batch.outcomes`. The message names a few."""
        super().__init__(*(args or (f"not saved: {recorded_already(outcomes)}",)))
        self.outcomes = outcomes


class NothingToSave(Exception):
    """The error with which a scope is exited if its batch has nothing to save. The scope's reaction is ignored."""


_FEW: Final = 5
"""Keys that a message names; of more it says how many they are. Attributes of errors have all of them."""


def named(keys: tuple[Hashable, ...]) -> str:
    """Return the words for *keys* in a message."""
    few = ", ".join(map(shown, keys[:_FEW]))
    more = f" and {len(keys) - _FEW:,} more" if len(keys) > _FEW else ""
    return f"{'keys' if len(keys) > 1 else 'key'} {few}{more}"


def recorded_already(names: Iterable[str]) -> str:
    """Return the words for the idempotency keys of outcomes with these *names*, which are recorded."""
    keys = tuple([getattr(name, "idempotency_key", name) for name in names])
    if not keys:
        return "outcomes that have expired were in the way"
    return f"the idempotency {named(keys)} {'are' if len(keys) > 1 else 'is'} recorded already"


def of_keys(error: E, keys: tuple[Hashable, ...], key: Hashable = None) -> E:
    """Return *error*, which now says that it is of an operation on *keys*, and of *key* if that is one of them."""
    error.key = keys[0] if key is None or key not in keys else key
    error.keys = keys
    return error


def not_started(keys: tuple[Hashable, ...], seconds: float, why: str = "", key: Hashable = None) -> OperationCancelled:
    """Return the error of an operation on *keys*, which has waited for *key* and has not started."""
    error = OperationCancelled(
        f"the operation on {named(keys)} did not start within its start_timeout of {seconds:g} s{why}; nothing of it "
        "was saved, it is safe to run it again"
    )
    return of_keys(error, keys, key)
