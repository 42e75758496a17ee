"""What an operation has assigned is found by those behind it as a load would give it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, composite, mapped_column, object_session, relationship

from tests.support.mapped import ON_POSTGRES, Bed, opened, opening

if TYPE_CHECKING:
    from collections.abc import Callable

EAST = timezone(timedelta(hours=5))


class Base(DeclarativeBase):
    pass


class Colour(enum.Enum):
    RED = "r"


class Folded(sa.TypeDecorator[str]):
    impl = sa.String(20)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else value.lower()


@dataclass
class Amount:
    value: Decimal
    currency: str


class Account(Base):
    __tablename__ = "loaded_accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[Decimal] = mapped_column(sa.Numeric(10, 2), default=Decimal("0.00"))
    rate: Mapped[Any] = mapped_column(sa.Numeric(10, 2, asdecimal=False), default=0.0)
    share: Mapped[Any] = mapped_column(sa.Float(53), default=0.0)
    count: Mapped[Any] = mapped_column(sa.Integer, default=0)
    is_open: Mapped[Any] = mapped_column(sa.Boolean, default=False)
    code: Mapped[str] = mapped_column(sa.CHAR(5), default="abcde")
    note: Mapped[Any] = mapped_column(sa.String(20), default="")
    name: Mapped[str] = mapped_column(Folded, default="")
    colour: Mapped[Any] = mapped_column(sa.Enum(Colour, native_enum=False), default=Colour.RED)
    day: Mapped[Any] = mapped_column(sa.Date, default=None, nullable=True)
    hour: Mapped[time | None]
    moment: Mapped[datetime | None]
    exact: Mapped[datetime | None] = mapped_column(
        sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    )
    zoned: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    extra: Mapped[Any] = mapped_column(sa.JSON, default=None, nullable=True)
    token: Mapped[Any] = mapped_column(sa.Uuid, default=None, nullable=True)
    photo: Mapped[Any] = mapped_column(sa.LargeBinary, default=None, nullable=True)
    value: Mapped[Decimal] = mapped_column(sa.Numeric(10, 1), default=Decimal("0.0"))
    currency: Mapped[str] = mapped_column(sa.String(3), default="EUR")
    amount: Mapped[Amount] = composite(value, currency)
    parts: Mapped[list[Part]] = relationship()


class Part(Base):
    __tablename__ = "loaded_parts"
    id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[int] = mapped_column(sa.ForeignKey(Account.id))
    price: Mapped[Decimal] = mapped_column(sa.Numeric(10, 2))


VALUES: list[dict[str, Any]] = [
    {
        "total": Decimal("0.004"),
        "rate": 0.014,
        "share": 5,
        "count": "5",
        "is_open": 1,
        "code": "a",
        "note": 5,
        "name": "ABC",
        "colour": "RED",
        "day": datetime(2020, 1, 1, 5),  # noqa: DTZ001
        "hour": time(1, 2, 3, 999_999),
        "moment": datetime(2020, 1, 1, 1, 2, 3, 999_999),  # noqa: DTZ001
        "exact": datetime(2020, 1, 1, 1, 2, 3, 999_999),  # noqa: DTZ001
        "zoned": datetime(2020, 1, 1, 1, 2, 3, tzinfo=EAST),
        "token": UUID(int=5),
        "photo": bytearray(b"x"),
    },
    {
        "total": 7,
        "rate": Decimal("1.5"),
        "share": 0.1,
        "count": 2.0,
        "is_open": True,
        "code": "abcde",
        "note": "x",
        "colour": Colour.RED,
        "day": date(2020, 1, 1),
        "moment": datetime(2020, 7, 1, 1, tzinfo=EAST),
        "zoned": datetime(2020, 7, 1, 1, tzinfo=UTC),
    },
    {
        "total": Decimal("-1.999"),
        "count": True,
        "note": True,
        "photo": memoryview(b"x"),
        "zoned": datetime(2020, 7, 1, 1),  # noqa: DTZ001
    },
]

ONLY_ON_POSTGRES: list[dict[str, Any]] = [
    {"total": 0.125, "count": 2.5, "token": str(UUID(int=5)), "day": "2020-01-01", "zoned": date(2020, 7, 1)},
    {"total": "1.005", "count": Decimal("2.5")},
]


opened_bed = opening(Base)


def shown(account: Account, names: dict[str, Any]) -> dict[str, str]:
    return {name: repr(getattr(account, name)) for name in names}


def assign(values: dict[str, Any]) -> Callable[[Account], None]:
    def assigns(account: Account) -> None:
        for name, value in values.items():
            setattr(account, name, value)

    return assigns


def in_a_batch_and_alone(bed: Bed, values: dict[str, Any]) -> tuple[Any, Any]:
    """What the next operation finds, and what is saved: of a batch, and of a session each."""
    bed.add(Account(id=1), Account(id=2))
    done, found = bed.together(Account, 1, assign(values), lambda account: shown(account, values))
    assert done is None
    with Session(bed.other) as session:
        assign(values)(session.get_one(Account, 2))
        session.commit()
    with Session(bed.other) as session:
        alone = shown(session.get_one(Account, 2), values)
        return (found, shown(session.get_one(Account, 1), values)), (alone, alone)


@pytest.mark.parametrize("values", VALUES, ids=["odd", "plain", "odder"])
def test_what_was_assigned_is_found_as_a_load_gives_it(bed: Bed, values: dict[str, Any]) -> None:
    batch, alone = in_a_batch_and_alone(bed, values)
    assert batch == alone


def test_what_only_the_database_knows_is_what_the_next_load_gives(bed: Bed) -> None:
    batch, alone = in_a_batch_and_alone(bed, {"note": 1.50})
    assert batch == alone


@pytest.mark.parametrize("setting", ON_POSTGRES)
@pytest.mark.parametrize("value", [[1, 2], ["a", None], Decimal("1.50")], ids=["numbers", "texts", "decimal"])
def test_so_is_what_only_postgresql_takes_for_a_text(setting: Any, value: Any, tmp_path: Any) -> None:
    with opened(setting, Base, tmp_path) as bed:
        batch, alone = in_a_batch_and_alone(bed, {"note": value})
        assert batch == alone


@pytest.mark.parametrize("setting", ON_POSTGRES)
@pytest.mark.parametrize("values", ONLY_ON_POSTGRES, ids=["odd", "odder"])
def test_so_is_what_only_postgresql_converts(setting: Any, values: dict[str, Any], tmp_path: Any) -> None:
    with opened(setting, Base, tmp_path) as bed:
        batch, alone = in_a_batch_and_alone(bed, values)
        assert batch == alone


def test_amounts_are_rounded_behind_each_operation_as_if_it_had_been_saved(bed: Bed) -> None:
    bed.add(Account(id=1))

    def add(account: Account) -> str:
        account.total += Decimal("0.004")
        return str(account.total)

    assert bed.together(Account, 1, add, add, add) == ["0.004"] * 3
    assert bed.read(sa.select(Account.total)) == 0


def test_a_text_that_stands_for_a_number_hurts_nobody_who_counts_on(bed: Bed) -> None:
    bed.add(Account(id=1))

    def count(account: Account) -> int:
        account.count += 1
        return int(account.count)

    assert bed.together(Account, 1, count, assign({"count": "5"}), count) == [1, None, 6]


def test_a_composite_is_made_of_what_is_loaded(bed: Bed) -> None:
    bed.add(Account(id=1))

    def add(account: Account) -> str:
        account.amount = Amount(account.amount.value + Decimal("0.04"), "USD")
        return str(account.amount.value)

    assert bed.together(Account, 1, add, add) == ["0.04"] * 2


def test_what_is_assigned_in_new_rows_is_found_so_too(bed: Bed) -> None:
    def begin(account: Account) -> int:
        account.parts.append(Part(price=Decimal("1.006")))
        return 1

    def prices(account: Account) -> list[str]:
        return [str(account.total), *(str(part.price) for part in account.parts)]

    def made(key: int) -> Account:
        return Account(id=key, total=Decimal("0.01999"))

    assert bed.together(Account, 3, begin, prices, missing=made) == [1, ["0.02", "1.01"]]


def test_an_attribute_that_is_no_column_stays_for_the_operations_behind(bed: Bed) -> None:
    bed.add(Account(id=1))
    remember = assign({"memo": "x"})
    with bed.processor(Account) as processor:
        callers = [gevent.spawn(processor.run, 1, call) for call in (remember, lambda one: getattr(one, "memo", None))]
        assert [caller.get() for caller in callers] == [None, "x"]
        assert processor.run(1, lambda one: getattr(one, "memo", None)) is None


def test_who_raises_leaves_nothing_to_convert(bed: Bed) -> None:
    bed.add(Account(id=1))

    def fails(account: Account) -> None:
        session = object_session(account)
        assert session is not None
        account.total, before = Decimal("0.004"), account.total
        account.total = before
        raise KeyError

    refused, found = bed.together(Account, 1, fails, lambda account: str(account.total))
    assert isinstance(refused, KeyError)
    assert found == "0.00"


def test_what_json_makes_of_a_value_is_found_behind_the_save(bed: Bed) -> None:
    bed.add(Account(id=1))
    assert bed.together(Account, 1, assign({"extra": (1, 2)}), lambda account: type(account.extra)) == [None, tuple]
    assert bed.read(sa.select(Account.extra)) == [1, 2]
