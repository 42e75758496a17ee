"""`Processor.run`, apart from `Processor` so that it can be compiled."""

from __future__ import annotations

from contextvars import copy_context
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.exceptions import InvalidSwitchError

from geventbatch._check_values import check_callable, check_flag, check_identity, check_seconds
from geventbatch._core import process
from geventbatch._core.dispatcher import Dispatcher
from geventbatch._core.operation import WAITING, Operation, ReadOnly
from geventbatch._core.process import here, running, unforked
from geventbatch._for_mypyc import mypyc_attr
from geventbatch._unbatched import run_alone
from geventbatch._values.answers import PLAIN
from geventbatch._values.arguments import repeatable

if TYPE_CHECKING:
    from collections.abc import Hashable
    from typing import NoReturn
    from weakref import ref

    from gevent.event import AsyncResult

    from geventbatch._core.batch import Batch
    from geventbatch._options import Options
    from geventbatch._watch.metrics import Watcher


_getcurrent: Final = gevent.getcurrent

_PLAIN: Final = PLAIN
_NO_ERROR: Final[BaseException | None] = None
"""None, declared as an error: after a bare None, mypyc takes `error` for None even if the operation has raised."""

_across: Final[list[Any]] = []
"""The function behind `run_across`, once it was called: an import in each call would cost it 0.5 us."""

_copy_context: Final = copy_context  # compiled code would look up an imported name each time


@mypyc_attr(allow_interpreted_subclasses=True)  # `Processor`, and subclasses of the user's
class BaseProcessor:
    """The part of `Processor` that has to be quick.

    It is not generic: mypyc never clears the weak references to an object of a generic class, and processors have weak
    references.
    """

    _options: Options
    _subscriptions: list[ref[Watcher]]
    _batching: bool
    _dispatcher: Dispatcher

    def run(  # noqa: C901, PLR0912, PLR0913 - the hot path stays in one piece: a call more costs each operation 50 ns
        self,
        key: Hashable,
        operation: Any,
        /,
        *args: Any,
        # Any, since compiled code would check narrower types by itself, with a poorer message.
        start_timeout: Any = None,
        idempotency_key: Any = None,
        identified_by: Any = None,
        read_only: Any = False,
    ) -> Any:
        """Do what `Processor.run` says."""
        dispatcher = self._dispatcher
        if not unforked or dispatcher.epoch != here.epoch:
            dispatcher = self._current()
        for one in args if type(operation) is FunctionType else given(operation, args):
            if type(one) not in _PLAIN:
                operation = repeatable(operation, args)
                break
        if start_timeout is not None:
            check_seconds("start_timeout", start_timeout)
        if idempotency_key is not None:
            operation = self._options.once(key, idempotency_key, operation, args, identified_by)
        elif identified_by is not None:
            check_identity(identified_by)
        if read_only is not False:
            check_flag("read_only", read_only)
        admitted: Operation[Any] = ReadOnly() if read_only else Operation()
        admitted.callable = operation
        admitted.args = args
        admitted.context = _copy_context()  # as it is now (guarantee 11)
        admitted.state = WAITING
        admitted.error = _NO_ERROR
        batching = self._batching
        door = dispatcher.door
        if door is not None:
            key, batching = door.enter(key, admitted, batching=batching)
        if not batching:
            return run_alone(dispatcher, key, admitted, start_timeout)
        current = _getcurrent()
        # A child of our hub is in our thread, and is not the hub. Any other greenlet is checked in full.
        if current.parent is not here.hub or current in running:
            process.check_place(dispatcher)
        batch = dispatcher.admit(key, admitted)
        group = admitted.group  # set by `Batch.add`
        if read_only:
            batch.reads += 1
        try:
            # Woken by `Batch.end`, on every path. If we leave, the batch goes on, and our link to the group is gone.
            if start_timeout is None:
                # What `group.wait()` does, in less time, and with a kilobyte less of C stack to keep for each caller.
                group.rawlink(current.switch)
                if here.hub.switch() is not group:
                    _refuse_switch()
            else:
                _wait_from_start(batch, admitted, group, start_timeout)
        except BaseException:
            group.unlink(current.switch)
            batch.withdraw(admitted)
            raise
        if dispatcher.epoch != here.epoch:
            process.park()
        if batch.failure is None and admitted.error is None:
            return admitted.value
        return batch.answer(admitted)

    def run_across(  # noqa: PLR0913 - every option is a keyword
        self,
        keys: Any,
        operation: Any,
        /,
        *args: Any,
        start_timeout: Any = None,
        idempotency_key: Any = None,
        identified_by: Any = None,
        read_only: Any = False,
    ) -> Any:
        """Do what `Processor.run_across` says."""
        if not _across:
            from geventbatch._bulk.across import run_across  # here, since most processors never do

            _across.append(run_across)
        return _across[0](
            self._current(),
            keys,
            operation,
            args,
            batching=self._batching,
            start_timeout=start_timeout,
            idempotency_key=idempotency_key,
            identified_by=identified_by,
            read_only=read_only,
        )

    def _current(self) -> Dispatcher:
        """Return the dispatcher of this process, also if nobody has told of a fork."""
        if not unforked:
            process.notice_fork()
        dispatcher = self._dispatcher
        if dispatcher.epoch != here.epoch:
            dispatcher = self._dispatcher = Dispatcher(self._options, self._subscriptions, stopping=dispatcher.stopping)
            if dispatcher.stopping:
                dispatcher.check_stopped()
        return dispatcher


def given(operation: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of *operation*, a partial's own included. Raise unless it can be called."""
    check_callable("operation", operation)
    return (*operation.args, *operation.keywords.values(), *args) if type(operation) is partial else args


def wait(batch: Batch, operation: Operation[Any], start_timeout: float | None) -> None:
    """Wait until *batch* has answered *operation*: what `BaseProcessor.run` does without a call. Switches: yes."""
    try:
        if start_timeout is None:
            operation.group.wait()
        else:
            _wait_from_start(batch, operation, operation.group, start_timeout)
    except BaseException:
        batch.withdraw(operation)
        raise
    if batch.dispatcher.epoch != here.epoch:
        process.park()


def _refuse_switch() -> NoReturn:
    raise InvalidSwitchError("the caller of an operation was switched to before it had its answer")


def _wait_from_start(batch: Batch, operation: Operation[Any], group: AsyncResult[None], seconds: float) -> None:
    # Check `ready()` before the second wait. If the result is already set, gevent queues a new waiter behind those not
    # yet notified, and loses it if the last of those is killed or times out at that moment.
    group.wait(seconds)
    if operation.state == WAITING and not batch.ended:
        process.leave_to_parent(batch.dispatcher)
        raise batch.cancel(operation, seconds)
    if not group.ready():
        group.wait()
