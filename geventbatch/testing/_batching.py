"""Turns batching off for a while."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from geventbatch._seam import each_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch._processor import Processor
    from geventbatch._seam import AnyProcessor


@contextmanager
def batching_off(*processors: AnyProcessor) -> Iterator[None]:
    """Set ``batching=False`` on *processors* until the block ends.

    Without *processors*, on all in this process, those made inside the block too.

    `Processor.run` then loads, applies and saves in its caller's own greenlet or thread. If the store uses its caller's
    connection and transaction (`DjangoStore` does), so does the operation.

    Raises:
        TypeError: An argument is no processor.
    Switches: no.
    """
    with each_of(processors, _batching_off):
        yield


@contextmanager
def _batching_off(processor: Processor[Any]) -> Iterator[None]:
    before, processor.batching = processor.batching, False
    try:
        yield
    finally:
        processor.batching = before
