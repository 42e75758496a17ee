"""What a trigger or a policy leaves out of the save of mapped classes is the error of its own operation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session, relationship
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import NullPool

from geventbatch import Processor, SaveFailed, current_batch
from geventbatch.stores import SQLAlchemyStore
from tests.support.callers import answer_of
from tests.support.mapped import EVERYWHERE, Bed, opened
from tests.support.policies import hidden_for_writing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Base(DeclarativeBase):
    pass


class Fare(Base):
    __tablename__ = "left_out_fares"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int] = mapped_column(default=1)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey("left_out_trains.id"))


class Counted(Base):
    __tablename__ = "left_out_counted"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int] = mapped_column(default=1)
    saves: Mapped[int] = mapped_column()
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey("left_out_trains.id"))
    __mapper_args__ = {"version_id_col": saves}  # noqa: RUF012


class Train(Base):
    __tablename__ = "left_out_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    fares: Mapped[list[Fare]] = relationship()
    counted: Mapped[list[Counted]] = relationship()


class Versioned(Base):
    __tablename__ = "left_out_versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    saves: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": saves}  # noqa: RUF012


ON_POSTGRES_TRIGGER = """
    CREATE FUNCTION leave_{table}() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF NEW.{column} >= 100 THEN RETURN NULL; END IF; RETURN NEW; END $$;
    CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION leave_{table}()
"""
ON_SQLITE_TRIGGER = """
    CREATE TRIGGER leave_{table} BEFORE UPDATE ON {table} FOR EACH ROW WHEN NEW.{column} >= 100
    BEGIN SELECT RAISE(IGNORE); END
"""
OF_TABLES = {
    "left_out_fares": "price",
    "left_out_counted": "price",
    "left_out_trains": "sold",
    "left_out_versioned": "sold",
}


@pytest.fixture(scope="module", params=EVERYWHERE[:5])
def opened_bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with opened(request.param, Base, tmp_path_factory.mktemp("bed")) as bed:
        trigger = ON_SQLITE_TRIGGER if bed.server == "sqlite" else ON_POSTGRES_TRIGGER
        with bed.other.begin() as connection:
            for table, column in OF_TABLES.items():
                connection.exec_driver_sql(trigger.format(table=table, column=column))
        yield bed


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1, fares=[Fare(id=1)], counted=[Counted(id=1)]), Versioned(id=1))
    return bed


def sell(train: Any) -> int:
    train.sold += 1
    return int(train.sold)


def oversell(train: Any) -> int:
    train.sold += 100
    return int(train.sold)


def raise_fare(train: Train) -> None:
    train.fares[0].price = 100


def raise_counted(train: Train) -> None:
    train.counted[0].price = 100


def flush(train: Train) -> None:
    train.sold = 100
    session: Any = object_session(train)
    session.flush()


def told_alone(bed: Bed, entity: type, operation: Callable[[Any], object]) -> type:
    with Session(bed.other) as session:
        operation(session.get_one(entity, 1))
        with pytest.raises(Exception) as found:
            session.commit()
    return type(found.value)


@pytest.mark.parametrize(
    ("entity", "operation"),
    [(Train, oversell), (Versioned, oversell), (Train, raise_fare), (Train, raise_counted)],
)
def test_what_a_trigger_leaves_out_is_told_as_alone_to_its_own_operation_only(
    bed: Bed, entity: type, operation: Callable[[Any], object]
) -> None:
    assert told_alone(bed, entity, operation) is StaleDataError
    answers = bed.together(entity, 1, sell, operation, sell)
    assert answers[::2] == [1, 2]
    assert type(answers[1]) is StaleDataError
    assert bed.read(sa.select(entity.sold)) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("operation", [oversell, raise_fare])
def test_who_is_alone_is_told_what_was_left_out_in_the_first_attempt_that_may_be_the_last(
    bed: Bed, operation: Callable[[Any], object], batching: bool
) -> None:
    store = bed.store(Train)
    with Processor(open_resource=store, min_duration=0, batching=batching, max_attempts=1) as processor:
        assert type(answer_of(processor.run, 1, operation)) is StaleDataError
        assert processor.run(1, sell) == 1


def test_what_is_left_out_of_many_is_told_to_each_of_them(bed: Bed) -> None:
    answers = bed.together(Train, 1, *[sell, oversell] * 10)
    assert answers[::2] == list(range(1, 11))
    assert {type(answer) for answer in answers[1::2]} == {StaleDataError}


def test_what_a_flush_of_an_operation_does_not_find_is_its_own_error(bed: Bed) -> None:
    if bed.server == "sqlite":
        assert isinstance(bed.together(Train, 1, flush)[0], RuntimeError)  # nothing is written there before the save
        return
    answers = bed.together(Train, 1, sell, flush, sell)
    assert answers[::2] == [1, 2]
    assert type(answers[1]) is StaleDataError


def test_a_row_beside_with_a_version_that_somebody_else_has_changed_is_a_conflict(bed: Bed) -> None:
    changed: list[int] = []

    def cheapen(train: Train) -> int:
        price = train.counted[0].price
        if not changed:
            changed.append(1)
            bed.write(sa.update(Counted).values(price=7, saves=Counted.saves + 1))
        train.counted[0].price = price + 1
        return price

    assert bed.together(Train, 1, sell, cheapen, sell) == [1, 7, 2]


def test_a_true_conflict_is_told_as_one(bed: Bed) -> None:
    if bed.mode == "lock":
        return
    store = bed.store(Train)

    def race(train: Train) -> None:
        train.sold += 1
        bed.write(sa.update(Train).values(sold=Train.sold + 1))

    with Processor(open_resource=store, min_duration=0, max_attempts=3) as processor:
        failed = answer_of(processor.run, 1, race)
        assert isinstance(failed, SaveFailed)
        assert failed.retry_safe
        assert "somebody else changed it" in str(failed)


def test_a_row_that_a_policy_hides_is_told_to_who_would_write_it(bed: Bed) -> None:
    if bed.server == "sqlite" or bed.mode == "lock":  # where the load locks, and finds none
        return
    with hidden_for_writing(bed.other, "left_out_versioned", "id <> 1", poolclass=NullPool) as clerk:
        store = SQLAlchemyStore.mapped(clerk, Versioned, mode=bed.mode, pipeline=bed.pipeline)
        with Processor(open_resource=store, min_duration=0.02, max_duration=20) as processor:
            operations = [*[sell] * 6, lambda train: train.sold]
            callers = [gevent.spawn(answer_of, processor.run, 1, operation) for operation in operations]
            answers = [caller.get() for caller in callers]
            assert {type(answer) for answer in answers[:-1]} == {StaleDataError}
            assert answers[-1] == 0


def delete(resource: Any) -> None:
    current_batch().delete()


@pytest.mark.parametrize("operations", [[delete], [sell, delete, sell]])
def test_a_deletion_that_a_trigger_leaves_out_is_told_as_alone(bed: Bed, operations: list[Any]) -> None:
    if bed.server == "sqlite":
        keep = "CREATE TRIGGER keep BEFORE DELETE ON left_out_versioned FOR EACH ROW BEGIN SELECT RAISE(IGNORE); END"
    else:
        keep = """
            CREATE OR REPLACE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
            CREATE TRIGGER keep BEFORE DELETE ON left_out_versioned FOR EACH ROW EXECUTE FUNCTION keep()
        """
    on = "" if bed.server == "sqlite" else " ON left_out_versioned"
    bed.write(sa.text(keep))
    try:
        answers = bed.together(Versioned, 1, *operations)
    finally:
        bed.write(sa.text(f"DROP TRIGGER keep{on}"))
    left = [answer for operation, answer in zip(operations, answers, strict=True) if operation is sell]
    assert left == list(range(1, len(left) + 1))
    assert {type(one) for operation, one in zip(operations, answers, strict=True) if operation is delete} == {
        StaleDataError
    }


def test_a_new_resource_that_a_trigger_leaves_out_fails_its_own_operation_only(bed: Bed) -> None:
    if bed.server == "sqlite":  # where the trigger is for changes
        return
    answers = bed.together(Train, 2, sell, oversell, sell, missing=lambda key: Train(id=key, sold=0))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], Exception)
    assert not isinstance(answers[1], SaveFailed)
    assert bed.read(sa.select(Train.sold).where(Train.id == 2)) == 2
