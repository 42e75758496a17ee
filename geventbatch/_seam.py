"""Where tests get between a processor and its store: around the function that opens its resources."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from geventbatch import _process
from geventbatch._options import reopened
from geventbatch._processor import Processor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.integrations.flask import AppProcessor

    AnyProcessor: TypeAlias = Processor[Any] | AppProcessor[Any]


class Around:
    """An ``open_resource``, or an ``open_resources``, around another one."""

    def __init__(self, inner: Callable[[Any], Any]) -> None:
        """Wrap *inner*."""
        self._inner = inner

    def __call__(self, asked: Any) -> Any:
        """Open the resource at a key, or those at some keys."""
        return self._inner(asked)

    def __getattr__(self, name: str) -> Any:
        """Be whatever else the other one is: a store may normalise keys, among other things."""
        return getattr(self._inner, name)


@contextmanager
def each_of(
    given: tuple[AnyProcessor, ...], block: Callable[[Processor[Any]], AbstractContextManager[None]]
) -> Iterator[None]:
    """Enter *block* for each of the processors that were named, and leave it when ours ends. Raises `TypeError`.

    When none was named: for all of this process, those too that are made inside.
    """
    with ExitStack() as stack:

        def enter(processor: Processor[Any]) -> None:
            stack.enter_context(block(processor))

        for processor in map(the_processor, given) if given else _process.processors():
            enter(processor)
        if given:
            yield
            return
        _process.watchers.append(enter)
        try:
            yield
        finally:
            _process.watchers.remove(enter)


def the_processor(given: AnyProcessor) -> Processor[Any]:
    """Give the processor; that of the application at hand, if it was declared for any. Raises `TypeError`."""
    if isinstance(given, Processor):
        return given
    for_app = getattr(given, "for_app", None)
    found = None if for_app is None else for_app()
    if not isinstance(found, Processor):
        raise TypeError(f"processor is {given!r}, but must be a Processor")
    return found


@contextmanager
def around_scopes(processor: Processor[Any], around: Callable[[Any], Around]) -> Iterator[None]:
    """Have *processor* open its resources by what *around* makes of the function that did, until the block ends.

    A scope that was opened before ends as it began. Blocks are left in the reverse order of entering.
    """
    before = processor._options  # noqa: SLF001 - this is the one place that reaches into a processor
    processor._use(reopened(before, around))  # noqa: SLF001
    try:
        yield
    finally:
        processor._use(before)  # noqa: SLF001
