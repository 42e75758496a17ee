"""What ``missing=`` makes has to be a new object each time: operations change it in place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from geventbatch import LoadFailed
from tests.stores.test_django_models import deposit, processing, tables
from tests.support.callers import answer_of
from tests.support.document_places import Kind, NotEnough, Place, look, opened_place, over, put, shown, take, together
from tests.support.mapped import opened

from tests.support.django_project.bank.models import Account  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCUMENTS = over(
    Kind("sqlite"),
    Kind("sqlite", "object"),
    Kind("sqlite", bulk=True),
    Kind("postgresql", "JSONB", mode="version"),
    Kind("redis"),
    Kind("redis", "object", bulk=True),
)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield from opened_place(request.param, tmp_path)


class Base(DeclarativeBase):
    pass


class Purse(Base):
    __tablename__ = "purses_missing"
    name: Mapped[str] = mapped_column(primary_key=True)
    total: Mapped[int]

    def __hash__(self) -> int:
        return hash(self.name)


def add(purse: Purse) -> int:
    purse.total += 1
    return purse.total


def is_refused(answer: object) -> bool:
    return isinstance(answer, LoadFailed) and answer.retry_safe and "missing returned the very same" in str(answer)


@DOCUMENTS
def test_what_missing_gives_to_two_keys_is_refused_to_the_second(place: Place) -> None:
    made = place.made("")
    with place.opened(place.store(missing=lambda _: made)) as opened:
        assert opened.run("a", put, 5) == 5
        assert is_refused(answer_of(opened.run, "b", put, 1))
        assert opened.run("a", look)["total"] == 5
    with place.opened() as opened:
        assert opened.run("b", look)["total"] == 0


@DOCUMENTS
@pytest.mark.parametrize("keys", [["k"], ["other", "k"]], ids=["alone", "among others"])
def test_in_what_missing_gives_twice_nothing_is_undone_and_nobody_judged_by_it(place: Place, keys: list[str]) -> None:
    made = cache(place.made)
    with place.opened(place.store(missing=made)) as opened:
        others = [gevent.spawn(answer_of, opened.run, key, put, 1) for key in keys if key != "k"]
        answers = together(opened, (put, 100), (take, 30), (take, 1000), (take, 30), (look,))
        gevent.joinall(others)
        assert all(map(is_refused, answers)), answers
        assert [other.value for other in others] == [1] * len(others)
    with place.opened() as opened:
        assert opened.run("k", look)["total"] == 0


@over(Kind("redis", "object"), Kind("sqlite", "object"))
def test_what_nothing_can_be_changed_in_may_be_the_same_for_all(place: Place) -> None:
    @dataclass(frozen=True)
    class Nothing:
        total: int = 0

    def fail(_: Any) -> None:
        raise NotEnough

    for made in (None, (), Nothing(), object()):
        store = place.store(missing=lambda _, made=made: made, encode=lambda _: "{}")
        with place.opened(store) as opened:
            for key in ("a", "b"):
                answers = together(opened, (fail,), (fail,), key=key)
                assert [type(answer) for answer in answers] == [NotEnough] * 2
                assert opened.run(key, type, read_only=True) is type(made)


@DOCUMENTS
def test_what_missing_makes_anew_each_time_is_undone(place: Place) -> None:
    with place.opened() as opened:
        answers = together(opened, (put, 100), (take, 30), (take, 1000), (take, 30))
        assert shown(answers) == [100, 70, "NotEnough(1000)", 40]


@pytest.mark.parametrize("tenant", [False, True], ids=["", "tenant"])
@pytest.mark.parametrize("server", ["sqlite", "postgresql"])
def test_an_instance_of_a_mapped_class_that_missing_gives_twice_is_refused(
    server: str, tenant: bool, tmp_path: Path
) -> None:
    made = Purse(name="a", total=0)
    setting = server, "version" if server == "sqlite" else "lock", True
    options: dict[str, Any] = {"missing": lambda _: made}
    if tenant:
        options |= {"tenant": lambda: "one", "prepare_connection": lambda *_: None}
    with opened(setting, Base, tmp_path) as bed, bed.processor(Purse, **options) as processor:
        assert processor.run("a", add) == 1
        assert is_refused(answer_of(processor.run, "b", add))
        assert processor.run("a", add) == 2


def test_an_instance_of_a_model_that_missing_gives_twice_is_refused(tmp_path: Path) -> None:
    def deposit_and_raise(account: Any) -> None:
        deposit(account, 5)
        raise NotEnough

    made = Account(name="a")
    with (
        tables("sqlite", tmp_path, Account) as alias,
        processing(Account, alias, by="name", missing=lambda _: made) as processor,
    ):
        assert isinstance(answer_of(processor.run, "a", deposit_and_raise), NotEnough)
        assert is_refused(answer_of(processor.run, "a", deposit, 1))
