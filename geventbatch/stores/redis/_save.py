"""The state of a hash, and a save of it, which finds out whether it was written."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import (
    AskError,
    ClusterCrossSlotError,
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict, NotSaved, Repeated
from geventbatch.stores._conflict import changed
from geventbatch.stores.redis._scripts import KEPT_SAVES, RESOLVE, SAVE, TRACE_MILLISECONDS
from geventbatch.stores.redis._server import PART, answer, lent

if TYPE_CHECKING:
    from geventbatch import Batch
    from geventbatch.stores.redis._server import Server

_TOO_SHORT: Final = 0.01
"""Seconds before the deadline within which no question is worth asking."""

_LONGEST_PAUSE: Final = 0.2
"""Seconds between two unanswered questions, at most."""

_REFUSALS: Final = re.compile(
    r"script|^(NOTSAVED|NOPERM|OOM|MISCONF|READONLY|WRONGTYPE|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|CROSSSLOT|BUSY|NOAUTH)\b"
)
"""Errors of the script itself, which has then written nothing, and of a server that has not begun it. Other errors do
not count: a proxy that has lost a server may answer an error of its own."""

_REFUSED: Final = (
    ClusterCrossSlotError,
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
)
"""The same errors, where the driver removes the word."""

_LONGEST_VERSION: Final = 100
"""Digits. No resource is saved as often, but Python refuses to read a number of thousands of digits."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The places of the outcomes that a save records."""

    names: dict[str, bytes]
    """The names in Redis by idempotency key."""
    milliseconds: int


@dataclass(frozen=True, slots=True)
class State:
    """The state of a hash."""

    value: bytes | None
    version: bytes
    saves: bytes
    """The last saves, separated by spaces: ``version:token`` each, or ``version!token`` for a fence."""

    @classmethod
    def of(cls, key: str, value: bytes | None, version: bytes | None, saves: bytes | None) -> State:
        if version is not None and not (version.isdigit() and len(version) <= _LONGEST_VERSION):
            raise ValueError(
                f"the version of {shown(key)} in Redis cannot be decoded: it is {shown(version)}, and no number"
            )
        return cls(value, version or b"", saves or b"")

    def is_trace(self) -> bool:
        """Return whether the hash has no value, only the trace of a deleted resource, or a fence, until it expires."""
        return self.value is None and bool(self.version or self.saves)

    def compared(self) -> tuple[bytes, bytes, int]:
        return self.version, self.saves, int(self.value is not None)

    def followed_by(self, mark: str) -> tuple[int, bytes]:
        """Return the version and the saves after one more save, which writes *mark*."""
        version = int(self.version or 0) + 1
        return version, b" ".join([*self.saves.split()[1 - KEPT_SAVES :], f"{version}{mark}".encode()])

    def last_save(self) -> bytes:
        return self.saves.rpartition(b" ")[2]


class Save:
    """One save. Its token shows afterwards whether it was carried out."""

    def __init__(self, server: Server, key: str, name: bytes, loaded: State, batch: Batch) -> None:
        self._server = server
        self._key = key
        self._name = name
        self._loaded = loaded
        self._batch = batch
        self._token = token_hex(8)

    def write(self, value: bytes | None, lives: str | int, outcomes: Recorded) -> State:
        """Compare and set, once; return the new state.

        Raises `NotSaved`, `Conflict`, or, if the outcome stays unknown, the driver's error.
        """
        written, arguments = self.prepared(value, lives)
        kept = self._batch.outcomes
        if kept:
            arguments += (outcomes.milliseconds, "\n".join(kept.values()))
        try:
            answer = self._ask(SAVE, *arguments, beside=tuple(outcomes.names.values()))
        except RedisError as error:
            answer = error
        self.understand(answer, list(outcomes.names))
        return written

    def prepared(self, value: bytes | None, lives: str | int) -> tuple[State, list[Any]]:
        """Return the state after the write, and the script's arguments."""
        version, saves = self._loaded.followed_by(f":{self._token}")
        arguments: list[Any] = [*self._loaded.compared(), version, saves, lives]
        arguments += (0, b"") if value is None else (1, value)
        return State(value, b"%d" % version, saves), arguments

    def command(self, arguments: list[Any]) -> tuple[Any, ...]:
        """Return the command to send."""
        return ("EVAL", SAVE, 1, self._name, *arguments)

    def understand(self, answer: object, idempotency_keys: list[str]) -> None:
        """Return if *answer* (the script's, or the driver's error) means that the save was carried out; else raise."""
        if isinstance(answer, NotSaved):
            raise answer
        if isinstance(answer, (AskError, TryAgainError)):  # the next load finds the new place
            raise Conflict(f"{shown(self._key)} is moving to another node, nothing was saved: {answer}") from answer
        if isinstance(answer, ResponseError) and _has_written_nothing(answer):
            raise NotSaved(f"Redis refused to save {shown(self._key)}, nothing was written: {answer}") from answer
        if isinstance(answer, RedisError):
            self._resolve(answer)
        elif isinstance(answer, list):
            found = {
                idempotency_keys[number]: told.decode() for number, told in zip(answer[::2], answer[1::2], strict=True)
            }
            told = f"{shown(self._key)} was not saved: {len(found)} of its idempotency keys are recorded already"
            raise Repeated(told, outcomes=found)
        elif not answer:
            raise self._conflict()

    def _resolve(self, lost: RedisError) -> None:
        """Ask the server whether the save was carried out; return if it was.

        Raise `Conflict` or `NotSaved` if it never will be; raise *lost* if that stays unknown.
        """
        arguments = (
            *self._loaded.compared(),
            *self._loaded.followed_by(f"!{self._token}"),
            self._token,
            self._loaded.last_save(),
            TRACE_MILLISECONDS,
        )
        pause = _TOO_SHORT
        while self._batch.remaining() > _TOO_SHORT:
            try:
                answer = self._ask(RESOLVE, *arguments)
            except (RedisError, NotSaved):
                time.sleep(min(pause, self._batch.remaining()))
                pause = min(2 * pause, _LONGEST_PAUSE)
                self._server.look_again(self._name)
                continue
            if answer == b"saved":
                return
            if answer == b"unknown":
                break
            if answer == b"fenced" and isinstance(lost, ResponseError):  # a replay would meet the same error
                raise NotSaved(f"{shown(self._key)} was not saved, nothing was written: {lost}") from lost
            raise self._conflict() from lost
        lost.add_note(f"It is unknown whether {shown(self._key)} was saved.")
        raise lost

    def _conflict(self) -> Conflict:
        version = int(self._loaded.version or 0)
        return changed(self._key, since=f"version {version}")

    def _ask(self, script: str, *arguments: object, beside: tuple[bytes, ...] = ()) -> object:
        """Send a script, once, for the resource and the keys *beside* it; return its answer.

        Raises:
            NotSaved: It was not sent.
            ResponseError: The server refused it.
            RedisError: The outcome is unknown.
        """
        command = ("EVAL", script, 1 + len(beside), self._name, *beside, *arguments)
        seconds = self._batch.remaining() * PART
        try:
            with lent(self._pool(), seconds, self._batch, shown(self._key)) as connection:
                return answer(connection, command)
        except AskError as error:  # or MOVED, a subclass
            pool = self._server.pool_at(error.host, error.port)
            if pool is None:
                raise
            with lent(pool, seconds, self._batch, shown(self._key)) as connection:
                answer(connection, ("ASKING",))
                return answer(connection, command)

    def _pool(self) -> Any:
        try:
            return self._server.pool_of(self._name)
        except (RedisError, RedisClusterException) as error:  # as far as the client knows, no node has the slot
            raise NotSaved(f"no node for {shown(self._key)}, it was not saved: {said(error)}") from error


def _has_written_nothing(error: ResponseError) -> bool:
    return isinstance(error, _REFUSED) or _REFUSALS.search(str(error)) is not None
