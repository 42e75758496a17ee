"""What the tests of guarantees share: a store that records what is asked of it, and callers that keep their answers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal

import gevent
import pytest

from geventbatch import Processor

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from geventbatch.testing import VirtualTime

Form = Literal["pair", "scope", "bulk"]
FORMS: tuple[Any, ...] = ("pair", "scope", pytest.param("bulk", marks=pytest.mark.variants))


class Store:
    """Keeps a list for each key; loading and saving take virtual time, and do what a test hooks into them.

    `kept` is what was saved, `log` says what happened when. The processor knows it as a load and save pair, as a
    resource scope, or as one of many keys; then a bulk has one key, unless a test asks for more, and every guarantee
    holds as without bulks.
    """

    def __init__(
        self, clock: VirtualTime, form: Form = "pair", *, load_time: float = 0.0, save_time: float = 0.0
    ) -> None:
        self.clock = clock
        self.form = form
        self.load_time = load_time
        self.save_time = save_time
        self.kept: defaultdict[Hashable, list[Any]] = defaultdict(list)
        self.log: list[tuple[float, str, Hashable]] = []
        self.left: list[BaseException] = []
        """With what scopes were left that must not save."""
        self.on_load: Callable[[Hashable], object] = do_nothing
        self.on_save: Callable[[Hashable], object] = do_nothing
        self.on_leave: Callable[[BaseException], object] = do_nothing
        """What it returns is what the scope's ``__exit__`` returns."""

    def processor(self, **options: Any) -> Processor[list[Any]]:
        if self.form == "pair":
            return Processor(load_resource=self.load, save_resource=self.save, **options)
        if self.form == "bulk":
            options = {"max_bulk": 1, "workers": 32, **options}
            return Processor(open_resources=lambda keys: Scopes(self, keys), **options)
        return Processor(open_resource=self.scope, **options)

    def call(self, processor: Processor[list[Any]], key: Hashable, operation: Callable[..., Any], *args: Any) -> Caller:
        """Spawn a caller of ``processor.run``."""
        return Caller(self.clock, processor, key, operation, *args)

    def note(self, what: str, key: Hashable) -> None:
        self.log.append((self.clock.now(), what, key))

    def times(self, what: str, key: Hashable | None = None) -> list[float]:
        """When *what* happened, to *key* or to any."""
        return [at for at, noted, of in self.log if noted == what and key in (None, of)]

    # -- the pair -----------------------------------------------------------------------------------------

    def load(self, key: Hashable) -> list[Any]:
        self.note("load", key)
        wait(self.load_time)
        self.on_load(key)
        self.note("loaded", key)
        return list(self.kept[key])

    def save(self, key: Hashable, resource: list[Any]) -> None:
        self.note("save", key)
        wait(self.save_time)
        self.on_save(key)
        self.kept[key] = list(resource)
        self.note("saved", key)

    # -- the scope ----------------------------------------------------------------------------------------

    def scope(self, key: Hashable) -> Scope:
        return Scope(self, key)

    # -- operations ---------------------------------------------------------------------------------------

    def apply(self, resource: list[Any], mark: Any, seconds: float = 0.0) -> Any:
        """Add *mark* to the resource, after *seconds*, and note both ends under the mark."""
        self.note("apply", mark)
        wait(seconds)
        resource.append(mark)
        self.note("applied", mark)
        return mark


class Scope:
    """The pair of a `Store` as a resource scope."""

    def __init__(self, store: Store, key: Hashable) -> None:
        self.store = store
        self.key = key
        self.resource: list[Any] = []

    def __enter__(self) -> list[Any]:
        self.resource = self.store.load(self.key)
        return self.resource

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            self.store.save(self.key, self.resource)
            return False
        self.store.left.append(error)
        return bool(self.store.on_leave(error))


class Scopes:
    """One `Scope` for each of many keys, one after the other."""

    def __init__(self, store: Store, keys: list[Hashable]) -> None:
        self.scopes = {key: Scope(store, key) for key in keys}
        self.resources: dict[Hashable, list[Any]] = {}

    def __enter__(self) -> dict[Hashable, list[Any]]:
        for key, scope in self.scopes.items():
            self.resources[key] = scope.__enter__()
        return self.resources

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if kind is not None:
            swallowed = [scope.__exit__(kind, error, trace) for scope in self.scopes.values()]
            return any(swallowed)
        for key in self.resources:
            self.scopes[key].__exit__(None, None, None)
        return False


class Caller:
    """One call of `Processor.run` in a greenlet of its own, and its answer."""

    def __init__(
        self,
        clock: VirtualTime,
        processor: Processor[list[Any]],
        key: Hashable,
        operation: Callable[..., Any],
        *args: Any,
    ) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.at: float | None = None
        """When it was answered, by a value or an error; None before."""
        self._clock = clock
        self.greenlet = gevent.spawn(self._run, processor, key, operation, *args)

    def __repr__(self) -> str:
        return f"<Caller answered {self.answer!r} at {self.at}>"

    def _run(self, processor: Processor[list[Any]], key: Hashable, operation: Callable[..., Any], *args: Any) -> None:
        try:
            self.value = processor.run(key, operation, *args)
        except BaseException as error:
            self.error = error
        self.at = self._clock.now()

    @property
    def answered(self) -> bool:
        return self.at is not None

    @property
    def answer(self) -> Any:
        return self.value if self.error is None else self.error

    def kill(self) -> None:
        """Have it killed where it waits, without waiting for it."""
        self.greenlet.kill(block=False)


def add(resource: list[Any], mark: Any) -> Any:
    """The plainest operation: add *mark*, and return it."""
    resource.append(mark)
    return mark


def fail(resource: list[Any], error: BaseException) -> None:
    """An operation that raises, and leaves the resource as it was."""
    raise error


def current_greenlet(*args: object) -> Any:
    """The greenlet that calls this; Any, since the stubs of gevent promise less than can be done to it."""
    return gevent.getcurrent()


def kill_current(*args: object) -> None:
    """Have the greenlet that calls this killed at its next yield."""
    current_greenlet().kill(block=False)


def kill_here(*args: object) -> None:
    kill_current()
    gevent.sleep(1)


def wait(seconds: float) -> None:
    if seconds:
        gevent.sleep(seconds)


def do_nothing(*args: object) -> None:
    pass


def raising(error: BaseException) -> Callable[..., Any]:
    """For a hook of a `Store`."""

    def fail_always(*args: object) -> None:
        raise error

    return fail_always


def only_once(hook: Callable[..., Any]) -> Callable[..., Any]:
    """*hook* the first time, nothing after that."""
    left = [hook]

    def do(*args: object) -> Any:
        return left.pop()(*args) if left else None

    return do


def answers(callers: Iterable[Caller]) -> list[Any]:
    return [caller.answer for caller in callers]


def answered_at(callers: Iterable[Caller]) -> list[float | None]:
    return [caller.at for caller in callers]
