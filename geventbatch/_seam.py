"""The one way by which our integrations and `geventbatch.testing` reach into a processor."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from geventbatch._core import process
from geventbatch._options import observed, reopened
from geventbatch._processor import Processor
from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch._core.dispatcher import Dispatcher
    from geventbatch._core.operation import Operation
    from geventbatch._options import Options
    from geventbatch._watch.metrics import Watcher
    from geventbatch._wrapper import Around
    from geventbatch.integrations.flask import AppProcessor

    AnyProcessor: TypeAlias = Processor[Any] | AppProcessor[Any]


def options_of(processor: Processor[Any]) -> Options:
    """Return the options of *processor*."""
    return processor._options


def dispatcher_of(processor: Processor[Any]) -> Dispatcher:
    """Return the dispatcher of *processor* in this process; after a fork it is another one."""
    return processor._current()


def watch(processor: Processor[Any], watcher: Watcher) -> None:
    """Show *watcher* every batch of *processor* that ends from now on. Only a weak reference to it is held."""
    processor._watch(watcher)


# -- observers of operations ------------------------------------------------------------------------------------


def add_observer(processor: Processor[Any], see: Callable[[Operation[Any]], object]) -> None:
    """Call *see* with each operation from now on; it may replace the callable of the operation."""
    options = processor._options
    _use(processor, observed(options, (*options.observers, see)))


def remove_observer(processor: Processor[Any], see: Callable[[Operation[Any]], object]) -> None:
    """Call *see* no more."""
    options = processor._options
    _use(processor, observed(options, tuple(one for one in options.observers if one != see)))


@contextmanager
def observing(processor: Processor[Any], see: Callable[[Operation[Any]], object]) -> Iterator[None]:
    """Call *see* with each operation, before other observers, until the block ends."""
    options = processor._options
    _use(processor, observed(options, (see, *options.observers)))
    try:
        yield
    finally:
        remove_observer(processor, see)


# -- between a processor and its store --------------------------------------------------------------------------


@contextmanager
def each_of(
    given: tuple[AnyProcessor, ...], block: Callable[[Processor[Any]], AbstractContextManager[None]]
) -> Iterator[None]:
    """Enter *block* for each processor in *given*, until our own block ends. Raise a `TypeError` for other objects.

    Without any: for all processors of this process, and for each that is made inside the block.
    """
    with ExitStack() as stack:

        def enter(processor: Processor[Any]) -> None:
            stack.enter_context(block(processor))

        for processor in map(the_processor, given) if given else process.processors():
            enter(processor)
        if given:
            yield
            return
        process.watchers.append(enter)
        try:
            yield
        finally:
            process.watchers.remove(enter)


def the_processor(given: AnyProcessor) -> Processor[Any]:
    """Return the processor; if it was declared for any application, the current one's. Raise a `TypeError` if none."""
    if isinstance(given, Processor):
        return given
    for_app = getattr(given, "for_app", None)
    found = None if for_app is None else for_app()
    if not isinstance(found, Processor):
        raise TypeError(f"processor is {shown(given)}, but must be a Processor")
    return found


@contextmanager
def around_scopes(
    processor: Processor[Any], around: Callable[[Any], Around], around_many: Callable[[Any], Around]
) -> Iterator[None]:
    """Wrap what opens the resources of *processor* by these, one key or many at a time, until the block ends.

    A scope that was opened before ends as it began. Blocks must be left in the reverse order of entering.
    """
    before = processor._options
    _use(processor, reopened(before, around, around_many))
    try:
        yield
    finally:
        _use(processor, observed(before, processor._options.observers))


def _use(processor: Processor[Any], options: Options) -> None:
    """Use *options* from now on, which differ from the former ones only in how resources are opened, or observed."""
    processor._options = options
    processor._current().use(options)
