"""For docs/window.md."""

import sqlalchemy as sa

from geventbatch import Processor, current_batch
from tests.support.pages.operations import load, save

metrics = Processor().subscribe_batch_metrics()
metrics.close()
connection = sa.create_engine("sqlite://").connect()


def check(page):
    trains = page["trains"]
    assert trains.run("ICE 1", len) == 0
    assert [page["current_batch"], page["connection"]] == [current_batch, connection]
