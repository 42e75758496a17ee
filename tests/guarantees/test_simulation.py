"""Deterministic simulation: whatever users, stores and clocks do, and in whatever order, the guarantees hold.

A failure prints the steps that led to it, and a line ``@reproduce_failure(...)``: put that above `Simulation` and run
this file again. ``GEVENTBATCH_EXAMPLES=50000`` tries more than the usual number of examples; each run tries other ones.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.support.simulation import KEYS, Act, Choices, World

if TYPE_CHECKING:
    from collections.abc import Iterator

    _Calls = list[tuple[str, tuple[Act, ...], float | None, float | None]]

EXAMPLES = int(os.environ.get("GEVENTBATCH_EXAMPLES", "1000"))

PART = 250
"""Examples of one test: Hypothesis keeps each of them in memory until the test ends."""

STEPS = 45

GUARDS = ("", "swallow", "cleanup", "convert")


def _acts(first: tuple[str, ...], ends: tuple[str, ...], last: tuple[str, ...] = ("",)) -> list[Act]:
    return [
        Act(one, end, guard, other)
        for end in ends
        for other in last
        for one in first
        for guard in (GUARDS if {"long", "hang"} & {one, other} else GUARDS[:1])
    ]


PACES = [Act(), Act("yield"), *[Act("short")] * 4]

LOADS = st.sampled_from(
    [
        *_acts(("long", "hang"), ("ok",)) * 4,
        *_acts(("", "yield", "short", "long"), ("fail", "conflict", "timeout", "collapse", "exit")),
        *_acts(("toil", "grind"), ("ok", "fail")),
    ]
)

SAVES = st.sampled_from(
    [
        *_acts(("", "short"), ("conflict", "not saved", "fail", "fail after", "ok")) * 3,
        *_acts(("", "long", "hang"), ("ok", "fail after"), ("", "long", "hang")),
        *_acts(("", "yield", "long"), ("timeout", "collapse", "exit", "timeout after", "collapse after", "exit after")),
        *_acts(("toil", "grind"), ("ok", "conflict")),
    ]
)

LEAVES = st.sampled_from(
    _acts(("", "yield", "short", "long", "hang", "grind"), ("ok", "fail", "suppress", "timeout", "collapse", "exit"))
)

STEPS_ACTS = st.sampled_from(
    [
        *[Act()] * 20,
        *_acts(("yield", "short", "long", "hang", "grind"), ("ok",)),
        *_acts(("", "short"), ("conflict", "conflict", "not saved", "fail", "timeout", "collapse", "exit")),
    ]
)

UNDOS = st.sampled_from(
    [*[Act()] * 8, *_acts(("", "work", "toil"), ("ok", "cannot", "cannot", "fail", "collapse", "exit"))]
)

OFFENCES = ("ok", "ok", "offend", "offend", "query", "query", "trespass", "half-way", "half-way", "refuse")

_PLAIN = _acts(("", "yield", "short", "work"), ("ok",))

_OPERATIONS = [
    *_acts(("", "yield", "short"), ("refuse", "half-way", "half-way", "timeout")) * 3,
    *_acts(("",), ("ok", "half-way"), ("yield", "long", "hang")),
    *_acts(("long", "hang"), ("ok", "refuse", "half-way")),
    *_acts(("toil", "grind"), ("ok",)) * 4,
    *_acts(("", "short"), ("offend",)) * 4,
    *_acts(("", "short"), ("query", "trespass")) * 2,
    *_acts(("", "short"), ("collapse", "exit", "run inside")),
    *_acts(("",), ("stop", "stop and wait")),
]

OPERATIONS = st.sampled_from(
    [(act,) for act in _PLAIN * 160]
    + [(act,) for act in _OPERATIONS]
    + [(act, Act()) for act in _OPERATIONS]
    + [(Act(), act) for act in _OPERATIONS]
)

PATIENCE = st.sampled_from([None] * 42 + [0.0, 0.005, 0.01, 0.02, 0.05, 0.3])

CALLS = st.lists(
    st.tuples(st.sampled_from(KEYS + KEYS[:1] * 3), OPERATIONS, PATIENCE, PATIENCE), min_size=1, max_size=6
)

CHOICES = st.builds(
    Choices,
    min_duration=st.sampled_from([0.0, 0.0, 0.05, 0.2, 0.2]),
    max_duration=st.sampled_from([1.0, 0.25]),
    workers=st.sampled_from([1, 2]),
    form=st.sampled_from(["scope", "steps", "undoes", "pair", "bulk"]),
    copying=st.sampled_from(["default", "default", "own", "none"]),
    narrow=st.booleans(),
    max_batches=st.sampled_from([None, None, 1, 2]),
    max_batch_size=st.sampled_from([None, None, 1, 3]),
    max_pending=st.sampled_from([None, None, None, 6]),
    max_attempts=st.sampled_from([5, 2, 1]),
    numbering=st.sampled_from([False] * 5 + [True]),
    load=st.sampled_from(PACES),
    save=st.sampled_from(PACES),
)

ANY_OF = st.integers(0, 15)


_begun = count(1)


def _forget_garbage() -> None:
    """Make the collection at the end of an example look at nothing older, and at times collect that too."""
    if next(_begun) % 50 == 0:
        gc.unfreeze()
        gc.collect()
    gc.freeze()


def _is_stopping(simulation: Any) -> bool:
    return bool(simulation.world.life.stopping)


def _is_on(simulation: Any) -> bool:
    return not simulation.world.life.stopping


def _is_busy(simulation: Any) -> bool:
    return not simulation.world.life.quiet


def _callers(simulation: Any) -> list[Any]:
    return [call.greenlet for call in simulation.world.life.calls if not call.fate]


def _has_callers(simulation: Any) -> bool:
    return bool(_callers(simulation))


def _has_workers(simulation: Any) -> bool:
    return bool(simulation.world.live_workers())


class Simulation(RuleBasedStateMachine):
    """Each example is a process of its own, with one processor after the other."""

    @initialize(seed=st.integers(0, 2**32 - 1), choices=CHOICES)
    def begin(self, seed: int, choices: Choices) -> None:
        _forget_garbage()
        self.world = World(seed)
        self.world.begin(choices)

    @rule(calls=CALLS)
    def run(self, calls: _Calls) -> None:
        if _is_stopping(self):
            self.world.renew(self.world.life.choices)
        for key, acts, patience, start_timeout in calls:
            self.world.life.call(key, acts, patience, start_timeout)

    @precondition(_is_on)
    @rule(calls=CALLS, turns=st.integers(1, 6))
    def run_and_turn(self, calls: _Calls, turns: int) -> None:
        self.run(calls)
        self.world.turn(turns)

    @precondition(_is_on)
    @rule(key=st.sampled_from(KEYS), act=st.sampled_from(_PLAIN), number=st.sampled_from([8, 33, 100]))
    def run_many(self, key: str, act: Act, number: int) -> None:
        for _ in range(number):
            self.world.life.call(key, (act,), None, None)
        self.world.turn(1)

    @precondition(_is_on)
    @rule(key=st.sampled_from(KEYS), seconds=st.sampled_from([0.01, 0.02, 0.03]), number=st.integers(1, 3))
    def run_and_leave_as_answered(self, key: str, seconds: float, number: int) -> None:
        """With a load and a save of a hundredth each, all this falls into one moment."""
        for _ in range(number):
            self.world.life.call(key, (Act(),), None, seconds)
            self.world.life.call(key, (Act(),), seconds, None)
        self.world.advance(seconds)

    @precondition(_is_on)
    @rule(key=st.sampled_from(KEYS), culprit=st.integers(0, 3), act=SAVES)
    def run_with_a_culprit(self, key: str, culprit: int, act: Act) -> None:
        """The store refuses the four together, and something happens to the save of a later part."""
        for number in range(4):
            self.world.life.call(key, (Act(end="offend" if number == culprit else "ok"),), None, None)
        self.world.saves[key].extend([Act(), Act(), act])
        self.world.turn(2)

    @precondition(_is_on)
    @rule(key=st.sampled_from(KEYS), ends=st.lists(st.sampled_from(OFFENCES), min_size=3, max_size=8), act=STEPS_ACTS)
    def run_with_culprits(self, key: str, ends: list[str], act: Act) -> None:
        """Several of them, so that the batch goes step by step, where it can, and something happens to a step."""
        for end in ends:
            self.world.life.call(key, (Act(end=end),), None, None)
        self.world.steps[key].extend([Act(), act])
        self.world.turn(2)

    @precondition(_is_on)
    @rule(
        key=st.sampled_from(KEYS),
        ends=st.lists(st.sampled_from(("ok", "half-way", "half-way", "refuse")), min_size=3, max_size=12),
        acts=st.lists(UNDOS, max_size=3),
    )
    def run_with_raises(self, key: str, ends: list[str], acts: list[Act]) -> None:
        """Several raise, and something happens while they are undone."""
        for end in ends:
            self.world.life.call(key, (Act(end=end),), None, None)
        self.world.undos[key].extend(acts)
        self.world.turn(2)

    @precondition(_is_stopping)
    @rule(key=st.sampled_from(KEYS))
    def run_too_late(self, key: str) -> None:
        self.world.life.call(key, (Act(),), None, None)

    @precondition(_is_on)
    @rule(key=st.sampled_from(KEYS), act=LOADS)
    def plan_load(self, key: str, act: Act) -> None:
        self.world.loads[key].append(act)

    @precondition(_is_on)
    @rule(key=st.sampled_from(KEYS), act=SAVES)
    def plan_save(self, key: str, act: Act) -> None:
        self.world.saves[key].append(act)

    @precondition(_is_on)
    @rule(key=st.sampled_from(KEYS), number=st.integers(1, 5))
    def plan_contention(self, key: str, number: int) -> None:
        self.world.saves[key].extend([Act(end="conflict")] * number)

    @precondition(_is_on)
    @rule(key=st.sampled_from(KEYS), act=LEAVES)
    def plan_leave(self, key: str, act: Act) -> None:
        self.world.leaves[key].append(act)

    @rule(seconds=st.sampled_from([0.02, 0.1, 0.25, 0.5, 1.0, 3.0, 12.0]))
    def advance(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(seconds=st.sampled_from([0.0, 0.005, 0.01, 0.02, 0.04]))
    def advance_a_little(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(calls=CALLS, seconds=st.sampled_from([0.0, 0.005, 0.01, 0.02, 0.04]))
    def run_and_advance(self, calls: _Calls, seconds: float) -> None:
        self.run(calls)
        self.world.advance(seconds)

    @rule(turns=st.integers(1, 6))
    def turn(self, turns: int) -> None:
        self.world.turn(turns)

    @precondition(_has_callers)
    @rule(number=ANY_OF)
    def kill_caller(self, number: int) -> None:
        self.world.kill(_callers(self), number)

    @precondition(_has_workers)
    @rule(number=ANY_OF, seconds=st.sampled_from([0.0, 0.005, 0.02, 0.05]))
    def kill_worker(self, number: int, seconds: float) -> None:
        if seconds:
            self.world.advance(seconds)
        self.world.kill(self.world.live_workers(), number)

    @rule(key=st.sampled_from(KEYS))
    def write_foreign(self, key: str) -> None:
        self.world.store.write_foreign(key)

    @rule(seconds=st.sampled_from([0.002, 0.05, 1.5]))
    def spend(self, seconds: float) -> None:
        self.world.spend(seconds)

    @precondition(_is_on)
    @rule(on=st.sampled_from([True, True, False]))
    def switch_batching(self, on: bool) -> None:
        self.world.life.processor.batching = on

    @precondition(_is_on)
    @rule(calls=CALLS)
    def run_alone(self, calls: _Calls) -> None:
        self.switch_batching(on=False)
        self.run_and_turn(calls, 2)
        self.switch_batching(on=True)

    @precondition(_is_busy)
    @rule(timeouts=st.lists(st.sampled_from([None, 0.001, 0.1, 1.0]), min_size=1, max_size=3))
    def stop(self, timeouts: list[float | None]) -> None:
        for timeout in timeouts:
            self.world.life.stop(timeout)

    @precondition(_is_busy)
    @rule(in_hub=st.booleans())
    def stop_at_once(self, in_hub: bool) -> None:
        if in_hub:
            self.world.life.begin_stop_in_hub()
        else:
            self.world.life.begin_stop()

    @precondition(_is_stopping)
    @rule(choices=CHOICES)
    def renew(self, choices: Choices) -> None:
        self.world.renew(choices)

    def teardown(self) -> None:
        world = getattr(self, "world", None)
        if world is None:
            return
        try:
            if not world.violations:
                world.finish()
        finally:
            world.close()


@pytest.fixture
def _quiet_surroundings() -> Iterator[None]:
    """Nothing that happens by real time may change an example: no turns of the hub, no collections; no log lines, which
    keep what they tell of."""
    log = logging.getLogger("geventbatch")
    log.disabled = True
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    gc.disable()
    yield
    log.disabled = False
    gc.enable()
    sys.setswitchinterval(interval)
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # as it was before


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("_quiet_surroundings")
@pytest.mark.parametrize("part", range(-(-EXAMPLES // PART)))
def test_the_guarantees_hold_whatever_happens_in_whatever_order(part: int) -> None:
    run_state_machine_as_test(
        Simulation,
        settings=settings(
            max_examples=PART,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


_OK = (Act(),)
_CULPRIT = (Act(end="offend"),)
_SECOND = (Act(), Act(end="refuse"))
_THIRD = (Act(), *_SECOND)


@pytest.mark.usefixtures("_quiet_surroundings")
@pytest.mark.parametrize(
    ("calls", "saves"),
    [
        pytest.param([_OK, _SECOND, _OK, _OK, _CULPRIT, _OK], "ok ok conflict", id="before the last one that is saved"),
        pytest.param([_OK, _SECOND, _CULPRIT, _OK], "ok ok conflict", id="behind it"),
        pytest.param([_THIRD, _SECOND, _CULPRIT, _OK], "ok conflict", id="beside nothing that is saved"),
        pytest.param([_THIRD, _SECOND, _CULPRIT, _OK], "ok fail", id="beside nothing that is saved, before a failure"),
        pytest.param([_THIRD, _SECOND, _CULPRIT, _OK, _OK, _OK], "ok ok conflict", id="before a culprit"),
    ],
)
def test_the_simulation_knows_that_who_was_refused_is_through_with_his_part_of_the_batch(
    calls: list[tuple[Act, ...]], saves: str
) -> None:
    simulation: Any = Simulation()
    simulation.begin(seed=0, choices=Choices(copying="none"))
    for end in saves.split():
        simulation.plan_save(key="a", act=Act(end=end))
    simulation.plan_load(key="a", act=Act(first="long"))  # all come meanwhile
    for acts in calls:
        simulation.run_and_advance(calls=[("a", acts, None, None)], seconds=0.005)
    simulation.teardown()


def test_the_simulation_knows_that_what_has_returned_is_saved_first_where_a_store_cannot_copy() -> None:
    simulation: Any = Simulation()
    simulation.begin(seed=0, choices=Choices(min_duration=0.05, form="undoes"))
    for _ in range(4):
        simulation.advance(seconds=0.02)
    simulation.run_many(act=Act(), key="a", number=8)
    simulation.run_with_raises(acts=[], ends=["ok", "ok", "half-way"], key="a")
    cannot = [Act(end="cannot"), Act(), Act(end="cannot")]
    simulation.run_with_raises(acts=cannot, ends=["ok", "ok", "half-way"], key="a")
    simulation.teardown()
