"""A store, its callers and a processor in virtual time, with all that can go wrong, and what has to hold all the same.

A `World` has one `Store` and one processor at a time (a `Life`). Each `run` of a caller is a `Call`. What the store
sees of a batch is a `Story`, and each load of it, up to its save, is a `Visit`. What must not be is written down in
`World.violations`, since whoever sees it first may be a greenlet whose exceptions the library answers with.
"""

from __future__ import annotations

import gc
import random
import traceback
import weakref
from collections import defaultdict, deque
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from itertools import islice, takewhile
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import gevent
from gevent import Greenlet, GreenletExit

from geventbatch import (
    BatchAborted,
    BatchError,
    BatchTimeout,
    Conflict,
    LoadFailed,
    NotSaved,
    OperationCancelled,
    Processor,
    ProcessorOverloaded,
    ProcessorStopped,
    Rejected,
    SaveFailed,
    current_batch,
)
from geventbatch._core import process
from geventbatch._core.hub_turns import pace
from geventbatch.errors import CannotUndo, Undecided
from geventbatch.testing import virtual_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch import Batch, MetricSubscription

KEYS = ("a", "b", "c")

MARK: ContextVar[object] = ContextVar("MARK", default=None)
"""A caller's own in operations, a batch's own in loads and saves."""

HANG = 5.0
"""Virtual seconds; longer than any deadline."""

SECONDS = {"yield": 0.0, "short": 0.01, "long": 0.3, "hang": HANG}
"""Ways to wait."""

WORK = {"work": 0.002, "toil": 0.05, "grind": 2.0}
"""Ways to keep the processor busy without a yield, the last one past any deadline."""

CLEANUP = 0.7
"""Seconds for which what was interrupted may go on waiting."""

LONGEST_BACKOFF = 0.1

POLL = 0.01
"""Seconds in which stop() looks again whether those that run alone have ended, maybe in other threads."""

_ROUNDING = 1e-6
_PAUSES = 1e-3  # for the library's turns on the hub, a microsecond each

_REPORTED = (
    ProcessorStopped,
    ProcessorOverloaded,
    OperationCancelled,
    BatchAborted,
    LoadFailed,
    SaveFailed,
    BatchTimeout,
)


class Refused(Exception):
    """An operation raises it before it has changed anything."""


class HalfWay(Exception):
    """An operation raises it in the middle of its change, and leaves a mess behind."""


class Flushed(Exception):
    """The operation had the store send what was before it, which was refused."""


class StoreError(Exception):
    """The store, or what waits inside of an operation, has failed."""


class Collapse(BaseException):
    """What no `except Exception` sees."""


class Brief:
    """Shows of its fields what is not the default, so that a failing example is short."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # of Hypothesis
        printer.text(str(self))

    def __str__(self) -> str:
        changed = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        shown = [f"{one.name}={changed[one.name]!r}" for one in fields(self) if changed[one.name] != one.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class Act(Brief):
    """How a load, an operation, a save or the leaving of a scope goes: it waits, does its work, waits again, ends."""

    first: str = ""
    end: str = "ok"
    guard: str = ""  # what it does when a wait is interrupted: nothing, "swallow", "cleanup" or "convert"
    last: str = ""


QUICK = Act()


@dataclass(frozen=True)
class Choices(Brief):
    """How a processor is made, and how long its store takes when nothing is planned."""

    min_duration: float = 0.0
    max_duration: float = 1.0
    workers: int = 1
    form: Literal["scope", "steps", "undoes", "pair", "bulk"] = "scope"
    copying: Literal["default", "own", "none"] = "default"  # of the resource, where its scope has no `restore`
    narrow: bool = False  # Refused is a clean error; by default there are none
    max_batches: int | None = None
    max_batch_size: int | None = None
    max_pending: int | None = None
    max_attempts: int = 5
    numbering: bool = False  # a worker_number_for_key that switches
    load: Act = QUICK
    save: Act = QUICK


@dataclass(eq=False, slots=True, weakref_slot=True)
class Resource:
    """What a load gives: a copy of the saved identities, and the version that they had."""

    of: Callable[[], list[Visit]]  # written in C: no copy is made of it, and what it has at hand is not undone
    entries: list[int]
    version: int

    @property
    def visit(self) -> Visit:
        return self.of()[0]


class Mark:
    """A value of a context variable."""


@dataclass(eq=False, slots=True)
class Story:
    """A batch, as the store sees it."""

    batch: Batch
    key: str
    alone: bool
    began: float
    spent_before: float
    mark: Mark = field(default_factory=Mark)
    # -- mutable state -------------------------------------------------------------------------------------
    spent: float = 0.0  # by its own code
    loaded_tick: int = 0  # of its first load; 0 is never
    opened: float = 0.0  # when its first operation came, as far as is known
    active: int = 0  # functions of the user that run
    loading: bool = False  # one of them a load
    interrupted: bool = False  # by the deadline
    answered: bool = False  # somebody knows the outcome
    conflict_at: float | None = None
    visit: Visit | None = None  # the latest one
    calls: dict[int, Call] = field(default_factory=dict)  # that were started
    errors: list[BaseException] = field(default_factory=list)  # of its loads and saves
    settled: set[int] = field(default_factory=set)  # calls whose outcome is certain, whatever becomes of the rest
    unclear: set[int] = field(default_factory=set)  # those that are out, and settled if their part is the one at hand
    parted: bool = False  # the store has refused to save all at once, or cannot copy: then a save may be of a part
    stepwise: bool = False  # the latest visit is judged step by step

    def apply_again(self, culprit: int | None = None) -> None:
        """Those behind a culprit that were thrown out may have raised for what it had made; steps judge all anew."""
        numbers = list(self.calls)  # in the order of the batch, as they were started
        for number in numbers[0 if culprit is None else numbers.index(culprit) + 1 :]:
            if number not in self.settled and number not in self.unclear:
                self.calls[number].out = False

    def end_part(self, last: Call, *, settled: bool) -> None:
        """All up to *last* are through, if it is *settled*; who is out may be so too, which is not told here."""
        calls = list(self.calls.values())
        behind = calls.index(last) + 1
        if settled:
            self.settled.update(call.number for call in calls[:behind])
        through = [*calls[:behind], *takewhile(lambda call: call.out, calls[behind:])]  # its part may be longer
        self.unclear.update(call.number for call in through if call.out)

    def meet_conflict(self, now: float) -> None:
        """Somebody else has written: all that were started are applied again."""
        self.conflict_at = now
        self.apply_again()


@dataclass(eq=False, slots=True)
class Visit:
    """A load, and what follows up to the save."""

    story: Story
    loaded: list[int] = field(default_factory=list)
    applied: list[Call] = field(default_factory=list)  # each once, in the order in which they were applied first
    returned: set[int] = field(default_factory=set)  # calls
    offending: list[Call] = field(default_factory=list)  # what they made is refused by the store
    trespassing: list[Call] = field(default_factory=list)  # they did what they may not
    may_be_saved: bool = False  # its save has begun, and met no conflict
    saved: bool = False

    @property
    def completed(self) -> int:
        return len(self.returned)

    def expected(self, before: Call | None = None) -> list[int]:
        """What has to be in the resource: for an operation that is applied, or is applied again, and at the end."""
        calls = self.applied[: self.applied.index(before)] if before in self.applied else self.applied
        return self.loaded + [call.number for call in calls if call.number in self.returned]


@dataclass(eq=False)
class Call:
    """One `run` of one caller."""

    life: Life
    number: int
    key: str
    acts: tuple[Act, ...]  # of its attempts; the last one goes on
    patience: float | None  # seconds until its own Timeout fires
    start_timeout: float | None
    mark: Mark = field(default_factory=Mark)
    # -- mutable state -------------------------------------------------------------------------------------
    greenlet: Greenlet[..., None] | None = None
    timer: gevent.Timeout | None = None
    sequence: int = 0  # when it came; 0 before it has called run
    came: float = 0.0
    after_stop: bool = False
    alone: bool = False
    starts: int = 0
    story: Story | None = None
    visit: Visit | None = None  # in which it was applied last
    last: object = None  # what it returned in its last attempt
    raised: BaseException | None = None  # or raised
    out: bool = False  # it has raised, and may be out until somebody else has written
    doomed: bool = False  # a load failed while it waited
    fate: str = ""  # "saved", "raised", "left", "safe" or "unknown"

    @property
    def waiting(self) -> bool:
        return bool(self.sequence) and not self.fate

    def __str__(self) -> str:
        return f"operation {self.number} on {self.key!r} ({', '.join(map(str, self.acts))})"


class Change:
    """The operation of a call: it adds its identity to the resource, in its own way."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self, resource: Resource, mark: Mark) -> object:
        return self.call.life.apply(self.call, resource, mark)


class Scope:
    """The store in the `open_resource` form."""

    def __init__(self, life: Life, key: str) -> None:
        self.life = life
        self.key = key

    def __enter__(self) -> Resource:
        self.resource = self.life.load(self.key)
        return self.resource

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> bool:
        if error is None:
            self.life.save(self.key, self.resource)
            return False
        return self.life.leave(self.key, self.resource)


class UndoingScope(Scope):
    """One that brings its resource back."""

    first: Resource | None = None

    def __enter__(self) -> Resource:
        resource = super().__enter__()
        self.first = self.life.copy_of(resource)
        return resource

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> bool:
        self.first = None  # no cycle
        return super().__exit__(kind, error, tb)

    def checkpoint(self) -> object:
        self.life.undo(self.key)
        return self.life.copy_of(self.resource)

    def restore(self, checkpoint: Any) -> Resource:
        self.life.undo(self.key)
        before: Any = self.first if checkpoint is None else checkpoint
        self.resource = self.life.copy_of(before)
        return self.resource


class StepScope(Scope):
    """One that can be judged step by step, and that looks at what operations do."""

    steps = True
    kept: Resource | None

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> bool:
        self.kept = None  # no cycle
        return super().__exit__(kind, error, tb)

    def begin_steps(self) -> None:
        self.resource.visit.story.stepwise = True
        self.resource.visit.story.apply_again()
        self.kept = self.life.copy_of(self.resource)
        self.life.step(self.key, "begin_steps", self.resource)

    def keep(self) -> None:
        self.life.step(self.key, "keep", self.resource)
        self.kept = self.life.copy_of(self.resource)

    def undo(self) -> Resource:
        assert self.kept is not None
        self.resource = self.life.copy_of(self.kept)
        self.life.step(self.key, "undo", self.resource)
        return self.resource

    def operation_raised(self, error: BaseException) -> NotSaved | None:
        return Undecided("of what was before") if isinstance(error, Flushed) else None

    def operation_returned(self) -> NotSaved | None:
        return self.life.look(self.resource.visit)


class Store:
    """The saved identities of each key, with a version that tells when somebody else has written."""

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self.entries: dict[str, list[int]] = {key: [] for key in KEYS}
        self.versions = dict.fromkeys(KEYS, 0)

    def write(self, key: str, resource: Resource) -> None:
        if resource.version != self.versions[key]:
            raise Conflict(f"{key!r} is at {self.versions[key]}, and not at {resource.version} any more")
        self.entries[key] = list(resource.entries)
        self.versions[key] += 1

    def write_foreign(self, key: str) -> None:
        self.entries[key].append(-1)
        self.versions[key] += 1


class World:
    """Virtual time, the store and a processor. The caller of its methods is the main greenlet."""

    def __init__(self, seed: int) -> None:
        random.seed(seed)  # of the backoff
        self._time = virtual_time(seed)
        self.clock = self._time.__enter__()
        self.hub: Any = gevent.get_hub()
        vars(self.hub)["handle_error"] = self._note_error
        _forget_the_past()
        Greenlet.add_spawn_callback(self._note_spawn)
        self.store = Store()
        self.refs: list[weakref.ref[Any]] = []
        # -- mutable state ---------------------------------------------------------------------------------
        self.violations: list[str] = []
        self.workers: list[Greenlet[..., Any]] = []  # all that the library has spawned
        self.numbers = 0  # calls ever made
        self.ticks = 0  # what happens in one moment has an order too
        self.spent = 0.0  # by everybody, without a yield
        self.loads: defaultdict[str, deque[Act]] = defaultdict(deque)  # planned
        self.saves: defaultdict[str, deque[Act]] = defaultdict(deque)
        self.leaves: defaultdict[str, deque[Act]] = defaultdict(deque)
        self.steps: defaultdict[str, deque[Act]] = defaultdict(deque)
        self.undos: defaultdict[str, deque[Act]] = defaultdict(deque)
        self.closing = False  # nobody waits any more
        self.atomic = False  # nothing may run now
        self._spawning = False
        self.life: Life

    def tick(self) -> int:
        self.ticks += 1
        return self.ticks

    def wrong(self, what: str) -> None:
        self.violations.append(f"at {self.clock.now()}: {what}")

    def check(self) -> None:
        assert not self.violations, "\n".join(self.violations)

    def begin(self, choices: Choices) -> None:
        self.life = self.make_life(choices)

    def make_life(self, choices: Choices) -> Life:
        return Life(self, choices)

    def spawn(self, function: Any, *args: Any) -> Greenlet[..., Any]:
        self._spawning = True
        try:
            return gevent.spawn(function, *args)
        finally:
            self._spawning = False

    def live_workers(self) -> list[Greenlet[..., Any]]:
        self.workers = [worker for worker in self.workers if not worker.dead]
        return self.workers

    def spend(self, seconds: float) -> None:
        self.spent += seconds
        self.clock.spend(seconds)

    @contextmanager
    def no_switch(self, what: str) -> Iterator[None]:
        ticks, self.atomic = self.ticks, True
        try:
            yield
        finally:
            self.atomic = False
        if ticks != self.ticks:
            self.wrong(f"{what} has switched")

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        spent = -1.0
        while spent != self.spent:  # then the library takes turns on the hub, by tiny timers
            spent = self.spent
            self.clock.advance(_PAUSES)
        self.life.check_settled()
        self.check()

    def turn(self, turns: int) -> None:
        for _ in range(turns):
            gevent.sleep(0)
        self.check()

    def kill(self, greenlets: list[Any], number: int) -> None:
        if greenlets:
            greenlets[number % len(greenlets)].kill(block=False)

    def renew(self, choices: Choices) -> None:
        """Begin a new processor when the old one has stopped."""
        self._wait_for(self.life.is_idle, "a caller waits for ever after stop()")
        self.life.begin_stop()
        self.life.check_saved()
        if not self.life.quiet:
            self.wrong("stop() returns False, though everything has ended")
        self.check()
        self.life.forget()
        self.life = self.make_life(choices)

    def finish(self) -> None:
        """Let everything end by itself, then stop."""
        self._wait_for(self.life.is_idle, "a caller waits for ever")
        self.advance(30.0)  # surplus workers end
        if len(self.live_workers()) > self.life.shards() and not self.life.quiet:
            self.wrong(f"{len(self.workers)} workers have been idle for 30 seconds")
        stopper = self.life.stop(None)
        self._wait_for(lambda: stopper.dead, "stop() waits for ever")
        self.life.check_saved()
        self.check()
        self.check_left_over()

    def _wait_for(self, done: Any, otherwise: str) -> None:
        for _ in range(400):
            self.advance(HANG)
            if done():
                return
        self.wrong(otherwise)
        self.check()

    def check_left_over(self) -> None:
        """Find nothing that outlives the callers, while the processor is still there."""
        processor = self.life.processor
        if self.live_workers():
            self.wrong(f"workers are left over: {self.workers}")
        if self.clock.timers:
            self.wrong(f"{self.clock.timers} timers are left over")
        self.life.forget()
        if any(ref() is not None for ref in self.refs):
            gc.collect()
        left = [ref() for ref in self.refs if ref() is not None]
        if left:
            self.wrong(f"{len(left)} references are left over, such as {left[0]!r}; the processor is {processor!r}")
        self.check()

    def close(self) -> None:
        """End whatever is still there, after a failure."""
        self.closing = True
        for _ in range(100):
            left = [one for one in (*self.life.greenlets(), *self.workers) if not one.dead]
            if not left:
                break
            gevent.killall(left, block=False)
            self.clock.advance(HANG)
        self.life.forget()
        Greenlet.remove_spawn_callback(self._note_spawn)
        del vars(self.hub)["handle_error"]
        self._time.__exit__(None, None, None)
        _forget_the_past()

    def _note_spawn(self, greenlet: Greenlet[..., Any]) -> None:
        if not self._spawning:
            self.workers.append(greenlet)

    def _note_error(self, context: object, kind: Any, error: Any, tb: Any) -> None:
        if not self.closing and not issubclass(kind, GreenletExit):
            self.wrong(f"{context!r} failed: {''.join(traceback.format_exception(kind, error, tb))}")


def _forget_the_past() -> None:
    """Begin as a process does: what an earlier example left in the library must not change this one."""
    pace.forget()
    pace._iteration = -1
    process.running.clear()


class Life:
    """A processor, from its making to the end of its stop."""

    def __init__(self, world: World, choices: Choices) -> None:
        self.world = world
        self.choices = choices
        self.clean_errors: tuple[type[BaseException], ...] = (Refused,) if choices.narrow else ()
        self.processor = self._make()
        # -- mutable state ---------------------------------------------------------------------------------
        self.metrics: MetricSubscription | None = self.processor.subscribe_batch_metrics()
        self.calls: list[Call] = []
        self.callers: dict[Any, Call] = {}  # by greenlet
        self.stories: dict[int, Story] = {}  # by the identity of their batch
        self.visits: dict[str, Visit] = {}  # the latest one of each key, batching on
        self.newest: dict[str, int] = defaultdict(int)  # the highest sequence that was started
        self.seen: dict[int, BaseException] = {}  # errors that callers got
        self.stoppers: dict[Any, float] = {}  # greenlets that wait in stop, and when they should return
        self.worn: list[Any] = []  # greenlets that a deadline has interrupted
        self.stopping = False
        self.quiet = False  # stop has returned True
        self.quiet_since = inf
        self.idle_since = inf  # nobody waits and nothing runs
        self.idle_tick = 0

    def _make(self) -> Processor[Resource]:
        choices = self.choices
        options: dict[str, Any] = {
            name: getattr(choices, name)
            for name in (
                "min_duration",
                "max_duration",
                "workers",
                "max_batches",
                "max_batch_size",
                "max_pending",
                "max_attempts",
            )
        }
        if choices.numbering:
            options["worker_number_for_key"] = self.number
        if choices.form == "pair":
            options |= {"load_resource": self.load, "save_resource": self.save}
        elif choices.form == "bulk":  # of one key each, so that keys do not share a deadline or a kill
            options |= {"load_resources": self.load_one, "save_resources": self.save_one, "max_bulk": 1}
        else:
            options["open_resource"] = self.open
        if choices.narrow:
            options["clean_errors"] = self.clean_errors
        if choices.copying != "default":
            options["copy_resource"] = self.copy_of if choices.copying == "own" else None
        return Processor(**options)

    def shards(self) -> int:
        return self.choices.workers

    def number(self, key: str, workers: int) -> int:
        gevent.sleep(0)
        return KEYS.index(key) % workers

    def open(self, key: str) -> Scope:
        forms = {"steps": StepScope, "undoes": UndoingScope}
        return forms.get(self.choices.form, Scope)(self, key)

    def load_one(self, keys: list[str]) -> dict[str, Any]:
        (key,) = keys
        return {key: self.load(key)}

    def save_one(self, resources: dict[str, Any]) -> None:
        ((key, resource),) = resources.items()
        self.save(key, resource)

    def is_idle(self) -> bool:
        return not any(call.waiting for call in self.calls) and not any(story.active for story in self.stories.values())

    def greenlets(self) -> list[Greenlet[..., Any]]:
        return [*self.callers, *self.stoppers]

    def forget(self) -> None:
        """Let go of all that one call or one batch has made."""
        self.calls.clear()
        self.callers.clear()
        self.stories.clear()
        self.visits.clear()
        self.seen.clear()
        self.stoppers.clear()
        self.worn.clear()
        self.metrics = None

    # -- callers ------------------------------------------------------------------------------------------

    def call(self, key: str, acts: tuple[Act, ...], patience: float | None, start_timeout: float | None) -> None:
        self.world.numbers += 1
        call = Call(self, self.world.numbers, key, acts, patience, start_timeout)
        self.world.refs.append(weakref.ref(call.mark))
        call.greenlet = self.world.spawn(self._run, call)
        self.calls.append(call)
        self.callers[call.greenlet] = call

    def _run(self, call: Call) -> None:
        operation = Change(call)
        self.world.refs.append(weakref.ref(operation))
        MARK.set(call.mark)
        call.timer = gevent.Timeout(call.patience)
        call.timer.start()
        call.came = self.world.clock.now()
        call.after_stop = self.stopping
        call.alone = not self.processor.batching
        call.sequence = self._moment("a caller")
        try:
            value = self.processor.run(call.key, operation, call.mark, start_timeout=call.start_timeout)
        except BaseException as error:
            self._moment("a caller")
            self._judge(call, error)
        else:
            self._moment("a caller")
            self._returned(call, value)
        finally:
            call.timer.close()

    def _moment(self, who: str) -> int:
        if self.world.atomic:
            self.world.wrong(f"{who} ran in the middle of what must not switch")
        return self.world.tick()

    def _returned(self, call: Call, value: object) -> None:
        call.fate = "saved"
        self._know_outcome(call)
        if call.after_stop:
            self.world.wrong(f"{call} was admitted after stop()")
        if value is None or value is not call.last:
            self.world.wrong(f"{call} was answered {value!r}, but has returned {call.last!r} last")
        if call.number not in self.world.store.entries[call.key]:
            self.world.wrong(f"{call} was answered, but is not saved")

    def _judge(self, call: Call, error: BaseException) -> None:
        if error is call.timer or isinstance(error, GreenletExit):
            call.fate = "left"
        elif call.alone and isinstance(error, gevent.Timeout) and call.story and error in call.story.errors:
            call.fate = "left"  # taken for a Timeout of the caller's own
        elif error is call.raised:
            call.fate = "raised"
            self._know_outcome(call)
            # One that is out is in no later attempt, and is answered after the last.
            visit = call.story.visit if call.story and call.out else call.visit
            settled = call.story is not None and call.number in call.story.settled | call.story.unclear
            if visit is None or (visit.completed and not visit.saved and not settled):
                self.world.wrong(f"{call} was answered with its own {error!r} before the save")
        elif type(error) in _REPORTED and isinstance(error, BatchError):
            self._reported(call, error)
        else:
            self.world.wrong(f"{call} was answered with {error!r}")
            call.fate = "unknown"
        if call.fate not in {"left", "raised"}:
            self._check_own(call, error)
        if call.after_stop and call.fate != "left" and type(error) is not ProcessorStopped:
            self.world.wrong(f"{call} came after stop(), and was answered with {error!r}")

    def _check_own(self, call: Call, error: BaseException) -> None:
        if id(error) in self.seen:
            self.world.wrong(f"{call} was given an exception that another caller has too: {error!r}")
        self.seen[id(error)] = error

    def _know_outcome(self, call: Call) -> None:
        if call.story is not None:
            call.story.answered = True

    def _reported(self, call: Call, error: BatchError) -> None:
        call.fate = "safe" if error.retry_safe else "unknown"
        wrong = self._contradiction(call, error)
        if isinstance(error, BatchAborted):
            self._know_outcome(call)
            if call.story is not None and call.number in call.story.settled:
                wrong = "it had its outcome already"
        if wrong:
            self.world.wrong(f"{call} was answered with {error!r}: {wrong}")
        if error.retry_safe and call.number in self.world.store.entries[call.key]:
            self.world.wrong(f"{call} was answered with {error!r}, retry_safe, but is saved")

    def _contradiction(self, call: Call, error: BatchError) -> str:
        """Say what is wrong with *error*, if anything, as an outcome of *call*."""
        story = call.story
        if not error.retry_safe and not (story and story.visit and self._may_be_saved(call, story.visit)):
            return "certainly nothing was saved"
        if isinstance(error, BatchAborted):
            return self._contradiction_of_batch(call, error)
        if call.starts or not error.retry_safe:
            return f"it has been started {call.starts} times"
        if isinstance(error, OperationCancelled):
            early = call.start_timeout is None or self.world.clock.now() < call.came + call.start_timeout - _ROUNDING
            return "its start_timeout has not passed" if early or not isinstance(error, TimeoutError) else ""
        if isinstance(error, ProcessorStopped):
            return "" if self.stopping else "nobody has called stop()"
        most = self.choices.max_pending
        pending = sum(1 for _ in islice((other for other in self.calls if other.waiting), most))  # looks no further
        return f"only {pending} are pending" if most is None or pending < most else ""

    def _may_be_saved(self, call: Call, visit: Visit) -> bool:
        """Whether it was being saved: who is in a later part was not, and was not applied in that visit."""
        return visit.may_be_saved and (call.visit is visit or call.out)

    def _contradiction_of_batch(self, call: Call, error: BatchAborted) -> str:
        cause = error.__cause__
        if error.key != call.key or cause is None:
            return f"its key is {error.key!r}, its cause {cause!r}"
        if isinstance(error, BatchTimeout):
            if not isinstance(error, TimeoutError) or error.retry_safe != (error.phase != "save"):
                return f"its phase is {error.phase!r}"
        elif isinstance(error, SaveFailed):
            # Who waits behind one that had the batch begin again has not started yet.
            known = [one for story in self.stories.values() for one in story.errors]
            known = known if call.story is None else call.story.errors
            of_a_step = isinstance(cause, NotSaved) and cause.__cause__ in known
            if error.retry_safe != isinstance(cause, NotSaved) or not (cause in known or of_a_step):
                return f"its cause is {cause!r}"
        elif isinstance(error, LoadFailed):
            # Out of attempts, a Conflict of a load is a failed load only then: who came while it backed off waits too.
            backed_off = isinstance(cause, Conflict) and any(cause in story.errors for story in self.stories.values())
            if not (call.doomed or call.alone or call.starts or backed_off or self.choices.numbering):
                return "it came after that load"
            return "" if error.retry_safe else "nothing can have been saved"
        return ""

    # -- the store ----------------------------------------------------------------------------------------

    def _story(self, key: str) -> Story:
        batch = current_batch()
        story = self.stories.get(id(batch))
        if story is None:
            caller = self.callers.get(gevent.getcurrent())
            story = Story(batch, key, caller is not None, self.world.clock.now(), self.world.spent)
            if gevent.getcurrent() in self.worn:
                self.world.wrong(f"a worker is used again, though its last batch was interrupted: {story.key!r}")
            self.stories[id(batch)] = story
            if caller is not None:
                caller.story = story
        if batch.key != key or story.key != key or batch.remaining() < 0.001:
            self.world.wrong(f"current_batch() is {batch!r} for {key!r}")
        return story

    def _enter(self, story: Story, what: str) -> None:
        """Begin a function of the user: nothing else of the key may run, nothing at all after an outcome or a stop."""
        self._moment(what)
        if self.quiet:
            self.world.wrong(f"{what} of {story.key!r} after stop() has returned True")
        if what != "leaving" and (story.answered or story.interrupted):
            self.world.wrong(f"{what} of {story.key!r} after the outcome of its batch was fixed")
        running = [other for other in self.stories.values() if other.active and not other.alone]
        if not story.alone and any(other.key == story.key for other in running):
            self.world.wrong(f"{what} of {story.key!r} while another one of the key runs")
        if not story.alone and what != "load" and self.visits.get(story.key) is not story.visit:
            self.world.wrong(f"{what} of {story.key!r} in a batch that was superseded")
        most = self.choices.max_batches
        if not story.alone and most is not None and len(running) >= most:
            self.world.wrong(f"{what} of {story.key!r} makes {len(running) + 1} batches at once")
        story.active += 1

    def _wait(self, story: Story, way: str, guard: str) -> None:
        try:
            if way in SECONDS and not self.world.closing:
                gevent.sleep(SECONDS[way])
            elif way in WORK:
                story.spent += WORK[way]
                self.world.spend(WORK[way])
        except BaseException as error:
            self._note_interruption(story, error)
            if self.world.closing or not guard:
                raise
            if guard == "swallow":
                return
            if guard == "convert":
                raise StoreError("interrupted") from error
            self._clean_up(story)
            raise

    def _clean_up(self, story: Story) -> None:
        try:
            gevent.sleep(CLEANUP)
        except BaseException as error:
            self._note_interruption(story, error)
            raise

    def _has_start_timeout_passed(self, caller: Call, story: Story) -> bool:
        """Whether it may be interrupted where it runs alone: its operation has not started, and is too late."""
        if caller.start_timeout is None or story.calls:
            return False
        return self.world.clock.now() >= caller.came + caller.start_timeout - _ROUNDING

    def _note_interruption(self, story: Story, error: BaseException) -> None:
        caller = self.callers.get(gevent.getcurrent())
        own = caller is not None and (error is caller.timer or self._has_start_timeout_passed(caller, story))
        if isinstance(error, gevent.Timeout) and not own:
            story.interrupted = True
            self.worn.append(gevent.getcurrent())
            if self.world.clock.now() < story.began + self.choices.max_duration - _ROUNDING:
                self.world.wrong(f"{story.key!r} was interrupted before its deadline")
            if story.loading:
                self._doom(story)

    def load(self, key: str) -> Resource:
        story = self._story(key)
        self._enter(story, "load")
        story.loading = True
        if story.visit is not None and story.visit.applied and not story.visit.completed:  # nothing was to be saved
            story.end_part(story.visit.applied[-1], settled=False)
        visit = story.visit = Visit(story)
        story.stepwise = False
        if not story.alone:
            self.visits[key] = visit
        act = self._plan(self.world.loads, key, self.choices.load)
        store = self.world.store
        visit.loaded = list(store.entries[key])
        resource = Resource([visit].copy, list(store.entries[key]), store.versions[key])
        self.world.refs.append(weakref.ref(resource))
        try:
            if MARK.get() not in {None, story.mark}:
                self.world.wrong(f"load of {key!r} sees another context")
            MARK.set(story.mark)
            self._wait(story, act.first, act.guard)
            self._end(story, act.end)
        except BaseException as error:
            story.errors.append(error)
            if isinstance(error, Conflict):
                story.meet_conflict(self.world.clock.now())
            elif not story.interrupted and not isinstance(error, GreenletExit):
                self._doom(story)
            raise
        finally:
            story.loading = False
            story.active -= 1
        story.loaded_tick = story.loaded_tick or self.world.tick()
        return resource

    def _doom(self, story: Story) -> None:
        """The load has failed: nobody who waits for the key now may ever be applied."""
        for call in self.calls:
            admitted = call.waiting and not call.alone and not self.choices.numbering
            if admitted and not story.alone and call.key == story.key and not call.starts:
                call.doomed = True

    def _end(self, story: Story, end: str) -> None:
        error = _error(end)
        if error is not None:
            raise error

    def save(self, key: str, resource: Resource) -> None:
        story = self._story(key)
        self._enter(story, "save")
        resource.visit.may_be_saved = True
        act = self._plan(self.world.saves, key, self.choices.save)
        end, _, when = act.end.partition(" ")
        try:
            self._check_save(story, resource)
            self._wait(story, act.first, act.guard)
            if when != "after":
                self._end(story, end)
            self._check_constraint(story, resource.visit)
            self.world.store.write(key, resource)
            self._wait(story, act.last, act.guard)
            self._end(story, end)
            resource.visit.saved = True
            if not story.interrupted:
                story.end_part(resource.visit.applied[-1], settled=True)
        except BaseException as error:
            story.errors.append(error)
            if isinstance(error, (Conflict, Rejected)):
                if isinstance(error, Conflict):
                    story.meet_conflict(self.world.clock.now())
                resource.visit.may_be_saved = story.interrupted  # then the outcome was fixed before
            raise
        finally:
            story.active -= 1

    def _check_constraint(self, story: Story, visit: Visit) -> None:
        """Refuse what an offending operation made, and know who is found out by it."""
        if not visit.offending:
            return
        story.parted = True
        offence = StoreError("an operation offends")
        if visit.completed == 1 and not story.interrupted:
            (culprit,) = visit.offending
            culprit.raised = offence
            story.settled.add(culprit.number)
            story.apply_again(culprit.number)
            story.end_part(culprit, settled=False)  # if nothing else is left of it
            visit.returned.clear()  # what is left has nothing to be saved
        raise Rejected("a constraint") from offence

    def copy_of(self, resource: Resource) -> Resource:
        copy = Resource(resource.of, list(resource.entries), resource.version)
        self.world.refs.append(weakref.ref(copy))
        return copy

    def step(self, key: str, what: str, resource: Resource) -> None:
        """Do a step of the scope, which is refused if it has to keep what offends."""
        story = self._story(key)
        self._enter(story, what)
        act = self._plan(self.world.steps, key, QUICK) if what != "undo" else QUICK
        visit = resource.visit
        try:
            if visit is not story.visit or not story.stepwise:
                self.world.wrong(f"{what} of {key!r} in an attempt that is not judged step by step")
            self._wait(story, act.first, act.guard)
            self._end(story, act.end)
            if what == "keep":
                self._check_step(visit)
        except BaseException as error:
            story.errors.append(error)
            if isinstance(error, Conflict):
                story.meet_conflict(self.world.clock.now())
            raise
        finally:
            story.active -= 1

    def undo(self, key: str) -> None:
        """Do what a scope does to undo, or cannot do."""
        act = self._plan(self.world.undos, key, QUICK)
        story = self.stories[id(current_batch())]
        if act.first in WORK:
            story.spent += WORK[act.first]
            self.world.spend(WORK[act.first])
        try:
            self._end(story, act.end)
        except BaseException:
            story.parted = True  # without a copy, what has returned is saved first
            raise

    def _check_step(self, visit: Visit) -> None:
        if visit.offending:
            (culprit,) = visit.offending
            self._refuse(culprit, visit)
            visit.offending.clear()
            raise Rejected("a constraint") from culprit.raised

    def look(self, visit: Visit) -> NotSaved:
        culprit = visit.trespassing.pop()
        self._refuse(culprit, visit)
        culprit.out = not visit.story.stepwise
        verdict = Rejected("it may not do that")
        verdict.__cause__ = culprit.raised
        return verdict

    def _refuse(self, culprit: Call, visit: Visit) -> None:
        culprit.raised, culprit.last = StoreError("it offends"), None
        visit.returned.discard(culprit.number)

    def _check_save(self, story: Story, resource: Resource) -> None:
        visit = resource.visit
        if MARK.get() is not story.mark:
            self.world.wrong(f"save of {story.key!r} sees another context than its load")
        if visit is not story.visit or visit.saved:
            self.world.wrong(f"save of {story.key!r} with a resource of another load")
        if not visit.completed:
            self.world.wrong(f"save of {story.key!r} though no operation has completed")
        if resource.entries != visit.expected():
            self.world.wrong(f"save of {story.key!r} with {resource.entries}, in place of {visit.expected()}")
        started = [call for call in story.calls.values() if call.number not in story.settled]
        if any(call not in started for call in visit.applied):
            self.world.wrong(f"save of {story.key!r} with an operation that has its outcome")
        left_out = [call for call in started if call not in visit.applied and not call.out]
        if left_out and not story.parted:
            self.world.wrong(f"save of {story.key!r} without {left_out[0]}, which was started")
        deadline = story.began + self.choices.max_duration + self._paused(story) - story.spent
        if self.world.clock.now() > deadline + _PAUSES:
            self.world.wrong(f"save of {story.key!r} after its deadline")

    def _paused(self, story: Story) -> float:
        """For how long the library may have paused the batch: while other code was busy."""
        return self.world.spent - story.spent_before

    def leave(self, key: str, resource: Resource) -> bool:
        story = self._story(key)
        self._enter(story, "leaving")
        act = self._plan(self.world.leaves, key, QUICK)
        try:
            self._wait(story, act.first, act.guard)
            if act.end == "suppress":
                return True
            self._end(story, act.end)
            return False
        except BaseException as error:
            story.errors.append(error)
            raise
        finally:
            story.active -= 1

    def _plan(self, plans: dict[str, deque[Act]], key: str, otherwise: Act) -> Act:
        planned = plans.get(key)
        return planned.popleft() if planned else otherwise

    # -- operations ---------------------------------------------------------------------------------------

    def apply(self, call: Call, resource: Resource, mark: Mark) -> object:
        story = self._story(call.key)
        self._enter(story, "operation")
        try:
            self._check_apply(call, story, resource, mark)
            act = call.acts[min(call.starts, len(call.acts) - 1)]
            call.starts += 1
            call.last, call.raised, call.out = None, None, False
            visit = resource.visit
            if call not in visit.applied:
                visit.applied.append(call)
            visit.returned.discard(call.number)
            visit.offending = [other for other in visit.offending if other is not call]
            return self._change(call, story, resource, act)
        finally:
            story.active -= 1

    def _change(self, call: Call, story: Story, resource: Resource, act: Act) -> object:
        try:
            self._wait(story, act.first, act.guard)
            resource.entries.append(call.number)
            self._wait(story, act.last, act.guard)
            if act.end == "half-way":
                self._make_a_mess(call, resource)
            self._end_operation(call, act.end)
        except BaseException as error:
            if isinstance(error, self.clean_errors) and call.number in resource.entries:
                resource.entries.remove(call.number)
            elif isinstance(error, (Exception, gevent.Timeout)):
                call.out = self._may_be_out(story, error)
            call.raised = error
            raise
        if act.end == "offend":
            resource.visit.offending.append(call)
        elif act.end == "trespass" and self.choices.form == "steps":
            current_batch().ask_scope()
            resource.visit.trespassing.append(call)
        resource.visit.returned.add(call.number)
        call.last = object()
        return call.last

    def _may_be_out(self, story: Story, error: BaseException) -> bool:
        """Whether an operation that raised *error* may be left out, since it cannot be undone."""
        choices = self.choices
        if choices.form == "steps":
            return not story.stepwise and not isinstance(error, Flushed)
        return choices.form == "undoes" or choices.copying == "none"

    def _make_a_mess(self, call: Call, resource: Resource) -> None:
        if call.number % 3 == 0:
            resource.entries.clear()
        elif call.number % 3 == 1:
            resource.entries = [-2, *resource.entries]
        resource.version -= 1

    def _end_operation(self, call: Call, end: str) -> None:
        if end == "stop":
            self.begin_stop()
        elif end == "stop and wait":
            self.refused("stop()", self.processor.stop)
            self.stopping = True
        elif end == "query":
            if self.choices.form == "steps" and call.visit is not None and call.visit.offending:
                raise Flushed
        elif end == "run inside":
            self.refused("run()", lambda: self.processor.run(call.key, lambda _: None))
        else:
            error = _error(end)
            if error is not None:
                raise error

    def refused(self, what: str, function: Any) -> None:
        with self.world.no_switch(what):
            try:
                function()
            except RuntimeError:
                return
            self.world.wrong(f"{what} inside a batch has raised nothing")

    def _check_apply(self, call: Call, story: Story, resource: Resource, mark: Mark) -> None:  # noqa: C901 - a list
        wrong = self.world.wrong
        if call.fate and not (call.fate == "left" and call.starts):
            wrong(f"{call} is applied, but is {call.fate!r} already")
        if call.doomed:
            wrong(f"{call} is applied, but its load has failed")
        if call.number in story.settled:
            wrong(f"{call} is applied again, but has its outcome")
        if resource.entries != resource.visit.expected(call):
            wrong(f"{call} is applied to {resource.entries}, in place of {resource.visit.expected(call)}")
        if call in resource.visit.applied and call.number not in resource.visit.returned:
            wrong(f"{call} is applied again to what it was applied to, though it has raised")
        if call.after_stop:
            wrong(f"{call} is applied, but came after stop()")
        if call.number in resource.entries:
            wrong(f"{call} is applied twice to one resource")
        if MARK.get() is not call.mark or mark is not call.mark:
            wrong(f"{call} sees another context than its caller's")
        MARK.set(story.mark)
        if resource.visit is not story.visit:
            wrong(f"{call} is applied to what another batch has loaded")
        if call.story not in {None, story}:
            wrong(f"{call} is applied in a second batch")
        if (
            resource.visit.applied
            and call not in resource.visit.applied
            and resource.visit.applied[-1].sequence > call.sequence
            and not self.choices.numbering
        ):
            wrong(f"{call} is applied behind operation {resource.visit.applied[-1].number}, which came later")
        call.story = story
        call.visit = resource.visit
        if call.number not in story.calls:
            self._check_first(call, story)
        story.calls[call.number] = call
        story.unclear.discard(call.number)

    def _check_first(self, call: Call, story: Story) -> None:
        wrong = self.world.wrong
        most = self.choices.max_batch_size
        if not story.calls:
            story.opened = call.came
        elif call.sequence > story.loaded_tick and not self.choices.numbering and call.came >= self._window_end(story):
            wrong(f"{call} came after the window, but is applied in the batch")
        if most is not None and len(story.calls) >= most:
            wrong(f"{call} is applied in a batch that has {most} operations")
        if not call.alone and not self.choices.numbering:
            if call.sequence < self.newest[call.key]:
                wrong(f"{call} is started after one that came later")
            self.newest[call.key] = call.sequence

    def _window_end(self, story: Story) -> float:
        window = self.choices.min_duration
        return story.opened + window + _ROUNDING if window else 0.0

    # -- stopping -----------------------------------------------------------------------------------------

    def begin_stop(self) -> None:
        """Stop without a wait: anywhere."""
        self.stopping = True
        with self.world.no_switch("stop(timeout=0)"):
            if self.processor.stop(timeout=0):
                self._note_quiet()

    def begin_stop_in_hub(self) -> None:
        self.world.hub.loop.run_callback(self.begin_stop)

    def stop(self, timeout: float | None) -> Greenlet[..., Any]:
        greenlet = self.world.spawn(self._stop, timeout)
        self.stoppers[greenlet] = inf
        return greenlet

    def _stop(self, timeout: float | None) -> None:
        self.stopping = True
        self.stoppers[gevent.getcurrent()] = inf if timeout is None else self.world.clock.now() + timeout
        stopped = self.processor.stop(timeout)
        if stopped:
            self._note_quiet()
        elif timeout is None:
            self.world.wrong("stop() has returned False without a timeout")

    def _note_quiet(self) -> None:
        self.quiet = True
        self.quiet_since = min(self.quiet_since, self.world.clock.now())
        running = [story.key for story in self.stories.values() if story.active]
        if running:
            self.world.wrong(f"stop() has returned True, but a batch of {running[0]!r} runs")

    # -- what has to hold ---------------------------------------------------------------------------------

    def check_settled(self) -> None:
        """Nothing is ready to run now: whoever still waits has a reason to."""
        now = self.world.clock.now()
        waiting = [call for call in self.calls if call.waiting]
        for call in waiting:
            self._check_waiting(call, now)
        most = self.choices.max_pending
        if most is not None and len(waiting) > most:
            self.world.wrong(f"{len(waiting)} are pending, but max_pending is {most}")
        self._check_stoppers(now)
        if self.quiet and waiting:
            self.world.wrong(f"stop() has returned True, but {waiting[0]} was not answered")
        self._check_keys(waiting, now)
        waits = any(not greenlet.dead for greenlet in self.stoppers)
        if self.quiet and not waits and (self.world.live_workers() or self.world.clock.timers):
            self.world.wrong(
                f"stop() has returned True, but {self.world.workers} or {self.world.clock.timers} timers live"
            )

    def _check_stoppers(self, now: float) -> None:
        """Find no stop() that waits longer than it was told, or for nobody."""
        if not self.is_idle() or self._backing_off(now):
            self.idle_since = inf
        elif self.idle_since == inf or self.idle_tick != self.world.ticks:
            self.idle_since, self.idle_tick = now, self.world.ticks
        for greenlet, latest in self.stoppers.items():
            if not greenlet.dead and now > min(latest, self.quiet_since + POLL, self.idle_since + POLL) + _ROUNDING:
                self.world.wrong("a stop() waits though its time is up, or everything has ended")

    def _backing_off(self, now: float) -> set[str]:
        since = now - LONGEST_BACKOFF - _ROUNDING
        return {
            story.key for story in self.stories.values() if story.conflict_at is not None and story.conflict_at >= since
        }

    def _check_waiting(self, call: Call, now: float) -> None:
        story = call.story
        if call.alone:
            return
        if call.doomed:
            self.world.wrong(f"{call} was not answered, but its load has failed")
        start_timeout = None if self.choices.numbering else call.start_timeout  # it counts from the admission
        if start_timeout is not None and not call.starts and now > call.came + start_timeout + _ROUNDING:
            self.world.wrong(f"{call} was not answered, but its start_timeout has passed")
        if story is not None:
            if story.answered or story.interrupted:
                self.world.wrong(f"{call} was not answered, but its batch has an outcome")
            if now > story.began + self.choices.max_duration + self._paused(story) + _PAUSES:
                self.world.wrong(f"{call} was not answered, but the deadline of its batch has passed")

    def _check_keys(self, waiting: list[Call], now: float) -> None:
        """Find no key whose callers wait for nobody."""
        active = {story.key for story in self.stories.values() if story.active and not story.alone}
        live = active | {call.key for call in waiting if not call.alone}
        live |= {
            story.key for story in self.stories.values() if now <= story.began + self.choices.min_duration + _ROUNDING
        }
        backing_off = self._backing_off(now)
        most = self.choices.max_batches
        crowded = most is not None and len(live | backing_off) > most
        for call in waiting:
            if call.alone:
                if (call.story is None or not call.story.active) and call.key not in backing_off:
                    self.world.wrong(f"{call} waits for nobody, alone")
            elif call.key not in active | backing_off and not crowded:
                window = 0.0 if self.stopping else self.choices.min_duration
                late = now > call.came + window + _ROUNDING and not self.choices.numbering
                if late or not call.starts:
                    self.world.wrong(f"{call} waits for nobody")

    def check_saved(self) -> None:
        """Compare what is saved with what the callers were told."""
        for call in self.calls:
            if call.sequence and not call.fate:
                self.world.wrong(f"{call} was never answered")
        calls = {call.number: call for call in self.calls}
        for key, entries in self.world.store.entries.items():
            self._check_entries(key, [calls[number] for number in entries if number in calls])

    def _check_entries(self, key: str, saved: list[Call]) -> None:
        for call in saved:
            if call.key != key or call.fate not in {"saved", "unknown", "left"} or not call.starts:
                self.world.wrong(f"{call} is saved, but was {call.fate}")
        if len(set(saved)) != len(saved):
            self.world.wrong(f"an operation is saved twice at {key!r}: {[call.number for call in saved]}")
        missing = [call for call in self.calls if call.key == key and call.fate == "saved" and call not in saved]
        if missing:
            self.world.wrong(f"{missing[0]} was answered, but is not saved")
        came = [call.sequence for call in saved if not call.alone]
        if came != sorted(came) and not self.choices.numbering:
            self.world.wrong(f"the operations at {key!r} are saved in another order than they came")


def _error(end: str) -> BaseException | None:
    kinds: dict[str, Any] = {
        "refuse": Refused,
        "half-way": HalfWay,
        "fail": StoreError,
        "cannot": CannotUndo,
        "not saved": NotSaved,
        "conflict": Conflict,
        "timeout": gevent.Timeout,
        "collapse": Collapse,
        "exit": GreenletExit,
    }
    kind = kinds.get(end)
    return None if kind is None else kind()
