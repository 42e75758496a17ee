"""Deterministic simulation of operations across keys, as `test_simulation` does for one key.

``GEVENTBATCH_EXAMPLES=20000`` tries so many examples, in place of 500.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.guarantees.test_simulation import (
    ANY_OF,
    LEAVES,
    PACES,
    _acts,
    _callers,
    _forget_garbage,
    _has_callers,
    _has_workers,
    _is_busy,
    _is_on,
    _is_stopping,
    _quiet_surroundings,
)
from tests.support.simulation import Act
from tests.support.simulation_across.reached import REACHED, missing
from tests.support.simulation_across.world import KEYS, AcrossChoices, AcrossWorld

__all__ = ["_quiet_surroundings"]

_Calls = list[tuple[str, tuple[Act, ...], float | None, float | None]]

EXAMPLES = int(os.environ.get("GEVENTBATCH_EXAMPLES", "500"))

PART = 250

STEPS = 40

LOADS = st.sampled_from(
    [
        *_acts(("long", "hang"), ("ok",)) * 4,
        *_acts(("", "yield", "short", "long"), ("fail", "conflict", "timeout", "collapse", "exit")),
        *_acts(("", "short", "long"), ("some",)) * 8,
        *_acts(("toil", "grind"), ("ok", "fail")),
    ]
)

SAVES = st.sampled_from(
    [
        *_acts(("", "short"), ("conflict", "not saved", "fail", "fail after", "ok", "partly", "partly")) * 3,
        *_acts(("", "long", "hang"), ("ok", "fail after"), ("", "long", "hang")),
        *_acts(("", "yield", "long"), ("timeout", "collapse", "exit", "timeout after", "collapse after", "exit after")),
        *_acts(("toil", "grind"), ("ok", "conflict")),
    ]
)

_PLAIN = _acts(("", "yield", "short", "work"), ("ok",))

_OPERATIONS = [
    *_acts(("", "yield", "short"), ("refuse", "half-way", "half-way", "timeout")) * 3,
    *_acts(("",), ("ok", "half-way"), ("yield", "long", "hang")),
    *_acts(("long", "hang"), ("ok", "refuse", "half-way")),
    *_acts(("toil", "grind"), ("ok",)) * 4,
    *_acts(("", "short"), ("offend",)) * 4,
    *_acts(("", "short"), ("collapse", "exit", "run inside")),
    *_acts(("",), ("stop", "stop and wait")),
]

OPERATIONS = st.sampled_from(
    [(act,) for act in _PLAIN * 100 + _acts(("", "short"), ("read",)) * 20]
    + [(act,) for act in _OPERATIONS]
    + [(act, Act()) for act in _OPERATIONS]
    + [(Act(), act) for act in _OPERATIONS]
)

PATIENCE = st.sampled_from([None] * 30 + [0.0, 0.005, 0.01, 0.02, 0.05, 0.3])

NAMED = st.one_of(
    st.sampled_from(KEYS),
    st.permutations(KEYS).map(lambda keys: "".join(keys[:2])),
    st.permutations(KEYS).map(lambda keys: "".join(keys[:3])),
    st.permutations(KEYS).map(lambda keys: "".join(keys[:5])),
    st.sampled_from(KEYS[1:]).map(lambda key: "M" + key),
)

CALLS = st.lists(st.tuples(NAMED, OPERATIONS, PATIENCE, PATIENCE), min_size=1, max_size=8)

CHOICES = st.builds(
    AcrossChoices,
    min_duration=st.sampled_from([0.0, 0.0, 0.0, 0.2]),
    max_duration=st.sampled_from([1.0, 0.25]),
    workers=st.sampled_from([1, 1, 3]),
    copying=st.sampled_from(["default", "default", "none"]),
    narrow=st.booleans(),
    opens=st.sampled_from(["by hand", "by a pair", "by a store", "by a store"]),
    max_bulk=st.sampled_from([5, 6, 100]),
    max_batches=st.sampled_from([None, None, 1, 2]),
    max_batch_size=st.sampled_from([None, None, 1, 3]),
    max_pending=st.sampled_from([None, None, None, 6]),
    max_attempts=st.sampled_from([5, 2, 1]),
    numbering=st.sampled_from([False] * 7 + [True]),
    load=st.sampled_from(PACES),
    save=st.sampled_from(PACES),
)


class AcrossSimulation(RuleBasedStateMachine):
    """Each example is a process of its own, with one processor after the other."""

    @initialize(seed=st.integers(0, 2**32 - 1), choices=CHOICES)
    def begin(self, seed: int, choices: AcrossChoices) -> None:
        _forget_garbage()
        self.world = AcrossWorld(seed)
        self.world.begin(choices)

    @property
    def life(self) -> Any:
        return self.world.life

    @rule(calls=CALLS)
    def run(self, calls: _Calls) -> None:
        if _is_stopping(self):
            self.world.renew(self.life.choices)
        for keys, acts, patience, start_timeout in calls:
            self.life.call_across(tuple(keys), acts, patience, start_timeout)

    @precondition(_is_on)
    @rule(calls=CALLS, turns=st.integers(1, 6))
    def run_and_turn(self, calls: _Calls, turns: int) -> None:
        self.run(calls)
        self.world.turn(turns)

    @rule(calls=CALLS, seconds=st.sampled_from([0.0, 0.005, 0.01, 0.02, 0.04]))
    def run_and_advance(self, calls: _Calls, seconds: float) -> None:
        self.run(calls)
        self.world.advance(seconds)

    @precondition(_is_on)
    @rule(number=st.sampled_from([8, 40]), named=st.lists(NAMED, min_size=1, max_size=5))
    def run_many(self, number: int, named: list[str]) -> None:
        for place in range(number):
            self.life.call_across(tuple(named[place % len(named)]), (Act(),), None, None)
        self.world.turn(1)

    @precondition(_is_on)
    @rule(
        calls=st.lists(
            st.tuples(NAMED, st.sampled_from(("ok", "half-way", "half-way", "refuse", "offend"))),
            min_size=3,
            max_size=12,
        )
    )
    def run_with_culprits(self, calls: list[tuple[str, str]]) -> None:
        for keys, end in calls:
            self.life.call_across(tuple(keys), (Act(end=end),), None, None)
        self.world.turn(2)

    @precondition(_is_on)
    @rule(keys=st.permutations(KEYS), act=SAVES)
    def run_apart(self, keys: list[str], act: Act) -> None:
        """Several components, of which the store saves all but one."""
        for first in range(0, len(keys), 2):
            self.life.call_across(tuple(keys[first : first + 2]), (Act(),), None, None)
        self.world.saves[""].extend([Act(end="partly"), act])
        self.world.turn(2)

    @precondition(_is_on)
    @rule(keys=st.permutations(KEYS), pauses=st.lists(st.sampled_from([0.005, 0.01, 0.02]), min_size=2, max_size=5))
    def run_behind(self, keys: list[str], pauses: list[float]) -> None:
        """Batches of one key in one bulk: later ones may take operations while those of earlier ones are at work."""
        busy, *others = keys[:4]
        self.life.call_across((busy,), (Act(first="short"),), None, None)
        self.world.turn(2)
        for pause in pauses:
            for key in others:
                if self.world.numbers % 2:  # the next call would be one of `run_across`
                    self.life.call_across((busy,), (Act(),), None, None)
                self.life.call_across((key,), (Act(first="short"),), None, None)
            self.world.advance(pause)

    @precondition(_is_on)
    @rule(calls=CALLS, fails=st.sets(st.sampled_from(KEYS), min_size=1, max_size=3), first=st.booleans())
    def run_with_failing_keys(self, calls: _Calls, fails: set[str], first: bool) -> None:
        """The load of some keys fails: the first one, or the one of a replay."""
        self.life.fails = fails
        if not first:
            self.world.saves[""].append(Act(end="conflict"))
            self.world.loads[""].append(Act())
        self.world.loads[""].append(Act(end="some"))
        self.run(calls)
        self.world.turn(2)

    @precondition(_is_stopping)
    @rule(keys=NAMED)
    def run_too_late(self, keys: str) -> None:
        self.life.call_across(tuple(keys), (Act(),), None, None)

    @precondition(_is_on)
    @rule(act=LOADS, fails=st.sets(st.sampled_from(KEYS), min_size=1, max_size=3))
    def plan_load(self, act: Act, fails: set[str]) -> None:
        self.life.fails = fails
        self.world.loads[""].append(act)

    @precondition(_is_on)
    @rule(act=SAVES)
    def plan_save(self, act: Act) -> None:
        self.world.saves[""].append(act)

    @precondition(_is_on)
    @rule(number=st.integers(1, 5))
    def plan_contention(self, number: int) -> None:
        self.world.saves[""].extend([Act(end="conflict")] * number)

    @precondition(_is_on)
    @rule(act=LEAVES)
    def plan_leave(self, act: Act) -> None:
        self.world.leaves[""].append(act)

    @rule(seconds=st.sampled_from([0.0, 0.005, 0.01, 0.02, 0.04, 0.1, 0.25, 0.5, 1.0, 3.0, 12.0]))
    def advance(self, seconds: float) -> None:
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
        self.world.write_foreign(key)

    @rule(seconds=st.sampled_from([0.002, 0.05, 1.5]))
    def spend(self, seconds: float) -> None:
        self.world.spend(seconds)

    @precondition(_is_on)
    @rule(on=st.sampled_from([True, True, False]))
    def switch_batching(self, on: bool) -> None:
        self.life.processor.batching = on

    @precondition(_is_busy)
    @rule(timeouts=st.lists(st.sampled_from([None, 0.001, 0.1, 1.0]), min_size=1, max_size=3))
    def stop(self, timeouts: list[float | None]) -> None:
        for timeout in timeouts:
            self.life.stop(timeout)

    @precondition(_is_busy)
    @rule(in_hub=st.booleans())
    def stop_at_once(self, in_hub: bool) -> None:
        if in_hub:
            self.life.begin_stop_in_hub()
        else:
            self.life.begin_stop()

    @precondition(_is_stopping)
    @rule(choices=CHOICES)
    def renew(self, choices: AcrossChoices) -> None:
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


def run_examples(number: int, *, shrink: bool = True) -> None:
    """Run so many examples, in parts: Hypothesis keeps each example in memory until its part ends.

    To *shrink* one that fails may take minutes.
    """
    for begun in range(0, number, PART):
        run_state_machine_as_test(
            AcrossSimulation,
            settings=settings(
                max_examples=min(PART, number - begun),
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                print_blob=True,
                phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )


def run_behind_for_certain() -> None:
    """Run an example that joins a batch of one key in a bulk while another one's operations are at work."""
    world = AcrossWorld(0)
    world.begin(AcrossChoices(max_batches=1))
    life: Any = world.life
    try:
        for _ in range(10):
            for key in "abc":
                if world.numbers % 2:  # the next call would be one of `run_across`
                    life.call_across(("M",), (Act(),), None, None)
                life.call_across((key,), (Act(first="short"),), None, None)
            world.advance(0.005)
        world.finish()
    finally:
        world.close()


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("_quiet_surroundings")
def test_the_guarantees_hold_across_keys_whatever_happens_in_whatever_order() -> None:
    REACHED.clear()
    run_behind_for_certain()
    run_examples(EXAMPLES)
    assert not missing(), "no example has reached these"
