"""Another process with a store of the contract suite: ``python -m tests.programs.store CASE ADDRESS``.

It says that it is ready, and then reads lines: the keys whose totals are to be raised by 1, all at the same time, each
so many times. To each line it answers with a list of what went wrong.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import sys  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import gevent  # noqa: E402

from tests.adapters.base import case_named  # noqa: E402

if TYPE_CHECKING:
    from geventbatch import Processor
    from tests.adapters.base import Adapter


def main(name: str, address: str) -> None:
    case = case_named(name)
    with case.opens(address) as adapter, adapter.processor(missing="make", max_attempts=200) as processor:
        say("ready")
        for line in sys.stdin:
            asked = json.loads(line)
            running = [gevent.spawn(raise_totals, adapter, processor, key, asked["times"]) for key in asked["keys"]]
            say([repr(one.value) for one in gevent.joinall(running) if one.value is not None])


def raise_totals(adapter: Adapter, processor: Processor[Any], key: str, times: int) -> Exception | None:
    try:
        for _ in range(times):
            processor.run(key, adapter.add, 1)
    except Exception as error:
        return error
    return None


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
