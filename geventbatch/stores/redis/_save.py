"""The state of a hash, and a save of it, which finds out whether it was written."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, NamedTuple

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
from geventbatch.errors import Conflict, NotSaved, Repeated, recorded_already
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


_SHOWN: Final = 3
"""Keys in a message about a save of many."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The outcomes that a save records."""

    names: dict[str, bytes]
    """The names in Redis by idempotency key."""
    texts: list[str]
    """What is recorded at each name."""
    milliseconds: int


class State(NamedTuple):  # made faster than a frozen dataclass: each batch makes several
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


class Change(NamedTuple):
    """The part of a save in one hash: it is compared with its loaded state, and written if that is to change."""

    key: str
    name: bytes
    loaded: State
    value: bytes | None
    """None deletes it."""
    lives: str | int | None
    """The milliseconds to live: '' leaves them, 0 is for ever. None: the hash is only compared."""

    def saved_as(self, token: str) -> State:
        """Return the state after the save with this *token*."""
        if self.lives is None:
            return self.loaded
        version, saves = self.loaded.followed_by(f":{token}")
        return State(self.value, b"%d" % version, saves)


class Save:
    """One save of one hash, or of several: of all or none. Its token shows afterwards whether it was carried out."""

    def __init__(self, server: Server, changes: list[Change], batch: Batch, outcomes: Recorded | None = None) -> None:
        self._server = server
        self._changes = changes
        self._batch = batch
        self._outcomes = outcomes
        self._token = token_hex(8)
        self.written = [change.saved_as(self._token) for change in changes]

    def write(self) -> None:
        """Compare and set, once.

        Raises `NotSaved`, `Conflict`, or, if the outcome stays unknown, the driver's error.
        """
        try:
            answer = self._ask(self.command())
        except RedisError as error:
            answer = error
        self.understand(answer)

    def command(self) -> tuple[Any, ...]:
        """Return the command to send."""
        outcomes = self._outcomes
        names = [change.name for change in self._changes]
        arguments: list[Any] = [len(names), 0, ""]
        for change, after in zip(self._changes, self.written, strict=True):
            arguments += change.loaded.compared()
            if change.lives is None:
                arguments += ("", "", "", 0, b"")
            else:
                arguments += (after.version, after.saves, change.lives)
                arguments += (0, b"") if after.value is None else (1, after.value)
        if outcomes is not None:
            arguments[1:3] = outcomes.milliseconds, "\n".join(outcomes.texts)
            names += outcomes.names.values()
        return ("EVAL", SAVE, len(names), *names, *arguments)

    def understand(self, answer: object) -> None:
        """Return if *answer* (the script's, or the driver's error) means that the save was carried out; else raise."""
        if isinstance(answer, NotSaved):
            raise answer
        if isinstance(answer, (AskError, TryAgainError)):  # the next load finds the new place
            raise Conflict(f"{self._named()} is moving to another node, nothing was saved: {answer}") from answer
        if isinstance(answer, ResponseError) and _has_written_nothing(answer):
            raise NotSaved(f"Redis refused to save {self._named()}, nothing was written: {answer}") from answer
        if isinstance(answer, RedisError):
            self._resolve(answer)
        elif isinstance(answer, list):
            assert self._outcomes is not None  # noqa: S101 - for type checkers
            ids = list(self._outcomes.names)
            found = {ids[number]: told.decode() for number, told in zip(answer[::2], answer[1::2], strict=True)}
            told = f"{self._named()} was not saved: {recorded_already(found)}"
            raise Repeated(told, outcomes=found)
        elif answer != 1:
            assert isinstance(answer, int)  # noqa: S101 - for type checkers
            raise _conflict(self._changes[-answer - 1])

    def _resolve(self, lost: RedisError) -> None:
        """Ask the server whether the save was carried out; return if it was.

        Raise `Conflict` or `NotSaved` if it never will be; raise *lost* if that stays unknown.
        """
        written = [change for change in self._changes if change.lives is not None] or self._changes
        arguments: list[Any] = [len(written), self._token, TRACE_MILLISECONDS]
        for change in written:
            arguments += change.loaded.compared()
            arguments += change.loaded.followed_by(f"!{self._token}")
            arguments.append(change.loaded.last_save())
        command = ("EVAL", RESOLVE, len(written), *[change.name for change in written], *arguments)
        pause = _TOO_SHORT
        while self._batch.remaining() > _TOO_SHORT:
            try:
                answer = self._ask(command)
            except (RedisError, NotSaved):
                time.sleep(min(pause, self._batch.remaining()))
                pause = min(2 * pause, _LONGEST_PAUSE)
                self._server.look_again(written[0].name)
                continue
            if answer == b"saved":
                return
            if answer == b"unknown":
                break
            if answer == b"fenced" and isinstance(lost, ResponseError):  # a replay would meet the same error
                raise NotSaved(f"{self._named()} was not saved, nothing was written: {lost}") from lost
            raise self._overtaken() from lost
        lost.add_note(f"It is unknown whether {self._named()} was saved.")
        raise lost

    def _overtaken(self) -> Conflict:
        if len(self._changes) == 1:
            return _conflict(self._changes[0])
        return Conflict(f"{self._named()} were not saved, nothing was written: the save was lost, or overtaken")

    def _named(self) -> str:
        changes = self._changes
        if len(changes) == 1:
            return shown(changes[0].key)
        some = ", ".join([shown(change.key) for change in changes[:_SHOWN]])
        return some if len(changes) <= _SHOWN else f"{some} and {len(changes) - _SHOWN} more"

    def _ask(self, command: tuple[Any, ...]) -> object:
        """Send *command*, once; return its answer.

        Raises:
            NotSaved: It was not sent.
            ResponseError: The server refused it.
            RedisError: The outcome is unknown.
        """
        seconds = self._batch.remaining() * PART
        try:
            with lent(self._pool(), seconds, self._batch, self._named()) as connection:
                return answer(connection, command)
        except AskError as error:  # or MOVED, a subclass
            pool = self._server.pool_at(error.host, error.port)
            if pool is None:
                raise
            with lent(pool, seconds, self._batch, self._named()) as connection:
                answer(connection, ("ASKING",))
                return answer(connection, command)

    def _pool(self) -> Any:
        try:
            return self._server.pool_of(self._changes[0].name)
        except (RedisError, RedisClusterException) as error:  # as far as the client knows, no node has the slot
            raise NotSaved(f"no node for {self._named()}, it was not saved: {said(error)}") from error


def _conflict(change: Change) -> Conflict:
    return changed(change.key, since=f"version {int(change.loaded.version or 0)}")


def _has_written_nothing(error: ResponseError) -> bool:
    return isinstance(error, _REFUSED) or _REFUSALS.search(str(error)) is not None
