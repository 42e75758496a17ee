"""Faults: loads and saves of a processor that fail, hang, or lose their answer, on purpose."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal

from gevent.event import Event

from geventbatch._batch import current_batch
from geventbatch._check_values import check_seconds, count
from geventbatch._safe_repr import shown
from geventbatch._seam import around_scopes, options_of, the_processor
from geventbatch._wrapper import Around
from geventbatch.errors import Conflict, NothingToSave, PartlySaved

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator
    from types import TracebackType

    from geventbatch._seam import AnyProcessor

    When = Literal["load", "save", "saved"]

_EVERY: Final = object()


@contextmanager
def faults(processor: AnyProcessor) -> Iterator[FaultPlan]:
    """Make loads and saves of *processor* go wrong as planned, until the block ends.

    In a test::

        with faults(processor) as plan:
            plan.lose_answer()
            with pytest.raises(SaveFailed):
                processor.run("Ann", Account.deposit, 10)  # and it is saved

    It works with batching on and off, for one key and for bulks, and with any store, pair or scope. Loads and
    saves without a fault are the store's own. If a load or save still hangs when the block ends, it goes on.

    Yields:
        The plan, which is empty.

    Raises:
        TypeError: *processor* is no processor.
        AssertionError: At the end of the block, unless the block raises: a planned fault never happened.
    Switches: no.
    """
    target = the_processor(processor)
    options = options_of(target)
    plan = FaultPlan(options.store.normalize_key)
    try:
        with around_scopes(target, lambda one: _OpenOne(one, plan), lambda many: _OpenMany(many, plan)):
            yield plan
    finally:
        for fault in plan.planned:
            fault.release()
    missed = [repr(fault) for fault in plan.planned if not fault.happened]
    if missed:
        raise AssertionError(
            f"planned, but never happened: {', '.join(missed)}. The processor made {plan.loads} loads and {plan.saves} "
            "saves in the block"
        )


class FaultPlan:
    """A plan of faults, made by `faults`; do not make one by hand.

    Each method plans one fault and returns it. These arguments are the same for all:

    - *nth*: Which load or save fails, counted from now on; the first is 1.
    - *times*: How many in a row fail. None: all.
    - *key*: Count only loads or saves of this key. In a bulk, only this key then fails, and the others go on.

    A load that fails does not reach the store. A batch with nothing to save makes no save. A replay loads and saves
    again, and counts again.

    Attributes:
        loads: The number of loads begun in the block, faulty ones included.
        saves: The number of saves, likewise.
        planned: Every `Fault`, in the order of planning.
    """

    def __init__(self, normalize: Callable[[Any], Any] | None = None) -> None:
        """Plan nothing."""
        self._normalize = normalize
        # -- mutable state ---------------------------------------------------------------------------------
        self.loads = 0
        self.saves = 0
        self.planned: list[Fault] = []

    def __repr__(self) -> str:
        """Name the planned faults, and the counts."""
        return f"<FaultPlan: {', '.join(map(repr, self.planned)) or 'none'}; {self.loads} loads, {self.saves} saves>"

    def fail_load(
        self,
        error: BaseException | type[BaseException],
        *,
        nth: int = 1,
        times: int | None = 1,
        key: Hashable = _EVERY,
    ) -> Fault:
        """Make a load raise *error*. Switches: no."""
        return self._plan(Fault("load", nth, times, self._key(key), error=error))

    def fail_save(
        self,
        error: BaseException | type[BaseException],
        *,
        nth: int = 1,
        times: int | None = 1,
        key: Hashable = _EVERY,
    ) -> Fault:
        """Make a save raise *error* and save nothing: the store's scope is exited with that error. Switches: no.

        Unless *error* is a `NotSaved`, the callers learn that the outcome is unknown.
        """
        return self._plan(Fault("save", nth, times, self._key(key), error=error))

    def conflict(self, *, nth: int = 1, times: int | None = 1, key: Hashable = _EVERY) -> Fault:
        """Make a save raise `Conflict`: another writer was faster, nothing was saved. Switches: no."""
        return self.fail_save(Conflict("a conflict, as planned"), nth=nth, times=times, key=key)

    def lose_answer(
        self,
        error: BaseException | type[BaseException] | None = None,
        *,
        nth: int = 1,
        times: int | None = 1,
        key: Hashable = _EVERY,
    ) -> Fault:
        """Make a save succeed and raise all the same, as if the connection was lost in COMMIT. Switches: no.

        Args:
            error: The error to raise; by default a `ConnectionResetError`.
            nth: See the class.
            times: Likewise.
            key: Likewise.
        """
        raised = ConnectionResetError("saved, but the answer was lost, as planned") if error is None else error
        return self._plan(Fault("saved", nth, times, self._key(key), error=raised))

    def hang_load(
        self, seconds: float | None = None, *, nth: int = 1, times: int | None = 1, key: Hashable = _EVERY
    ) -> Fault:
        """Make a load wait for *seconds*, or until it is released, and then go on. Switches: no."""
        return self._plan(Fault("load", nth, times, self._key(key), hangs=True, seconds=seconds))

    def hang_save(
        self,
        seconds: float | None = None,
        *,
        saved: bool = False,
        nth: int = 1,
        times: int | None = 1,
        key: Hashable = _EVERY,
    ) -> Fault:
        """Make a save wait for *seconds*, or until it is released, and then go on. Switches: no.

        Args:
            seconds: How long it waits; None: until `Fault.release`, or the end of the block.
            saved: True makes it wait after it was carried out: the answer to COMMIT does not come. If False,
                and the deadline comes first, the store's scope is exited with an error, and saves nothing.
            nth: See the class.
            times: Likewise.
            key: Likewise.
        """
        when: When = "saved" if saved else "save"
        return self._plan(Fault(when, nth, times, self._key(key), hangs=True, seconds=seconds))

    def _key(self, key: Hashable) -> Hashable:
        return key if key is _EVERY or self._normalize is None else self._normalize(key)

    def _plan(self, fault: Fault) -> Fault:
        self.planned.append(fault)
        return fault

    def due_at_load(self, keys: Iterable[Hashable]) -> list[Fault]:
        """Count a load of *keys*; return the faults that happen in it."""
        self.loads += 1
        return [fault for fault in self.planned if fault.when == "load" and fault.is_due(keys)]

    def due_at_save(self, keys: Iterable[Hashable]) -> list[Fault]:
        """Count a save of *keys*; return the faults that happen in it."""
        self.saves += 1
        return [fault for fault in self.planned if fault.when != "load" and fault.is_due(keys)]


class Fault:
    """One planned fault, made by the methods of `FaultPlan`; do not make one by hand.

    Attributes:
        happened: How many times it has happened.
    """

    def __init__(
        self,
        when: When,
        nth: int,
        times: int | None,
        key: Hashable,
        *,
        error: BaseException | type[BaseException] | None = None,
        hangs: bool = False,
        seconds: float | None = None,
    ) -> None:
        """Check the arguments."""
        if hangs and seconds is not None:
            check_seconds("seconds", seconds)
        if not hangs and not isinstance(error, BaseException | type):
            raise TypeError(f"error is {shown(error)}, but must be an exception, or a class of them")
        if isinstance(error, type) and not issubclass(error, BaseException):
            raise TypeError(f"error is {shown(error)}, but must be an exception, or a class of them")
        self.when: Final[When] = when
        self.key: Final = key
        self._nth = count("nth", nth)
        self._times = None if times is None else count("times", times)
        self._error = error
        self._hangs = hangs
        self._seconds = seconds
        # -- mutable state ---------------------------------------------------------------------------------
        self.happened = 0
        self._seen = 0
        self._begun = Event()
        self._released = Event()

    def __repr__(self) -> str:
        """Say what goes wrong, and how often it has."""
        what = "hangs" if self._hangs else f"raises {shown(self._error)}"
        after = " after it was carried out" if self.when == "saved" else ""
        of = "" if self.key is _EVERY else f" of key {shown(self.key)}"
        phase = "load" if self.when == "load" else "save"
        return f"<Fault: {phase} {self._nth}{of} {what}{after}, happened {self.happened} times>"

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the fault has happened; if it hangs, until something hangs in it. Switches: yes.

        Args:
            timeout: Seconds; None waits for ever.

        Returns:
            True if it has happened, False if the time has passed.
        """
        return self._begun.wait(timeout)

    def release(self) -> None:
        """End this fault's hangs: loads and saves that hang go on, and no other one hangs. Switches: no."""
        self._released.set()

    def is_due(self, keys: Iterable[Hashable]) -> bool:
        """Count a load or save of *keys*, if it is for them. Return whether it is one to go wrong."""
        if self.key is not _EVERY and self.key not in keys:
            return False
        self._seen += 1
        return self._seen >= self._nth and (self._times is None or self._seen < self._nth + self._times)

    def hang(self) -> None:
        """Wait, if this fault hangs. Switches: yes."""
        if self._hangs:
            self._happen()
            self._released.wait(self._seconds)

    def error(self) -> BaseException | None:
        """Return the error to raise, or None if the fault only hangs."""
        if self._error is None:
            return None
        self._happen()
        return self._error() if isinstance(self._error, type) else self._error.with_traceback(None)

    def go(self) -> None:
        """Hang, then raise. Switches: yes."""
        self.hang()
        error = self.error()
        if error is not None:
            raise error

    @property
    def is_of_one(self) -> bool:
        """Return whether only one key of a bulk fails."""
        return self.key is not _EVERY

    def _happen(self) -> None:
        self.happened += 1
        self._begun.set()


class _OpenOne(Around):
    """Opens the resource at one key."""

    def __init__(self, inner: Callable[[Any], Any], plan: FaultPlan) -> None:
        super().__init__(inner)
        self._plan = plan

    def __call__(self, key: Hashable) -> _Scope:
        for fault in self._plan.due_at_load((key,)):
            fault.go()
        return _Scope(self._plan, (key,), self._inner(key))


class _Scope(Around):
    """The scope of one key, around the store's."""

    def __init__(self, plan: FaultPlan, keys: tuple[Hashable, ...], inner: Any) -> None:
        super().__init__(inner)
        self._plan = plan
        self._keys = keys

    def __enter__(self) -> Any:
        return self._inner.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._inner.__exit__(kind, error, at)
            return
        due = self._plan.due_at_save(self._keys)
        try:
            for fault in due:
                if fault.when == "save":
                    fault.go()
        except BaseException as raised:
            self._leave(raised)
            raise
        self._inner.__exit__(None, None, None)
        for fault in due:
            if fault.when == "saved":
                fault.go()

    def _leave(self, reason: BaseException) -> None:
        with suppress(Exception):  # as in the library, the scope's reaction is ignored
            self._inner.__exit__(type(reason), reason, reason.__traceback__)


class _OpenMany(Around):
    """Opens the resources at many keys."""

    def __init__(self, inner: Callable[[Any], Any], plan: FaultPlan) -> None:
        super().__init__(inner)
        self._plan = plan

    def __call__(self, keys: list[Any]) -> _ScopeOfMany:
        failed: dict[Hashable, BaseException] = {}
        for fault in self._plan.due_at_load(keys):
            fault.hang()
            error = fault.error()
            if error is None:
                continue
            if not (fault.is_of_one and isinstance(error, Exception)):
                raise error
            failed.setdefault(fault.key, error)
        return _ScopeOfMany(self._plan, tuple(keys), self._inner(keys), failed)


class _ScopeOfMany(_Scope):
    """The scope of many keys, around the store's."""

    def __init__(
        self, plan: FaultPlan, keys: tuple[Hashable, ...], inner: Any, failed: dict[Hashable, BaseException]
    ) -> None:
        super().__init__(plan, keys, inner)
        self._failed = failed
        self._resources: Any = None

    def __enter__(self) -> Any:
        self._resources = self._inner.__enter__()
        if isinstance(self._resources, MutableMapping):  # else the library reports the fault
            self._resources.update(self._failed)
        return self._resources

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._inner.__exit__(kind, error, at)
            return
        bulk: Any = current_batch().bulk
        due = self._plan.due_at_save(tuple(bulk))
        lost: dict[Any, Exception] = {}
        try:
            self._go(due, "save", lost)
        except BaseException as raised:
            self._leave(raised)
            raise
        batches = {
            id(bulk[key]) for key in lost
        }  # keys that an operation connects have the same one, and are lost together
        for key in [key for key in bulk if id(bulk[key]) in batches]:
            del bulk[key]
            self._resources.pop(key, None)
        if bulk:
            lost |= self._save()
        else:
            self._leave(NothingToSave())
        self._go([fault for fault in due if fault.key not in lost], "saved", lost)
        if lost:
            raise PartlySaved(lost)

    def _go(self, due: list[Fault], when: When, lost: dict[Any, Exception]) -> None:
        """Make the faults *due* at *when* happen; note errors of single keys in *lost*."""
        for fault in due:
            if fault.when != when:
                continue
            fault.hang()
            error = fault.error()
            if error is None:
                continue
            if not (fault.is_of_one and isinstance(error, Exception)):
                raise error
            lost.setdefault(fault.key, error)

    def _save(self) -> dict[Any, Exception]:
        try:
            self._inner.__exit__(None, None, None)
        except PartlySaved as partly:
            return dict(partly.errors)
        return {}
