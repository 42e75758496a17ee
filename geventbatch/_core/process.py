"""What belongs to the operating-system process, and not to one processor.

- A fork is noticed (guarantee 12): `here.epoch` counts the forks that led to this process. What was born in another
  epoch is the parent's, and does nothing here: it is parked.
- The library's greenlets live in one thread (guarantee 13): that of the process's first batched `run`.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final, NoReturn, final

import gevent
from gevent import monkey
from gevent._hub_local import get_hub_if_exists
from gevent.hub import Hub

from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from weakref import ref

    from greenlet import greenlet

    from geventbatch._core.attempt import Attempt
    from geventbatch._core.batch import Batch
    from geventbatch._core.dispatcher import Dispatcher
    from geventbatch._processor import Processor


class _NoHub:
    """Stands for the hub before the first batched run: after a fork, what the parent had scheduled asks for it too."""

    @property
    def loop(self) -> Any:
        return gevent.get_hub().loop


_NO_HUB: Final = _NoHub()


@final
class Here:
    """What a fork changes."""

    __slots__ = ("epoch", "forked_late", "hub", "pid", "thread")

    def __init__(self) -> None:
        self.epoch = 0
        """How many forks lie between the first process and this one."""
        self.pid = os.getpid()
        self.forked_late = False
        """Whether this process, or one that led to it, was forked from one that had run batches."""
        self.thread: int | None = None
        """The native identity of the thread of the first batched `run` in this process."""
        self.hub: Any = _NO_HUB
        """The hub of that thread, as the last batched run has seen it: to ask gevent costs a batch 1 % each time.
        Never None, which is the parent of a thread's main greenlet."""


here: Final = Here()
"""Of this process. An object, and not names of this module, which compiled code would look up each time."""

running: Final[dict[greenlet, Attempt]] = {}
"""The attempt that each greenlet is in the middle of: its load, an operation, its save."""

made: Final[list[ref[Processor[Any]]]] = []
"""The processors. A list, since any thread may add to it or take from it in one step."""

watchers: Final[list[Callable[[Processor[Any]], object]]] = []
"""Called with each processor that is made: for what watches all of them, and for tests."""

after: Final[dict[greenlet, Attempt]] = {}
"""The attempt whose scopes each greenlet lets finish, after the answers. It is inside of it only for `stop`."""

# Under monkey-patching the plain name tells greenlets apart, and not threads.
native_thread: Callable[[], int] = monkey.get_original("_thread", "get_ident")

# Of the thread, and not of the greenlet. An identity alone is no proof: a later thread may have that of one that ended.
_ours: Any = monkey.get_original("_thread", "_local")()

_native_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")

_after_fork: list[Callable[[], None]] = []

_at_first_run: list[Callable[[], object]] = []


def after_fork(callback: Callable[[], None]) -> None:
    """Have *callback* called in every child right after a fork: no I/O there, no kill, no switch."""
    _after_fork.append(callback)


def at_first_run(callback: Callable[[], object]) -> None:
    """Have *callback* called at the first batched `run` of every process, in its greenlet. It must not switch."""
    _at_first_run.append(callback)


def _forked() -> None:
    if here.pid == os.getpid():  # we were told before
        return
    here.pid = os.getpid()
    here.epoch += 1
    here.forked_late = here.forked_late or here.thread is not None
    here.hub, here.thread = _NO_HUB, None
    running.clear()
    after.clear()
    for callback in _after_fork:
        callback()


os.register_at_fork(after_in_child=_forked)


class _ToldFirst(logging.Handler):
    """No handler of any logger's: `logging` tells all that there are of a fork, in the child.

    It does so before those are called who registered since it was imported. One of them may switch: to ask for its
    resource anew, OpenTelemetry's SDK waits for a thread. Greenlets of the parent's run then, within `os.fork`.
    """

    def __init__(self) -> None:
        # That is what makes it one to tell. A whole handler would be taken off a list as the interpreter ends, when
        # `logging` is not there any more.
        self.createLock()

    def _at_fork_reinit(self) -> None:
        _forked()


_told_first: Final = _ToldFirst()


def processors() -> list[Processor[Any]]:
    """Give the processors that live in this process, those that its parent made before the fork included."""
    return [processor for held in tuple(made) if (processor := held()) is not None]


def park() -> NoReturn:
    """Never go on: this greenlet is the parent's, and only its memory was inherited.

    Ending it instead would run clean-up of the user's on sockets that the parent still uses. Nobody wakes it.
    """
    hub = gevent.get_hub()
    while True:
        hub.switch()


def has_hub() -> bool:
    """Whether greenlets live in this thread: its hub is there, or the first wait of patched code will make it."""
    return get_hub_if_exists() is not None or monkey.is_module_patched("socket")


def sleep(seconds: float) -> None:
    """Wait, without making a hub in a thread that has none. Switches: yes."""
    (gevent.sleep if has_hub() else _native_sleep)(seconds)


def enclosing(dispatcher: Dispatcher) -> Batch | None:
    """The batch of the processor that the current greenlet is inside of, if any."""
    return _of(dispatcher, running.get(gevent.getcurrent()))


def is_waited_for(dispatcher: Dispatcher) -> bool:
    """Whether a stop of the processor waits for the current greenlet, so that this cannot wait for the stop."""
    return enclosing(dispatcher) is not None or _of(dispatcher, after.get(gevent.getcurrent())) is not None


def _of(dispatcher: Dispatcher, attempt: Attempt | None) -> Batch | None:
    while attempt is not None:
        if attempt.dispatcher is dispatcher:
            return attempt.batch
        attempt = attempt.outer
    return None


def in_hub() -> bool:
    """Whether the caller runs in the hub, where nothing may block."""
    return isinstance(gevent.getcurrent(), Hub)


def check_place(dispatcher: Dispatcher) -> None:
    """Raise the `RuntimeError` that says why a batched `run` cannot be called here; the first one takes the thread."""
    check_not_inside(dispatcher)
    if here.thread is None:
        here.thread = native_thread()
        _ours.epoch = here.epoch
        _begin(list(_at_first_run))
    check_thread("run")
    here.hub = gevent.get_hub()


def _begin(callbacks: list[Callable[[], object]]) -> None:
    """Call all of them, also when one raises: it may warn where warnings are errors."""
    if callbacks:
        try:
            callbacks[0]()
        finally:
            _begin(callbacks[1:])


def check_not_inside(dispatcher: Dispatcher) -> None:
    """Raise where `run` could only wait for itself: in the hub, and inside a batch of the processor (13, 14)."""
    if in_hub():
        msg = "run() was called in gevent's hub, where nothing may block: call it from a greenlet (gevent.spawn)"
        raise RuntimeError(msg)
    inside = enclosing(dispatcher)
    if inside is not None:
        raise RuntimeError(
            f"run() was called inside a batch of the same processor (key {shown(inside.key)}), which would wait for "
            "itself: call it after the batch, or make the change inside this operation"
        )


def in_thread() -> bool:
    """Whether this is the thread that the library's greenlets live in, if they live anywhere yet."""
    return here.thread is None or getattr(_ours, "epoch", None) == here.epoch


def check_thread(method: str) -> None:
    """Raise when this is not the thread that the library's greenlets live in."""
    if not in_thread():
        raise RuntimeError(
            f"{method}() was called from another thread than the first run() of this process; greenlets belong to one "
            "thread: call it there, or construct the processor with batching=False, which works in any thread"
        )
