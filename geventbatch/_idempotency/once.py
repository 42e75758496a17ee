"""Idempotency keys: an operation that was saved under one is not applied again; its caller gets the recorded outcome.

To its batch, an operation with a key is like any other; its callable is a `Once`. The `Once` keeps the outcome on the
attempt, as text, and the store records all outcomes in the transaction of the save. If some keys are recorded already,
the store saves nothing and raises `Repeated`. Then those operations are settled by the record, and the batch is
replayed without them.

The store has looked for a caller's key before that caller is answered. The save looks for the keys that it records. The
key of a broken operation is in no save: for that, an attempt asks its scope (`ask`).

It is imported when a processor is made whose store records outcomes; ``options.idempotency`` is this module.
"""

from __future__ import annotations

from contextlib import suppress
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NoReturn

from gevent import getcurrent

from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._core.hub_turns import pace
from geventbatch._core.operation import BROKEN, SETTLED, STARTED, WAITING
from geventbatch._core.verdict import is_a
from geventbatch._failure import load_failed
from geventbatch._idempotency.error_text import decode_error, encode_error
from geventbatch._idempotency.value_text import ALLOWED, decode, describe, encode
from geventbatch._safe_repr import said, shown
from geventbatch._unbatched import Start
from geventbatch._values.answers import refuse_unfinished
from geventbatch.errors import BatchError, Conflict, IdempotencyKeyReused

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from geventbatch._core.attempt import Attempt
    from geventbatch._core.batch import Batch
    from geventbatch._core.operation import Operation

LONGEST: Final = 255
"""Characters of an idempotency key."""

_PRINT: Final = 24
"""Characters of the fingerprint (12 bytes) that a record begins with. The next character is `_VALUE` or `_ERROR`."""

_VALUE: Final = "="
_ERROR: Final = "!"


class Recalled(Exception):
    """Raised for an operation if another one of its batch has the same idempotency key, and raised.

    Its caller gets the ``__cause__``.
    """


class NotPlain(TypeError):
    """An operation's outcome cannot be recorded. The operation is undone even if ``clean_errors`` has `TypeError`."""


class Once:
    """An operation with an idempotency key, as its batch calls it."""

    __slots__ = ("__wrapped__", "fingerprint", "key", "operation")

    def __init__(
        self,
        key: str,
        operation: Callable[..., Any],
        args: tuple[Any, ...],
        identified_by: tuple[Any, ...] | None = None,
    ) -> None:
        """Raise a `TypeError` or `ValueError` if the key is wrong, or the operation cannot be told from others."""
        if (
            type(key) is not str
            or not 0 < len(key) <= LONGEST
            or not key.isascii()
            or not key.isprintable()
            or " " in key
        ):
            _refuse_key(key)
        asked = getattr(operation, "stands_for", operation)  # an integration may have wrapped it
        try:
            text = describe(asked, args) if identified_by is None else describe(asked, identified_by, alone=True)
        except Exception as error:
            _refuse_operation(key, asked, error, "arguments" if identified_by is None else "identified_by")
        self.key = key
        self.operation = self.__wrapped__ = operation
        self.fingerprint = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def __call__(self, resource: Any, *args: Any) -> Any:
        """Apply the operation and keep its outcome. If this attempt has an outcome of the same key, return that."""
        attempt = process.running[getcurrent()]
        if attempt.outcomes and self.key in attempt.outcomes:
            return self._again(attempt, attempt.outcomes[self.key])
        try:
            value = self.operation(resource, *args)
        except attempt.dispatcher.options.recorded_errors as error:
            try:
                text = encode_error(error, attempt.dispatcher.options.recorded_errors)
            except Exception as why:
                instead = "raise one with arguments and attributes that are each"
                raise self._not_plain(
                    attempt.batch.key, f"raised {shown(error)}, which", why, instead
                ) from error.with_traceback(None)
            attempt.record(self.key, f"{self.fingerprint}{_ERROR}{text}")
            del attempt  # the traceback of the error refers to this frame: no cycle
            raise
        try:
            attempt.record(self.key, f"{self.fingerprint}{_VALUE}{encode(value)}")
        except Exception as error:  # any: a property of the value may raise
            refuse_unfinished(attempt.batch.key, self.operation, value)
            raise self._not_plain(
                attempt.batch.key, "returned something that", error, "return"
            ) from error.with_traceback(None)
        return value

    def _not_plain(self, key: Hashable, what: str, why: Exception, instead: str) -> NotPlain:
        return NotPlain(
            f"the operation with the idempotency key {shown(self.key)} on key {shown(key)} {what} cannot be "
            f"recorded ({why}), and so nothing of it was saved: {instead} {ALLOWED}"
        )

    def recall(self, batch: Batch, record: str) -> Any:
        """Return the answer in *record*, or raise the error in it."""
        if record[:_PRINT] != self.fingerprint:
            raise IdempotencyKeyReused(
                f"batch of key {shown(batch.key)}: the idempotency key {shown(self.key)} was used before, for another "
                "operation or with other arguments (or another identified_by); nothing of this one was saved",
                key=batch.key,
                idempotency_key=self.key,
            )
        kind, text = record[_PRINT], record[_PRINT + 1 :]
        try:
            found = decode(text) if kind == _VALUE else decode_error(text, batch.dispatcher.options.recorded_errors)
        except Exception as error:
            raise BatchError(
                f"batch of key {shown(batch.key)}: the operation with the idempotency key {shown(self.key)} was "
                f"answered before, and is not applied again; but its recorded outcome cannot be decoded any more: "
                f"{text[:500]} ({said(error)})"
            ) from error.with_traceback(None)
        if kind == _VALUE:
            return found
        raise found

    def _again(self, attempt: Attempt, record: str) -> Any:
        try:
            return self.recall(attempt.batch, record)
        except Exception as error:
            raise Recalled from error.with_traceback(None)


_OUR_CODE: Final = Once.__call__.__code__


def once_of(operation: Operation[Any]) -> Once | None:
    """Return the `Once` of an operation, or None if it has no key."""
    found: Any = operation.callable
    if type(found) is Start:
        found = found.callable
    return found if type(found) is Once else None  # `isinstance` would ask an object of the user's for its class


def is_recalled(operation: Operation[Any], error: BaseException) -> bool:
    """If *error* is a `Recalled`, set its ``__cause__`` as the error of *operation*, and return True.

    Else take our frame out of the traceback of *error*, and return False.
    """
    if once_of(operation) is None:
        return False
    if type(error) is Recalled:
        operation.error = error.__cause__
    else:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code is not _OUR_CODE:  # a `Start` may be around it
            trace = trace.tb_next
        if trace is not None:
            error.__traceback__ = trace.tb_next
    return type(error) is Recalled


def is_recorded(attempt: Attempt, operation: Operation[Any]) -> bool:
    """Return whether the error of *operation* is recorded with the save. True if it has no key."""
    once = once_of(operation)
    outcomes = attempt.outcomes or {}
    return once is None or (once.key in outcomes and outcomes[once.key][_PRINT] == _ERROR)


def forget(attempt: Attempt, recorded: int) -> None:
    """Forget the outcomes of operations that have returned, but keep the first *recorded* ones."""
    outcomes = attempt.outcomes or {}
    for key in [*islice(outcomes, recorded, None)]:
        if outcomes[key][_PRINT] == _VALUE:
            del outcomes[key]


def settle_repeated(attempt: Attempt, operations: list[Operation[Any]], found: Mapping[str, str]) -> bool:
    """Settle *operations* whose outcomes are *found*. Return False if there are none. Switches: yes.

    Decoding an outcome may import a module of the user's. So it is decoded before anything is changed.
    """
    settled = False
    for operation in operations:
        once = once_of(operation) if operation.state in {WAITING, STARTED, BROKEN} else None
        if once is None or once.key not in found:
            continue
        settled = True
        operation.state = max(operation.state, STARTED)  # from now on its caller cannot withdraw it
        value, error = None, None
        try:
            value = once.recall(attempt.batch, found[once.key])
        except Exception as raised:
            error = raised.with_traceback(None)
        if attempt.over():
            break
        operation.value, operation.error, operation.state = value, error, SETTLED
        attempt.now = _clock.monotonic()
        if not attempt.alone and attempt.now >= pace.slice_end(attempt.now):
            attempt.pause()
            if attempt.over():
                break
    return settled


def look_for(attempt: Attempt, operations: list[Operation[Any]]) -> bool:
    """Ask the scope for the keys of *operations* before they are applied. Return False if the attempt ends here."""
    attempt.asked = [one for one in operations if one.state <= STARTED and once_of(one) is not None]
    if attempt.asked:
        ask(attempt)
    return not attempt.batch.ended and attempt.verdict is None


def ask(attempt: Attempt) -> None:
    """Ask the scope for the keys of `Attempt.asked`: operations that are in no save. Switches: yes."""
    asked, attempt.asked = attempt.asked or [], None
    keys = [once.key for operation in asked if (once := once_of(operation)) is not None]
    try:
        found: Mapping[str, str] = attempt.context.run(attempt.scope.recorded, keys)
    except Conflict as conflict:
        if not attempt.over():
            attempt.asked, attempt.verdict = asked, conflict
    except Exception as error:
        if not attempt.over():
            attempt.batch.fail_load(load_failed(attempt.batch.key, error))
    else:
        if not attempt.over():
            settle_repeated(attempt, asked, found)


def record_broken(attempt: Attempt, operations: list[Operation[Any]]) -> None:
    """Record with this attempt the errors of the broken ones among *operations*."""
    kinds = attempt.dispatcher.options.recorded_errors
    for operation in operations:
        once, error = once_of(operation), operation.error
        if operation.state != BROKEN or once is None or error is None or type(error) is NotPlain:
            continue
        if is_a(error, kinds) and once.key not in (attempt.outcomes or ()) and not attempt.over():
            with suppress(Exception):  # it was recorded once, when it was raised
                text = encode_error(error, kinds)
                attempt.record(once.key, f"{once.fingerprint}{_ERROR}{text}")


# -- at the door --------------------------------------------------------------------------------------------


def _refuse_key(key: object) -> NoReturn:
    if not isinstance(key, str):
        raise TypeError(f"idempotency_key is {shown(key)}, but must be a str")
    raise ValueError(
        f"idempotency_key is {shown(key)}, but must be 1 to {LONGEST} visible ASCII characters, without spaces"
    )


def _refuse_operation(key: str, operation: object, error: Exception, by: str) -> NoReturn:
    raise TypeError(
        f"run() was given the idempotency_key {shown(key)}, but cannot tell {shown(operation)} with its {by} "
        f"from others: {said(error)}. Pass what it depends on as arguments, each {ALLOWED}; or, in "
        "identified_by=(…), what its client sends again"
    ) from error
