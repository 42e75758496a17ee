"""State of the operating-system process: forks, the one thread with batches, and which greenlet runs which attempt.

- A fork is noticed (guarantee 12): `here.epoch` counts the forks that led to this process. A batch or greenlet of
  another epoch is the parent's. It does nothing here: it is parked.
- The library's greenlets live in one thread (guarantee 13): the thread of the process's first batched `run`.
"""

from __future__ import annotations

import logging
import os
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
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
    """Stands for the hub before the first batched `run`. After a fork, callbacks of the parent's ask for it too."""

    @property
    def loop(self) -> Any:
        return gevent.get_hub().loop

    def switch(self) -> Any:
        return gevent.get_hub().switch()


_NO_HUB: Final = _NoHub()


@final
class Here:
    """State that a fork changes."""

    __slots__ = ("epoch", "forked_late", "hub", "pid", "thread")

    def __init__(self) -> None:
        self.epoch = 0
        """The number of forks between the first process and this one."""
        self.pid = os.getpid()
        self.forked_late = False
        """True if this process, or one of its ancestors, was forked from a process that had run batches."""
        self.thread: int | None = None
        """The native identity of the thread of the first batched `run` in this process."""
        self.hub: Any = _NO_HUB
        """The hub of that thread at the last batched `run`: to ask gevent costs a batch 1 % each time.
        Never None, which is the parent of a thread's main greenlet."""


here: Final = Here()
"""The state of this process. It is an object since compiled code would look up names of this module each time."""


class _ByNumber:
    """True in the process whose number is known, and not in its child."""

    value = True  # set in vain, as that of a flag in memory is not

    def __bool__(self) -> bool:
        return here.pid == os.getpid()


def _wiped_by_forks() -> Any:
    """Return a flag in memory that is true until the kernel wipes it, as it does in a child, whoever forks."""
    try:
        from _ctypes import _SimpleCData  # `ctypes` itself takes 2 ms to import

        c_bool: Any = type("c_bool", (_SimpleCData,), {"_type_": "?"})
        page = mmap(-1, PAGESIZE, MAP_PRIVATE | MAP_ANONYMOUS)
        page.madvise(_WIPE_ON_FORK)
        return c_bool.from_buffer(page)
    except (ImportError, OSError):  # no Linux, or not a whole one
        return _ByNumber()


_WIPE_ON_FORK: Final = 18
"""``MADV_WIPEONFORK`` of Linux. Python has no name for it."""

unforked: Final[Any] = _wiped_by_forks()
"""False in a child of a fork that was not noticed yet. To ask for the process's number costs five times as much."""
unforked.value = True

running: Final[dict[greenlet, Attempt]] = {}
"""By greenlet: the attempt that it is in the middle of, in a load, an operation or a save."""

made: Final[list[ref[Processor[Any]]]] = []
"""The processors. A list, since any thread may add to it or take from it in one step."""

watchers: Final[list[Callable[[Processor[Any]], object]]] = []
"""Functions to call with each processor that is made: for exporters that watch all of them, and for tests."""

after: Final[dict[greenlet, Attempt]] = {}
"""By greenlet: the attempt whose hooks it calls after the answers. Only `stop` counts it as inside that attempt."""

# Under monkey-patching the plain name tells greenlets apart, and not threads.
native_thread: Callable[[], int] = monkey.get_original("_thread", "get_ident")

# Local to the thread, not to the greenlet. A thread identity is no proof: a later thread may reuse it.
_ours: Any = monkey.get_original("_thread", "_local")()

_native_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")

_after_fork: list[Callable[[], None]] = []

_at_first_run: list[Callable[[], object]] = []


def after_fork(callback: Callable[[], None]) -> None:
    """Register *callback*, to be called in every child right after a fork: it must not do I/O, kill or switch."""
    _after_fork.append(callback)


def at_first_run(callback: Callable[[], object]) -> None:
    """Register *callback* for the first batched `run` of each process, in its greenlet. It must not switch."""
    _at_first_run.append(callback)


def notice_fork() -> None:
    """Begin anew if this process is a child of the one that called last. Switches: no.

    Servers that fork in C, such as uWSGI, call none of the callbacks below: their children come here where `unforked`
    is asked.
    """
    pid = os.getpid()
    if here.pid == pid and unforked:  # the first process of each namespace of Linux has the number 1
        return
    here.pid = pid
    unforked.value = True
    here.epoch += 1
    here.forked_late = here.forked_late or here.thread is not None
    here.hub, here.thread = _NO_HUB, None
    running.clear()
    after.clear()
    for callback in _after_fork:
        callback()


os.register_at_fork(after_in_child=notice_fork)


class _ToldFirst(logging.Handler):
    """Not a real log handler: `logging` re-initialises every handler in a forked child, so it tells us of the fork.

    It does so before the at-fork callbacks that were registered after it was imported. One of these may switch: to
    compute its resource anew, OpenTelemetry's SDK waits for a thread. Then greenlets of the parent's run, inside
    `os.fork`.
    """

    def __init__(self) -> None:
        # This alone registers the handler. `Handler.__init__` would also put it on a list, and take it off when the
        # interpreter ends, when `logging` is gone.
        self.createLock()

    def _at_fork_reinit(self) -> None:
        notice_fork()


_told_first: Final = _ToldFirst()


def processors() -> list[Processor[Any]]:
    """Return the processors of this process, including those that its parent made before the fork."""
    return [processor for held in tuple(made) if (processor := held()) is not None]


def park() -> NoReturn:
    """Wait for ever: this greenlet is the parent's, and only its memory was inherited by the fork.

    If it ended instead, clean-up code of the user's would run on sockets that the parent still uses.
    """
    hub = gevent.get_hub()
    while True:
        hub.switch()


def leave_to_parent(dispatcher: Dispatcher) -> None:
    """Notice a fork of which nobody has told. In the child, never return if *dispatcher* is the parent's."""
    notice_fork()
    if dispatcher.epoch != here.epoch:
        park()


def has_hub() -> bool:
    """Return whether this thread has a hub, or will get one at the first wait of patched code."""
    return get_hub_if_exists() is not None or monkey.is_module_patched("socket")


def sleep(seconds: float) -> None:
    """Sleep for so many *seconds*, without making a hub in a thread that has none. Switches: yes."""
    (gevent.sleep if has_hub() else _native_sleep)(seconds)


def enclosing(dispatcher: Dispatcher) -> Batch | None:
    """Return the batch of the processor that the current greenlet is inside, or None."""
    return _of(dispatcher, running.get(gevent.getcurrent()))


def is_waited_for(dispatcher: Dispatcher) -> bool:
    """Return whether a stop of the processor waits for the current greenlet, which thus cannot wait for the stop."""
    return enclosing(dispatcher) is not None or _of(dispatcher, after.get(gevent.getcurrent())) is not None


def _of(dispatcher: Dispatcher, attempt: Attempt | None) -> Batch | None:
    while attempt is not None:
        if attempt.dispatcher is dispatcher:
            return attempt.batch
        attempt = attempt.outer
    return None


def in_hub() -> bool:
    """Return whether the caller runs in the hub, where nothing may block."""
    return isinstance(gevent.getcurrent(), Hub)


def check_place(dispatcher: Dispatcher, method: str = "run") -> None:
    """Raise a `RuntimeError` if a batched `run` cannot be called here. The first one claims the thread."""
    check_not_inside(dispatcher, method)
    if here.thread is None:
        here.thread = native_thread()
        _ours.epoch = here.epoch
        _begin(list(_at_first_run))
    check_thread(method)
    here.hub = gevent.get_hub()


def _begin(callbacks: list[Callable[[], object]]) -> None:
    """Call all *callbacks*, also if one raises, as a warning does where warnings are errors."""
    if callbacks:
        try:
            callbacks[0]()
        finally:
            _begin(callbacks[1:])


def check_not_inside(dispatcher: Dispatcher, method: str = "run") -> None:
    """Raise if *method* would wait for itself: in the hub, or inside a batch of the processor (guarantees 13, 14)."""
    if in_hub():
        raise RuntimeError(
            f"{method}() was called in gevent's hub, where nothing may block: call it from a greenlet (gevent.spawn)"
        )
    inside = enclosing(dispatcher)
    if inside is not None:
        raise RuntimeError(
            f"{method}() was called inside a batch of the same processor (key {shown(inside.key)}), which would wait "
            "for itself. Nothing was run: call it after the batch, or make the change inside this operation"
        )


def in_thread() -> bool:
    """Return whether this thread has the library's greenlets. Before the first batched `run`, every thread may."""
    return here.thread is None or getattr(_ours, "epoch", None) == here.epoch


def check_thread(method: str) -> None:
    """Raise if this is not the thread that the library's greenlets live in; *method* is for the message."""
    if not in_thread():
        raise RuntimeError(
            f"{method}() was called from another thread than the first run() of this process; greenlets belong to one "
            "thread: call it there, or construct the processor with batching=False, which works in any thread"
        )
