"""One trial of a store: what the checks of `store_contract` do with a bench, in two processes and through a proxy."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from random import SystemRandom
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.event import Event

from geventbatch._safe_repr import shown
from geventbatch.errors import BatchError, LoadFailed
from geventbatch.testing._proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from geventbatch._processor import Processor
    from geventbatch.testing._proxy import Endpoint, Rule
    from geventbatch.testing._store_bench import StoreBench

PATIENCE: Final = 30.0
"""Seconds: a store that takes longer for one batch hangs."""

DEADLINE: Final = 0.4
"""Seconds: the `max_duration` of a batch that is to meet its deadline."""

_MEETING: Final = 5.0
"""Seconds: so long may batches take that wait for each other. It is shorter than what a pool waits for a connection."""

_random: Final = SystemRandom()


class Trial:
    """A bench during one check. Whatever it has opened is closed at the end."""

    def __init__(self, bench: StoreBench, claim: str) -> None:
        self.bench = bench
        self._claim = claim
        self._stack = ExitStack()
        self._patient: dict[int, Processor[Any]] = {}
        """The processor of each store whose batches may wait for each other."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, tb)

    def expect(self, condition: object, found: str) -> None:
        """Fail the check unless *condition* holds; *found* says what was seen instead."""
        if not condition:
            raise AssertionError(f"{type(self.bench).__name__}: {found}. The contract: {self._claim}")

    # -- keys and their totals ------------------------------------------------------------------------------

    def new_key(self) -> Hashable:
        """Return a key that nobody has used."""
        return self.bench.key(_random.randrange(1, 2**31))

    def saved_key(self, total: int = 10) -> Hashable:
        """Return a new key with a resource."""
        key = self.new_key()
        self.bench.put(key, total)
        self.expect_total(key, total, f"after put({shown(key)}, {total})")
        return key

    def expect_total(self, key: Hashable, total: int, when: str) -> None:
        """Fail the check unless *total* is what is saved at *key*."""
        found = self.bench.get(key)
        self.expect(found == total, f"{when}, {found} is saved at {shown(key)}, not {total}")

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until *condition* holds, or for as long as patience lasts."""
        give_up_at = time.monotonic() + PATIENCE
        while not condition() and time.monotonic() < give_up_at:
            gevent.sleep(0.01)

    # -- processors and their callers -----------------------------------------------------------------------

    def store(self, server: Endpoint | None = None) -> Any:
        """Return a new store, at the server itself or at what leads there; closed at the end."""
        return self._stack.enter_context(self.bench.open_store(server or self.bench.server))

    def proxied_store(self) -> tuple[Proxy, Any]:
        """Return a proxy, and a new store that connects through it."""
        if self.bench.server is None:
            raise TypeError(f"{type(self.bench).__name__} has a save_marker, and needs a server too")
        proxy = self._stack.enter_context(Proxy(self.bench.server))
        return proxy, self.store((proxy.host, proxy.port))

    def processor(self, store: Any = None, **options: Any) -> Processor[Any]:
        """Return a processor over *store*, or over a new one; stopped at the end."""
        plain = {"min_duration": 0, "max_duration": PATIENCE, "max_attempts": 50, "max_batches": self.bench.max_batches}
        plain["workers"] = 1  # no greenlets but those: a store may have a connection for each
        made = self.bench.processor(self.store() if store is None else store, **{**plain, **options})
        return self._stack.enter_context(made)

    def run(self, processor: Processor[Any], key: Hashable, operation: Any, *args: Any) -> Any:
        """Run the operation, and return what its caller is answered: a value, or the error."""
        (answer,) = self.run_all([(processor, key, operation, *args)])
        return answer

    def run_all(self, runs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run all of them at once, and return what their callers are answered."""
        return self.answers([self.spawn(*run) for run in runs])

    def spawn(self, processor: Processor[Any], key: Hashable, operation: Any, *args: Any) -> gevent.Greenlet[..., Any]:
        """Begin to run the operation."""
        caller = gevent.spawn(_answer, processor, key, operation, args)
        self._stack.callback(caller.kill)
        return caller

    def answers(self, callers: Sequence[gevent.Greenlet[..., Any]]) -> list[Any]:
        """Return what these callers are answered."""
        gevent.joinall(callers, timeout=2 * PATIENCE)
        self.expect(all(caller.ready() for caller in callers), "a caller was never answered: the store does not yield")
        return [caller.get() for caller in callers]

    @contextmanager
    def paused(self, processor: Processor[Any], key: Hashable) -> Iterator[gevent.Greenlet[..., Any]]:
        """Hold a batch that adds 1 between its load and its save until the block ends; yield its caller."""
        reached, goes_on = Event(), Event()

        def pause(resource: Any) -> int:
            reached.set()
            goes_on.wait()
            return self.bench.add(resource, 1)

        caller = self.spawn(processor, key, pause)
        self.wait_for(lambda: reached.is_set() or caller.ready())
        try:
            yield caller
        finally:
            goes_on.set()
        gevent.joinall([caller], timeout=2 * PATIENCE)

    def makes_missing(self) -> bool:
        """Return whether the store makes a resource where there is none. Fail the check if it does neither."""
        key = self.new_key()
        answer = self.run(self.processor(), key, self.bench.add, 7)
        found = self.bench.get(key)
        if isinstance(answer, LoadFailed):
            self.expect(found is None, f"the load of the missing key {shown(key)} failed, and yet {found} is saved")
            return False
        self.expect(
            (answer, found) == (7, 7),
            f"an operation added 7 at the missing key {shown(key)}: it was answered {answer!r}, and {found} is saved; "
            "allowed are 7, or a LoadFailed",
        )
        return True

    # -- breaking -------------------------------------------------------------------------------------------

    def expect_met(self, rule: Rule, what: str) -> None:
        """Fail the check unless the proxy has seen such a message."""
        self.expect(rule.met, f"no message of the store had the {what} {rule.marker!r} in it: name another one")

    def expect_truth(self, key: Hashable, answer: Any, before: int) -> None:
        """Fail the check unless *answer* is true of an operation that was to add 1 to the total *before*."""
        found = self.bench.get(key)
        told = f"an operation was to add 1 to {before} at {shown(key)}; its caller was answered {answer!r}"
        if not isinstance(answer, BaseException):
            self.expect(found == answer == before + 1, f"{told}, and {found} is saved")
        elif isinstance(answer, BatchError) and answer.retry_safe:
            self.expect(found == before, f"{told} (retry_safe: nothing was saved), and {found} is saved")
        else:
            self.expect(isinstance(answer, BatchError), f"{told}, which is no error of the library")
            self.expect(found in {before, before + 1}, f"{told} (unknown), and {found} is saved")

    def expect_as_good_as_new(self, store: Any) -> None:
        """Fail the check unless *store* runs as many batches side by side as there can be, each right."""
        if id(store) not in self._patient:
            self._patient[id(store)] = self.processor(store, max_duration=_MEETING)
        processor = self._patient[id(store)]
        keys = [self.saved_key(100 * n) for n in range(1, self.bench.max_batches + 1)]
        inside: set[Hashable] = set()
        all_inside = Event()

        def meet(resource: Any, key: Hashable) -> int:
            inside.add(key)
            if len(inside) == len(keys):
                all_inside.set()
            all_inside.wait()
            return self.bench.add(resource, 1)

        answers = self.run_all([(processor, key, meet, key) for key in keys])
        self.expect(
            answers == [100 * n + 1 for n in range(1, len(keys) + 1)],
            f"{len(inside)} of {len(keys)} batches could run at once afterwards, and were answered {answers!r}",
        )
        for number, key in enumerate(keys, 1):
            self.expect_total(key, 100 * number + 1, "afterwards")

    # -- another process ------------------------------------------------------------------------------------

    def add_all(self, processor: Processor[Any], keys: Sequence[Hashable], times: int) -> list[str]:
        """Add 1 at each of *keys*, so many *times*, all keys at once; return the errors."""
        answers = [self.run_all([(processor, key, self.bench.add, 1) for key in keys]) for _ in range(times)]
        return [repr(answer) for some in answers for answer in some if isinstance(answer, BaseException)]

    @contextmanager
    def second_process(self) -> Iterator[Callable[[list[Hashable], int], gevent.Greenlet[..., Any]]]:
        """Yield a function by which another process adds 1 at each of the keys, so often; it returns the errors."""
        module = sys.modules[type(self.bench).__module__]
        command = [sys.executable, "-m", "geventbatch.testing._second_process", module.__name__, module.__file__ or ""]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own module

        def asked(value: object) -> Any:
            assert process.stdin is not None  # noqa: S101 - for type checkers
            assert process.stdout is not None  # noqa: S101 - likewise
            process.stdin.write(base64.b64encode(pickle.dumps(value)).decode() + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            self.expect(line, "the second process ended; its standard error says why")
            return json.loads(line)

        try:
            asked(self.bench)
            yield lambda keys, times: gevent.spawn(asked, (keys, times))
            process.communicate()
        finally:
            process.kill()
            process.communicate()


def _answer(processor: Processor[Any], key: Hashable, operation: Any, args: tuple[Any, ...]) -> Any:
    try:
        return processor.run(key, operation, *args)
    except Exception as error:
        return error
