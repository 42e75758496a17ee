"""What Python does first in every process of the suite, which has this directory in PYTHONPATH.

gevent asks some twenty times for plugins while it patches, and reads each time what every installed package says: most
of what a small program takes to start. Here they are read once. A client of Redis asks at each connection which version
it has, which is read once too.
"""

import importlib.metadata
from functools import cache
from typing import Any

_all = cache(importlib.metadata.entry_points)


def _entry_points(**chosen: Any) -> Any:
    return _all().select(**chosen) if chosen else _all()


importlib.metadata.entry_points = _entry_points
importlib.metadata.version = cache(importlib.metadata.version)
