"""Another process that opens the stores of the contract suite, one after the other.

It reads lines. One names the case and the address of a store, those that follow the keys whose totals are to be raised
by 1, all at the same time, each so many times, until an empty one. It answers each, the latter with what went wrong. Or
they name transfers of 1, each by its two keys and an idempotency key, and how many are sent together: it answers with
their answers.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json
import sys
from typing import TYPE_CHECKING, Any

import gevent
from gevent.pool import Pool

from tests.support.adapters.base import case_named

if TYPE_CHECKING:
    from geventbatch import Processor
    from tests.support.adapters.base import Adapter


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        with (
            case_named(asked["case"]).opens(asked["address"]) as adapter,
            adapter.processor(missing="make", max_attempts=200) as processor,
        ):
            say("opened")
            raise_all(adapter, processor)
        say("closed")


def raise_all(adapter: Adapter, processor: Processor[Any]) -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if not asked:
            return
        if "transfers" in asked:
            together = Pool(asked["together"])
            say(together.map(lambda one: transfer(adapter, processor, *one), asked["transfers"]))
            continue
        running = [gevent.spawn(raise_totals, adapter, processor, key, asked["times"]) for key in asked["keys"]]
        say([repr(one.value) for one in gevent.joinall(running) if one.value is not None])


def raise_totals(adapter: Adapter, processor: Processor[Any], key: str, times: int) -> Exception | None:
    try:
        for _ in range(times):
            processor.run(key, adapter.add, 1)
    except Exception as error:
        return error
    return None


def transfer(adapter: Adapter, processor: Processor[Any], keys: list[str], name: str) -> Any:
    try:
        return processor.run_across(keys, adapter.transfer, 1, idempotency_key=name, identified_by=(1,))
    except Exception as error:
        return repr(error)


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
