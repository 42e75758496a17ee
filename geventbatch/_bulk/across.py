"""`Processor.run_across`: the door, and the admission of an operation to the queues of all its keys."""

from __future__ import annotations

from contextvars import copy_context
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

from gevent import getcurrent
from gevent.event import AsyncResult
from gevent.exceptions import InvalidSwitchError
from gevent.hub import Waiter

from geventbatch._bulk.component import Component
from geventbatch._bulk.crossing import Crossing, Place
from geventbatch._check_values import check_flag, check_identity, check_key, check_seconds, refuse_key
from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._core.operation import WAITING, Operation, ReadOnly
from geventbatch._core.process import here, running
from geventbatch._core.run import given, wait
from geventbatch._safe_repr import shown
from geventbatch._unbatched import run_batch_alone
from geventbatch._values.answers import PLAIN
from geventbatch._values.arguments import repeatable

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from geventbatch._core.dispatcher import Dispatcher
    from geventbatch._core.key_queue import KeyQueue
    from geventbatch._options import Options


def run_across(  # noqa: PLR0913 - all that `Processor.run_across` is given
    dispatcher: Dispatcher,
    keys: Any,
    operation: Any,
    args: tuple[Any, ...],
    *,
    batching: bool,
    start_timeout: Any,
    idempotency_key: Any,
    identified_by: Any,
    read_only: Any,
) -> Any:
    """Do what `Processor.run_across` says."""
    options = dispatcher.options
    _check_form(options)
    for one in args if type(operation) is FunctionType else given(operation, args):
        if type(one) not in PLAIN:
            operation = repeatable(operation, args)
            break
    if start_timeout is not None:
        check_seconds("start_timeout", start_timeout)
    named = _check_keys(keys, options)
    once: Any = None
    if idempotency_key is not None:
        operation = once = options.once(named, idempotency_key, operation, args, identified_by, across=True)
    elif identified_by is not None:
        check_identity(identified_by)
    check_flag("read_only", read_only)
    admitted: Operation[Any] = ReadOnly() if read_only else Operation()
    admitted.callable, admitted.args = operation, args
    admitted.context = copy_context()  # as it is now (guarantee 11)
    admitted.state, admitted.error = WAITING, None
    door = dispatcher.door
    if door is not None:
        named, batching = door.enter_across(named, admitted, batching=batching)
    if options.across.check_keys is not None:
        options.across.check_keys(named)
    if once is not None:
        once.go_across(named)
    if not batching:
        return _run_alone(dispatcher, named, admitted, start_timeout)
    crossing = _admit(dispatcher, named, admitted, Gate if start_timeout is None else AsyncResult)
    wait(crossing, admitted, start_timeout)
    return crossing.answer(admitted)


_ANSWERED: Final = object()
"""Tells a gate's own switch from another one. (A gate that has it for a caller that has left is no cycle.)"""


class Gate(Waiter):  # type: ignore[type-arg]  # it takes none at run time
    """Wakes the one caller of an operation: it is lighter than an `AsyncResult`, for which many may wait."""

    __slots__ = ()

    def set(self) -> None:
        """Let the caller go on, at once; do nothing if it has left. Call it in the hub."""
        self.switch(_ANSWERED)

    def wait(self) -> None:
        """Wait for `set`. Raise if anything else switches to the caller. Switches: yes."""
        if self.get() is not _ANSWERED:
            raise InvalidSwitchError("the caller of an operation was switched to before it had its answer")


# -- the door -----------------------------------------------------------------------------------------------------


def _check_form(options: Options) -> None:
    """Raise unless the processor opens many keys at once, and saves all of them or nothing."""
    if options.open_across is None:
        why = options.why_not_across
        raise TypeError(
            f"run_across() needs a store that saves many keys at once, all or nothing, and that of {options.name} does "
            + ("not: " if why is None else f"not (its open_resources raised {shown(why)}): ")
            + "make the processor with a store that has such an open_resources, or with an open_resources=… of your own"
        ) from why
    if options.across.all_or_nothing is not True:
        raise TypeError(
            f"run_across() needs an open_resources that saves all of its keys or nothing, and that of {options.name} "
            "does not say that it does: if it saves in one transaction, give it the attribute all_or_nothing = True "
            "(see geventbatch.scopes.AllOrNothing; of a pair, save_resources has it)"
        )


def _check_keys(keys: Any, options: Options) -> tuple[Any, ...]:
    if isinstance(keys, (str, bytes, bytearray)):  # its characters would be taken for keys
        raise TypeError(f"keys is {shown(keys)}, but must be a list of keys, as in [{shown(keys)}]")
    if isinstance(keys, (set, frozenset)):  # the operation gets its resources in the order of its keys
        raise TypeError(f"keys is {shown(keys)}, which has no order: pass a list, in the order of the resources")
    try:
        named = tuple(keys)
    except TypeError:
        raise TypeError(f"keys is {shown(keys)}, but must be an iterable of keys, such as a list") from None
    if not named:
        raise ValueError("keys has no key: name at least one")
    if len(named) > options.max_bulk:
        raise ValueError(
            f"keys has {len(named)} keys, but max_bulk is {options.max_bulk}: an operation's keys must fit into one "
            "bulk; give the processor a higher max_bulk, or the operation fewer keys"
        )
    return named


def _refuse_twice(key: Hashable) -> None:
    raise ValueError(f"keys has the key {shown(key)} twice: name each key once")


# -- batching off -------------------------------------------------------------------------------------------------


def _run_alone(
    dispatcher: Dispatcher, named: tuple[Any, ...], operation: Operation[Any], start_timeout: float | None
) -> Any:
    process.check_not_inside(dispatcher, "run_across")
    seen: set[Any] = set()
    for key in named:
        check_key(key)
        if key in seen:
            _refuse_twice(key)
        seen.add(key)
    return run_batch_alone(Crossing(dispatcher, named, _clock.monotonic(), []), operation, start_timeout)


# -- admission ----------------------------------------------------------------------------------------------------


def _admit(
    dispatcher: Dispatcher, named: tuple[Any, ...], operation: Operation[Any], gate: Callable[[], Any]
) -> Crossing:
    """Put *operation* into the queues of all its keys, with a *gate* for its caller: see `Dispatcher.admit`."""
    current = getcurrent()
    if current.parent is not here.hub or current in running:  # as in `BaseProcessor.run`
        process.check_place(dispatcher, "run_across")
    operation.group = gate()  # only now: in a thread without a hub it would make one
    if dispatcher.stopping:
        dispatcher.refuse(named)
    key_queues = _find(dispatcher, named)
    # No switch from here.
    dispatcher.pending += 1
    most = dispatcher.max_pending
    if dispatcher.stopping or (most is not None and dispatcher.pending + len(dispatcher.alone) > most):
        dispatcher.pending -= 1
        _discard(dispatcher, key_queues)
        dispatcher.refuse(named)
    now = _clock.monotonic()
    if now >= dispatcher.counts.next_sample:
        dispatcher.counts.sample(now)
    crossing = Crossing(dispatcher, tuple([one.key for one in key_queues]), now, key_queues)
    component = _component_of(key_queues)
    crossing.enter(operation)
    if component is not None:
        component.take_in(crossing)
    elif not crossing.blocked:
        dispatcher.put_across(crossing, key_queues[-1])
    return crossing


def _find(dispatcher: Dispatcher, named: tuple[Any, ...]) -> list[KeyQueue]:
    """Return the key queues of *named*, none of which was retired while others were looked up."""
    found: list[KeyQueue] = []
    every: list[KeyQueue] = []  # those of earlier rounds, of which some are empty if it raises
    try:
        while not _are_live(found):
            every += found
            found = []
            for key in named:
                try:
                    hashed: object = hash(key)
                except TypeError as error:
                    refuse_key(key, error)
                found.append(dispatcher.find_key_queue(key, hashed))
        if len({*found}) < len(found):
            _refuse_twice(next(one.key for place, one in enumerate(found) if one in found[:place]))
    except BaseException:
        _discard(dispatcher, every + found)
        raise
    return found


def _are_live(key_queues: list[KeyQueue]) -> bool:
    for key_queue in key_queues:
        if key_queue.retired:
            return False
    return bool(key_queues)


def _discard(dispatcher: Dispatcher, key_queues: list[KeyQueue]) -> None:
    for key_queue in key_queues:
        dispatcher.discard(key_queue)


def _component_of(key_queues: list[KeyQueue]) -> Component | None:
    """Return the component that loads all of *key_queues*, if nothing waits behind it and it takes another crossing."""
    found: Component | None = None
    for key_queue in key_queues:
        last = key_queue.last
        if last is None:
            return None
        its = last.crossing if type(last) is Place else last
        component = None if its is None or its.attempt is None else its.attempt.batch
        if type(component) is not Component or (found is not None and component is not found):
            return None
        found = component
    return found if found is not None and found.takes(key_queues) else None
