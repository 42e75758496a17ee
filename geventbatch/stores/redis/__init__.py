"""Resources in Redis, or in a Redis Cluster: one hash for each.

`_scripts` says how a save recognises itself.
"""

from __future__ import annotations

import json
from math import inf
from typing import TYPE_CHECKING, Final, Generic, Literal, TypeVar
from uuid import UUID

from redis import Redis, RedisCluster

from geventbatch._check_callables import check_functions
from geventbatch._safe_repr import named, said, shown
from geventbatch.errors import ImpossibleKey
from geventbatch.stores import _json
from geventbatch.stores._missing import checked
from geventbatch.stores._reuse import kept_by
from geventbatch.stores.redis._names import has_tag
from geventbatch.stores.redis._resources import Resources
from geventbatch.stores.redis._scope import Scope
from geventbatch.stores.redis._server import Cluster, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from geventbatch.stores._reuse import Reuse
    from geventbatch.stores.redis._bulk import BulkRedis

R = TypeVar("R")

_LONGEST: Final = 2**62 // 1000
"""Seconds, some million years: Redis has 64 bits for an expiry in milliseconds."""


class RedisStore(Generic[R]):
    """The ``open_resource`` of a `Processor` whose resources are kept in Redis, each in one hash.

    The hash has the fields ``value``, ``version``, which counts the saves, and ``saves``, by which a save recognises
    itself. The mode is "version": a save compares and sets atomically. If another writer has saved since the load, that
    is a `Conflict`, which the batch replays. Another program that writes the hash must count the version up in the same
    transaction: ``MULTI``, ``HSET key value …``, ``HINCRBY key version 1``, ``EXEC``. If it deletes the hash and makes
    it anew, it must go on from the old version.

    Each resource needs only one key, so the store works on a Redis Cluster. There, the keys of an operation across keys
    must lie in one slot, so that one script can save them: give them a common hash tag, as in ``{bank}Ann`` and
    ``{bank}shop``.

    `current_batch().delete()` removes the value. The rest of the hash expires after ten minutes.

    An answer is as durable as the server makes it: see ``appendfsync``, and note that a replica may lack the last saves
    when it takes over. Loading goes through *client*, with its retries. A save is sent once, on a connection of the
    client's pool. If its answer is lost, the store tries to find out whether it was written as long as the batch has
    time. Only if it cannot, the save fails with the driver's error, in a `SaveFailed` that is not ``retry_safe``.

    The outcome of an operation with an idempotency key has a key of its own, in the slot of the operation's keys, which
    expires by itself. If Redis evicts keys, the outcome may be lost earlier.

    Args:
        client: A `redis.Redis` or `redis.RedisCluster`. It may be used for anything else as well.
        prefix: The beginning of a hash's name; the key follows.
        encode: Returns the value of a resource: a str or bytes. By default JSON. Its error is the error of the
            operations that brought the resource into that state. The same holds for what JSON would lose: a tuple, or
            a name that is no text.
        decode: Returns the resource of a value (bytes), exactly as it was. By default JSON. Its error fails the load.
        missing: For a key without a resource: "raise" raises `ResourceMissing`; a function of the key (a str) returns
            a new resource.
        ttl: Seconds that a resource lives after its last change; None leaves the expiry alone, so it lives for ever.
        idempotency_ttl: Seconds that the outcome of an operation with an idempotency key is kept; None: such operations
            are refused.
        reuse_resource: Caches saved resources, so that the next batch of a key loads nothing (`Reuse`); None caches
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
            raise TypeError(f"prefix is {shown(prefix)}, but must be a str")
        check_functions(("resource",), encode=encode)
        check_functions(("state",), decode=decode)
        self._resources: Resources[R] = Resources(
            server=Cluster(client) if isinstance(client, RedisCluster) else Server(client),
            prefix=prefix.encode(),
            encode=_json.encode_compact if encode is None else encode,
            decode=json.loads if decode is None else decode,
            check=_json.check_of(decode or json.loads),
            missing=checked(missing),
            milliseconds=_milliseconds("ttl", ttl),
            outcome_milliseconds=_milliseconds("idempotency_ttl", idempotency_ttl),
            kept=kept_by(reuse_resource),
        )
        self._kept = self._resources.kept

    def __repr__(self) -> str:
        """Say where the resources are, and under which prefix."""
        return f"<RedisStore {self._resources.prefix.decode()!r} on {self._resources.server!r}>"

    def __call__(self, key: str) -> Scope[R]:
        """Return the resource scope of *key*. Switches: no; entering and exiting it does."""
        return Scope(self._resources, self.normalize_key(key))

    on_server: Final = True
    """A database server is behind the store, which may take its time."""

    @property
    def keeps_outcomes(self) -> bool:
        """Return whether it records the outcomes of operations with an idempotency key."""
        return self._resources.outcome_milliseconds is not None

    @property
    def open_resources(self) -> BulkRedis[R]:
        """The bulk form: ``Processor(open_resources=store.open_resources)``, for many keys with few operations each.

        One message loads the resources of all ready batches, and another saves them (one to each node of a cluster).
        Keys that operations across keys connect are loaded and saved by one script: all of them or none. It caches
        nothing (``reuse_resource``).

        Switches: no.
        """
        from geventbatch.stores.redis._bulk import BulkRedis

        return BulkRedis(self, self._resources)

    def normalize_key(self, key: Hashable) -> str:
        """Return *key* as text, so that ``42`` and ``"42"`` are one. Switches: no.

        Raises:
            TypeError: It is no str, int, UUID or bytes.
            ImpossibleKey: It has no UTF-8 form.
        """
        if isinstance(key, str):
            text = str.__str__(key)  # an Enum may have a text of its own
        elif isinstance(key, bytes):
            text = bytes(key).decode(errors="surrogateescape")
        elif isinstance(key, int) and not isinstance(key, bool):
            text = int.__repr__(key)
        elif isinstance(key, UUID):
            text = UUID.__str__(key)
        else:
            raise TypeError(
                f"the key {shown(key)} is a {type(key).__name__}; a RedisStore takes str, int, UUID and bytes"
            )
        try:
            text.encode(errors="surrogateescape")
        except UnicodeEncodeError as error:
            told = f"the key {shown(key)} has no UTF-8 form, so it is no key in Redis: {said(error)}"
            raise ImpossibleKey(told, key=key) from error
        return text

    def check_outcomes(self, key: Hashable) -> None:
        """Raise a `ValueError` if a cluster can keep no outcomes beside the resource at *key*. Switches: no."""
        name = self._resources.name(self.normalize_key(key))
        if isinstance(self._resources.server, Cluster) and b"}" in name and not has_tag(name):
            raise ValueError(
                f"the key {shown(key)} is {shown(name)} in Redis: a cluster can keep no outcomes of operations with an "
                "idempotency key beside it, since it has a } outside of a hash tag; nothing was run. Make keys "
                "without a }, or with a hash tag, as in {tag}rest"
            )

    def stopped(self) -> None:
        """Drop the cached resources, when the processor has stopped. Switches: no."""
        if self._kept is not None:
            self._kept.clear()


# -- options --------------------------------------------------------------------------------------------------


def _check_client(client: object) -> None:
    if not isinstance(client, (Redis, RedisCluster)):
        raise TypeError(
            f"client is {named(client)}, but must be a redis.Redis (redis.Redis.from_url(url)) or a redis.RedisCluster"
        )


def _milliseconds(option: str, ttl: object) -> int | None:
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
        raise TypeError(f"{option} is {shown(ttl)}, but must be seconds or None")
    if not 0 < ttl < inf:
        raise ValueError(f"{option} is {shown(ttl)}, but must be more than 0 seconds, and finite, or None")
    return max(1, round(min(ttl, _LONGEST) * 1000))
