"""Print what importing the library brings in and changes, after gevent."""

import json
import sys

import gevent
import gevent.event
import gevent.lock
import gevent.queue  # noqa: F401 - the library needs them too
from gevent import monkey
from gevent._hub_local import get_hub_if_exists

PATCHED_BY_GEVENT = ("socket", "threading", "_thread", "time", "os", "select", "signal", "ssl", "queue", "subprocess")
for name in PATCHED_BY_GEVENT:
    __import__(name)


def patchable() -> dict[str, int]:
    return {
        f"{name}.{attribute}": id(value)
        for name in PATCHED_BY_GEVENT
        for attribute, value in vars(sys.modules[name]).items()
    }


before, modules = patchable(), set(sys.modules)
import geventbatch  # noqa: F401 - this is what is looked at

after = patchable()
told = {
    "new": sorted(set(sys.modules) - modules),
    "changed": sorted(name for name in before | after if before.get(name) != after.get(name)),
    "patched": [name for name in PATCHED_BY_GEVENT if monkey.is_module_patched(name)],
    "saved": sorted(vars(monkey)["saved"]),
    "hub": repr(get_hub_if_exists()),
    "threads": sys.modules["threading"].active_count(),
}
sys.stdout.write(json.dumps(told))
