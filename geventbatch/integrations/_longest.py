"""Processors whose batches may take longer than their server waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geventbatch._core import process
from geventbatch._seam import dispatcher_of, options_of
from geventbatch._watch.problem import SetupProblem

if TYPE_CHECKING:
    from collections.abc import Iterator


def killed_after(seconds: float, why: str, mend: str) -> Iterator[SetupProblem]:
    """Return a problem for each processor that may have a batch of more than so many *seconds*, and is not stopped."""
    for processor in process.processors():
        longest = options_of(processor).max_duration
        if longest > seconds and not dispatcher_of(processor).stopping:
            yield SetupProblem(
                "killed-batches",
                f"A batch may take max_duration = {longest:g} s, but {why}: what runs longer is killed.",
                f"Pass a max_duration (of the processor {processor.name}) well under {seconds:g} s{mend}.",
            )
