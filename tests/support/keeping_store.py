"""A store in memory that records outcomes, and callers with idempotency keys."""

from __future__ import annotations

from functools import partial
from typing import Any

import gevent

from geventbatch import Processor, current_batch
from geventbatch.errors import Repeated
from tests.support.callers import answer_of
from tests.support.recording_store import Scope, Store


class Keeping:
    """A store in memory that records outcomes."""

    keeps_outcomes = True

    def __init__(self, store: Store) -> None:
        self.store = store
        self.recorded: dict[str, str] = {}

    def __call__(self, key: Any) -> KeepingScope:
        return KeepingScope(self, key)


class KeepingScope(Scope):
    def __init__(self, keeping: Keeping, key: Any) -> None:
        super().__init__(keeping.store, key)
        self.keeping = keeping

    def recorded(self, keys: list[str]) -> dict[str, str]:
        self.store.note("ask", tuple(keys))
        return {key: self.keeping.recorded[key] for key in keys if key in self.keeping.recorded}

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is not None:
            return super().__exit__(kind, error, traceback)
        outcomes = current_batch().outcomes
        found = {key: told for key, told in self.keeping.recorded.items() if key in outcomes}
        if found:
            self.store.note("repeated", self.key)
            raise Repeated("there already", outcomes=found)
        super().__exit__(kind, error, traceback)
        self.keeping.recorded |= outcomes
        return False


def opened(keeping: Keeping, **options: Any) -> Processor[Any]:
    return Processor(open_resource=keeping, **{"min_duration": 0, "max_duration": 5, **options})


def call(processor: Processor[Any], key: str | None, *run: Any) -> gevent.Greenlet[..., Any]:
    return gevent.spawn(answer_of, partial(processor.run, idempotency_key=key), "k", *run)


def answers(callers: list[gevent.Greenlet[..., Any]]) -> list[Any]:
    return [caller.get() for caller in callers]
