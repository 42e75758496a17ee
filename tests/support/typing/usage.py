"""Read by mypy and pyright, never run: what the public names promise to a type checker.

What must be right has its type asserted. What must be refused carries both checkers' ignores, and an ignore that
nothing needs is an error: a mistake that goes through unnoticed fails the check.
"""

from collections.abc import Generator, Hashable
from contextlib import AbstractContextManager, contextmanager
from typing import assert_type

from geventbatch import (
    BatchAborted,
    BatchError,
    BatchMetric,
    BatchTimeout,
    Conflict,
    LoadFailed,
    NotSaved,
    OperationCancelled,
    Processor,
    ProcessorOverloaded,
    ProcessorStopped,
    SaveFailed,
    current_batch,
    worker_number_for_key,
)


class Train:
    """A resource."""

    def book(self, seat: int, passenger: str) -> bool:
        return bool(seat and passenger)

    def cancel(self, seat: int, reason: str = "") -> str:
        return reason or str(seat)

    def hold(self, *seats: int) -> int:
        return sum(seats)


def load(key: str) -> Train:
    return Train()


def save(key: str, train: Train) -> None:
    train.hold(len(key))


@contextmanager
def store(key: str) -> Generator[Train]:
    yield load(key)


class Store:
    def __call__(self, key: str) -> AbstractContextManager[Train]:
        return store(key)


@contextmanager
def store_many(keys: list[str]) -> Generator[dict[str, Train]]:
    yield load_many(keys)


def load_many(keys: list[str]) -> dict[str, Train]:
    return {key: load(key) for key in keys}


def load_some(keys: list[str]) -> dict[str, Train | Exception]:
    return {key: load(key) if key else KeyError(key) for key in keys}


def save_many(trains: dict[str, Train]) -> None:
    for key, train in trains.items():
        save(key, train)


def save_other(key: str, number: list[int]) -> None:
    number.append(len(key))


# The resource's type comes from the functions that make it.

assert_type(Processor(), Processor[None])
assert_type(Processor(workers=4, max_batches=None, batching=False, clean_errors=(ValueError,)), Processor[None])
assert_type(Processor(open_resource=store), Processor[Train])
assert_type(Processor(open_resource=Store(), min_duration=0, max_duration=5), Processor[Train])
assert_type(Processor(load_resource=load), Processor[Train])
assert_type(Processor(load_resource=load, save_resource=save), Processor[Train])
assert_type(Processor(open_resources=store_many, max_bulk=10), Processor[Train])
assert_type(Processor(load_resources=load_many, save_resources=save_many), Processor[Train])
assert_type(Processor(load_resources=load_some, save_resources=save_many), Processor[Train])

Processor(load_resource=load, save_resource=save_other)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
Processor(open_resource=load)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Processor(open_resource=store, load_resource=load)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
Processor(open_resources=store)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Processor(open_resources=store_many, open_resource=store)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
Processor(load_resources=load_many)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
Processor(min_durations=0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
Processor(store)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]

with Processor(open_resource=store) as entered:
    assert_type(entered, Processor[Train])


# `run` knows what the operation takes and what it returns.

processor = Processor(load_resource=load, save_resource=save)

assert_type(processor.run("k", Train.book, 12, "Ann"), bool)
assert_type(processor.run("k", Train.book, 12, "Ann", start_timeout=0.5), bool)
assert_type(processor.run("k", Train.book, 12, "Ann", idempotency_key="a"), bool)
assert_type(processor.run("k", Train.book, 12, "Ann", idempotency_key=None), bool)
assert_type(processor.run("k", Train.hold, 12, read_only=True), int)
assert_type(processor.run(("a tuple", 1), Train.book, 12, "Ann"), bool)
assert_type(processor.run("k", lambda train: train.hold(1, 2)), int)
assert_type(processor.run("k", lambda train, seat: train.book(seat, "Ann"), 12), bool)
assert_type(Processor().run("k", lambda resource: resource), None)

processor.run("k", Train.book, "12", "Ann")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run("k", Train.book, 12)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run("k", Train.book, 12, "Ann", 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run("k", Train.book, 12, passenger="Ann")  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
processor.run("k", Train.book, 12, "Ann", start_timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run("k", Train.book, 12, "Ann", idempotency_key=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run("k", Train.book, 12, "Ann", read_only="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run("k", Train.book, "12", "Ann", idempotency_key="a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run("k", str.upper)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run("k", "book")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run(["k"], Train.book, 12, "Ann")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Arguments with a default may be left out, and those of a variable number are checked one by one.

assert_type(processor.run("k", Train.cancel, 12), str)
assert_type(processor.run("k", Train.cancel, 12, "ill"), str)
assert_type(processor.run("k", Train.hold), int)
assert_type(processor.run("k", Train.hold, 1, 2, 3), int)

processor.run("k", Train.cancel, 12, 13)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run("k", Train.hold, 1, "2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# The rest of the API.

assert_type(processor.stop(), bool)
assert_type(processor.stop(timeout=0), bool)
assert_type(processor.batching, bool)
processor.batching = False
batch = current_batch()
assert_type(batch.key, Hashable)
assert_type(batch.remaining(), float)
assert_type(worker_number_for_key(("a", 1), 8), int)

subscription = processor.subscribe_batch_metrics()
assert_type(subscription.missed, int)
for metric in subscription:
    assert_type(metric, BatchMetric)
    assert_type(metric.operation_count, int)
    assert_type(metric.attempts, int)
    assert_type(metric.started_at, float)
    assert_type(metric.total_duration, float)
    assert_type(metric.error, BatchError | None)
    metric.attempts = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


# One `except` takes everything that a batch may answer, and each kind by itself is narrower.

try:
    processor.run("k", Train.book, 12, "Ann")
except (LoadFailed, SaveFailed) as failed:
    assert_type(failed, LoadFailed | SaveFailed)
except BatchTimeout as timeout:
    assert_type(timeout.retry_safe, bool)
    time_is_up: TimeoutError = timeout
    in_time: bool = timeout.phase in {"load", "operations"}
except BatchAborted as aborted:
    assert_type(aborted.retry_safe, bool)
except (OperationCancelled, ProcessorOverloaded, ProcessorStopped) as never_started:
    same: BatchError = never_started

nothing_written: NotSaved = Conflict()
