"""The checks of `store_contract` that break no connection. The first line of each says what the store has to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.event import Event

from geventbatch._safe_repr import shown
from geventbatch.errors import BatchError
from geventbatch.testing._store_trial import DEADLINE

if TYPE_CHECKING:
    from geventbatch.testing._store_trial import Trial

_ROUNDS: Final = 10


class _Broken(Exception):
    """What an operation raises."""


def an_answer_means_saved(trial: Trial) -> None:
    """What a caller is answered is saved by then, and the next batch loads what is saved."""
    key = trial.saved_key()
    processor = trial.processor()
    for total in range(11, 11 + _ROUNDS):
        answer = trial.run(processor, key, trial.bench.add, 1)
        trial.expect(answer == total, f"an operation added 1 to {total - 1}, and was answered {answer!r}")
        trial.expect_total(key, total, f"after the answer {total}")
    trial.bench.put(key, 100)
    answer = trial.run(processor, key, trial.bench.add, 1)
    trial.expect(answer == 101, f"another program had saved 100, an operation added 1, and was answered {answer!r}")
    trial.expect_total(key, 101, "after the answer 101")


def operations_that_arrive_together_are_all_saved(trial: Trial) -> None:
    """All operations of a batch are saved."""
    key = trial.saved_key()
    processor = trial.processor()
    answers = trial.run_all([(processor, key, trial.bench.add, 1)] * 100)
    trial.expect(answers == [*range(11, 111)], f"100 operations added 1 to 10, and were answered {answers!r}")
    trial.expect_total(key, 110, "after 100 operations")


def an_operation_that_raises_changes_nothing(trial: Trial) -> None:
    """What an operation has changed before it raised is not saved, and the others of its batch are."""
    key = trial.saved_key()
    runs = [(trial.bench.add, 1), (_add_and_raise, trial), (trial.bench.add, 1)]
    processor = trial.processor(min_duration=0.05)
    first, broken, last = trial.run_all([(processor, key, *run) for run in runs])
    trial.expect(isinstance(broken, _Broken), f"an operation raised, and its caller was answered {broken!r}")
    trial.expect((first, last) == (11, 12), f"the operations around it were answered {first!r} and {last!r}")
    trial.expect_total(key, 12, "after one operation of three had raised")


def a_batch_of_which_nothing_is_left_saves_nothing(trial: Trial) -> None:
    """A batch whose operations have all raised saves nothing, and holds nothing: the next one goes on."""
    key = trial.saved_key()
    processor = trial.processor()
    for _ in range(trial.bench.max_batches + 1):
        broken = trial.run(processor, key, _add_and_raise, trial)
        trial.expect(isinstance(broken, _Broken), f"an operation raised, and its caller was answered {broken!r}")
    trial.expect_total(key, 10, "after operations that raised")
    answer = trial.run(processor, key, trial.bench.add, 1)
    trial.expect(answer == 11, f"the next operation was answered {answer!r}, not 11")
    trial.expect_total(key, 11, "after the answer 11")


def a_deadline_between_load_and_save_saves_nothing(trial: Trial) -> None:
    """An operation that is interrupted leaves nothing: no change is saved or remembered, no connection is lost."""
    key = trial.saved_key()
    store = trial.store()
    hasty = trial.processor(store, max_duration=DEADLINE)

    def hang(resource: Any) -> None:
        trial.bench.add(resource, 1000)
        Event().wait()

    for _ in range(2):
        answer = trial.run(hasty, key, hang)
        trial.expect(
            isinstance(answer, BatchError) and answer.retry_safe,
            f"an operation never ended; its caller was answered {answer!r}, not a BatchTimeout that is retry_safe",
        )
    trial.expect_total(key, 10, "after a deadline before the save")
    processor = trial.processor(store)
    answers = [trial.run(processor, key, trial.bench.add, 1) for _ in range(_ROUNDS)]
    trial.expect(answers == [*range(11, 11 + _ROUNDS)], f"those after a deadline were answered {answers!r}")


def a_missing_resource_is_made_or_its_load_fails(trial: Trial) -> None:
    """Where there is no resource, the load fails, or a new resource is saved."""
    if trial.makes_missing():
        key = trial.new_key()
        processor = trial.processor()
        trial.run(processor, key, _add_and_raise, trial)
        answers = trial.run_all([(processor, key, trial.bench.add, 1)] * 2)
        trial.expect(answers == [1, 2], f"at a new key, two operations that add 1 were answered {answers!r}")
        trial.expect_total(key, 2, "after the answer 2")


def two_processes_lose_nothing(trial: Trial) -> None:
    """Two processes that change the same keys are both answered, and all that was answered is saved."""
    if trial.makes_missing():
        keys = [trial.new_key() for _ in range(4)]
        before = 0
    else:
        keys = [trial.saved_key() for _ in range(4)]
        before = 10
    processor = trial.processor(max_attempts=200)
    with trial.second_process() as add_there:
        theirs = add_there(keys, _ROUNDS)
        errors = trial.add_all(processor, keys, _ROUNDS)
        errors += theirs.get()
    trial.expect(not errors, f"two processes added at the same keys, and callers got {', '.join(errors)}")
    for key in keys:
        trial.expect_total(key, before + 2 * _ROUNDS, f"after two processes had each added 1 {_ROUNDS} times")


def with_batching_off_nothing_is_lost(trial: Trial) -> None:
    """With ``batching=False`` every operation loads and saves by itself, and none is lost."""
    key = trial.saved_key()
    processor = trial.processor(batching=False, max_attempts=200)
    for _ in range(3):
        answers = trial.run_all([(processor, key, trial.bench.add, 1)] * trial.bench.max_batches)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        trial.expect(not errors, f"operations that ran at once, without batching, were answered {errors!r}")
    trial.expect_total(key, 10 + 3 * trial.bench.max_batches, "after operations without batching")


def keys_are_apart(trial: Trial) -> None:
    """Batches of several keys run side by side, and each one saves its own resource."""
    trial.expect_as_good_as_new(trial.store())


def what_somebody_else_writes_between_load_and_save_is_not_lost(trial: Trial) -> None:
    """What another program writes between a batch's load and its save is kept: by a lock, or by a replay."""
    key = trial.saved_key()
    with trial.paused(trial.processor(), key) as caller:
        writer = gevent.spawn(trial.bench.put, key, 100)
        writer.join(timeout=0.3)  # a lock has it wait for the batch
    (answer, _) = trial.answers([caller, writer])
    found = trial.bench.get(key)
    trial.expect(
        (answer, found) in {(101, 101), (11, 100)},
        f"another program saved 100 while a batch was adding 1 to 10; that was answered {answer!r}, and {found} is "
        "saved; allowed are 101 and 101, or 11 and 100",
    )


def two_stores_lose_nothing(trial: Trial) -> None:
    """Two batches of one key, over two stores, both between load and save: one waits for the other, or is replayed."""
    keys = [trial.saved_key(0)]
    if trial.makes_missing():
        keys.append(trial.new_key())  # both insert the first resource
    one, other = trial.processor(), trial.processor()
    for key in keys:
        with trial.paused(one, key) as first:
            second = trial.spawn(other, key, trial.bench.add, 1)
            second.join(timeout=0.3)  # a lock has it wait for the first one
        answers = trial.answers([first, second])
        trial.expect(
            sorted(map(repr, answers)) == ["1", "2"],
            f"two batches of {shown(key)} added 1 to 0, and were answered {answers!r}",
        )
        trial.expect_total(key, 2, f"after the answers {answers!r}")


def a_state_that_the_database_refuses_fails_its_culprit_alone(trial: Trial) -> None:
    """A violated constraint is the error of the operation that has violated it; the others are saved."""
    key = trial.saved_key()
    runs: list[tuple[Any, ...]] = [(trial.bench.add, 1), (trial.bench.add, 1), (trial.bench.violate,)]
    processor = trial.processor(min_duration=0.05)
    first, second, culprit = trial.run_all([(processor, key, *run) for run in runs])
    trial.expect(
        (first, second) == (11, 12), f"the operations before the culprit were answered {first!r} and {second!r}"
    )
    trial.expect(
        isinstance(culprit, Exception) and not isinstance(culprit, BatchError),
        f"an operation violated a constraint, and its caller was answered {culprit!r}, not the database's error",
    )
    trial.expect_total(key, 12, "after one operation of three had violated a constraint")


def _add_and_raise(resource: Any, trial: Trial) -> None:
    trial.bench.add(resource, 1000)
    raise _Broken


ALWAYS: Final = (
    an_answer_means_saved,
    operations_that_arrive_together_are_all_saved,
    an_operation_that_raises_changes_nothing,
    a_batch_of_which_nothing_is_left_saves_nothing,
    a_deadline_between_load_and_save_saves_nothing,
    a_missing_resource_is_made_or_its_load_fails,
    two_processes_lose_nothing,
    with_batching_off_nothing_is_lost,
)
SIDE_BY_SIDE: Final = (
    keys_are_apart,
    what_somebody_else_writes_between_load_and_save_is_not_lost,
    two_stores_lose_nothing,
)
CONSTRAINTS: Final = (a_state_that_the_database_refuses_fails_its_culprit_alone,)
