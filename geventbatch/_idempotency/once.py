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

from geventbatch._bulk.composite import At
from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._core.hub_turns import pace
from geventbatch._core.operation import BROKEN, SETTLED, STARTED, WAITING
from geventbatch._core.verdict import is_a
from geventbatch._failure import load_failed
from geventbatch._idempotency.error_text import decode_error, encode_error
from geventbatch._idempotency.outcome_name import name_by, name_of, text_of
from geventbatch._idempotency.value_text import ALLOWED, decode, describe, encode
from geventbatch._safe_repr import said, shown
from geventbatch._unbatched import Start
from geventbatch._values.answers import refuse_unfinished
from geventbatch.errors import BatchError, Conflict, IdempotencyKeyReused, named, of_keys

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

    __slots__ = ("__wrapped__", "fingerprint", "key", "name", "operation")

    # -- mutable state -------------------------------------------------------------------------------------
    name: str | None  # of its outcome: the idempotency key, or an `OutcomeName`; None until it is asked for

    def __init__(
        self,
        key: str,
        operation: Callable[..., Any],
        args: tuple[Any, ...],
        identified_by: tuple[Any, ...] | None = None,
        method: str = "run",
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
            by = "arguments" if identified_by is None else "identified_by"
            raise TypeError(
                f"{method}() was given the idempotency_key {shown(key)}, but cannot tell {shown(asked)} with its {by} "
                f"from others: {said(error)}. Pass what it depends on as arguments, each {ALLOWED}; or, in "
                "identified_by=(…), what its client sends again"
            ) from error
        self.key = key
        self.name = None
        self.operation = self.__wrapped__ = operation
        self.fingerprint = _fingerprint(text)

    def go_across(self, keys: tuple[Hashable, ...]) -> None:
        """Be of all *keys*, in the order in which the operation has named them. Raise if they have no texts."""
        try:
            texts = [text_of(key) for key in keys]
        except Exception as error:
            raise TypeError(
                f"run_across() was given the idempotency_key {shown(self.key)}, but cannot tell the {named(keys)} from "
                f"others in a record: {said(error)}. Use keys that are each {ALLOWED}"
            ) from error
        self.name = name_by(texts, keys, self.key, across=True)
        self.fingerprint = _fingerprint("\n".join([self.fingerprint, *texts]))

    def name_in(self, attempt: Attempt, keys: tuple[Hashable, ...]) -> str:
        """Return the name of its outcome, at *keys*, in what *attempt* records. Raise if these have no texts."""
        if self.name is None:
            self.name = self.key if attempt.bulk is None else name_of(keys, self.key, across=False)
        return self.name

    def __call__(self, resource: Any, *args: Any) -> Any:
        """Apply the operation and keep its outcome. If this attempt has an outcome of the same key, return that."""
        attempt = process.running[getcurrent()]
        keys = attempt.batch.keys
        try:
            name = self.name_in(attempt, keys)
        except Exception as error:
            told = "was not applied, since its key"
            raise self._not_plain(keys, told, error, "use a key that is") from error.with_traceback(None)
        if attempt.outcomes and name in attempt.outcomes:
            return self._again(keys, attempt, attempt.outcomes[name])
        try:
            value = self.operation(resource, *args)
        except attempt.dispatcher.options.recorded_errors as error:
            try:
                text = encode_error(error, attempt.dispatcher.options.recorded_errors)
            except Exception as why:
                instead = "raise one with arguments and attributes that are each"
                raise self._not_plain(keys, f"raised {shown(error)}, which", why, instead) from error.with_traceback(
                    None
                )
            attempt.record(name, f"{self.fingerprint}{_ERROR}{text}")
            del attempt  # the traceback of the error refers to this frame: no cycle
            raise
        try:
            attempt.record(name, f"{self.fingerprint}{_VALUE}{encode(value)}")
        except Exception as error:  # any: a property of the value may raise
            refuse_unfinished(keys[0], self.operation, value)
            raise self._not_plain(keys, "returned something that", error, "return") from error.with_traceback(None)
        return value

    def _not_plain(self, keys: tuple[Hashable, ...], what: str, why: Exception, instead: str) -> NotPlain:
        return NotPlain(
            f"the operation with the idempotency key {shown(self.key)} on {named(keys)} {what} cannot be "
            f"recorded ({why}), and so nothing of it was saved: {instead} {ALLOWED}"
        )

    def recall(self, keys: tuple[Hashable, ...], batch: Batch, record: str) -> Any:
        """Return the answer in *record*, or raise the error in it. The operation's *keys* are for messages."""
        if record[:_PRINT] != self.fingerprint:
            order = "; or with the keys in another order" if keys[1:] else ""
            told = (
                f"batch of {named(keys)}: the idempotency key {shown(self.key)} was used before, for another "
                f"operation or with other arguments (or another identified_by){order}; nothing of this one was saved"
            )
            raise of_keys(IdempotencyKeyReused(told, idempotency_key=self.key), keys)
        kind, text = record[_PRINT], record[_PRINT + 1 :]
        try:
            found = decode(text) if kind == _VALUE else decode_error(text, batch.dispatcher.options.recorded_errors)
        except Exception as error:
            told = (
                f"batch of {named(keys)}: the operation with the idempotency key {shown(self.key)} was "
                f"answered before, and is not applied again; but its recorded outcome cannot be decoded any more: "
                f"{text[:500]} ({said(error)})"
            )
            raise of_keys(BatchError(told), keys) from error.with_traceback(None)
        if kind == _VALUE:
            return found
        raise found

    def _again(self, keys: tuple[Hashable, ...], attempt: Attempt, record: str) -> Any:
        try:
            return self.recall(keys, attempt.batch, record)
        except Exception as error:
            raise Recalled from error.with_traceback(None)


_OUR_CODE: Final = Once.__call__.__code__


def _fingerprint(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def once_of(operation: Operation[Any]) -> Once | None:
    """Return the `Once` of an operation, or None if it has no key."""
    found: Any = operation.callable
    if type(found) is At:
        found = found.__wrapped__
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


def _keys_of(attempt: Attempt, operation: Operation[Any]) -> tuple[Hashable, ...]:
    found: Any = operation.callable
    return found.keys if type(found) is At else attempt.batch.loads


def _name_of(attempt: Attempt, operation: Operation[Any]) -> str | None:
    """Return the name of the outcome of *operation*; None if it has no idempotency key, or its key no text."""
    once = once_of(operation)
    if once is None:
        return None
    try:
        return once.name_in(attempt, _keys_of(attempt, operation))
    except Exception:  # its caller is told when it is applied
        return None


def is_recorded(attempt: Attempt, operation: Operation[Any]) -> bool:
    """Return whether the error of *operation* is recorded with the save. True if it has no key."""
    name = _name_of(attempt, operation)
    outcomes = attempt.outcomes or {}
    return name is None or (name in outcomes and outcomes[name][_PRINT] == _ERROR)


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
        name = None if once is None else _name_of(attempt, operation)
        if once is None or name is None or name not in found:
            continue
        settled = True
        operation.state = max(operation.state, STARTED)  # from now on its caller cannot withdraw it
        value, error = None, None
        try:
            value = once.recall(_keys_of(attempt, operation), attempt.batch, found[name])
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


def ask(*attempts: Attempt) -> bool:
    """Ask the scope, which *attempts* share, for the keys of `Attempt.asked`: operations that are in no save.

    Return False if the scope has raised: so the transaction may be spoiled. Switches: yes.
    """
    first, asked = attempts[0], [(attempt, attempt.asked or []) for attempt in attempts]
    for attempt in attempts:
        attempt.asked = None
    names = [_name_of(attempt, operation) for attempt, operations in asked for operation in operations]
    found: Mapping[str, str] = {}
    raised: Exception | None = None
    try:
        found = first.context.run(first.scope.recorded, list(dict.fromkeys(name for name in names if name is not None)))
    except Exception as error:
        raised = error
    try:
        for attempt, operations in asked:
            if attempt.over():
                continue
            if raised is None:
                settle_repeated(attempt, operations, found)
            elif isinstance(raised, Conflict):
                attempt.asked, attempt.verdict = operations, raised
            else:
                attempt.batch.fail_load(load_failed(attempt.batch.key, raised))
        return raised is None
    finally:
        del raised  # its traceback refers to this frame: no cycle


def record_broken(attempt: Attempt, operations: list[Operation[Any]]) -> None:
    """Record with this attempt the errors of the broken ones among *operations*."""
    kinds = attempt.dispatcher.options.recorded_errors
    for operation in operations:
        once, error, name = once_of(operation), operation.error, _name_of(attempt, operation)
        if once is None or error is None or name is None or not is_owed(attempt, operation):
            continue
        if name not in (attempt.outcomes or ()) and not attempt.over():
            with suppress(Exception):  # it was recorded once, when it was raised
                text = encode_error(error, kinds)
                attempt.record(name, f"{once.fingerprint}{_ERROR}{text}")


def is_owed(attempt: Attempt, operation: Operation[Any]) -> bool:
    """Return whether *operation* is broken, and its error is to be recorded with its part of the batch."""
    error = operation.error
    if operation.state != BROKEN or error is None or once_of(operation) is None or type(error) is NotPlain:
        return False
    return is_a(error, attempt.dispatcher.options.recorded_errors)


# -- at the door --------------------------------------------------------------------------------------------


def _refuse_key(key: object) -> NoReturn:
    if not isinstance(key, str):
        raise TypeError(f"idempotency_key is {shown(key)}, but must be a str")
    raise ValueError(
        f"idempotency_key is {shown(key)}, but must be 1 to {LONGEST} visible ASCII characters, without spaces"
    )
