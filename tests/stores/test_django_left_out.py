"""What a trigger or a policy leaves out of a save is not answered as saved."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import DatabaseError
from django.db.backends.utils import CursorWrapper

from geventbatch import Processor, current_batch
from geventbatch.stores import DjangoStore
from geventbatch.stores.django import _lossy_tables
from geventbatch.stores.django._connections import close_idle
from tests.support.callers import answer_of
from tests.support.django_project.start import database, execute, options_of, place

from tests.support.django_project.bank.models import Account, Entry, Outcome  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LEAVES_OUT = """
    CREATE FUNCTION leave_out() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF NEW.{column} = {value} THEN RETURN NULL; END IF; RETURN NEW; END $$;
    CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION leave_out()
"""

WAYS: Any = [
    pytest.param({}, id="lock"),
    pytest.param({"mode": "version"}, id="version"),
    pytest.param({"pipeline": False}, id="no pipeline"),
]


@contextmanager
def tables(directory: Path, *statements: str) -> Iterator[str]:
    with (
        place("postgresql", directory, models=(Account, Entry, Outcome)) as address,
        database(address, create=False, options=options_of(address)) as alias,
    ):
        for statement in statements:
            execute(alias, statement)
        yield alias
        close_idle(alias)


@contextmanager
def processing(alias: str, **options: Any) -> Iterator[Processor[Account]]:
    batching = options.pop("batching", True)
    store = DjangoStore(Account, by="name", using=alias, idempotency=Outcome, **options)
    with Processor(open_resource=store, min_duration=0.02, max_duration=20, batching=batching) as processor:
        yield processor


def deposit(account: Account, amount: int) -> int:
    account.balance += amount
    return int(account.balance)


def add(account: Account, text: str) -> str:
    current_batch().add_row(Entry(account=account, text=text))
    return text


def answers(processor: Processor[Account], operation: Any, *values: object, **options: Any) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, "a", operation, one, **options) for one in values]
    return [caller.get() for caller in callers]


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("batching", [True, False])
def test_a_change_that_a_trigger_leaves_out_is_not_answered_as_saved(
    options: dict[str, Any], batching: bool, tmp_path: Path
) -> None:
    left_out = LEAVES_OUT.format(column="balance", value=100, table="bank_account")
    with tables(tmp_path, left_out) as alias, processing(alias, batching=batching, **options) as processor:
        Account.objects.using(alias).create(name="a")
        for _ in range(2):
            assert isinstance(answer_of(processor.run, "a", deposit, 100, idempotency_key="one"), DatabaseError)
        assert Account.objects.using(alias).get().balance == 0


@pytest.mark.parametrize("options", WAYS)
def test_a_change_that_a_trigger_leaves_out_is_the_error_of_its_own_operation(
    options: dict[str, Any], tmp_path: Path
) -> None:
    left_out = LEAVES_OUT.format(column="balance", value=101, table="bank_account")
    with tables(tmp_path, left_out) as alias, processing(alias, **options) as processor:
        Account.objects.using(alias).create(name="a")
        found = answers(processor, deposit, 1, 100)
        assert found[0] == 1
        assert isinstance(found[1], DatabaseError)
        assert processor.run("a", deposit, 1) == 2
        assert Account.objects.using(alias).get().balance == 2


@pytest.mark.parametrize("options", WAYS)
def test_a_row_that_a_trigger_leaves_out_is_the_error_of_the_operation_that_added_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    left_out = LEAVES_OUT.format(column="text", value="'bad'", table="bank_entry")
    with tables(tmp_path, left_out) as alias, processing(alias, **options) as processor:
        Account.objects.using(alias).create(name="a")
        found = answers(processor, add, "one", "bad", "two")
        assert (found[0], found[2]) == ("one", "two")
        assert isinstance(found[1], Exception)
        assert [entry.text for entry in Entry.objects.using(alias).order_by("pk")] == ["one", "two"]


@pytest.mark.parametrize("options", WAYS)
def test_a_new_resource_that_a_trigger_leaves_out_is_not_answered_as_saved(
    options: dict[str, Any], tmp_path: Path
) -> None:
    left_out = LEAVES_OUT.format(column="name", value="'b'", table="bank_account")
    with tables(tmp_path, left_out) as alias:
        with processing(alias, missing=lambda name: Account(name=name), **options) as processor:
            assert isinstance(answer_of(processor.run, "b", deposit, 1), Exception)
            assert processor.run("a", deposit, 1) == 1
        assert [account.name for account in Account.objects.using(alias).all()] == ["a"]


@pytest.mark.parametrize("options", WAYS)
def test_rows_that_are_inserted_with_commit_have_their_keys(options: dict[str, Any], tmp_path: Path) -> None:
    added: list[Entry] = []

    def keep(account: Account, text: str) -> None:
        entry = Entry(account=account, text=text)
        added.append(entry)
        current_batch().add_row(entry)

    with tables(tmp_path) as alias, processing(alias, **options) as processor:
        Account.objects.using(alias).create(name="a")
        answers(processor, keep, "one", "two", "three")
        there = dict(Entry.objects.using(alias).values_list("pk", "text"))
        assert {entry.pk: entry.text for entry in added} == there


@pytest.mark.parametrize("options", WAYS)
def test_a_table_with_rules_is_saved_as_any_other(options: dict[str, Any], tmp_path: Path) -> None:
    rule = "CREATE RULE r AS ON UPDATE TO bank_account DO ALSO INSERT INTO bank_entry (text) VALUES (NEW.balance)"
    with tables(tmp_path, rule) as alias, processing(alias, **options) as processor:
        Account.objects.using(alias).create(name="a")
        assert [processor.run("a", deposit, 1) for _ in range(3)] == [1, 2, 3]
        assert (Account.objects.using(alias).get().balance, Entry.objects.using(alias).count()) == (3, 3)


# -- what is counted, and what need not be -----------------------------------------------------------------------

AFTERWARDS = """
    CREATE FUNCTION look_on() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
    CREATE TRIGGER look_on AFTER UPDATE ON bank_account FOR EACH ROW EXECUTE FUNCTION look_on()
"""
CHANGES = LEAVES_OUT.format(column="balance", value=100, table="bank_account")
DELETES = CHANGES.replace("INSERT OR UPDATE", "DELETE")


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages with which COMMIT goes from now on."""
    messages: list[str] = []
    execute = CursorWrapper._execute  # type: ignore[attr-defined]

    def remember(self: Any, sql: Any, *args: Any) -> Any:
        if "COMMIT" in str(sql):
            messages.append(str(sql))
        return execute(self, sql, *args)

    monkeypatch.setattr(CursorWrapper, "_execute", remember)
    return messages


@pytest.mark.parametrize(
    ("statement", "counted"),
    [
        pytest.param("SELECT", False, id="nothing"),
        pytest.param(AFTERWARDS, False, id="a trigger that only looks on"),
        pytest.param(DELETES, False, id="a trigger of DELETE"),
        pytest.param(f"{CHANGES}; ALTER TABLE bank_account DISABLE TRIGGER leave_out", False, id="a disabled trigger"),
        pytest.param(CHANGES, True, id="a trigger"),
        pytest.param("ALTER TABLE bank_account ENABLE ROW LEVEL SECURITY", True, id="policies"),
        pytest.param("CREATE TABLE child () INHERITS (bank_account)", True, id="a child"),
        pytest.param(
            "ALTER TABLE bank_account RENAME TO kept; CREATE VIEW bank_account AS SELECT * FROM kept", True, id="a view"
        ),
    ],
)
def test_an_update_is_counted_before_commit_only_where_something_could_leave_it_out(
    statement: str, counted: bool, commits: list[str], tmp_path: Path
) -> None:
    with tables(tmp_path, statement) as alias, processing(alias) as processor:
        Account.objects.using(alias).create(name="a")
        assert [processor.run("a", deposit, 1) for _ in range(3)] == [1, 2, 3]
        assert Account.objects.using(alias).get().balance == 3
    assert [_lossy_tables.LOOK[:20] in one for one in commits] == [True, False, False]
    assert ["count(*)" in one for one in commits] == [True, counted, counted]


def test_an_update_is_counted_where_the_batch_writes_something_else(commits: list[str], tmp_path: Path) -> None:
    def write(account: Account) -> None:
        account.entries.create(text="beside")
        deposit(account, 1)

    def add_too(account: Account) -> None:
        add(account, "added")
        deposit(account, 1)

    with tables(tmp_path) as alias, processing(alias) as processor:
        Account.objects.using(alias).create(name="a")
        processor.run("a", deposit, 1)
        processor.run("a", write)
        processor.run("a", add_too)
        processor.run("a", deposit, 1, idempotency_key="one")
        processor.run("a", deposit, 1)
    assert ["count(*)" in one for one in commits] == [True, True, True, True, False]


def test_a_table_is_looked_at_again_after_a_minute(
    commits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tables(tmp_path, CHANGES) as alias, processing(alias) as processor:
        Account.objects.using(alias).create(name="a")
        processor.run("a", deposit, 1)
        execute(alias, "DROP TRIGGER leave_out ON bank_account")
        processor.run("a", deposit, 1)
        known = _lossy_tables._known
        monkeypatch.setattr(_lossy_tables, "_known", {place: (found, 0) for place, (found, _) in known.items()})
        processor.run("a", deposit, 1)
        processor.run("a", deposit, 1)
    assert ["count(*)" in one for one in commits] == [True, True, True, False]


# -- while the process runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS)
def test_a_change_that_a_trigger_leaves_out_that_is_made_while_the_process_runs_is_not_answered_as_saved(
    options: dict[str, Any], commits: list[str], tmp_path: Path
) -> None:
    with tables(tmp_path) as alias, processing(alias, **options) as processor:
        Account.objects.using(alias).create(name="a")
        assert [processor.run("a", deposit, 1) for _ in range(2)] == [1, 2]
        execute(alias, LEAVES_OUT.format(column="balance", value=103, table="bank_account"))
        found = answers(processor, deposit, 1, 100)
        assert found[0] == 3
        assert isinstance(found[1], DatabaseError)
        assert Account.objects.using(alias).get().balance == 3
        del commits[:]
        processor.run("a", deposit, 1)
    assert all("count(*)" in one for one in commits)


@pytest.mark.parametrize("what", ["outcome", "row", "statement"])
@pytest.mark.parametrize("options", WAYS)
def test_nothing_of_a_batch_is_saved_whose_row_such_a_trigger_leaves_out(
    options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    def change(account: Account) -> None:
        deposit(account, 100)
        if what == "row":
            add(account, "added")
        elif what == "statement":
            account.entries.create(text="beside")

    key = "one" if what == "outcome" else None
    with tables(tmp_path) as alias, processing(alias, **options) as processor:
        Account.objects.using(alias).create(name="a")
        assert [processor.run("a", deposit, 0) for _ in range(2)] == [0, 0]
        assert [processor.run("a", deposit, 1) for _ in range(2)] == [1, 2]
        execute(alias, LEAVES_OUT.format(column="balance", value=102, table="bank_account"))
        assert isinstance(answer_of(processor.run, "a", change, idempotency_key=key), DatabaseError)
        counts = [model.objects.using(alias).count() for model in (Entry, Outcome)]
        assert (Account.objects.using(alias).get().balance, counts) == (2, [0, 0])


@pytest.mark.parametrize("options", WAYS)
def test_a_row_that_is_added_and_left_out_by_such_a_trigger_is_the_error_of_who_added_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    with tables(tmp_path) as alias, processing(alias, **options) as processor:
        Account.objects.using(alias).create(name="a")
        assert [processor.run("a", add, text) for text in ("one", "two")] == ["one", "two"]
        execute(alias, LEAVES_OUT.format(column="text", value="'bad'", table="bank_entry"))
        assert isinstance(answer_of(processor.run, "a", add, "bad"), Exception)
        assert answers(processor, add, "three", "four") == ["three", "four"]
        there = [entry.text for entry in Entry.objects.using(alias).order_by("pk")]
        assert there == ["one", "two", "three", "four"]


def test_what_a_new_trigger_writes_itself_as_it_leaves_out_the_first_change_stays(tmp_path: Path) -> None:
    trigger = LEAVES_OUT.format(column="balance", value=102, table="bank_account")
    written = "INSERT INTO bank_entry (text) VALUES ('refused ' || (SELECT count(*) FROM bank_entry)); RETURN NULL"
    with tables(tmp_path) as alias, processing(alias) as processor:
        Account.objects.using(alias).create(name="a")
        assert [processor.run("a", deposit, 1) for _ in range(2)] == [1, 2]
        execute(alias, trigger.replace("RETURN NULL", written))
        assert [type(answer_of(processor.run, "a", deposit, 100)) for _ in range(3)] == [DatabaseError] * 3
        assert Account.objects.using(alias).get().balance == 2
        assert [entry.text for entry in Entry.objects.using(alias).all()] == ["refused 0"]
