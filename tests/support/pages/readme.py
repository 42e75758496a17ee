"""For README.md."""

import redis

from tests.support.pages.trains import Train as Mapped
from tests.support.pages.trains import TrainModel, engine

REPLACED = {
    "mapped(engine, Train": "mapped(engine, Mapped",
    "DjangoStore(Train": "DjangoStore(TrainModel",
    'create_engine("sqlite:///trains.db")': "engine",
    'documents(engine, "trains", missing': 'documents(engine, "first_trains", missing',
}


def check(page):
    assert page["seat"] == "12"
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT state FROM first_trains").all() == [('{"12": "Ann"}',)]
    assert {page["Mapped"], page["TrainModel"]} == {Mapped, TrainModel}
    assert page["engine"] is engine
    assert page["redis"] is redis
