"""For docs/switching-off.md."""

from tests.support.pages.operations import trains


def check(page):
    assert page["trains"].batching
    assert trains.run("ICE 1", len) == 0
