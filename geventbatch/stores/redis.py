"""Resources in Redis, or in a Redis Cluster: one hash for each.

`_redis_scripts` says why a save may be told from every other one.
"""

from __future__ import annotations

import json
import re
from math import inf
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar
from uuid import UUID

from redis import Redis, RedisCluster
from redis.exceptions import RedisClusterException, RedisError

from geventbatch.errors import Conflict, NotSaved, Rejected, ResourceMissing
from geventbatch.stores._redis_save import Recorded, Save, State
from geventbatch.stores._redis_scope import Scope
from geventbatch.stores._redis_scripts import LOAD, TRACE_MILLISECONDS
from geventbatch.stores._redis_server import Cluster, Server, exchange
from geventbatch.stores._reuse import kept_by

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from geventbatch import Batch
    from geventbatch.stores._bulk_redis import BulkRedis
    from geventbatch.stores._reuse import Kept, Reuse

R = TypeVar("R")

TAG: Final = re.compile(rb"^[^{]*\{[^}]+\}")
"""By what is between these braces, where they are, a cluster knows the slot of a key."""


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
        self._server = Cluster(client) if isinstance(client, RedisCluster) else Server(client)
        self._prefix = prefix.encode()
        self._encode: Callable[[R], str | bytes] = _json if encode is None else encode
        self._decode: Callable[[bytes], R] = json.loads if decode is None else decode
        self._missing = missing
        self._ttl = None if ttl is None else _milliseconds("ttl", ttl)
        self._kept: Kept[State] | None = kept_by(reuse_resource)
        self._idempotency_ttl = None if idempotency_ttl is None else _milliseconds("idempotency_ttl", idempotency_ttl)

    def __repr__(self) -> str:
        """Say where it keeps what."""
        return f"<RedisStore {self._prefix.decode()!r} on {self._server!r}>"

    def __call__(self, key: str) -> Scope[R]:
        """The resource scope of *key*. Switches: no; entering and leaving it does."""
        return Scope(self, self.normalize_key(key))

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
        if isinstance(self._server, Cluster) and b"}" in name and not TAG.search(name):
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

    def take(self, key: str) -> State | None:
        """What is kept, if it is."""
        return None if self._kept is None else self._kept.take(key)

    def keep(self, key: str, state: State) -> None:
        """Keep what is there now; but what has no token, since a hash that is made anew may look the same."""
        if self._kept is not None and state.value is not None and state.saves:
            self._kept.put(key, state)

    def load(self, key: str) -> State:
        """What is in Redis."""
        found = self._server.load(self._name(key))
        return State.of(key, *found)

    def resource_of(self, key: str, state: State) -> R:
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

    def save(self, key: str, loaded: State, resource: R, batch: Batch) -> State:
        """Write what the batch has made of it, if that is something else, and give what is there then."""
        value = self.value_of(key, loaded, resource, batch)
        if value == loaded.value and not batch.outcomes:
            return loaded
        save = Save(self._server, key, self._name(key), loaded, batch)
        return save.write(value, self._lives(loaded, value), self._recorded_at(key, batch.outcomes))

    def value_of(self, key: str, loaded: State, resource: R, batch: Batch) -> bytes | None:
        """What the batch has made of it."""
        if not batch.completed:
            return loaded.value
        return None if batch.deleted else self._encoded(key, resource)

    def load_all(self, keys: Iterable[str], batch: Batch) -> dict[str, State | Exception]:
        """What is in Redis at each of them, or what went wrong there."""
        commands = {key: ("EVAL", LOAD, 1, self._name(key)) for key in keys}
        found: dict[str, State | Exception] = {}
        for key, answer in self._exchange(commands, batch).items():
            try:
                # Alone, the client tries again, and looks where a key has moved to.
                found[key] = self.load(key) if isinstance(answer, Exception) else State.of(key, *answer)
            except Exception as error:
                found[key] = error
        return found

    def save_all(self, changes: dict[str, tuple[State, bytes | None]], batch: Batch) -> dict[str, Exception]:
        """Write these values, each if it is still as it was loaded; give what those fail with that were not."""
        saves = {key: Save(self._server, key, self._name(key), loaded, batch) for key, (loaded, _) in changes.items()}
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
            answers |= exchange(pool, some, batch)
        return answers

    def compare(self, key: str, kept: State) -> None:
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

    def _recorded_at(self, key: str, idempotency_keys: Iterable[str]) -> Recorded:
        first = self._name(key)
        if not TAG.search(first):
            first = b"{%b}" % first  # which makes it a tag, unless there is a } in it (see `check_outcomes`)
        names = {one: b"%b:idempotency:%b" % (first, one.encode()) for one in idempotency_keys}
        return Recorded(names, self._idempotency_ttl or 0)

    def _name(self, key: str) -> bytes:
        return self._prefix + key.encode(errors="surrogateescape")

    def _encoded(self, key: str, resource: R) -> bytes:
        try:
            value = self._encode(resource)
            return value.encode() if isinstance(value, str) else bytes(value)
        except Exception as error:
            raise Rejected(f"{key!r} cannot be encoded any more, nothing was saved: {error}") from error

    def _lives(self, loaded: State, value: bytes | None) -> str | int:
        if value is None:
            return TRACE_MILLISECONDS
        if self._ttl is not None:
            return self._ttl
        return 0 if loaded.value is None else ""


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
