"""Callers whose answers are kept, and threads that gevent knows nothing of."""

from collections.abc import Callable
from typing import Any

from gevent.monkey import get_original

_start_thread: Any = get_original("_thread", "start_new_thread")
_new_lock: Any = get_original("_thread", "allocate_lock")


def answer_of(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Give what *call* returned, or the exception that it raised."""
    try:
        return call(*args, **options)
    except BaseException as error:
        return error


def in_a_thread(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Give the answer of *call* in a thread of its own; the hub of this thread stands still until then."""
    answers: list[Any] = []
    ended = _new_lock()
    ended.acquire()

    def thread() -> None:
        try:
            answers.append(answer_of(call, *args, **options))
        finally:
            ended.release()

    _start_thread(thread, ())
    assert ended.acquire(True, 30), "the thread has not ended within 30 s"
    return answers[0]
