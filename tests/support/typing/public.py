"""Read by mypy and pyright, never run: as usage.py, for what is spoken between the library, stores and frameworks."""

from typing import Any, assert_type
from wsgiref.types import WSGIApplication

import dramatiq
import redis
import sqlalchemy as sa
from django.http import HttpRequest, HttpResponse
from gevent.pywsgi import WSGIServer
from gevent.server import StreamServer

import geventbatch.integrations.celery
import geventbatch.integrations.uwsgi
from geventbatch import (
    Batch,
    BatchAborted,
    BatchError,
    BatchMetrics,
    Conflict,
    IdempotencyKeyReused,
    LoadFailed,
    MetricSubscription,
    NothingToSave,
    NotSaved,
    PartlySaved,
    Problem,
    Processor,
    Rejected,
    ResourceMissing,
    SetupProblem,
    check_setup,
    current_batch,
    stop_all,
)
from geventbatch.errors import CannotUndo
from geventbatch.integrations import opentelemetry
from geventbatch.integrations.django.middleware import ErrorAnswers as DjangoAnswers
from geventbatch.integrations.dramatiq import Stop
from geventbatch.integrations.huey import consume
from geventbatch.integrations.pywsgi import serve
from geventbatch.integrations.wsgi import Answer, ErrorAnswers
from geventbatch.scopes import Undoes
from geventbatch.stores import RedisStore, Reuse, SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from geventbatch.testing import VirtualTime, virtual_time

# What a load and a save raise, and what their callers get.

missing: LoadFailed = ResourceMissing()
refused: NotSaved = Rejected("a constraint")
conflict: NotSaved = Conflict()
partly = PartlySaved({"ICE 1": Conflict()})
PartlySaved(["ICE 1"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
not_for_callers: BatchError = Conflict()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
left_with: BatchError = NothingToSave()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


def told(error: BatchError) -> str:
    if isinstance(error, IdempotencyKeyReused):
        return error.idempotency_key
    if isinstance(error, BatchAborted):
        return repr(error.key)
    return "retry" if error.retry_safe else "look"


# The batch, inside of it.

batch = current_batch()
assert_type(batch, Batch)
batch.add_row({"any": "row"})
batch.delete()
assert_type(batch.deleted, bool)
batch.remaining(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


# The whole process, and watchers.

assert_type(stop_all(), bool)
assert_type(stop_all(timeout=0), bool)
stop_all("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
metrics = Processor().subscribe_batch_metrics()
assert_type(metrics, MetricSubscription)
metrics.close()
assert_type(check_setup(), list[SetupProblem])

# The old names, for one release: `deprecated` tells checkers of the function.

as_ever: BatchMetrics = metrics
assert_type(as_ever, MetricSubscription)
problems: list[Problem] = geventbatch.check()  # type: ignore[deprecated]  # pyright: ignore[reportDeprecated]


# Stores: of many keys, with idempotency keys.

engine = sa.create_engine("sqlite://")
outcomes = idempotency_table("outcomes", sa.MetaData())
assert_type(outcomes, sa.Table)
store = SQLAlchemyStore.documents(engine, "trains", idempotency=outcomes, idempotency_ttl=3600)
store.create_table()
assert_type(store.purge_outcomes(limit=10), int)
processor = Processor(open_resource=store)
processor.run("ICE 1", str.upper, idempotency_key="a", identified_by=("Ann", 12))
processor.run("ICE 1", str.upper, identified_by="Ann")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
keeping = RedisStore(redis.Redis(), decode=str, reuse_resource=Reuse(max_keys=10, max_age=60))
assert_type(Processor(open_resources=keeping.open_resources, max_bulk=10), Processor[Any])
assert_type(Processor(open_resources=store.open_resources), Processor[Any])
Reuse(max_key=10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
SQLAlchemyStore.documents(engine, "trains", mode="locked")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
RedisStore(redis.Redis(), idempotency_tll=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


# Integrations.


def application(wsgi: WSGIApplication) -> WSGIApplication:
    return ErrorAnswers(wsgi, retry_after=2)


class Own(ErrorAnswers):
    def answer(self, error: BatchError) -> Answer:
        return super().answer(error)


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.path)


DjangoAnswers(view)
DjangoAnswers("view")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
geventbatch.integrations.celery.stop()
geventbatch.integrations.uwsgi.stop()
assert_type(serve(WSGIServer(("127.0.0.1", 8000), spawn=10), timeout=5), bool)
serve(StreamServer(("127.0.0.1", 8000)))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def worker(broker: dramatiq.Broker, huey: Any) -> None:
    broker.add_middleware(Stop())
    consume(huey, workers=100, shutdown_timeout=30)
    consume(huey, workers="100")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Virtual time.


def test() -> None:
    with virtual_time(seed=1) as clock:
        assert_type(clock, VirtualTime)
        assert_type(clock.now(), float)


# Traces.

opentelemetry.instrument()
opentelemetry.instrument(Processor(), keys=True)
opentelemetry.instrument(keys="ICE 1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
opentelemetry.uninstrument()

# What undoes an operation that raised, in a scope written by hand.


class UndoingScope:
    """A scope of a list."""

    def __enter__(self) -> list[int]:
        self.resource = [1]
        return self.resource

    def __exit__(self, *_: object) -> None: ...

    def checkpoint(self) -> object:
        if not self.resource:
            raise CannotUndo("nothing was loaded")
        return tuple(self.resource)

    def restore(self, checkpoint: object | None) -> list[int]:
        return self.resource


undoes: Undoes[list[int]] = UndoingScope()
by_hand = Processor(open_resource=lambda key: UndoingScope(), recorded_errors=(ValueError,))
assert_type(by_hand, Processor[list[int]])
copied = Processor(load_resource=lambda key: [1], copy_resource=list[int])
uncopied = Processor(load_resource=lambda key: [1], copy_resource=None)
