from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.mapped import Bed


@pytest.fixture
def bed(opened_bed: Bed) -> Bed:
    """The module's database, with nothing in its tables."""
    opened_bed.clear()
    return opened_bed
