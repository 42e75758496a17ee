"""The fixtures of `geventbatch.testing`, for pytest, which finds this module by itself: see docs/testing.md.

It is no part of the package, so that a test run that asks for none of them imports neither geventbatch nor gevent.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import FaultPlan, VirtualTime


@pytest.fixture
def geventbatch_clock() -> Iterator[VirtualTime]:
    """Virtual time for the test: `geventbatch.testing.virtual_time`."""
    from geventbatch.testing import virtual_time

    with virtual_time() as clock:
        yield clock


@pytest.fixture
def geventbatch_faults() -> Iterator[Callable[[Any], FaultPlan]]:
    """``geventbatch_faults(processor)`` plans faults until the test ends: `geventbatch.testing.faults`."""
    from geventbatch.testing import faults

    with ExitStack() as stack:
        yield lambda processor: stack.enter_context(faults(processor))


@pytest.fixture
def geventbatch_check() -> Iterator[Callable[..., None]]:
    """``geventbatch_check(processor, …)`` checks operations until the test ends: `check_operations`."""
    from geventbatch.testing import check_operations

    with ExitStack() as stack:
        yield lambda *processors, **options: stack.enter_context(check_operations(*processors, **options))


@pytest.fixture
def geventbatch_checked() -> Iterator[None]:
    """The operations of every processor are checked: for ``usefixtures``, the mark or in pytest.ini."""
    from geventbatch.testing import check_operations

    with check_operations():
        yield


@pytest.fixture
def geventbatch_batching_off() -> Iterator[None]:
    """Every processor runs each operation in its caller, as with ``batching=False``."""
    from geventbatch.testing import batching_off

    with batching_off():
        yield
