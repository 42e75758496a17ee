"""For docs/tasks.md."""

import sys
from types import ModuleType

import dramatiq
import pytest
from celery import Celery
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import CurrentMessage
from huey import MemoryHuey

from geventbatch import Processor, ProcessorStopped
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.pages.trains import Base, Train, engine, run_trains

store = SQLAlchemyStore.mapped(engine, Train, by="name", idempotency=idempotency_table("tasks", Base.metadata))
trains = Processor(open_resource=store, min_duration=0, max_duration=5)
run_trains("ICE 1")
app = Celery("jobs", broker="memory://")
broker = StubBroker()
broker.add_middleware(CurrentMessage())
dramatiq.set_broker(broker)
huey = MemoryHuey()
sys.modules["jobs"] = ModuleType("jobs")
sys.modules["jobs"].huey = huey
REPLACED = {"consume(huey, workers=100)": "assert callable(consume)"}


def check(page):
    for _ in range(2):
        assert page["book"].apply(("ICE 1", 12, "Ann"), task_id="a").get() == 12

    task = page["book_by_task"].s("ICE 1", 14, "Cid")
    for _ in range(2):
        assert huey.execute(task) == 14

    message = page["book_by_message"].message("ICE 1", 13, "Bob")
    for _ in range(2):
        broker.enqueue(message)
    worker = dramatiq.Worker(broker, worker_timeout=100)
    worker.start()
    broker.join("default", fail_fast=True)
    worker.stop()  # and the processor, since the page has added the middleware
    with pytest.raises(ProcessorStopped):
        trains.run("ICE 1", Train.book, 15, "Dan")
