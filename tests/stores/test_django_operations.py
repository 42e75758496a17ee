"""What operations do through the resource of a `DjangoStore`, and beside it: as if each of them had run alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import IntegrityError, connections, transaction
from django.db.models import F, prefetch_related_objects

from geventbatch import LoadFailed, Processor, current_batch
from geventbatch.stores import DjangoStore
from tests.support.callers import answer_of
from tests.support.django_accounts import MARIADB, account, deposit, opening, processing, together
from tests.support.django_project.start import execute

from tests.support.django_project.bank.models import Account, Card, Entry, Noting, Savings  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


alias = opening("sqlite", "postgresql", MARIADB)


def between(alias: str, operation: Callable[[Account], object], **options: Any) -> Any:
    """The answer of *operation* between two deposits, which are saved."""
    with processing(alias, min_duration=0.01, **options) as processor:
        answers = together(processor, lambda a: deposit(a, 1), operation, lambda a: deposit(a, 1))
    assert (answers[0], answers[2], account(alias).balance) == (1, 2, 2), answers
    return answers[1]


# -- the resource's own row, behind its back ---------------------------------------------------------------------


def update_by_query(resource: Account) -> None:
    Account.objects.using(resource._state.db).filter(pk=resource.pk).update(balance=F("balance") + 100)


def delete_by_query(resource: Account) -> None:
    Account.objects.using(resource._state.db).filter(pk=resource.pk).delete()


def update_by_text(resource: Account) -> None:
    with connections[str(resource._state.db)].cursor() as cursor:
        cursor.execute("UPDATE bank_account SET note = 'x'")


def save_another_instance(resource: Account) -> None:
    other = Account.objects.using(resource._state.db).get(pk=resource.pk)
    other.balance += 100
    other.save()


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_a_change_of_the_resources_own_row_behind_its_back_is_refused_to_its_own_operation(
    alias: str, mode: str
) -> None:
    for operation in (update_by_query, delete_by_query, update_by_text, save_another_instance):
        Account.objects.using(alias).update(balance=0)
        error = between(alias, operation, mode=mode)
        assert isinstance(error, RuntimeError), operation
        assert "changed the row of its resource by a query or another instance" in str(error)
    assert account(alias).note == ""


class Found(Exception):
    """Such a balance."""


@pytest.mark.parametrize("raises", [False, True])
def test_nobody_is_answered_of_the_row_as_it_was_behind_one_who_has_asked_for_it_as_it_is(
    alias: str, raises: bool
) -> None:
    written: list[int] = []

    def write() -> None:
        execute(alias, "UPDATE bank_account SET balance = 10")
        connections[alias].close()

    def answer(balance: int) -> int:
        if raises:
            raise Found(balance)
        return balance

    def asks(resource: Account) -> int:
        if not written:
            written.append(10)
            gevent.spawn(write).get()
        return answer(Account.objects.using(alias).values_list("balance", flat=True).get(name=resource.name))

    with processing(alias, mode="version", min_duration=0.01) as processor:
        answers = together(processor, asks, lambda a: answer(a.balance))
    assert [found.args[0] if raises else found for found in answers] == [10, 10]


def test_where_all_have_raised_nothing_is_saved_though_they_have_asked_and_written(alias: str) -> None:
    Account.objects.using(alias).create(name="b")

    def asks(resource: Account) -> None:
        raise Found(Account.objects.using(alias).values_list("balance", flat=True).get(name=resource.name))

    def writes(_: Account) -> None:
        raise Found(Account.objects.using(alias).filter(name="b").update(balance=1))

    with processing(alias, mode="version", min_duration=0.01) as processor:
        assert [found.args for found in together(processor, asks, writes)] == [(0,), (1,)]
    assert account(alias).balance == Account.objects.using(alias).get(name="b").balance == 0


def test_a_change_of_the_resources_own_row_that_is_swallowed_is_refused_too(alias: str) -> None:
    def change(resource: Account) -> None:
        with pytest.raises(RuntimeError):
            update_by_query(resource)

    assert isinstance(between(alias, change), RuntimeError)


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_a_query_finds_in_the_row_of_the_resource_what_those_before_have_changed(alias: str, mode: str) -> None:
    def count(_: object) -> list[int]:
        return list(Account.objects.using(alias).values_list("balance", flat=True))

    def look(resource: Account) -> None:
        raise KeyError(Account.objects.using(alias).get(pk=resource.pk).balance)

    assert between(alias, count, mode=mode) == [1]
    Account.objects.using(alias).update(balance=0)
    assert between(alias, look, mode=mode).args == (1,)


def test_a_query_finds_the_row_of_the_resource_without_what_its_own_operation_has_changed(alias: str) -> None:
    def ask(resource: Account) -> int:
        resource.balance += 10
        resource.save()
        found = Account.objects.using(alias).get(pk=resource.pk).balance
        resource.balance -= 10
        return found

    assert between(alias, ask) == 1


def test_queries_for_other_rows_of_its_table_cost_no_save_of_their_own(alias: str) -> None:
    other = Account.objects.using(alias).create(name="b", balance=7)

    def ask(resource: Account) -> tuple[int, int, bool]:
        found = Account.objects.using(alias).get(pk=other.pk)
        locked = Account.objects.using(alias).select_for_update().get(pk=other.pk)
        taken = (
            Account.objects.using(alias).filter(name="a").exclude(pk=resource.pk).exists()
        )  # as validate_unique asks
        return found.balance, locked.balance, taken

    with processing(alias, min_duration=0.01) as processor:
        metrics = processor.subscribe_batch_metrics()
        assert together(processor, lambda a: deposit(a, 1), ask, lambda a: deposit(a, 1)) == [1, (7, 7, False), 2]
    assert [(metric.operation_count, metric.attempts) for metric in metrics] == [(3, 1)]


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_other_rows_of_the_resources_own_table_may_be_changed(alias: str, mode: str) -> None:
    Account.objects.using(alias).create(name="b")

    def transfer(resource: Account) -> int:
        return Account.objects.using(alias).filter(name="b").update(balance=F("balance") + 1)

    assert between(alias, transfer, mode=mode) == 1
    assert Account.objects.using(alias).get(name="b").balance == 1


def test_the_row_of_a_new_resource_is_not_inserted_by_an_operation(alias: str) -> None:
    store = DjangoStore(Account, by="name", using=alias, missing=lambda name: Account(name=name))

    def insert(resource: Account) -> None:
        Account.objects.using(alias).create(name=resource.name)

    with Processor(open_resource=store, min_duration=0.01) as processor:
        error, balance = together_on("new", processor, insert, lambda a: deposit(a, 1))
    assert isinstance(error, RuntimeError)
    assert balance == Account.objects.using(alias).get(name="new").balance == 1


def together_on(key: object, processor: Processor[Any], *operations: Callable[[Any], object]) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, key, operation) for operation in operations]
    return [caller.get() for caller in callers]


def done(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What *coroutine* returns, which waits for nothing."""
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    return ended.value.value


# -- save, delete and refresh of the resource --------------------------------------------------------------------


def test_saving_and_deleting_the_resource_asynchronously_is_left_to_the_store_too(alias: str) -> None:
    def save(resource: Account) -> int:
        deposit(resource, 1)
        done(resource.asave(update_fields=["balance"]))
        return Account.objects.using(alias).get().balance

    def delete(resource: Account) -> None:
        done(resource.adelete())

    with processing(alias, min_duration=0.01) as processor:
        answers = together(processor, save, delete, lambda a: a.name)
    assert answers[:2] == [0, None]
    assert isinstance(answers[2], LoadFailed)
    assert not Account.objects.using(alias).exists()


REFRESHING: tuple[Callable[[Any], object], ...] = (
    lambda a: a.refresh_from_db(),
    lambda a: a.refresh_from_db(fields=["balance"]),
    lambda a: a.refresh_from_db(fields=["entries", "balance"]),
    lambda a: done(a.arefresh_from_db()),
    lambda a: done(a.arefresh_from_db(fields=["note"])),
)


def test_reading_anew_what_is_loaded_is_refused_and_undoes_nothing(alias: str) -> None:
    for operation in REFRESHING:
        Account.objects.using(alias).update(balance=0)
        error = between(alias, operation)
        assert isinstance(error, RuntimeError)
        assert "would undo what the operations before this one have changed" in str(error)


def test_a_foreign_key_is_not_read_anew_by_the_name_of_its_relation(alias: str) -> None:
    card = Card.objects.using(alias).create(owner=account(alias))
    store = DjangoStore(Card, using=alias)

    def change(resource: Card) -> None:
        resource.owner = None

    def refresh(resource: Card) -> None:
        resource.refresh_from_db(fields=["owner"])

    with Processor(open_resource=store, min_duration=0.01) as processor:
        answers = together_on(card.pk, processor, change, refresh)
    assert answers[0] is None
    assert isinstance(answers[1], RuntimeError)
    assert Card.objects.using(alias).get().owner is None


def test_saving_the_resource_to_another_database_is_refused(alias: str) -> None:
    for operation in (
        lambda a: a.save(using="default"),
        lambda a: a.save(False, False, "default"),
        lambda a: a.delete(using="default"),
        lambda a: a.refresh_from_db(using="default", fields=["entries"]),
    ):
        Account.objects.using(alias).update(balance=0)
        error = between(alias, operation)
        assert isinstance(error, RuntimeError)
        assert "(using='default') on the resource of a batch" in str(error)
    assert between_saves_itself(alias) is None


def between_saves_itself(alias: str) -> Any:
    Account.objects.using(alias).update(balance=0)
    return between(alias, lambda a: a.save(using=alias))


# -- what is read through the resource ---------------------------------------------------------------------------


def card_of(alias: str) -> Card:
    return Card.objects.using(alias).create(owner=account(alias))


def test_a_related_object_is_read_anew_by_each_operation(alias: str) -> None:
    card = card_of(alias)

    def read(resource: Card) -> str:
        assert resource.owner is not None
        return resource.owner.note

    def change(resource: Card) -> None:
        assert resource.owner is not None
        Account.objects.using(alias).filter(pk=resource.owner.pk).update(note="changed")

    def change_in_memory_only(resource: Card) -> None:
        assert resource.owner is not None
        resource.owner.note = "of nobody"

    store = DjangoStore(Card, using=alias)
    with Processor(open_resource=store, min_duration=0.01) as processor:
        answers = together_on(card.pk, processor, read, change, read, change_in_memory_only, read)
    assert answers == ["", None, "changed", None, "changed"]


def test_prefetched_objects_are_read_anew_by_each_operation(alias: str) -> None:
    def prefetch(resource: Account) -> int:
        prefetch_related_objects([resource], "entries")
        return len(resource.entries.all())

    def add(resource: Account) -> None:
        Entry.objects.using(alias).create(account_id=resource.pk, text="x")

    with processing(alias, min_duration=0.01) as processor:
        assert together(processor, prefetch, add, lambda a: len(a.entries.all())) == [0, None, 1]


def test_what_a_model_computes_once_is_computed_anew_for_each_operation(alias: str) -> None:
    card = card_of(alias)

    def spend(resource: Card) -> int:
        resource.spent += 1
        return resource.twice + resource.thrice

    store = DjangoStore(Card, using=alias)
    with Processor(open_resource=store, min_duration=0.01) as processor:
        assert together_on(card.pk, processor, spend, spend, spend) == [5, 10, 15]


def test_a_related_object_that_is_saved_behind_its_assignment_is_saved_with_the_resource(alias: str) -> None:
    card = card_of(alias)

    def give(resource: Card) -> None:
        resource.owner = Account(name="new owner")
        resource.owner.save(using=alias)

    store = DjangoStore(Card, using=alias)
    with Processor(open_resource=store, min_duration=0.01) as processor:
        answers = together_on(card.pk, processor, give, lambda a: a.owner.name)
    assert answers == [None, "new owner"]
    found = Card.objects.using(alias).get().owner
    assert found is not None
    assert found.name == "new owner"


def test_a_related_object_that_is_not_saved_is_the_error_of_the_operation_that_assigned_it(alias: str) -> None:
    card = card_of(alias)

    def give(resource: Card) -> None:
        resource.owner = Account(name="new owner")

    def spend(resource: Card) -> int:
        resource.spent += 1
        return resource.spent

    store = DjangoStore(Card, using=alias)
    with Processor(open_resource=store, min_duration=0.01) as processor:
        answers = together_on(card.pk, processor, spend, give, spend)
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], ValueError)
    assert "unsaved related object" in str(answers[1])


def test_an_attribute_that_is_no_column_is_not_there_for_the_operations_behind_it(alias: str) -> None:
    def mark(resource: Any) -> str:
        resource.seen_by = "the first"
        return str(resource.seen_by)

    with processing(alias, min_duration=0.01) as processor:
        assert together(processor, mark, lambda a: getattr(a, "seen_by", None), mark) == [
            "the first",
            None,
            "the first",
        ]


def test_what_a_save_of_the_models_own_writes_of_an_attribute_is_not_lost(alias: str) -> None:
    def note(resource: Any, word: str, *, refused: bool = False) -> None:
        Entry.objects.using(alias).count()  # so that the store looks at what it has left
        resource.balance += 1
        if refused:
            resource.balance -= 1
            raise ValueError(word)
        resource.__dict__.setdefault("noted", []).append(word)

    Account.objects.using(alias).update_or_create(name="a")
    with Processor(open_resource=DjangoStore(Noting, by="name", using=alias), min_duration=0.01) as processor:
        answers = together_on(
            "a", processor, lambda a: note(a, "one"), lambda a: note(a, "no", refused=True), lambda a: note(a, "two")
        )
    assert answers[::2] == [None, None]
    assert isinstance(answers[1], ValueError)
    assert account(alias).note == "one two"


def test_the_parents_tables_of_a_resource_are_its_own_too(alias: str) -> None:
    Savings.objects.using(alias).create(name="s")
    store = DjangoStore(Savings, by="name", using=alias)

    def change(resource: Savings) -> None:
        Account.objects.using(alias).filter(name="s").update(balance=100)

    with Processor(open_resource=store, min_duration=0.01) as processor:
        answers = together_on("s", processor, change, lambda a: deposit(a, 1))
    assert isinstance(answers[0], RuntimeError)
    assert answers[1] == 1


def test_a_row_that_was_added_is_not_found_by_a_query_before_the_save(alias: str) -> None:
    def add_entry(resource: Account) -> None:
        current_batch().add_row(Entry(text="added"))

    with processing(alias, min_duration=0.01) as processor:
        assert together(processor, add_entry, lambda _: Entry.objects.using(alias).count()) == [None, 0]
    assert Entry.objects.using(alias).count() == 1


# -- triggers ----------------------------------------------------------------------------------------------------


COUNTED = {
    "sqlite": "CREATE TRIGGER counted AFTER INSERT ON bank_entry BEGIN "
    "UPDATE bank_account SET note = note || '+' WHERE id = NEW.account_id; END",
    "postgresql": "CREATE FUNCTION counted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "UPDATE bank_account SET note = note || '+' WHERE id = NEW.account_id; RETURN NEW; END $$; "
    "CREATE TRIGGER counted AFTER INSERT ON bank_entry FOR EACH ROW EXECUTE FUNCTION counted()",
    "mariadb": "CREATE TRIGGER counted AFTER INSERT ON bank_entry FOR EACH ROW "
    "UPDATE bank_account SET note = CONCAT(note, '+') WHERE id = NEW.account_id",
}


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_what_a_trigger_writes_to_the_resources_row_is_kept_and_blamed_on_nobody(
    alias: str, request: pytest.FixtureRequest, mode: str
) -> None:
    execute(alias, COUNTED[request.node.callspec.params["alias"]])
    Account.objects.using(alias).create(name="b")

    def add_entry(resource: Account) -> None:
        Entry.objects.using(alias).create(account_id=resource.pk, text=f"x{Entry.objects.using(alias).count()}")

    def add_and_undo(resource: Account) -> None:
        with transaction.atomic(using=alias):
            add_entry(resource)
            transaction.set_rollback(True, using=alias)

    def transfer(resource: Account) -> int:
        return Account.objects.using(alias).filter(name="b").update(balance=F("balance") + 1)

    with processing(alias, min_duration=0.01, mode=mode) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(processor, lambda a: deposit(a, 1), add_and_undo, add_entry, transfer, add_entry)
        assert answers == [1, None, None, 1, None]
    assert [metric.attempts for metric in metrics] == [1]
    found = account(alias)
    assert (found.balance, found.note) == (1, "++")


def test_what_the_database_says_to_the_resource_comes_behind_the_operation_and_not_at_its_save(alias: str) -> None:
    def forget_note(resource: Account) -> str:
        resource.note = None  # type: ignore[assignment]
        try:
            resource.save()
        except IntegrityError:
            return "alone"
        return "in a batch"

    assert isinstance(between(alias, forget_note), IntegrityError)


# -- others of its class -----------------------------------------------------------------------------------------


def made_by_type(resource: Account) -> Account:
    return type(resource)(name="b", balance=7)


def made_by_class(resource: Account) -> Account:
    return resource.__class__(name="b", balance=7)


@pytest.mark.parametrize("make", [made_by_type, made_by_class])
def test_another_one_that_an_operation_makes_of_the_resources_class_is_an_ordinary_one(
    alias: str, make: Callable[[Account], Account]
) -> None:
    def split(resource: Account) -> bool:
        other = make(resource)
        other.save(using=resource._state.db)
        return type(other) is Account

    assert between(alias, split) is True
    assert Account.objects.using(alias).get(name="b").balance == 7


def test_another_one_is_compared_with_the_class_of_the_resource_as_alone(alias: str) -> None:
    def compare(resource: Account) -> list[bool]:
        other = Account(name="b")
        return [isinstance(other, type(resource)), isinstance(other, resource.__class__), resource.__class__ is Account]

    assert between(alias, compare) == [True, True, True]
