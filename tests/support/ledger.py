"""An `open_resources` in memory that saves all or nothing, and callers of `run_across`, in virtual time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent

from geventbatch import Processor, current_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    Account = list[Any]
    Accounts = tuple[Account, ...]


class Broken(Exception):
    """What an operation raises half-way."""


class Ledger:
    """Keeps a list for each key, and saves all of a bulk or nothing."""

    all_or_nothing = True

    def __init__(self) -> None:
        self.kept: dict[Any, Account] = {}
        self.loads: list[list[Any]] = []
        self.saves: list[list[Any]] = []
        self.left: list[type[BaseException]] = []
        self.running: list[Any] = []  # keys that a scope has loaded, and not saved or left yet
        self.load_time = self.save_time = 0.0
        self.slow: dict[Any, float] = {}  # seconds, by key
        self.missing: set[Any] = set()
        self.unloadable: dict[Any, Exception] = {}
        self.on_load: Callable[[list[Any]], object] = lambda _: None
        self.on_save: Callable[[dict[Any, Account]], object] = lambda _: None
        self.connected: list[list[set[Any]]] = []  # at each save: the keys that belong together

    def __call__(self, keys: list[Any]) -> AbstractContextManager[dict[Any, Any]]:
        return self.open(keys)

    @contextmanager
    def open(self, keys: list[Any]) -> Iterator[dict[Any, Any]]:
        assert current_batch().alone or not set(keys) & set(self.running), "two bulks have a key in common"
        self.running += keys
        try:
            self.loads.append(list(keys))
            gevent.sleep(self.load_time + max(self.slow.get(key, 0.0) for key in keys))
            self.on_load(keys)
            resources: dict[Any, Any] = {key: list(self.kept.get(key, ())) for key in keys if key not in self.missing}
            resources |= {key: self.unloadable[key] for key in keys if key in self.unloadable}
            try:
                yield resources
            except BaseException as error:
                self.left.append(type(error))
                raise
            self.saves.append(list(resources))
            bulk = current_batch().bulk or {key: current_batch() for key in keys}  # none in the form for one key
            assert bulk.keys() >= resources.keys()  # a planned fault may have taken some out
            batches = dict.fromkeys(bulk.values())
            self.connected.append([{key for key in bulk if bulk[key] is batch} for batch in batches])
            gevent.sleep(self.save_time)
            self.on_save(resources)
            self.kept |= resources
        finally:
            for key in keys:
                self.running.remove(key)

    def processor(self, **options: Any) -> Processor[Account]:
        return Processor(open_resources=self, **{"min_duration": 0, "max_duration": 5, **options})


class Callers:
    """Greenlets that run operations, and what each was answered."""

    def __init__(self, processor: Processor[Account]) -> None:
        self.processor = processor
        self.answers: dict[Any, Any] = {}
        self.ended: list[Any] = []

    def run(self, keys: str, mark: Any, operation: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Run *operation* (by default one that appends *mark*): on one key by `run`, on several by `run_across`."""
        return gevent.spawn(self._run, keys, mark, operation, options)

    def _run(self, keys: str, mark: Any, operation: Any, options: Any) -> None:
        try:
            if len(keys) == 1:
                self.answers[mark] = self.processor.run(keys, operation or append, mark, **options)
            else:
                self.answers[mark] = self.processor.run_across([*keys], operation or append_to_all, mark, **options)
        except BaseException as error:
            self.answers[mark] = error
        self.ended.append(mark)


def append(account: Account, mark: Any) -> Any:
    account.append(mark)
    return mark


def append_to_all(accounts: Accounts, mark: Any) -> Any:
    for account in accounts:
        account.append(mark)
    return mark


def fail(accounts: Any, mark: Any) -> None:
    raise ValueError("refused")


def break_all(accounts: Accounts, mark: Any) -> None:
    accounts[0].append("half")
    raise Broken


def hold(accounts: Any, mark: Any) -> Any:
    (accounts if isinstance(accounts, list) else accounts[0]).append(mark)
    gevent.sleep(100)
