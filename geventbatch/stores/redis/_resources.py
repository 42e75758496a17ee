"""The common part of a Redis store's scopes: names, encodings, and how long a value lives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from redis.exceptions import RedisClusterException, RedisError, ResponseError

from geventbatch._safe_repr import said, shown
from geventbatch.errors import CannotUndo, NotSaved, Rejected, Repeated, ResourceMissing, recorded_already
from geventbatch.scopes import OutcomeName
from geventbatch.stores import _json
from geventbatch.stores._reuse import outdated
from geventbatch.stores.redis._names import outcome_name, outcome_name_across
from geventbatch.stores.redis._save import Change, Recorded, Save, State
from geventbatch.stores.redis._scripts import TRACE_MILLISECONDS
from geventbatch.stores.redis._server import Server, exchange, load_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from geventbatch import Batch
    from geventbatch.stores._missing import Making
    from geventbatch.stores._reuse import Kept

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Resources(Generic[R]):
    """The common part of one store's scopes."""

    server: Server
    prefix: bytes
    encode: Callable[[R], str | bytes]
    decode: Callable[[bytes], R]
    check: Callable[[Any], None] | None
    """Raises an error that names the parts of a resource that its encoding loses."""
    missing: Literal["raise"] | Making
    milliseconds: int | None
    """How long a resource lives after its last change; None: its expiry is left alone."""
    outcome_milliseconds: int | None
    """How long an outcome is kept; None: none is recorded."""
    kept: Kept[State] | None

    def take(self, key: str) -> State | None:
        """Take the cached state of *key*, if there is one."""
        return None if self.kept is None else self.kept.take(key)

    def keep(self, key: str, state: State) -> None:
        """Cache *state*; not without a token, since a hash that is made anew may look the same."""
        if self.kept is not None and state.value is not None and state.saves:
            self.kept.put(key, state)

    def load(self, key: str) -> State:
        """Return the state of the hash of *key*."""
        found = self.server.load(self.name(key))
        return State.of(key, *found)

    def resource_of(self, key: str, state: State) -> R:
        """Return the decoded resource, or a new one if there is no value."""
        if state.value is not None:
            try:
                return self.decode(state.value)
            except Exception as error:
                raise ValueError(
                    f"the value of {shown(key)} in Redis cannot be decoded: {type(error).__name__}: {said(error)}"
                ) from error
        if self.missing != "raise":
            made: R = self.missing(key)
            return made
        raise ResourceMissing(f"there is no {shown(key)} in Redis", key=key)

    def checkpoint(self, key: str, loaded: State, resource: R) -> tuple[Callable[[Any], R], bytes | State]:
        """Return a function and its argument, which make *resource* as it is now. Raises `CannotUndo`."""
        if self.check is not None:
            try:
                return _json.unpacked, _json.packed(resource)
            except ValueError:  # some of it is lost by encoding, or cannot be encoded
                pass
        try:
            value = self.encoded(key, resource, loaded.value)
            return partial(self.made_again, key), loaded._replace(value=value)
        except Rejected as error:  # the save tells the operation that is to blame
            raise CannotUndo(f"{shown(key)} cannot be copied: {error.__cause__}") from error

    def made_again(self, key: str, state: State, held: object = None) -> R:
        """Decode the resource again, or make it again, in place of *held*. Raises `CannotUndo`."""
        try:
            made = self.resource_of(key, state)
            if state.value is None and self.missing != "raise":
                self.missing.check(made, held, key)
            return made
        except Exception as error:
            raise CannotUndo(f"{shown(key)} cannot be made once more as it was: {said(error)}") from error

    def save(self, key: str, loaded: State, resource: R, batch: Batch) -> State:
        """Write the batch's value, if it has changed, and outcomes; return the new state."""
        try:
            value = self.value_of(key, loaded, resource, batch)
        except Rejected:
            self.refuse_repeated(batch, key)
            raise
        if value == loaded.value and not batch.outcomes:
            return loaded
        save = Save(self.server, [self.change(key, loaded, value)], batch, self.to_record(batch, key))
        save.write()
        return save.written[0]

    def refuse_repeated(self, batch: Batch, key: str) -> None:
        """Raise `Repeated` if outcomes are recorded: a repeated operation is not judged by the present state."""
        if batch.outcomes:
            try:
                found = self.recorded(batch.outcomes, key)
            except (RedisError, RedisClusterException, ValueError) as error:
                raise NotSaved(f"{shown(key)} was not saved, nothing was written: {said(error)}") from error
            if found:
                raise Repeated(f"{shown(key)} was not saved: {recorded_already(found)}", outcomes=found)

    def value_of(self, key: str, loaded: State, resource: R, batch: Batch) -> bytes | None:
        """Return the batch's value of the resource; None if it is to be deleted."""
        if not batch.completed:
            return loaded.value
        return None if key in batch.deleted_keys else self.encoded(key, resource, loaded.value)

    def load_all(self, groups: Iterable[list[str]], batch: Batch) -> dict[str, State | Exception]:
        """Return the state of each key, or the error of its load. The keys of a group are loaded at one moment."""
        by_first = {group[0]: (group, [self.name(key) for key in group]) for group in groups}
        commands = {first: load_command(names) for first, (_, names) in by_first.items()}
        found: dict[str, State | Exception] = {}
        for first, answer in self._exchange(commands, batch).items():
            group, names = by_first[first]
            answers: Any = answer if len(group) > 1 else [answer]
            if isinstance(answer, Exception):
                try:
                    # By itself: the client retries, and finds out where a key has moved to.
                    answers = self.server.load_all(names)
                except Exception as error:
                    answers = [error] * len(group)
            found |= {key: _state_of(key, told) for key, told in zip(group, answers, strict=True)}
        return found

    def save_all(self, saves: dict[str, Save], batch: Batch) -> dict[str, Exception]:
        """Carry out *saves*, of which each has the place of its first key; return the errors of the others."""
        failed: dict[str, Exception] = {}
        for key, answer in self._exchange({key: save.command() for key, save in saves.items()}, batch).items():
            try:
                saves[key].understand(answer)
            except Exception as error:
                failed[key] = error
        return failed

    def change(self, key: str, loaded: State, value: bytes | None) -> Change:
        """Return what a save does to the hash of *key*, which is to have *value*."""
        return Change(key, self.name(key), loaded, value, self._lives(loaded, value))

    def _exchange(self, commands: dict[str, tuple[Any, ...]], batch: Batch) -> dict[str, Any]:
        """Send each node its commands as one message, once; return the answers, or errors in their place."""
        answers: dict[str, Any] = {}
        by_pool: dict[int, tuple[Any, dict[str, tuple[Any, ...]]]] = {}
        for key, command in commands.items():
            try:
                pool = self.server.pool_of(self.name(key))
            except (RedisError, RedisClusterException) as error:
                answers[key] = NotSaved(f"no node for {shown(key)}, it was not saved: {said(error)}")
            else:
                by_pool.setdefault(id(pool), (pool, {}))[1][key] = command
        for pool, some in by_pool.values():
            answers |= exchange(pool, some, batch)
        return answers

    def compare(self, key: str, kept: State) -> None:
        """Raise a `Conflict` unless the hash is as it was cached."""
        try:
            there = self.load(key)
        except (RedisError, RedisClusterException, ValueError) as error:
            raise NotSaved(f"{shown(key)} cannot be compared: {said(error)}") from error
        if there != kept:
            raise outdated(key)

    def recorded(self, idempotency_keys: Iterable[str], key: str) -> dict[str, str]:
        """Return the recorded outcomes of operations with *idempotency_keys*: at *key*, unless these are names."""
        wanted = {one: self._outcome_name(one, key) for one in idempotency_keys}
        by_slot: dict[int | None, list[str]] = {}
        for one, name in wanted.items():
            by_slot.setdefault(self.server.slot_of(name), []).append(one)
        found: dict[str, str] = {}
        for some in by_slot.values():
            told = self.server.load_outcomes([wanted[one] for one in some])
            found |= {one: text.decode() for one, text in zip(some, told, strict=True) if text}
        return found

    def to_record(self, batch: Batch, key: str) -> Recorded | None:
        """Return what a save of *batch* at *key* records."""
        kept = batch.outcomes
        if not kept:
            return None
        names = {one: self._outcome_name(one, key) for one in kept}
        return Recorded(names, list(kept.values()), self.outcome_milliseconds or 0)

    def _outcome_name(self, asked: str, key: str) -> bytes:
        """Return the name in Redis of the outcome that *asked* stands for: an idempotency key, or an `OutcomeName`."""
        if not isinstance(asked, OutcomeName):
            return outcome_name(self.name(key), asked.encode())
        names: list[bytes] = [self.name(one) for one in asked.keys]
        idempotency_key = asked.idempotency_key.encode()
        return outcome_name_across(names, idempotency_key) if asked.across else outcome_name(names[0], idempotency_key)

    def check_slot(self, keys: tuple[str, ...]) -> None:
        """Raise a `ValueError` if one script cannot save all *keys*, since they lie in several slots of a cluster."""
        slots = {self.server.slot_of(self.name(key)): key for key in reversed(keys)}
        if len(slots) > 1:
            (one, first), (other, second), *_ = reversed(slots.items())
            raise ValueError(
                f"the keys {shown(first)} and {shown(second)} cannot be in one operation: in the cluster they are "
                f"{shown(self.name(first))} in slot {one} and {shown(self.name(second))} in slot {other}, which no "
                "script saves together; nothing was run. Give keys that operations connect a common hash tag, as in "
                "'{bank}Ann' and '{bank}shop', or the store a prefix with one"
            )

    def name(self, key: Any) -> bytes:
        """Return the name of the hash of *key*, a str."""
        text: str = key
        return self.prefix + text.encode(errors="surrogateescape")

    def encoded(self, key: str, resource: R, last: bytes | None) -> bytes:
        """Return the value of *resource*, which was *last* before."""
        try:
            made = self.encode(resource)
            value = made.encode() if isinstance(made, str) else bytes(memoryview(made))
            if self.check is not None and value != last:
                self.check(resource)
            return value
        except Exception as error:
            raise Rejected(f"{shown(key)} cannot be encoded any more, nothing was saved: {said(error)}") from error

    def _lives(self, loaded: State, value: bytes | None) -> str | int:
        if value is None:
            return TRACE_MILLISECONDS
        if self.milliseconds is not None:
            return self.milliseconds
        return 0 if loaded.is_trace() else ""


def _state_of(key: str, told: Any) -> State | Exception:
    """Return the state of *key* that a load has *told*, or its error."""
    if isinstance(told, Exception):
        return told
    if isinstance(told, bytes):
        return ResponseError(told.decode(errors="replace"))
    try:
        return State.of(key, *told)
    except ValueError as error:
        return error
