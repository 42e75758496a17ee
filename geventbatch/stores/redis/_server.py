"""Connections of redis-py's pools: a script is sent on one of them once, and the wait for its answer is bounded."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import cache
from inspect import Parameter, signature
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final, cast

import gevent
import redis.client
from redis.crc import key_slot
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from geventbatch._safe_repr import said
from geventbatch.errors import NotSaved
from geventbatch.stores._give_back import give_back
from geventbatch.stores.redis._idle import is_watched, release, take_idle
from geventbatch.stores.redis._scripts import LOAD, LOAD_OUTCOMES, LOAD_TOGETHER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from redis import Redis, RedisCluster

    from geventbatch import Batch

PART: Final = 0.75
"""The part of the remaining time that one question may take, so that another can follow."""


def load_command(names: list[bytes]) -> tuple[Any, ...]:
    """Return the command that loads *names* at one moment."""
    return ("EVAL", LOAD if len(names) == 1 else LOAD_TOGETHER, len(names), *names)


class Server:
    """One server, or the primary of a sentinel."""

    def __init__(self, client: Redis | RedisCluster) -> None:
        self._client: Any = client  # the driver's types lack the methods used here

    def __repr__(self) -> str:
        return repr(self._client)

    def load(self, name: bytes) -> tuple[bytes | None, bytes | None, bytes | None]:
        value, version, saves = cast("list[bytes | None]", self._ask(("EVAL", LOAD, 1, name)))
        return value, version, saves

    def load_all(self, names: list[bytes]) -> list[Any]:
        """Load *names* at one moment; return the values of each, or the error as bytes or an exception."""
        if len(names) == 1:
            return [self.load(names[0])]
        return cast("list[Any]", self._ask(load_command(names)))

    def load_outcomes(self, names: list[bytes]) -> list[bytes | None]:
        return cast("list[bytes | None]", self._ask(("EVAL", LOAD_OUTCOMES, len(names), *names)))

    def _ask(self, command: tuple[Any, ...]) -> object:
        """Return the answer to *command*, which writes nothing, so that it may be repeated.

        Do what the client does, at half of its cost, unless it does anything else: a subclass, a client of one
        connection, one that is traced or watched.
        """
        client = self._client
        if not _goes_straight(client):
            return client.execute_command(*command, NEVER_DECODE=True)
        pool = client.connection_pool
        connection = take_idle(pool) or take_connection(pool)
        try:
            told: object = connection.retry.call_with_retry(
                lambda: answer(connection, command), lambda _: connection.disconnect()
            )
            return told
        finally:
            release(pool, connection)

    def slot_of(self, _name: bytes, /) -> int | None:
        """Return the slot of a cluster that a name lies in; None without a cluster."""
        return None

    def pool_of(self, _name: bytes, /) -> Any:
        return self._client.connection_pool

    def pool_at(self, _host: str, _port: int, /) -> Any:
        return None

    def look_again(self, _name: bytes, /) -> None:
        """Do nothing: the pool connects anew to the present server."""


class Cluster(Server):
    """A cluster, of which the primary of the key's slot is asked."""

    def slot_of(self, name: bytes, /) -> int | None:
        return key_slot(name)

    def pool_of(self, name: bytes, /) -> Any:
        return self._pool(self._client.get_node_from_key(name))

    def pool_at(self, host: str, port: int, /) -> Any:
        host, port = self._client.nodes_manager.remap_host_port(host, port)
        return self._pool(self._client.get_node(host=host, port=port))

    def look_again(self, name: bytes, /) -> None:
        """Make the client ask all nodes, as it does when its own does not answer."""
        with suppress(RedisError, RedisClusterException):
            self.load(name)

    def _pool(self, node: Any) -> Any:
        return None if node is None else self._client.get_redis_connection(node).connection_pool


_EXECUTE: Final = getattr(redis.Redis, "execute_command", None)
_SINCE: Final = 6
"""The version of the driver that first repeated commands as `Server._ask` does."""
_IS_ITS_OWN: Final = redis.VERSION[0] >= _SINCE and (
    type(_EXECUTE) is FunctionType and _EXECUTE.__globals__ is vars(redis.client)
)
"""True if nothing stood before the driver's `execute_command` when it was imported, as a tracer does."""


def _goes_straight(client: Any) -> bool:
    """Return whether *client* takes a connection, sends, and repeats, and does nothing else with a command."""
    execute = client.execute_command
    return (
        _IS_ITS_OWN
        and type(execute) is MethodType
        and execute.__func__ is _EXECUTE
        and client.connection is None
        and not is_watched()
    )


@contextmanager
def lent(pool: Any, seconds: float, batch: Batch, what: str) -> Iterator[Any]:
    """Lend a connection that waits at most *seconds* for an answer; return it unchanged, or closed."""
    connection = _taken(pool, seconds, batch, what)
    try:
        _bound(connection, seconds)
        yield connection
    except ResponseError:
        raise
    except BaseException:
        # Perhaps in the middle of an answer. Newer drivers have closed it already.
        give_back(batch.key, connection.disconnect, saved=None)
        raise
    finally:
        give_back(batch.key, _release, pool, connection, saved=None)


def _release(pool: Any, connection: Any) -> None:
    _bound(connection, None)
    release(pool, connection)


def _taken(pool: Any, seconds: float, batch: Batch, what: str) -> Any:
    if (idle := take_idle(pool)) is not None:
        return idle
    # The driver retries a connect, perhaps for too long; nothing has been sent by then. An unbatched operation may be
    # in a thread without a hub, or in one that blocks, where a timer does not work.
    timer = None if batch.alone else gevent.Timeout.start_new(seconds)
    try:
        return take_connection(pool)
    except gevent.Timeout as error:
        if error is not timer:
            raise
        raise NotSaved(f"no connection to Redis in {seconds:.3f} s: {what} was not saved") from None
    except RedisError as error:
        raise NotSaved(f"no connection to Redis, {what} was not saved: {said(error)}") from error
    finally:
        if timer is not None:
            timer.close()


def take_connection(pool: Any) -> Any:
    return pool.get_connection("EVAL") if _is_told_commands(type(pool).get_connection) else pool.get_connection()


@cache
def _is_told_commands(get_connection: Callable[..., Any]) -> bool:
    """Return whether the pool takes the name of a command, as before redis-py 5.3."""
    parameters = list(signature(get_connection).parameters.values())[1:]
    return any(one.kind is Parameter.POSITIONAL_OR_KEYWORD and one.default is Parameter.empty for one in parameters)


def answer(connection: Any, command: tuple[object, ...]) -> object:
    connection = getattr(connection, "_conn", connection)  # of a client with a cache, which keeps no answers to scripts
    connection.send_packed_command((_packed(command),))
    return cast("object", connection.read_response(disable_decoding=True))


def _packed(command: tuple[object, ...]) -> bytes:
    """Return the message of *command*: as the driver packs it, which takes three times as long."""
    parts = [b"*%d\r\n" % len(command)]
    for one in command:
        text = one if type(one) is bytes else str(one).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(text), text))
    return b"".join(parts)


def exchange(pool: Any, commands: dict[str, tuple[Any, ...]], batch: Batch) -> dict[str, Any]:
    """Send all commands on one connection; return each answer, or the error in its place."""
    answers: dict[str, Any] = {}
    seconds = batch.remaining() * PART
    try:
        with lent(pool, seconds, batch, f"{len(commands)} keys") as connection:
            connection.send_packed_command([b"".join(map(_packed, commands.values()))])
            for key in commands:
                try:
                    answers[key] = connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    answers[key] = error
    except (RedisError, NotSaved) as error:
        answers |= {key: error for key in commands if key not in answers}
    return answers


def _bound(connection: Any, seconds: float | None) -> None:
    """Bound the wait for an answer to *seconds*; None: to the client's own bound.

    The driver offers no other way: its ``socket_timeout`` counts from the connect.
    """
    connection = getattr(connection, "_conn", connection)  # of a client with a cache
    of_client = connection.socket_timeout
    if seconds is None or (of_client is not None and of_client < seconds):
        seconds = of_client
    socket = getattr(connection, "_sock", None)
    if socket is not None:
        socket.settimeout(seconds)
