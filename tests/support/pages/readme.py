"""For README.md."""

import redis
from flask import Flask

from geventbatch import BatchError, IdempotencyKeyReused, LoadFailed, ResourceMissing, SaveFailed
from tests.support.pages.trains import Train as Mapped
from tests.support.pages.trains import TrainModel, engine

REPLACED = {
    "mapped(engine, Train": "mapped(engine, Mapped",
    "DjangoStore(Train": "DjangoStore(TrainModel",
    'create_engine("sqlite:///trains.db")': "engine",
    'documents(engine, "trains", missing': 'documents(engine, "first_trains", missing',
}
app = Flask(__name__)


def check(page):
    assert page["seat"] == "12"
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT state FROM first_trains").all() == [('{"12": "Ann"}',)]
    with app.test_request_context():
        assert page["failed"](ResourceMissing())[1] == 404
        assert page["failed"](IdempotencyKeyReused())[1] == 422
        assert page["failed"](LoadFailed(retry_safe=True))[1] == 503
        assert page["failed"](SaveFailed())[1] == 500
    assert page["BatchError"] is BatchError
    assert {page["Mapped"], page["TrainModel"]} == {Mapped, TrainModel}
    assert page["engine"] is engine
    assert page["redis"] is redis
