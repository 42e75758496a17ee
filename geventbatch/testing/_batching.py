"""Batching off for a while."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from geventbatch.testing._seam import processors_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch.testing._seam import AnyProcessor


@contextmanager
def batching_off(*processors: AnyProcessor) -> Iterator[None]:
    """Set ``batching=False`` on *processors* until the block ends; on all that this process has when none is named.

    `Processor.run` then loads, applies and saves in its caller's own greenlet or thread: on its own connection, in its
    own transaction, where the store takes those of its caller (`DjangoStore` does).

    Raises:
        TypeError: One is no processor.
    Switches: no.
    """
    before = [(one, one.batching) for one in processors_of(processors)]
    for processor, _ in before:
        processor.batching = False
    try:
        yield
    finally:
        for processor, batching in reversed(before):
            processor.batching = batching
