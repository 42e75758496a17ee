"""Resources in Redis, or in a Redis Cluster: one hash for each.

Why a save may be told from every other one
-------------------------------------------
A hash holds the ``value``, a ``version`` that counts the saves, and ``saves``: which version each of the last few saves
has made, each with a token of its own. One script compares version and saves with what was loaded, and writes all
three, so a save is one message, and a script that arrives twice writes once.

When the answer to it is lost, the script may have run, may never run, or may run later: it can wait in a buffer of the
network or the server. So it does not help to look what is there. Another script, on another connection, decides:

- The save's own token is among ``saves``: it was written. That is success.
- The hash is as it was loaded: not yet. The script counts the version up (a fence), so that the save, should it still
  arrive, finds another version and writes nothing. Then certainly nothing is written, and the batch replays. Asked a
  second time, since this answer may be lost too, it finds the fence and says the same.
- Others have saved since, and the save that was loaded is still among ``saves``: then all that came after it is there
  too, and the own token is not. It can never be written any more: a conflict.
- Else (the hash was deleted, has expired or was lost with its server; somebody else saved more often than ``saves``
  goes back) nobody knows. The driver's error goes up as it is.

A version that began anew after a deletion would make an old save fit again. So a deleted resource leaves its version
and saves for some minutes, without a value. The same is the fence where there was nothing.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from math import inf
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, cast
from uuid import UUID

import gevent
from redis import Redis, RedisCluster
from redis.exceptions import AskError, RedisClusterException, RedisError, ResponseError, TryAgainError

from geventbatch import current_batch
from geventbatch.errors import Conflict, NotSaved, Rejected, Repeated, ResourceMissing
from geventbatch.stores._reuse import judging_nobody, kept_by

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator
    from types import TracebackType

    from geventbatch import Batch
    from geventbatch.stores._bulk_redis import BulkRedis
    from geventbatch.stores._reuse import Kept, Reuse

R = TypeVar("R")

_KEPT_SAVES: Final = 8
"""So many saves a hash remembers: it is long enough for those that others make while one looks for a lost answer."""

_TRACE_MILLISECONDS: Final = 600_000
"""How long what has no value stays. Longer than a message can be delayed: TCP gives up after a quarter of that."""

_PART: Final = 0.75
"""Of the time that remains, the part that one question may take, so that another one can follow it."""

_TOO_SHORT: Final = 0.01
"""Seconds, in which no question is worth asking any more."""

_LONGEST_PAUSE: Final = 0.2
"""Seconds between two questions that were not answered."""

_TAG: Final = re.compile(rb"^[^{]*\{[^}]+\}")
"""By what is between these braces, where they are, a cluster knows the slot of a key."""

# A script, since it goes to the primary also where a client reads from replicas, and past a client's own cache.
_LOAD: Final = "return redis.call('HMGET', KEYS[1], 'value', 'version', 'saves')"

_LOAD_OUTCOMES: Final = """
local found = {}
for i = 2, #KEYS do found[i - 1] = redis.call('GET', KEYS[i]) end
return found
"""

# Of both scripts the first three arguments are the version, the saves and whether there was a value, as loaded.
_IS_AS_LOADED: Final = """
local found = redis.call('HMGET', KEYS[1], 'version', 'saves')
local version, saves = found[1] or '', found[2] or ''
local as_loaded = version == ARGV[1] and saves == ARGV[2]
  and redis.call('HEXISTS', KEYS[1], 'value') == tonumber(ARGV[3])
"""

# Then: the new version, the new saves, milliseconds to live ('' leaves it, '0' is for ever), 1 and the value, or 0 and
# '' when it goes. Then, where outcomes are to be recorded at the other keys: their milliseconds to live, and the
# outcomes, a line each. (`unpack` takes no more than some thousands.)
_SAVE: Final = (
    _IS_AS_LOADED
    + """
if not as_loaded then return 0 end
local repeated = {}
for first = 2, #KEYS, 1000 do
  local found = redis.call('MGET', unpack(KEYS, first, math.min(first + 999, #KEYS)))
  for i, outcome in ipairs(found) do
    if outcome then
      repeated[#repeated + 1] = first + i - 3
      repeated[#repeated + 1] = outcome
    end
  end
end
if #repeated > 0 then return repeated end
if ARGV[10] then
  local i = 1
  for outcome in ARGV[10]:gmatch('[^\\n]+') do
    i = i + 1
    redis.call('SET', KEYS[i], outcome, 'PX', ARGV[9])
  end
end
if ARGV[7] == '1' then
  redis.call('HSET', KEYS[1], 'version', ARGV[4], 'saves', ARGV[5], 'value', ARGV[8])
else
  redis.call('HSET', KEYS[1], 'version', ARGV[4], 'saves', ARGV[5])
  redis.call('HDEL', KEYS[1], 'value')
end
if ARGV[6] == '0' then
  redis.call('PERSIST', KEYS[1])
elseif ARGV[6] ~= '' then
  redis.call('PEXPIRE', KEYS[1], ARGV[6])
end
return 1
"""
)

# Then: the new version, the new saves with a fence in place of a save, the save's own token, the last save that was
# loaded, milliseconds to live of a hash that is nothing but a fence.
_RESOLVE: Final = (
    _IS_AS_LOADED
    + """
if saves:find(':' .. ARGV[6], 1, true) then return 'saved' end
if saves:find('!' .. ARGV[6], 1, true) then return 'fenced' end
if as_loaded then
  redis.call('HSET', KEYS[1], 'version', ARGV[4], 'saves', ARGV[5])
  if ARGV[1] == '' and ARGV[3] == '0' then redis.call('PEXPIRE', KEYS[1], ARGV[8]) end
  return 'fenced'
end
if ARGV[7] ~= '' and saves:find(ARGV[7], 1, true) then return 'changed' end
return 'unknown'
"""
)


class RedisStore(Generic[R]):
    """The ``open_resource`` of a `Processor` whose resources are kept in Redis, each in one hash.

    The hash has the field ``value``, the field ``version``, which counts the saves, and the field ``saves``, by which a
    save knows itself again. Its mode is "version": a save compares and sets atomically, and what somebody else has
    saved since the load is a `Conflict`, which the batch replays. Somebody else who writes the hash has to count the
    version up in the same transaction: ``MULTI``, ``HSET key value …``, ``HINCRBY key version 1``, ``EXEC``; and who
    deletes it and makes it anew goes on from the version that it had. One key for each resource is all that it needs,
    so it works on a Redis Cluster.

    Deleting (`current_batch().delete()`) takes the value away; what is left of the hash expires after ten minutes.

    An answer is as durable as the server makes it: see ``appendfsync``, and that a replica which takes over may lack
    the last saves. Loading goes through *client*, with its retries. A save is sent once, on a connection of the
    client's pool; when its answer is lost, the store finds out whether it was written as long as the batch has time.
    Only what it cannot find out fails as the driver's error, in a `SaveFailed` that is not ``retry_safe``.

    The outcome of an operation with an idempotency key has a key of its own, in the same slot of a cluster, which
    expires by itself. Where Redis evicts keys, it may be gone before.

    Args:
        client: A `redis.Redis` or `redis.RedisCluster`. It may be used for anything else as well.
        prefix: What the name of a hash begins with; the key follows.
        encode: Makes the value of a resource: a str or bytes. By default JSON. What it raises is the error of the
            operations that made the resource so, and of no other.
        decode: Makes the resource of the bytes of a value. By default JSON. What it raises fails the load.
        missing: "raise" raises `ResourceMissing` when there is no such resource; else what makes one, called with the
            key (a str).
        ttl: Seconds after its last change that a resource lives; None leaves that alone, so that it lives for ever.
        idempotency_ttl: Seconds that the outcome of an operation with an idempotency key is kept; None: such operations
            are refused.
        reuse_resource: Keep what was saved, so that the next batch of the key loads nothing (`Reuse`); None keeps
            nothing.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: *ttl* or *idempotency_ttl* is out of range.
    Switches: no.
    """

    def __init__(  # noqa: PLR0913 - every option of a store is a keyword of one constructor
        self,
        client: Redis | RedisCluster,
        *,
        prefix: str = "",
        encode: Callable[[R], str | bytes] | None = None,
        decode: Callable[[bytes], R] | None = None,
        missing: Literal["raise"] | Callable[[str], R] = "raise",
        ttl: float | None = None,
        idempotency_ttl: float | None = 86_400.0,
        reuse_resource: Reuse | None = None,
    ) -> None:
        """See the class."""
        _check_client(client)
        if not isinstance(prefix, str):
            raise TypeError(f"prefix is {prefix!r}, but must be a str")
        _check_functions(encode=encode, decode=decode)
        _check_missing(missing)
        self._server = _Cluster(client) if isinstance(client, RedisCluster) else _Server(client)
        self._prefix = prefix.encode()
        self._encode: Callable[[R], str | bytes] = _json if encode is None else encode
        self._decode: Callable[[bytes], R] = json.loads if decode is None else decode
        self._missing = missing
        self._ttl = None if ttl is None else _milliseconds("ttl", ttl)
        self._kept: Kept[_State] | None = kept_by(reuse_resource)
        self._idempotency_ttl = None if idempotency_ttl is None else _milliseconds("idempotency_ttl", idempotency_ttl)

    def __repr__(self) -> str:
        """Say where it keeps what."""
        return f"<RedisStore {self._prefix.decode()!r} on {self._server!r}>"

    def __call__(self, key: str) -> _Scope[R]:
        """The resource scope of *key*. Switches: no; entering and leaving it does."""
        return _Scope(self, self.normalize_key(key))

    @property
    def keeps_outcomes(self) -> bool:
        """Whether it records the outcomes of operations with an idempotency key."""
        return self._idempotency_ttl is not None

    @property
    def open_resources(self) -> BulkRedis[R]:
        """The bulk form: ``Processor(open_resources=store.open_resources)``, for many keys with few operations each.

        The resources of all batches that are ready are loaded by one message, and saved by another (to each node of a
        cluster). It takes no operations with idempotency keys, and keeps nothing (``reuse_resource``).

        Switches: no.
        """
        from geventbatch.stores._bulk_redis import BulkRedis

        return BulkRedis(self)

    def normalize_key(self, key: Hashable) -> str:
        """The text that *key* is in Redis, so that ``42`` and ``"42"`` are one. Switches: no.

        Raises:
            TypeError: It is no str, int, UUID or bytes.
            ValueError: It has no UTF-8 form.
        """
        if isinstance(key, str):
            text = str.__str__(key)  # an Enum may have another one of its own
        elif isinstance(key, bytes):
            text = bytes(key).decode(errors="surrogateescape")
        elif isinstance(key, int) and not isinstance(key, bool):
            text = int.__repr__(key)
        elif isinstance(key, UUID):
            text = UUID.__str__(key)
        else:
            raise TypeError(f"the key {key!r} is a {type(key).__name__}; a RedisStore takes str, int, UUID and bytes")
        try:
            text.encode(errors="surrogateescape")
        except UnicodeEncodeError as error:
            raise ValueError(f"the key {key!r} has no UTF-8 form, so it is no key in Redis: {error}") from error
        return text

    def check_outcomes(self, key: Hashable) -> None:
        """Raise a `ValueError` if a cluster can keep no outcomes beside the resource at *key*. Switches: no."""
        name = self._name(self.normalize_key(key))
        if isinstance(self._server, _Cluster) and b"}" in name and not _TAG.search(name):
            raise ValueError(
                f"the key {key!r} is {name!r} in Redis: beside it a cluster can keep no outcomes of operations with an "
                "idempotency key, since it has a } outside of a hash tag; nothing was run. Make keys without one, or "
                "with a tag, as in {tag}rest"
            )

    def stopped(self) -> None:
        """Let go what is kept: what a processor calls when it has stopped. Switches: no."""
        if self._kept is not None:
            self._kept.clear()

    # -- for its scopes -------------------------------------------------------------------------------------

    def take(self, key: str) -> _State | None:
        """What is kept, if it is."""
        return None if self._kept is None else self._kept.take(key)

    def keep(self, key: str, state: _State) -> None:
        """Keep what is there now; but what has no token, since a hash that is made anew may look the same."""
        if self._kept is not None and state.value is not None and state.saves:
            self._kept.put(key, state)

    def load(self, key: str) -> _State:
        """What is in Redis."""
        found = self._server.load(self._name(key))
        return _State.of(key, *found)

    def resource_of(self, key: str, state: _State) -> R:
        """Decode it, or make it."""
        if state.value is not None:
            try:
                return self._decode(state.value)
            except Exception as error:
                raise ValueError(
                    f"the value of {key!r} in Redis cannot be decoded: {type(error).__name__}: {error}"
                ) from error
        if callable(self._missing):
            return self._missing(key)
        raise ResourceMissing(f"there is no {key!r} in Redis", key=key)

    def save(self, key: str, loaded: _State, resource: R, batch: Batch) -> _State:
        """Write what the batch has made of it, if that is something else, and give what is there then."""
        value = self.value_of(key, loaded, resource, batch)
        if value == loaded.value and not batch.outcomes:
            return loaded
        save = _Save(self._server, key, self._name(key), loaded, batch)
        return save.write(value, self._lives(loaded, value), self._recorded_at(key, batch.outcomes))

    def value_of(self, key: str, loaded: _State, resource: R, batch: Batch) -> bytes | None:
        """What the batch has made of it."""
        if not batch.completed:
            return loaded.value
        return None if batch.deleted else self._encoded(key, resource)

    def load_all(self, keys: Iterable[str], batch: Batch) -> dict[str, _State | Exception]:
        """What is in Redis at each of them, or what went wrong there."""
        commands = {key: ("EVAL", _LOAD, 1, self._name(key)) for key in keys}
        found: dict[str, _State | Exception] = {}
        for key, answer in self._exchange(commands, batch).items():
            try:
                # Alone, the client tries again, and looks where a key has moved to.
                found[key] = self.load(key) if isinstance(answer, Exception) else _State.of(key, *answer)
            except Exception as error:
                found[key] = error
        return found

    def save_all(self, changes: dict[str, tuple[_State, bytes | None]], batch: Batch) -> dict[str, Exception]:
        """Write these values, each if it is still as it was loaded; give what those fail with that were not."""
        saves = {key: _Save(self._server, key, self._name(key), loaded, batch) for key, (loaded, _) in changes.items()}
        commands = {
            key: saves[key].command(saves[key].prepared(value, self._lives(loaded, value))[1])
            for key, (loaded, value) in changes.items()
        }
        failed: dict[str, Exception] = {}
        for key, answer in self._exchange(commands, batch).items():
            try:
                saves[key].understand(answer, [])
            except Exception as error:
                failed[key] = error
        return failed

    def _exchange(self, commands: dict[str, tuple[Any, ...]], batch: Batch) -> dict[str, Any]:
        """Send them, to each node its own as one message, each once; give the answers, or errors in their place."""
        answers: dict[str, Any] = {}
        by_pool: dict[int, tuple[Any, dict[str, tuple[Any, ...]]]] = {}
        for key, command in commands.items():
            try:
                pool = self._server.pool_of(self._name(key))
            except (RedisError, RedisClusterException) as error:
                answers[key] = NotSaved(f"no node for {key!r}, it was not saved: {error}")
            else:
                by_pool.setdefault(id(pool), (pool, {}))[1][key] = command
        for pool, some in by_pool.values():
            answers |= _exchange(pool, some, batch)
        return answers

    def compare(self, key: str, kept: _State) -> None:
        """Raise a `Conflict` unless it is there as it was kept."""
        try:
            there = self.load(key)
        except (RedisError, RedisClusterException, ValueError) as error:
            raise NotSaved(f"{key!r} cannot be compared: {error}") from error
        if there != kept:
            raise Conflict(f"{key!r} was changed by somebody else since this process has saved it")

    def recorded(self, key: str, idempotency_keys: Iterable[str]) -> dict[str, str]:
        """What is recorded of operations with them."""
        wanted = self._recorded_at(key, idempotency_keys).names
        found = self._server.load_outcomes(self._name(key), list(wanted.values()))
        return {one: told.decode() for one, told in zip(wanted, found, strict=True) if told is not None}

    def _recorded_at(self, key: str, idempotency_keys: Iterable[str]) -> _Outcomes:
        first = self._name(key)
        if not _TAG.search(first):
            first = b"{%b}" % first  # which makes it a tag, unless there is a } in it (see `check_outcomes`)
        names = {one: b"%b:idempotency:%b" % (first, one.encode()) for one in idempotency_keys}
        return _Outcomes(names, self._idempotency_ttl or 0)

    def _name(self, key: str) -> bytes:
        return self._prefix + key.encode(errors="surrogateescape")

    def _encoded(self, key: str, resource: R) -> bytes:
        try:
            value = self._encode(resource)
            return value.encode() if isinstance(value, str) else bytes(value)
        except Exception as error:
            raise Rejected(f"{key!r} cannot be encoded any more, nothing was saved: {error}") from error

    def _lives(self, loaded: _State, value: bytes | None) -> str | int:
        if value is None:
            return _TRACE_MILLISECONDS
        if self._ttl is not None:
            return self._ttl
        return 0 if loaded.value is None else ""


class _Scope(Generic[R]):
    """Entering loads, leaving saves, leaving with an exception does nothing. It holds no connection in between."""

    deletes: Final = True

    # -- mutable state ---------------------------------------------------------------------------------------
    reused: bool  # it was not loaded: the save has to compare, also when there is nothing to save
    _loaded: _State
    _resource: R

    def __init__(self, store: RedisStore[R], key: str) -> None:
        self._store = store
        self._key = key

    def __enter__(self) -> R:
        self.reused = self._reuse()
        if not self.reused:
            self._loaded = self._store.load(self._key)
            self._resource = self._store.resource_of(self._key, self._loaded)
        return self._resource

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """What is recorded of operations with these idempotency keys. Switches: yes."""
        return self._store.recorded(self._key, keys)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        with judging_nobody(self._key) if self.reused else nullcontext():
            saved = self._store.save(self._key, self._loaded, self._resource, current_batch())
            if self.reused and saved is self._loaded:
                self._store.compare(self._key, saved)
        self._store.keep(self._key, saved)

    def _reuse(self) -> bool:
        """Take what is kept, if it is."""
        kept = self._store.take(self._key)
        if kept is None:
            return False
        self._loaded = kept
        try:
            self._resource = self._store.resource_of(self._key, kept)
        except Exception:
            return False  # nobody is told so before it was loaded
        return True


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """Where those are that a save records."""

    names: dict[str, bytes]
    """By idempotency key."""
    milliseconds: int


@dataclass(frozen=True, slots=True)
class _State:
    """What is in a hash."""

    value: bytes | None
    version: bytes
    saves: bytes
    """``version:token`` for each of the last saves, ``version!token`` for a fence, spaces between them."""

    @classmethod
    def of(cls, key: str, value: bytes | None, version: bytes | None, saves: bytes | None) -> _State:
        if version is not None and not version.isdigit():
            raise ValueError(f"the version of {key!r} in Redis cannot be decoded: it is {version!r}, and no number")
        return cls(value, version or b"", saves or b"")

    def compared(self) -> tuple[bytes, bytes, int]:
        return self.version, self.saves, int(self.value is not None)

    def followed_by(self, mark: str) -> tuple[int, bytes]:
        """The version and the saves after one more, which writes *mark*."""
        version = int(self.version or 0) + 1
        return version, b" ".join([*self.saves.split()[1 - _KEPT_SAVES :], f"{version}{mark}".encode()])

    def last_save(self) -> bytes:
        return self.saves.rpartition(b" ")[2]


class _Save:
    """One attempt to write, which knows itself again by its token."""

    def __init__(self, server: _Server, key: str, name: bytes, loaded: _State, batch: Batch) -> None:
        self._server = server
        self._key = key
        self._name = name
        self._loaded = loaded
        self._batch = batch
        self._token = token_hex(8)

    def write(self, value: bytes | None, lives: str | int, outcomes: _Outcomes) -> _State:
        """Compare and set, once, and give what is there then.

        Raises `NotSaved`, `Conflict`, or the driver's error when that stays unknown.
        """
        written, arguments = self.prepared(value, lives)
        kept = self._batch.outcomes
        if kept:
            arguments += (outcomes.milliseconds, "\n".join(kept.values()))
        try:
            answer = self._ask(_SAVE, *arguments, beside=tuple(outcomes.names.values()))
        except RedisError as error:
            answer = error
        self.understand(answer, list(outcomes.names))
        return written

    def prepared(self, value: bytes | None, lives: str | int) -> tuple[_State, list[Any]]:
        """What is there when it is written, and what the script is given."""
        version, saves = self._loaded.followed_by(f":{self._token}")
        arguments: list[Any] = [*self._loaded.compared(), version, saves, lives]
        arguments += (0, b"") if value is None else (1, value)
        return _State(value, b"%d" % version, saves), arguments

    def command(self, arguments: list[Any]) -> tuple[Any, ...]:
        """What is sent."""
        return ("EVAL", _SAVE, 1, self._name, *arguments)

    def understand(self, answer: object, idempotency_keys: list[str]) -> None:
        """Return when the *answer*, or the driver's error in its place, means that it was written. Else raise."""
        if isinstance(answer, NotSaved):
            raise answer
        if isinstance(answer, (AskError, TryAgainError)):  # loading again finds the new place
            raise Conflict(f"{self._key!r} is moving to another node, nothing was saved: {answer}") from answer
        if isinstance(answer, ResponseError):  # whose script has written nothing: only its first command is refused
            raise NotSaved(f"Redis refused to save {self._key!r}: {answer}") from answer
        if isinstance(answer, RedisError):
            self._resolve(answer)
        elif isinstance(answer, list):
            found = {
                idempotency_keys[number]: told.decode() for number, told in zip(answer[::2], answer[1::2], strict=True)
            }
            told = f"{self._key!r} was not saved: {len(found)} of its idempotency keys are recorded already"
            raise Repeated(told, outcomes=found)
        elif not answer:
            raise self._conflict()

    def _resolve(self, lost: RedisError) -> None:
        """Return when it was written, raise a `Conflict` when it was not and never will be, else raise *lost*."""
        arguments = (
            *self._loaded.compared(),
            *self._loaded.followed_by(f"!{self._token}"),
            self._token,
            self._loaded.last_save(),
            _TRACE_MILLISECONDS,
        )
        pause = _TOO_SHORT
        while self._batch.remaining() > _TOO_SHORT:
            try:
                answer = self._ask(_RESOLVE, *arguments)
            except (RedisError, NotSaved):
                time.sleep(min(pause, self._batch.remaining()))
                pause = min(2 * pause, _LONGEST_PAUSE)
                self._server.look_again(self._name)
                continue
            if answer == b"saved":
                return
            if answer == b"unknown":
                break
            raise self._conflict() from lost
        lost.add_note(f"It is unknown whether {self._key!r} was saved.")
        raise lost

    def _conflict(self) -> Conflict:
        version = int(self._loaded.version or 0)
        return Conflict(f"{self._key!r} was changed since version {version}, nothing was saved")

    def _ask(self, script: str, *arguments: object, beside: tuple[bytes, ...] = ()) -> object:
        """Send a script, once, with the keys *beside* that of the resource, and give what it returns.

        Raises:
            NotSaved: It was not sent.
            ResponseError: The server refused it.
            RedisError: It is unknown what became of it.
        """
        command = ("EVAL", script, 1 + len(beside), self._name, *beside, *arguments)
        seconds = self._batch.remaining() * _PART
        try:
            with _lent(self._pool(), seconds, self._batch, repr(self._key)) as connection:
                return _answer(connection, command)
        except AskError as error:  # or MOVED, which is one of them
            pool = self._server.pool_at(error.host, error.port)
            if pool is None:
                raise
            with _lent(pool, seconds, self._batch, repr(self._key)) as connection:
                _answer(connection, ("ASKING",))
                return _answer(connection, command)

    def _pool(self) -> Any:
        try:
            return self._server.pool_of(self._name)
        except (RedisError, RedisClusterException) as error:  # as far as the client knows, nobody has the slot
            raise NotSaved(f"no node for {self._key!r}, it was not saved: {error}") from error


# -- the driver -----------------------------------------------------------------------------------------------


class _Server:
    """One server, or the primary that a sentinel knows."""

    def __init__(self, client: Redis | RedisCluster) -> None:
        self._client: Any = client  # the driver does not type what is asked of it here

    def __repr__(self) -> str:
        return repr(self._client)

    def load(self, name: bytes) -> tuple[bytes | None, bytes | None, bytes | None]:
        value, version, saves = self._client.execute_command("EVAL", _LOAD, 1, name, NEVER_DECODE=True)
        return value, version, saves

    def load_outcomes(self, name: bytes, names: list[bytes]) -> list[bytes | None]:
        found = self._client.execute_command("EVAL", _LOAD_OUTCOMES, 1 + len(names), name, *names, NEVER_DECODE=True)
        return cast("list[bytes | None]", found)

    def pool_of(self, _name: bytes, /) -> Any:
        return self._client.connection_pool

    def pool_at(self, _host: str, _port: int, /) -> Any:
        return None

    def look_again(self, _name: bytes, /) -> None:
        """A question was not answered: the pool connects to whoever is there now."""


class _Cluster(_Server):
    """Nodes, of which the primary of the key's slot is the one."""

    def pool_of(self, name: bytes, /) -> Any:
        return self._pool(self._client.get_node_from_key(name))

    def pool_at(self, host: str, port: int, /) -> Any:
        host, port = self._client.nodes_manager.remap_host_port(host, port)
        return self._pool(self._client.get_node(host=host, port=port))

    def look_again(self, name: bytes, /) -> None:
        """Have the client ask all nodes, which it does when its own does not answer."""
        with suppress(RedisError, RedisClusterException):
            self.load(name)

    def _pool(self, node: Any) -> Any:
        return None if node is None else self._client.get_redis_connection(node).connection_pool


@contextmanager
def _lent(pool: Any, seconds: float, batch: Batch, what: str) -> Iterator[Any]:
    """A connection that waits for no answer longer than *seconds*, and is given back as it was, or closed."""
    connection = _taken(pool, seconds, batch, what)
    try:
        _bound(connection, seconds)
        yield connection
    except ResponseError:
        raise
    except BaseException:
        # In the middle of an answer, perhaps. Newer drivers have closed it already.
        connection.disconnect()
        raise
    finally:
        _bound(connection, None)
        pool.release(connection)


def _taken(pool: Any, seconds: float, batch: Batch, what: str) -> Any:
    # Connecting has retries of the driver's own, which may take longer than we have; nothing has been sent then.
    # Who runs alone may be in a thread without a hub, or in one that blocks: no timer is of use there.
    timer = None if batch.alone else gevent.Timeout.start_new(seconds)
    try:
        return _take(pool)
    except gevent.Timeout as error:
        if error is not timer:
            raise
        raise NotSaved(f"no connection to Redis in {seconds:.3f} s: {what} was not saved") from None
    except RedisError as error:
        raise NotSaved(f"no connection to Redis, {what} was not saved: {error}") from error
    finally:
        if timer is not None:
            timer.close()


def _take(pool: Any) -> Any:
    return pool.get_connection("EVAL") if _is_told_commands(type(pool).get_connection) else pool.get_connection()


@cache
def _is_told_commands(get_connection: Callable[..., Any]) -> bool:
    """Before redis-py 5.3 a pool asked for the name of a command, from then on it does not want it."""
    parameters = list(signature(get_connection).parameters.values())[1:]
    return any(one.kind is Parameter.POSITIONAL_OR_KEYWORD and one.default is Parameter.empty for one in parameters)


def _answer(connection: Any, command: tuple[object, ...]) -> object:
    connection.send_command(*command)
    return cast("object", connection.read_response(disable_decoding=True))


def _exchange(pool: Any, commands: dict[str, tuple[Any, ...]], batch: Batch) -> dict[str, Any]:
    """Send all of them on one connection, and give what each was answered, or the error that took its place."""
    answers: dict[str, Any] = {}
    seconds = batch.remaining() * _PART
    try:
        with _lent(pool, seconds, batch, f"{len(commands)} keys") as connection:
            connection.send_packed_command(connection.pack_commands(commands.values()))
            for key in commands:
                try:
                    answers[key] = connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    answers[key] = error
    except (RedisError, NotSaved) as error:
        answers |= {key: error for key in commands if key not in answers}
    return answers


def _bound(connection: Any, seconds: float | None) -> None:
    """Have it wait for no answer longer than *seconds*; None for as long as its client says.

    The driver has no other way: its own ``socket_timeout`` counts when it connects.
    """
    connection = getattr(connection, "_conn", connection)  # of a client with a cache of its own
    of_client = connection.socket_timeout
    if seconds is None or (of_client is not None and of_client < seconds):
        seconds = of_client
    socket = getattr(connection, "_sock", None)
    if socket is not None:
        socket.settimeout(seconds)


# -- options --------------------------------------------------------------------------------------------------


def _json(resource: object) -> str:
    return json.dumps(resource, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _check_client(client: object) -> None:
    if not isinstance(client, (Redis, RedisCluster)):
        raise TypeError(f"client is {client!r}, but must be a redis.Redis or a redis.RedisCluster")


def _check_functions(**functions: object) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} is {function!r}, but must be callable or None")


def _check_missing(missing: object) -> None:
    if missing != "raise" and not callable(missing):
        raise TypeError(f'missing is {missing!r}, but must be "raise" or a callable that makes the resource of a key')


def _milliseconds(option: str, ttl: object) -> int:
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
        raise TypeError(f"{option} is {ttl!r}, but must be seconds or None")
    if not 0 < ttl < inf:
        raise ValueError(f"{option} is {ttl!r}, but must be more than 0 seconds, and finite, or None")
    return max(1, round(ttl * 1000))
