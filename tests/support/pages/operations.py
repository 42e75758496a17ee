"""For docs/operations.md."""

from copy import copy

from geventbatch import Processor

rows = {"ICE 1": {}}


def load(key):
    return copy(rows[key])


def save(key, train):
    rows[key] = train


trains = Processor(load_resource=load, save_resource=save, min_duration=0)


def check(page):
    assert page["seat"] == "12"
    assert rows == {"ICE 1": {"12": "Ann"}}
    assert page["free"] == 399
