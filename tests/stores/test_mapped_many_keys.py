"""Mapped classes at many keys: bulks of single keys, and operations across keys, of one class and of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from geventbatch import LoadFailed, Processor, ResourceMissing, SaveFailed, current_batch
from geventbatch._watch import log
from geventbatch.errors import ImpossibleKey
from geventbatch.stores import SQLAlchemyStore
from tests.support.callers import answer_of
from tests.support.mapped import opening, session_of
from tests.support.mapped_many import (
    Account,
    Base,
    Counted,
    Line,
    Meanwhile,
    Seat,
    Train,
    balances,
    bulk,
    deposit,
    deposit_all,
    overdraw,
    together,
    transfer,
)

if TYPE_CHECKING:
    from tests.support.mapped import Bed

opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(*[Account(id=number, balance=100) for number in range(1, 21)])
    return bed


def test_a_bulk_of_single_keys_is_loaded_by_one_statement_and_saved_in_one_transaction(bed: Bed) -> None:
    with bulk(bed) as processor:
        bed.statements.clear()
        answers = together(processor, *[(number, deposit, number) for number in range(1, 21)])
    assert answers == [100 + number for number in range(1, 21)]
    assert balances(bed) == {number: 100 + number for number in range(1, 21)}
    listed = " = ANY (" if bed.server == "postgresql" else " IN "
    assert sum("many_accounts" in one and listed in one and "UPDATE many" not in one for one in bed.statements) == (
        1 if bed.mode == "lock" else 2
    )


def test_a_row_that_an_operation_names_twice_fails_its_load(bed: Bed) -> None:
    bed.write(sa.update(Account).where(Account.id == 1).values(note="a"))
    with bulk(bed, by="note") as processor:
        answers = together(processor, (["a", "A"], transfer, 10), ("a", deposit, 1))
    assert answers[1] == 101
    if bed.server == "mariadb":  # its collation takes them for one
        assert isinstance(answers[0], LoadFailed)
        assert "always name it as the row does" in str(answers[0])
    else:
        assert isinstance(answers[0], ResourceMissing)


def test_the_same_change_of_many_rows_is_one_update(bed: Bed) -> None:
    def name(account: Account, note: str | None) -> str | None:
        told, account.note = account.note, note
        return told

    with bulk(bed) as processor:
        together(processor, *[(number, deposit, number) for number in range(1, 11)], ([11, 12], transfer, 10))
        together(processor, *[(number, name, f"{{{number}, 'ü\\\"") for number in range(1, 4)], (4, name, None))
        told = together(processor, (1, name, None), (2, name, "two"), (3, name, None), (4, name, None))
    assert balances(bed) == {number: 100 + number for number in range(1, 11)} | {11: 90, 12: 110}
    updates = [one for one in bed.statements if one.startswith("UPDATE")]
    assert len(updates) == 3
    assert all(("unnest" in one) == (bed.server == "postgresql") for one in updates)
    with bed.other.connect() as connection:
        notes = list(connection.scalars(sa.select(Account.note).order_by(Account.id)))
    assert notes[:4] == [None, "two", None, None]
    assert told == ["{1, 'ü\\\"", "{2, 'ü\\\"", "{3, 'ü\\\"", None]


def test_a_transfer_changes_both_rows(bed: Bed) -> None:
    with bulk(bed) as processor:
        assert together(processor, ([1, 2], transfer, 10), ([2, 3], transfer, 30), (3, deposit, 1)) == [90, 80, 131]
    assert balances(bed) == {1: 90, 2: 80, 3: 131}


def test_a_refusal_in_python_changes_nothing_and_the_others_of_its_component_go_on(bed: Bed) -> None:
    with bulk(bed) as processor:
        answers = together(
            processor, ([1, 2], transfer, 90), ([1, 2], transfer, 90), ([2, 1], transfer, 150), (4, deposit, 1)
        )
    assert [answers[0], type(answers[1]), answers[2], answers[3]] == [10, ValueError, 40, 101]
    assert balances(bed) == {1: 160, 2: 40, 4: 101}


def test_what_the_database_refuses_is_lost_with_its_component_and_only_the_culprit_is_told(bed: Bed) -> None:
    with bulk(bed) as processor:
        answers = together(
            processor,
            ([1, 2], transfer, 10),
            ([2, 3], overdraw, 500),
            ([3, 4], transfer, 10),
            ([5, 6], transfer, 10),
            (7, deposit, -200),
            (8, deposit, 1),
        )
    assert answers[:1] + answers[2:4] + answers[5:] == [90, 90, 90, 101]
    assert isinstance(answers[1], sa.exc.DBAPIError)
    assert isinstance(answers[4], sa.exc.DBAPIError)
    assert balances(bed) == {1: 90, 2: 110, 3: 90, 4: 110, 5: 90, 6: 110, 8: 101}


def test_an_operation_that_flushes_has_its_batch_saved_by_itself(bed: Bed) -> None:
    def flush(accounts: tuple[Account, ...]) -> int:
        accounts[0].balance -= 1
        session_of(accounts[0]).flush()
        accounts[1].balance += 1
        return accounts[1].balance

    others = Meanwhile(lambda: None, deposit)
    with bulk(bed) as processor:
        answers = together(processor, (5, others, 1), ([1, 2], transfer, 10), ([2, 3], flush), (6, deposit, 1))
    if bed.server == "sqlite":
        assert "would write to SQLite" in str(answers[2])
        assert balances(bed) == {1: 90, 2: 110, 5: 101, 6: 101}
    else:
        assert answers == [101, 90, 101, 101]
        assert balances(bed) == {1: 90, 2: 109, 3: 101, 5: 101, 6: 101}
    assert others.count == 1


def test_a_statement_that_fails_is_the_error_of_its_operation(bed: Bed) -> None:
    def insert(accounts: tuple[Account, ...]) -> None:
        accounts[0].balance -= 1
        session_of(accounts[0]).execute(sa.insert(Account).values(id=7, balance=0))

    with bulk(bed) as processor:
        answers = together(processor, (5, deposit, 1), ([1, 2], transfer, 10), ([2, 3], insert), ([3, 4], transfer, 5))
    kind = RuntimeError if bed.server == "sqlite" else IntegrityError
    assert [answers[0], answers[1], type(answers[2]), answers[3]] == [101, 90, kind, 95]
    assert balances(bed) == {1: 90, 2: 110, 3: 95, 4: 105, 5: 101}


def test_a_query_finds_what_earlier_operations_have_changed(bed: Bed) -> None:
    def total(accounts: tuple[Account, ...]) -> int:
        accounts[0].balance += 0
        return int(session_of(accounts[0]).scalar(sa.select(sa.func.sum(Account.balance))) or 0)

    with bulk(bed) as processor:
        answers = together(
            processor, ([1, 2], overdraw, 30), ([1, 2], total), (3, deposit, 1), ([1, 3], deposit_all, 1)
        )
    assert answers[1] in {2000, 2001}  # another component may be saved before it or not
    assert balances(bed) == {1: 71, 2: 130, 3: 102}


def test_a_refused_value_of_one_among_many_keys_is_found_by_savepoints(bed: Bed) -> None:
    with bulk(bed) as processor:
        runs = [(number, deposit, -101 if number % 5 == 0 else 1) for number in range(1, 21)]
        answers = together(processor, *runs)
    refused = [number for number, answer in enumerate(answers, 1) if isinstance(answer, Exception)]
    assert refused == [5, 10, 15, 20]
    assert balances(bed) == {number: 101 for number in range(1, 21) if number % 5}


def test_a_missing_key_is_told_to_the_operations_that_need_it(bed: Bed) -> None:
    with bulk(bed) as processor:
        answers = together(
            processor, ([1, 99], transfer, 10), ([1, 2], transfer, 10), (98, deposit, 1), (3, deposit, 1)
        )
    assert [type(answers[0]), answers[1], type(answers[2]), answers[3]] == [ResourceMissing, 90, ResourceMissing, 101]
    assert answers[0].key == 99
    assert balances(bed) == {1: 90, 2: 110, 3: 101}


def test_a_missing_key_can_be_made_and_is_inserted_with_its_component(bed: Bed) -> None:
    with bulk(bed, missing=lambda key: Account(id=key, balance=0)) as processor:
        answers = together(
            processor, ([1, 31], transfer, 10), (32, deposit, 5), ([2, 33], transfer, 500), (3, deposit, 1)
        )
    assert [*answers[:2], type(answers[2]), answers[3]] == [90, 5, ValueError, 101]
    assert balances(bed) == {1: 90, 31: 10, 32: 5, 3: 101}


def test_a_row_that_somebody_else_inserts_first_is_found_by_a_replay(bed: Bed) -> None:
    there = Meanwhile(lambda: bed.add(Account(id=31, balance=1000)), transfer)
    with bulk(bed, missing=lambda key: Account(id=key, balance=0)) as processor:
        assert together(processor, ([1, 31], there, 10), (3, deposit, 1)) == [90, 101]
    assert balances(bed) == {1: 90, 31: 1010, 3: 101}
    assert there.count > 1


def test_rows_that_an_operation_adds_are_inserted_once_and_are_lost_with_its_component(bed: Bed) -> None:
    def told(accounts: tuple[Account, ...], amount: int) -> int:
        current_batch().add_row((Line.__table__, {"text": f"{accounts[0].id} to {accounts[1].id}"}))
        current_batch().add_row(Line(text="an instance"))
        accounts[0].balance -= amount
        accounts[1].balance += amount
        return accounts[0].balance

    with bulk(bed) as processor:
        answers = together(
            processor, ([1, 2], told, 10), ([2, 3], told, 10), ([4, 5], told, 500), ([6, 7], told, 10), (8, deposit, 1)
        )
    assert [*answers[:2], *answers[3:]] == [90, 100, 90, 101]
    with bed.other.connect() as connection:
        lines = sorted(connection.scalars(sa.select(Line.text)))
    assert lines == ["1 to 2", "2 to 3", "6 to 7", "an instance", "an instance", "an instance"]


def test_a_deletion_in_a_bulk_saves_what_came_before_it(bed: Bed) -> None:
    def delete(account: Account) -> int:
        current_batch().delete()
        return account.balance

    with bulk(bed) as processor:
        answers = together(processor, (1, deposit, 1), (1, delete), (1, deposit, 1), (2, deposit, 1))
    assert [*answers[:2], type(answers[2]), answers[3]] == [101, 101, ResourceMissing, 101]
    with bed.other.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Account)) == 19


def test_an_operation_across_keys_deletes_one_of_them_and_changes_the_other(bed: Bed) -> None:
    def close(accounts: tuple[Account, ...]) -> int:
        closed, heir = accounts
        heir.balance += closed.balance
        current_batch().delete(closed.id)
        return heir.balance

    def close_by_session(accounts: tuple[Account, ...]) -> int:
        accounts[1].balance += accounts[0].balance
        session_of(accounts[0]).delete(accounts[0])
        return accounts[1].balance

    with bulk(bed) as processor:
        runs = ([1, 2], transfer, 10), ([1, 2], close), ([1, 2], transfer, 1), ([2, 3], transfer, 1), (5, deposit, 1)
        answers = together(processor, *runs, ([6, 7], close_by_session), (6, deposit, 1), (7, deposit, 1))
    assert [*answers[:2], *answers[3:6]] == [90, 200, 199, 101, 200]
    assert [type(answers[2]), type(answers[6]), answers[7]] == [ResourceMissing, ResourceMissing, 201]
    with bed.other.connect() as connection:
        left = set(connection.scalars(sa.select(Account.id)))
    assert left == set(range(2, 21)) - {6}
    assert balances(bed) == {2: 199, 3: 101, 5: 101, 7: 201}


def test_the_session_of_an_operation_knows_the_rows_of_its_own_component_only(bed: Bed) -> None:
    def known(accounts: tuple[Account, ...]) -> list[int]:
        return sorted(one.id for one in session_of(accounts[0]) if isinstance(one, Account))

    with bulk(bed) as processor:
        answers = together(processor, ([1, 2], known), ([2, 3], known), ([4, 5], known), (6, deposit, 1))
    assert answers == [[1, 2, 3], [1, 2, 3], [4, 5], 101]


def test_versions_are_counted_once_for_each_save(bed: Bed) -> None:
    bed.add(*[Counted(id=number, total=0) for number in range(1, 5)])

    def add(counted: Any, amount: int) -> None:
        for one in counted if isinstance(counted, tuple) else (counted,):
            one.total += amount

    with bulk(bed, Counted) as processor:
        together(processor, ([1, 2], add, 1), ([2, 3], add, 1), (4, add, 1), (4, add, 1))
    with bed.other.connect() as connection:
        rows = list(connection.execute(sa.select(Counted.id, Counted.total, Counted.version).order_by(Counted.id)))
    assert [tuple(row) for row in rows] == [(1, 1, 2), (2, 2, 2), (3, 1, 2), (4, 2, 2)]


SEVERAL = {"seat": Seat, "account": Account}


def book(resources: tuple[Any, ...], price: int) -> str:
    seat, account = resources
    seat.taken_by = f"account {account.id}"
    account.balance -= price
    return f"{seat.train.name} {seat.id}"


@pytest.fixture
def trains(bed: Bed) -> None:
    bed.add(Train(name="ICE 1", seats=[Seat(id=number) for number in range(1, 6)]), Train(name="ICE 2"))


@pytest.mark.usefixtures("trains")
def test_several_classes_are_changed_by_one_operation(bed: Bed) -> None:
    with bulk(bed, SEVERAL) as processor:
        answers = together(
            processor,
            ([("seat", 1), ("account", 1)], book, 10),
            ([("seat", "2"), ("account", "1")], book, 10),
            ([("seat", 3), ("account", 2)], book, 500),
            (("account", 3), deposit, 1),
        )
    assert answers[:2] + answers[3:] == ["ICE 1 1", "ICE 1 2", 101]
    assert isinstance(answers[2], sa.exc.DBAPIError)
    assert balances(bed) == {1: 80, 3: 101}
    with bed.other.connect() as connection:
        taken = list(connection.scalars(sa.select(Seat.taken_by).order_by(Seat.id)))
    assert taken == ["account 1", "account 1", None, None, None]


@pytest.mark.usefixtures("trains")
def test_a_store_of_several_classes_opens_one_of_them(bed: Bed) -> None:
    store = bed.store(SEVERAL, missing={"account": lambda key: Account(id=key, balance=0)})  # type: ignore[arg-type]
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        answers = together(processor, (("account", 1), deposit, 1), (("account", 40), deposit, 4), (("seat", 9), str))
        assert [*answers[:2], type(answers[2])] == [101, 4, ResourceMissing]
        assert answers[2].key == ("seat", 9)
        for key, kind in ((("wallet", 1), ValueError), (1, TypeError), (("seat", "x"), ImpossibleKey)):
            for refused in answer_of(processor.run, key, str), answer_of(processor.run_across, [key], str):
                assert type(refused) is kind
                assert "run_across()" not in str(refused)
        for keys in ((("seat", 1), ("account", 1)), (("seat", 1),), (("seat", 1), ("seat", 2), ("account", 1))):
            refused = answer_of(processor.run, keys, str)
            assert str(refused).endswith("; these are several keys: call run_across() with a list of them")
    assert balances(bed) == {1: 101, 40: 4}


def test_without_batching_an_operation_across_keys_is_one_transaction(bed: Bed) -> None:
    with bulk(bed) as processor:
        processor.batching = False
        assert processor.run_across([2, 1], transfer, 10) == 90
        assert type(answer_of(processor.run_across, [1, 2], transfer, 500)) is ValueError
        assert isinstance(answer_of(processor.run_across, [1, 2], overdraw, 500), (SaveFailed, sa.exc.DBAPIError))
        assert processor.run(3, deposit, 1) == 101
    assert balances(bed) == {1: 110, 2: 90, 3: 101}


def test_a_key_that_no_row_can_have_is_missing_and_the_others_are_saved(bed: Bed) -> None:
    with bulk(bed, by="note") as processor:
        bed.write(sa.update(Account).where(Account.id == 1).values(note="a"))
        answers = together(processor, ("a", deposit, 1), ("b", deposit, 1), ("c" * 39, deposit, 1))
    assert [answers[0], type(answers[1]), type(answers[2])] == [101, ResourceMissing, ResourceMissing]


def test_what_was_flushed_by_an_operation_is_lost_with_the_row_that_it_adds(bed: Bed) -> None:
    def flush(accounts: tuple[Account, ...]) -> None:
        accounts[0].balance -= 1
        session_of(accounts[0]).flush()
        current_batch().add_row((Line, {"text": None}))

    with bulk(bed) as processor:
        answers = together(processor, ([1, 2], transfer, 10), ([2, 3], flush), ([1, 2], transfer, 10))
    kind = RuntimeError if bed.server == "sqlite" else IntegrityError
    assert [answers[0], type(answers[1]), answers[2]] == [90, kind, 80]
    assert balances(bed) == {1: 80, 2: 120}


def test_a_new_row_that_is_refused_is_told_to_the_operation_that_made_it(bed: Bed) -> None:
    bed.write(sa.update(Account).where(Account.id == 1).values(note="taken"))

    def take(accounts: tuple[Account, ...], note: str) -> int:
        accounts[1].note = note
        accounts[0].balance -= 1
        return accounts[0].balance

    with bulk(bed, missing=lambda key: Account(id=key, balance=0)) as processor:
        answers = together(processor, ([1, 31], take, "taken"), ([2, 32], take, "free"), ([1, 33], take, "other"))
    assert [type(answers[0]), *answers[1:]] == [IntegrityError, 99, 99]
    assert balances(bed) == {1: 99, 2: 99, 32: 0, 33: 0}


def test_a_row_that_is_made_for_an_operation_that_is_refused_is_not_inserted_with_what_is_connected(bed: Bed) -> None:
    def flush(accounts: tuple[Account, ...]) -> int:
        accounts[0].balance -= 1
        session_of(accounts[0]).flush()
        return accounts[0].balance

    with bulk(bed, missing=lambda key: Account(id=key, balance=0)) as processor:
        runs = ([1, 2], transfer, 10), ([1, 31], transfer, 500), ([2, 32], flush), ([1, 33], transfer, 5)
        answers = together(processor, *runs, ([3, 34], transfer, 500), ([3, 35], transfer, 5))
    assert [type(answers[1]), type(answers[4])] == [ValueError, ValueError]
    there = {number for number in balances(bed) if number > 20}
    assert there == ({33, 35} if bed.server == "sqlite" else {32, 33, 35})


def test_listeners_of_the_user_s_sessions_hear_each_batch_before_and_after_the_commit(bed: Bed) -> None:
    maker, heard = sessionmaker(bed.engine), []

    @sa.event.listens_for(maker, "before_commit")
    def _(session: Session) -> None:
        session.add(Line(text="before"))

    @sa.event.listens_for(maker, "after_commit")
    def _(session: Session) -> None:
        heard.append(balances(bed))

    store = SQLAlchemyStore.mapped(maker, Account, mode=bed.mode, pipeline=bed.pipeline)
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=10, max_batches=1) as processor:
        assert together(processor, ([1, 2], transfer, 10), (3, deposit, 1), (4, deposit, 1)) == [90, 101, 101]
    assert heard == [{1: 90, 2: 110, 3: 101, 4: 101}] * 3
    with bed.other.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Line)) == 3


def test_where_nothing_was_copied_before_the_first_refusal_of_many_keys_there_is_nothing_to_warn_of(
    bed: Bed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_logged", set())
    with bulk(bed) as processor:
        connected = [([number, number + 1], transfer, 1) for number in range(1, 19)]
        told = together(processor, *connected, ([3, 5], transfer, 1000), *connected)
    assert [one for one in told if type(one) is not int] == [told[18]]
    assert isinstance(told[18], ValueError)
    assert "cannot be undone" not in caplog.text


def test_a_message_about_an_operation_names_its_own_keys_and_not_all_that_are_connected(
    bed: Bed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_logged", set())  # of each operation and error it is told once

    def flush(accounts: tuple[Account, ...]) -> None:
        accounts[0].balance += 1
        session_of(accounts[0]).flush()
        raise KeyError("no")

    def run_all() -> tuple[Any, Any]:
        connected = [([number, number + 1], transfer, 1) for number in range(1, 19)]
        *_, told, behind = together(processor, *connected, ([3, 5], flush), ([5, 3], transfer, 1))
        return told, behind

    with bulk(bed) as processor:
        assert [run_all()[1], run_all()[1]] == [99, 98]  # from the second on, what is loaded is copied
        told, behind = run_all()
        assert behind == 97
    if bed.server == "sqlite":
        assert str(told).startswith("an operation on keys 3, 5 would write to SQLite")
    else:
        assert isinstance(told, KeyError)
        assert "what operations on keys 3, 5 have done cannot be undone in memory: something was written" in caplog.text
        assert "Let it raise before it writes to the database" in caplog.text
