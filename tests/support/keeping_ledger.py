"""A `Ledger` that records outcomes, as an `open_resources` written by hand does, and callers with idempotency keys."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import gevent

from geventbatch import current_batch
from geventbatch.errors import PartlySaved, Repeated
from tests.support.callers import answer_of
from tests.support.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import TracebackType

    from geventbatch import Processor


class KeepingLedger(Ledger):
    """Keeps a list for each key and outcomes by name; saves all of a bulk, or all but those whose outcomes it has."""

    keeps_outcomes = True

    def __init__(self, *, partly: bool = True) -> None:
        super().__init__()
        self.partly = partly  # it saves the others, if outcomes are there already
        self.outcomes: dict[str, str] = {}
        self.asked: list[list[str]] = []
        self.on_ask: Callable[[list[str]], object] = lambda _: None

    def __call__(self, keys: list[Any]) -> AbstractContextManager[dict[Any, Any]]:
        return _Scope(self, keys)


class _Scope:
    def __init__(self, ledger: KeepingLedger, keys: list[Any]) -> None:
        self._ledger = ledger
        self._opened = ledger.open(keys)

    def __enter__(self) -> dict[Any, Any]:
        self._resources = self._opened.__enter__()
        return self._resources

    def recorded(self, names: list[str]) -> dict[str, str]:
        self._ledger.asked.append(names)
        self._ledger.on_ask(names)
        return {name: self._ledger.outcomes[name] for name in names if name in self._ledger.outcomes}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if error is not None:
            return self._opened.__exit__(kind, error, traceback)
        bulk, kept = current_batch().bulk, self._ledger.outcomes
        new: dict[str, str] = {}
        lost: dict[Any, Exception] = {}
        for key, batch in bulk.items():
            found = {name: kept[name] for name in batch.outcomes if name in kept}
            if found:
                lost[key] = Repeated("there already", outcomes=found)
                self._resources.pop(key, None)
            else:
                new |= batch.outcomes
        if lost and not self._ledger.partly:
            all_found = {name: kept[name] for batch in bulk.values() for name in batch.outcomes if name in kept}
            repeated = Repeated("there already", outcomes=all_found)
            self._opened.__exit__(Repeated, repeated, None)
            raise repeated
        self._opened.__exit__(None, None, None)
        kept |= new
        if lost:
            raise PartlySaved(lost)
        return None


def call(processor: Processor[Any], keys: str, idempotency_key: str | None, *run: Any, **options: Any) -> Any:
    """Run an operation by `run_across` on the letters of *keys*; or, on one that is written with a dot, by `run`."""
    options["idempotency_key"] = idempotency_key
    if keys.endswith("."):
        return gevent.spawn(answer_of, partial(processor.run, **options), keys[0], *run)
    return gevent.spawn(answer_of, partial(processor.run_across, **options), [*keys], *run)
