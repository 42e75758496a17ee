"""Huey consumers on gevent: a script in place of ``huey_consumer``, which neither patches nor ends well.

    from gevent import monkey

    monkey.patch_all()

    from geventbatch.integrations.huey import consume
    from jobs import huey

    consume(huey, workers=100)

At TERM, the running tasks finish, and the consumer ends. At HUP, they finish, and it starts anew, patched. Signals that
come meanwhile cut nothing short. Before the consumer ends, every admitted operation is saved, even if no task waits for
it. At INT, Huey interrupts the running tasks and drops them: what they had started is saved, and nothing else of them
happens. When it starts, the garbage collector leaves out what it has loaded (``GEVENTBATCH_FREEZE=0`` in the
environment refuses).
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Final

from gevent import monkey
from huey.consumer import Consumer

from geventbatch import stop_all
from geventbatch.integrations._collector import freeze_loaded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huey.api import Huey

__all__ = ["consume"]

_log: Final = logging.getLogger("geventbatch")


def consume(huey: Huey, *, workers: int = 100, **options: Any) -> None:
    """Run the tasks of *huey* in greenlets until a signal ends the consumer; then stop all processors.

    Every batch ends by its ``max_duration``, so that wait has no other limit.

    Args:
        huey: It must have been made after gevent had patched.
        workers: How many tasks may run at once.
        options: More options of Huey's ``Consumer``, such as ``shutdown_timeout``: the seconds after which it
            interrupts tasks that still run, and drops them. By default, it waits for them.

    Raises:
        RuntimeError: gevent has not patched, or only after *huey* was made.
        TypeError: Huey's ``Consumer`` has no such option, or it is one that is decided here.
    Switches: yes.
    """
    _check_patched(huey)
    for hook in huey._shutdown.values():  # noqa: SLF001 - Huey has no other way to see its hooks
        if "stop_all" in _names_in(hook):
            _log.warning(
                "%s, a hook of @huey.on_shutdown, stops processors. Huey calls it as each of its workers ends: the "
                "first idle one would stop them for all tasks that still run. Remove it: consume() stops them at the "
                "end",
                getattr(hook, "__qualname__", hook),
            )
    _Consumer(huey, workers=workers, worker_type="greenlet", graceful_signal="TERM", **options).run()


class _Consumer(Consumer):  # type: ignore[misc]  # Huey has no types
    """A consumer that stops all processors when its workers have ended, before it restarts too."""

    _signum: Any

    def start(self) -> None:
        super().start()
        freeze_loaded()

    def stop(self, graceful: bool = False) -> None:  # noqa: FBT001, FBT002 - Huey's signature
        super().stop(graceful)
        stop_all()
        if self._restart:
            # Huey runs the restarted program with these, which for "python -m" lack the option.
            sys.argv = sys.orig_argv[1:]

    def _handle_signal(self, signum: Any, frame: object) -> None:
        """Obey the first signal. A later one can do no more than keep the consumer from starting anew.

        At a second TERM, Huey would raise KeyboardInterrupt in whatever greenlet is running, be it in the middle of a
        batch, and drop all tasks; and HUP would have it start anew though it was told to end.
        """
        del frame
        restart, graceful = self._signal_actions[signum]
        if self._signum is None:
            self._signum, self._restart, self._graceful = signum, restart, graceful
        elif not restart:
            self._restart = False


def _check_patched(huey: Huey) -> None:
    mend = "Call gevent.monkey.patch_all() in the first lines of the script, before anything else is imported."
    if not (monkey.is_module_patched("socket") and monkey.is_module_patched("threading")):
        raise RuntimeError(f"gevent has not patched: a task that waits would block all other tasks. {mend}")
    native = tuple(type(monkey.get_original("_thread", name)()) for name in ("allocate_lock", "RLock", "_local"))
    late = [name for name, found in _parts(huey.storage) if isinstance(found, native)]
    if late:
        raise RuntimeError(
            f"gevent has patched after {huey!r} was made: {', '.join(late)} of its storage are made for threads, and "
            f"would not keep tasks apart, or block them all. {mend}"
        )


def _parts(storage: Any) -> Iterator[tuple[str, Any]]:
    """Return what a storage and its pool of connections hold, with a name for each."""
    for name, found in vars(storage).items():
        yield name, found
        if name == "pool":
            yield from ((f"pool.{inner}", one) for inner, one in vars(found).items())


def _names_in(hook: Any) -> tuple[str, ...]:
    """Return the names that the code of *hook* mentions, and its own."""
    function = getattr(hook, "func", hook)  # of a functools.partial
    names: tuple[str, ...] = getattr(getattr(function, "__code__", None), "co_names", ())
    return (*names, getattr(function, "__name__", ""))
