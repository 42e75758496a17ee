"""`Processor`, the public face of the library; and `stop_all`."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar, TypeVarTuple, Unpack, overload
from weakref import ref

from geventbatch._check_values import check_flag, check_seconds, refuse_unnamed
from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._core.dispatcher import Dispatcher
from geventbatch._core.run import BaseProcessor
from geventbatch._for_mypyc import defined_by
from geventbatch._options import check_options, shows_options
from geventbatch._watch import setup_problems
from geventbatch._watch.metrics import MetricSubscription, Watcher
from geventbatch._watch.stats import LiveBatch, ProcessorStats, live_batch, stats_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    from geventbatch._options import OptionTypes


R = TypeVar("R")
T = TypeVar("T")
Args = TypeVarTuple("Args")

if TYPE_CHECKING:
    _ScopeOfMany = AbstractContextManager[Mapping[Any, R | Exception], Any]


class Processor(BaseProcessor, Generic[R]):
    """Runs together all the operations that arrive for one key.

    It loads the resource once, applies every operation in memory one after the other, saves once, and answers every
    caller. Every option is a keyword, and optional. As a context manager, it stops on exit.

    Args:
        open_resource: ``open_resource(key)`` returns a context manager. Entering loads and returns the resource.
            Leaving saves. Leaving with an exception rolls back.
        load_resource: ``load_resource(key)`` returns the resource; None by default. With *save_resource*, it takes the
            place of *open_resource*.
        save_resource: ``save_resource(key, resource)`` saves it. By default it does nothing.
        open_resources: ``open_resources(keys)``, for many keys at once, returns a context manager. Entering loads and
            returns a dict of keys and resources. A key that is not in it is missing; an exception in place of a
            resource is the error of the load of that key alone. Before leaving, the library takes the keys out of the
            dict of which nothing is to be saved. Leaving saves the others, and raises `PartlySaved` for keys that were
            not saved.
        load_resources: ``load_resources(keys)`` returns that dict. With *save_resources*, it takes the place of
            *open_resources*.
        save_resources: ``save_resources(resources)`` saves that dict.
        compares: Whether the save of a pair compares the resource with the loaded state, and raises `Conflict` if it
            has changed meanwhile. If it does not, and more than one worker process serves, a warning says that one
            process may write over the changes of another. (Stores compare or lock by themselves.)
        max_bulk: Keys in one bulk, of the keys that a worker finds ready; by default 100.
        min_duration: The window: seconds for which a batch takes operations at least. 0 is natural batching: no wait;
            operations that arrive while a batch saves form the next one.
        max_duration: Seconds that a batch may take from its start; more than *min_duration*. By default twice the
            window, or 1.0 for a window under 0.1.
        workers: The number of queue shards, each with its own worker greenlets; by default 16 × CPUs, or 1 for bulks,
            since a bulk is taken from one shard.
        worker_number_for_key: ``worker_number_for_key(key, workers)`` returns the number of the shard, from 0 to
            ``workers - 1``.
        max_attempts: The most attempts of a batch whose saves raise `Conflict`.
        clean_errors: Errors by which an operation promises that it has left the resource untouched: a promise for
            speed. After any other error, the operation's changes are undone.
        recorded_errors: Errors of an operation that are recorded under its idempotency key, and raised again if the
            operation is sent again.
        copy_resource: ``copy_resource(resource)`` returns a copy, to undo an operation that raised, of a resource whose
            scope has no ``restore`` of its own; by default `copy.deepcopy`. None means that it cannot be copied: then
            each operation that raises costs a load. (A scope written by hand keeps its own object, so that is restored
            in place: by default with all that it holds, with a function of your own only the object itself.)
        max_batches: Batches running at once; a bulk counts as one.
        max_batch_size: Operations in one batch.
        max_pending: Operations admitted, not answered and not withdrawn; more are refused with `ProcessorOverloaded`.
        max_blocking_time: Seconds for which a load, an operation or a save may keep the hub without a yield. Longer
            ones are logged, once for each place; None turns that off. (It does not work with gevent's libuv loop.)
        name: Its name in metrics, traces and the page; by default the name of the function that loads.
        batching: False is the off-switch: each `run` loads, applies and saves by itself in its caller's own greenlet
            or thread. Settable at any time.

    Raises:
        TypeError: An option is of a wrong type.
        ValueError: An option is out of range.
    Switches: no; it starts no greenlet and no timer.
    """

    @overload
    def __init__(
        self, *, open_resource: Callable[[Any], AbstractContextManager[R, Any]], **options: Unpack[OptionTypes]
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        load_resource: Callable[[Any], R],
        save_resource: Callable[[Any, R], object] = ...,
        compares: bool = ...,
        **options: Unpack[OptionTypes],
    ) -> None: ...

    @overload
    def __init__(
        self, *, open_resources: Callable[[list[Any]], _ScopeOfMany[R]], **options: Unpack[OptionTypes]
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        load_resources: Callable[[list[Any]], Mapping[Any, R | Exception]],
        save_resources: Callable[[dict[Any, R]], object],
        compares: bool = ...,
        **options: Unpack[OptionTypes],
    ) -> None: ...

    @overload
    def __init__(
        self: Processor[None], *, save_resource: Callable[[Any, None], object] = ..., **options: Unpack[OptionTypes]
    ) -> None: ...

    @shows_options()
    def __init__(self, *unnamed: object, **options: Any) -> None:
        """See the class."""
        if unnamed:
            refuse_unnamed(*unnamed)
        self._options = check_options(**options)
        self._subscriptions: list[ref[Watcher]] = []
        # -- mutable state ---------------------------------------------------------------------------------
        self._batching = self._options.batching
        self._dispatcher = Dispatcher(self._options, self._subscriptions)
        process.made.append(ref(self, process.made.remove))
        for watch in process.watchers:
            watch(self)
        setup_problems.warn_of(self)

    def __repr__(self) -> str:
        """Return its state on one line."""
        off = "" if self._batching else ", batching off"
        return f"<Processor: {self._current()!r}{off}>"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop, and wait for the end. Switches: yes."""
        self.stop()

    @property
    def batching(self) -> bool:
        """True if operations are batched; False is the off-switch. Operations that were admitted end as they began."""
        return self._batching

    @batching.setter
    def batching(self, on: bool) -> None:
        check_flag("batching", on)
        self._batching = on

    @defined_by(BaseProcessor.run)
    def run(  # noqa: PLR0913 - every option is a keyword
        self,
        key: Hashable,
        operation: Callable[[R, Unpack[Args]], T],
        /,
        *args: *Args,
        start_timeout: float | None = None,
        idempotency_key: str | None = None,
        identified_by: tuple[object, ...] | None = None,
        read_only: bool = False,
    ) -> T:
        """Apply *operation* to the resource at *key* and wait until its batch is saved.

        Args:
            key: Any hashable that equals itself; equal keys are one.
            operation: Called as ``operation(resource, *args)``. It changes the resource in place. It may run more than
                once, so it depends on nothing but the resource and its arguments, and changes nothing else.
            *args: Its arguments. Keyword arguments go into the operation: ``functools.partial(operation, seat=12)``.
            start_timeout: Seconds to wait for the operation to start; None waits for ever.
            idempotency_key: 1 to 255 visible ASCII characters, for a store that records outcomes. If an operation was
                saved under it on this key, in any process, it is not applied again, and its outcome is returned once
                more. A lambda cannot have one.
            identified_by: With an *idempotency_key*, the values that the client sends again, in place of *args*. They
                tell whether the idempotency key was used for something else. So *args* may be new each time, such as an
                id or the time of day. A tuple of plain values; None takes *args*.
            read_only: Whether *operation* changes nothing. A batch whose completed operations all are read-only is not
                saved. If such an operation changes something, that is saved only with another operation of its batch.

        Returns:
            The return value of *operation*.

        Raises:
            Exception: The error of *operation*, unwrapped.
            ProcessorStopped: `stop` was called before. Safe to run again elsewhere.
            ProcessorOverloaded: ``max_pending`` operations wait already. Safe to run again later.
            OperationCancelled: It never started. Safe to run again.
            IdempotencyKeyReused: The idempotency key was used for something else.
            LoadFailed: Loading raised. Safe to run again.
            SaveFailed: Saving raised. Safe to run again only if ``retry_safe``.
            BatchTimeout: ``max_duration`` passed. Safe to run again only if ``retry_safe``.
            BatchAborted: A worker or an operation was killed. Safe to run again only if ``retry_safe``.
            TypeError: An argument is of a wrong type; or, with an *idempotency_key*, the store records no outcomes, or
                the operation's arguments or outcome cannot be recorded.
            ValueError: An argument is out of range.
            RuntimeError: Called in the hub, in another thread, or inside a batch of the same processor.
        Switches: yes, until the batch has ended.
        """
        raise NotImplementedError  # the code is BaseProcessor.run, in _core/run.py

    @defined_by(BaseProcessor.run_across)
    def run_across(  # noqa: PLR0913 - every option is a keyword
        self,
        keys: Iterable[Hashable],
        operation: Callable[[tuple[R, ...], Unpack[Args]], T],
        /,
        *args: *Args,
        start_timeout: float | None = None,
        idempotency_key: str | None = None,
        identified_by: tuple[object, ...] | None = None,
        read_only: bool = False,
    ) -> T:
        """Apply *operation* to the resources at all of *keys*, which are saved together or not at all (guarantee 21).

        What `run` promises for one key holds for all of them together. The operation waits for all its keys, and what
        comes later on any of them waits for it. It has no window of its own, and may end one early.

        Args:
            keys: One key or more, and ``max_bulk`` at the most; each once.
            operation: Called as ``operation(resources, *args)`` with a tuple of resources in the order of *keys*. It
                changes them in place, and may run more than once, as in `run`.
            *args: Its arguments. Keyword arguments go into the operation: ``functools.partial(operation, seat=12)``.
            start_timeout: Seconds to wait for the operation to start; None waits for ever.
            idempotency_key: As in `run`.
            identified_by: As in `run`.
            read_only: Whether *operation* changes nothing.

        Returns:
            The return value of *operation*.

        Raises:
            Exception: The error of *operation*, unwrapped: nothing has changed at any key.
            OperationCancelled: It never started; ``.key`` is the key that it has waited for. Safe to run again.
            LoadFailed: Loading one of the keys (``.key``) raised. Safe to run again.
            BatchError: Any other error of `run`; ``.keys`` has all keys.
            TypeError: An argument is of a wrong type; or the processor opens one key at a time by a pair or scope by
                hand, or the ``open_resources`` of it, or of its store, does not say that it saves all or nothing.
            ValueError: There is no key, a key twice, or more than ``max_bulk``; or an argument is out of range.
            RuntimeError: Called in the hub, in another thread, or inside a batch of the same processor.
        Switches: yes, until all is saved.
        """
        raise NotImplementedError

    def stop(self, timeout: float | None = None) -> bool:
        """Admit no more operations, close the open windows, and wait until all admitted operations are answered.

        It may be called more than once, also from several greenlets at once. With ``timeout=0`` it may be called from
        anywhere: the hub, a signal handler, an operation.

        Args:
            timeout: Seconds to wait; None waits for ever. Batches that have not ended by then still end by themselves.

        Returns:
            True if everything has ended: nothing runs any more.

        Raises:
            RuntimeError: Called in another thread; or, with a *timeout* other than 0, in the hub or inside a batch of
                this processor: then the stop has begun all the same.
            TypeError: *timeout* is no number.
            ValueError: *timeout* is negative, infinite or NaN.
        Switches: yes, until everything has ended or *timeout* has passed; never with ``timeout=0``.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        dispatcher = self._current()
        if self._batching or dispatcher.shards:
            process.check_thread("stop")
        dispatcher.begin_stop()
        if timeout == 0:
            return dispatcher.stopped.is_set()
        if process.in_hub() or process.is_waited_for(dispatcher):
            raise RuntimeError(
                "stop() has begun, but cannot wait here for its end, inside a batch or in the hub: call "
                "stop(timeout=0) here, or stop() in a greenlet of its own"
            )
        return _wait_for_stop(dispatcher, timeout)

    @property
    def name(self) -> str:
        """Its name in metrics, traces and the page: the option, or else the name of the function that loads."""
        return self._options.name

    def stats(self) -> ProcessorStats:
        """Return its counters in this process. Switches: no. Any thread may call: then they are approximate."""
        return stats_of(self._current())

    def live_batches(self) -> list[LiveBatch]:
        """Return its live batches, for each key in the order they opened.

        In another thread than the one of the first `run`, only unbatched operations are returned.

        Switches: no.
        """
        return [live_batch(batch) for batch in self._current().batches()]

    def subscribe_batch_metrics(self) -> MetricSubscription:
        """Return an iterator over the `BatchMetric` of every batch that ends from now on.

        When the processor has stopped, it ends after the last metric. A slow reader never delays a batch: it misses
        metrics, and ``missed`` counts them.

        Switches: no; its iteration does.
        """
        metrics = MetricSubscription()
        self._watch(metrics)
        return metrics

    def _watch(self, watcher: Watcher) -> None:
        """Show *watcher* every batch that ends from now on. Only a weak reference to it is held."""
        self._subscriptions.append(ref(watcher, self._subscriptions.remove))
        if self._current().ended:
            watcher.close()


def _wait_for_stop(dispatcher: Dispatcher, timeout: float | None) -> bool:
    deadline = inf if timeout is None else _clock.monotonic() + timeout
    # Unbatched operations may run in other threads, which cannot reliably wake this thread's hub.
    while dispatcher.alone and (left := deadline - _clock.monotonic()) > 0:
        process.sleep(min(left, 0.01))
        dispatcher.check_stopped()
    if dispatcher.stopped.is_set():
        return True
    return dispatcher.stopped.wait(_left(deadline))


def stop_all(timeout: float | None = None) -> bool:
    """Stop every processor of this process, as `Processor.stop` does: for the end of a server's worker.

    All begin to stop at once, and are waited for together.

    Args:
        timeout: Seconds to wait for all of them; None waits for ever.

    Returns:
        True if everything has ended: nothing runs any more.

    Raises:
        RuntimeError: The first one from a `Processor.stop`; the other processors were stopped all the same.
        TypeError: *timeout* is no number.
        ValueError: *timeout* is negative, infinite or NaN.
    Switches: yes, until everything has ended or *timeout* has passed; never with ``timeout=0``.
    """
    if timeout is not None:
        check_seconds("timeout", timeout)
    deadline = inf if timeout is None else _clock.monotonic() + timeout
    processors = process.processors()
    ended, refused = _stop_each(processors, 0)
    if timeout != 0:
        ended, refused = _stop_each(processors, deadline)
    for error in refused:
        raise error
    return ended


def _stop_each(processors: list[Processor[Any]], deadline: float) -> tuple[bool, list[RuntimeError]]:
    """Stop all *processors*. Return whether all have ended, and the errors of those that cannot be waited for here."""
    ended, refused = True, []
    for processor in processors:
        try:
            ended = processor.stop(_left(deadline)) and ended
        except RuntimeError as error:
            refused.append(error)
    return ended, refused


def _left(deadline: float) -> float | None:
    return None if deadline == inf else max(0.0, deadline - _clock.monotonic())
