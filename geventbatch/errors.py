"""What can go wrong, and whether it is safe to run the operation again.

Only what callers get is a `BatchError`. `NotSaved`, `Conflict`, `Rejected`, `Undecided`, `TooEarly`, `CannotUndo`,
`PartlySaved`, `Repeated` and `NothingToSave` are spoken between the library and a resource scope; a `ResourceMissing`
is both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

Phase = Literal["load", "operations", "save"]


class BatchError(Exception):
    """The parent of everything that `Processor.run` raises of its own.

    Attributes:
        retry_safe: True when certainly nothing of the operation was saved: running it again cannot apply it twice.
    """

    retry_safe: bool = False


class ProcessorStopped(BatchError):
    """`stop` was called before the operation was admitted: it never ran. Safe to run again, on another processor."""

    retry_safe = True


class ProcessorOverloaded(BatchError):
    """``max_pending`` operations are waiting already: this one was refused at the door. Safe to run again, later.

    Attributes:
        retry_after: Seconds after which those that wait now will have their answers, at the rate of the last ten
            seconds; ``max_duration`` when nothing was answered in these.
    """

    retry_safe = True

    def __init__(self, *args: object, retry_after: float = 0.0) -> None:
        """Keep the estimate."""
        super().__init__(*args)
        self.retry_after = retry_after


class OperationCancelled(BatchError, TimeoutError):
    """``start_timeout`` passed before the operation started, and now it never will. Safe to run again."""

    retry_safe = True


class IdempotencyKeyReused(BatchError):
    """The idempotency key was used before on this key, for another operation or with other arguments.

    Nothing of this operation was saved. It is safe to run again, and has to be with another idempotency key: the client
    that made both is in the wrong.

    Attributes:
        key: The key of the batch.
        idempotency_key: The other one.
    """

    retry_safe = True

    def __init__(self, *args: object, key: Hashable = None, idempotency_key: str = "") -> None:
        """Keep both keys."""
        super().__init__(*args)
        self.key = key
        self.idempotency_key = idempotency_key


class BatchAborted(BatchError):
    """The operation's batch failed as a whole; ``__cause__`` is what happened.

    Of its own (not one of its children): a worker or an operation was killed (`GreenletExit`, `SystemExit`,
    `KeyboardInterrupt`), in a load or a save too; safe to run again unless the save had begun.

    Attributes:
        key: The key of the batch.
    """

    def __init__(self, *args: object, key: Hashable = None, retry_safe: bool = False) -> None:
        """Keep the key, and whether it is safe to run the operation again."""
        super().__init__(*args)
        self.key = key
        self.retry_safe = retry_safe


class LoadFailed(BatchAborted):
    """Loading raised, whatever it raised but a kill (``__cause__``). Nothing was saved: safe to run again."""


class ResourceMissing(LoadFailed):
    """There is nothing at the key. For a load to raise, and what each caller gets then. Safe to run again."""

    def __init__(self, *args: object, key: Hashable = None, retry_safe: bool = True) -> None:
        """Keep the key."""
        super().__init__(*args, key=key, retry_safe=retry_safe)


class SaveFailed(BatchAborted):
    """Saving raised, whatever it raised but a kill (``__cause__``). Safe to run again only from a `NotSaved`."""


class BatchTimeout(BatchAborted, TimeoutError):
    """``max_duration`` passed before the batch had ended.

    Attributes:
        phase: What it was doing: 'load' or 'operations' (nothing was saved, safe to run again), or 'save' (unknown).
    """

    def __init__(self, *args: object, key: Hashable = None, retry_safe: bool = False, phase: Phase = "load") -> None:
        """Keep the phase too."""
        super().__init__(*args, key=key, retry_safe=retry_safe)
        self.phase: Phase = phase


class NotSaved(Exception):
    """For a save to raise: certainly nothing was written, and a replay would not help."""


class Conflict(NotSaved):
    """For a save or a load to raise: somebody else changed the resource, nothing was written. The batch replays."""


class Rejected(NotSaved):
    """For a save to raise: the store refused what the operations made, by a constraint of its own. Nothing was written.

    The batch finds the culprits by saving in parts, or step by step. A culprit's caller gets the ``__cause__`` of this
    error, which is what the store said, or this error itself; the others are saved. Their number has no limit but
    ``max_duration``.
    """


class Undecided(Rejected):
    """For a scope's verdict on an operation: what was refused then is perhaps what *earlier* operations had made.

    The batch is replayed step by step, and finds the culprit. Where the scope has no steps, what is before this
    operation is saved first, and it is applied to what the next load gives.
    """


class TooEarly(Undecided):
    """For a scope's verdict on an operation: it was applied to what *earlier* operations had left in memory.

    That was not what there is behind their save. What is before this operation is saved first, whether or not the scope
    has steps, and it is applied to what the next load gives.
    """


class CannotUndo(NotSaved):
    """For a scope's ``restore`` or ``checkpoint`` to raise: what an operation has done cannot be taken back in memory.

    The batch is loaded again, and all its operations are applied to that: step by step, where the scope has ``steps``.
    """


class PartlySaved(Exception):
    """For the save of a bulk to raise: some keys were not saved, and all the others were.

    Each of those keys is answered for what became of it: a `Conflict` replays its batch, after a `Rejected` the batch
    finds the culprits, any other `NotSaved` is a `SaveFailed` that is safe to run again; and anything else a
    `SaveFailed` of which nobody knows whether it was saved.

    Args:
        errors: What became of each key that was not saved. A key that was not to be saved, or a value that is no
            exception, leaves it unknown of all keys of the bulk whether they were saved.
    """

    def __init__(self, errors: Mapping[Any, Exception]) -> None:
        """Keep them."""
        super().__init__(f"not saved: {', '.join(map(shown, errors))}")
        self.errors = errors


class Repeated(NotSaved):
    """For a save to raise: some of the idempotency keys of `Batch.outcomes` are recorded already. Nothing was written.

    The batch gives the callers of those operations what is recorded, and replays without them.
    """

    def __init__(self, *args: object, outcomes: Mapping[str, str]) -> None:
        """Keep what is recorded: the outcomes of those keys, as `Batch.outcomes` once had them."""
        super().__init__(*args)
        self.outcomes = outcomes


class NothingToSave(Exception):
    """A resource scope is left with this when nothing of its batch is to be saved; what it makes of it is ignored."""


def not_started(key: Hashable, seconds: float) -> str:
    """Say what an `OperationCancelled` says."""
    return (
        f"the operation on key {shown(key)} did not start within its start_timeout of {seconds:g} s; nothing of it was "
        "saved, it is safe to run it again"
    )
