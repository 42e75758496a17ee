"""For docs/watching.md: a processor's store, an application, and the folder that processes share."""

import os
import tempfile

os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")

from contextlib import contextmanager
from types import SimpleNamespace

from flask import Flask

from geventbatch import Processor

app = Flask("watching")
seats = []


@contextmanager
def store(key):
    yield seats


def check(page):
    trains, client = page["trains"], app.test_client()
    later = Processor(open_resource=store, min_duration=0, name="later")
    assert later.run("ICE 1", len) == 0
    shown = client.get("/metrics").get_data(as_text=True)
    assert 'geventbatch_operations_total{outcome="returned",processor="later"} 1.0' in shown
    assert client.get("/health/batches").json == {"problems": [], "overdue": 0}
    trains.stop()
    nobody = SimpleNamespace(pid=0)
    page["child_exit"](None, nobody)
    del os.environ["PROMETHEUS_MULTIPROC_DIR"]
    page["child_exit"](None, nobody)  # what it raised would end gunicorn's master
