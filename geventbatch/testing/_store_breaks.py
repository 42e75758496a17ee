"""The checks of `store_contract` that break connections. The first line of each says what the store has to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from geventbatch.errors import BatchError
from geventbatch.testing._store_trial import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from geventbatch._processor import Processor
    from geventbatch.testing._proxy import Proxy, Rule
    from geventbatch.testing._store_trial import Trial


def nobody_is_answered_before_the_save_is(trial: Trial) -> None:
    """A caller is answered after the database has answered the save."""
    key = trial.saved_key()
    proxy, store = trial.proxied_store()
    processor = trial.processor(store)
    with proxy.hold_answer(trial.bench.save_marker) as rule:
        caller = trial.spawn(processor, key, trial.bench.add, 1)
        trial.wait_for(lambda: rule.reached() or caller.ready())
        caller.join(timeout=0.1)
        early = caller.ready()
    (answer,) = trial.answers([caller])
    trial.expect(not early, f"before the database had answered the save, the caller was answered {answer!r}")
    trial.expect_met(rule, "save_marker")
    trial.expect(answer == 11, f"an operation added 1 to 10, and was answered {answer!r}")
    trial.expect_total(key, 11, "after the answer 11")


def a_save_that_does_not_arrive_is_no_success(trial: Trial) -> None:
    """When the connection ends before the save, callers get an error, or it is saved after all."""
    _check_broken_save(trial, lambda proxy: proxy.cut_before(trial.bench.save_marker))


def a_save_whose_answer_is_lost_is_applied_once(trial: Trial) -> None:
    """When the connection ends after the save was carried out, it is no conflict, and is not applied twice."""
    _check_broken_save(trial, lambda proxy: proxy.cut_after(trial.bench.save_marker, trial.bench.save_answer))


def _check_broken_save(trial: Trial, breaks: Callable[[Proxy], Rule]) -> None:
    key = trial.saved_key()
    proxy, store = trial.proxied_store()
    processor = trial.processor(store)
    trial.run(processor, trial.saved_key(), trial.bench.add, 1)  # it has a connection, as ever but at the start
    rule = breaks(proxy)
    answer = trial.run(processor, key, trial.bench.add, 1)
    trial.expect_met(rule, "save_marker")
    trial.expect_truth(key, answer, 10)
    found = trial.bench.get(key) or 0
    answers = [trial.run(processor, key, trial.bench.add, 1) for _ in range(3)]
    trial.expect(
        answers == [found + n for n in (1, 2, 3)], f"after {found}, three operations were answered {answers!r}"
    )
    trial.expect_total(key, found + 3, "after a broken save and three good ones")


def deadlines_in_the_load_lose_no_connection(trial: Trial) -> None:
    """After deadlines in the load no connection is lost, and no late answer is taken for another one."""
    proxy, store = trial.proxied_store()
    trial.expect_as_good_as_new(store)  # and it has its connections: to make them is no part of the deadline
    hasty = trial.processor(store, max_duration=DEADLINE)
    with proxy.hold_answer(trial.bench.load_marker) as rule:
        keys, answers = _run_into_deadlines(trial, hasty)
    trial.expect_met(rule, "load_marker")
    for key, answer in zip(keys, answers, strict=True):
        trial.expect(
            isinstance(answer, BatchError) and answer.retry_safe,
            f"a load never ended; its caller was answered {answer!r}, not a BatchTimeout that is retry_safe",
        )
        trial.expect_total(key, 10, "after a deadline in the load")
    _expect_unharmed(trial, proxy, store)


def deadlines_in_the_save_are_told_as_they_are(trial: Trial) -> None:
    """After deadlines in the save nobody is told that nothing was saved while it may be; no connection is lost."""
    proxy, store = trial.proxied_store()
    trial.expect_as_good_as_new(store)  # and it has its connections: to make them is no part of the deadline
    hasty = trial.processor(store, max_duration=DEADLINE)
    with proxy.hold(trial.bench.save_marker) as rule:
        keys, answers = _run_into_deadlines(trial, hasty)
    trial.expect_met(rule, "save_marker")
    _expect_unharmed(trial, proxy, store)
    patient = trial.processor()
    for key, answer in zip(keys, answers, strict=True):
        total = trial.run(patient, key, trial.bench.add, 1)  # so that what had come late is there
        trial.expect(
            total == 11 or (total == 12 and isinstance(answer, BatchError) and not answer.retry_safe),
            f"a save met the deadline and arrived late; its caller was answered {answer!r}, the next one {total!r}",
        )
        trial.expect_total(key, total, "after a deadline in the save and one good save")


def connections_that_have_ended_cost_no_more_than_a_safe_error(trial: Trial) -> None:
    """When connections that rest have ended, the next batches take new ones; an error says that nothing was saved."""
    key = trial.saved_key()
    proxy, store = trial.proxied_store()
    processor = trial.processor(store)
    trial.expect_as_good_as_new(store)
    proxy.cut_all()
    total = 10
    answer: Any = None
    for _ in range(2 * trial.bench.max_batches + 1):
        answer = trial.run(processor, key, trial.bench.add, 1)
        trial.expect_truth(key, answer, total)
        total = trial.bench.get(key) or 0
    trial.expect(not isinstance(answer, BaseException), f"the store never recovered: the last answer is {answer!r}")
    trial.expect_as_good_as_new(store)


def _run_into_deadlines(trial: Trial, processor: Processor[Any]) -> tuple[list[Hashable], list[Any]]:
    """Have every connection interrupted, twice; return the keys, and what their callers were answered."""
    keys = [trial.saved_key() for _ in range(2 * trial.bench.max_batches)]
    rounds = keys[: trial.bench.max_batches], keys[trial.bench.max_batches :]
    return keys, [
        answer for some in rounds for answer in trial.run_all([(processor, key, trial.bench.add, 1) for key in some])
    ]


def _expect_unharmed(trial: Trial, proxy: Proxy, store: Any) -> None:
    """Fail the check unless all batches can run at once again, and no connection is left of what was interrupted.

    A store may have a connection for each greenlet. There are two processors, so that is the most there can be.
    """
    trial.expect_as_good_as_new(store)
    most = 2 * trial.bench.max_batches
    trial.wait_for(lambda: proxy.open_connections() <= most)  # a server takes its time to end one
    left = proxy.open_connections()
    trial.expect(left <= most, f"after deadlines, {left} connections are open, for {most} batches at the most")


BREAKS: Final = (
    nobody_is_answered_before_the_save_is,
    a_save_that_does_not_arrive_is_no_success,
    a_save_whose_answer_is_lost_is_applied_once,
    deadlines_in_the_load_lose_no_connection,
    deadlines_in_the_save_are_told_as_they_are,
    connections_that_have_ended_cost_no_more_than_a_safe_error,
)
