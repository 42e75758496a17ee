"""Operations across keys on Django models: several models in one store, statements of operations, callbacks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import DatabaseError, IntegrityError, connections, transaction
from django.db.models.signals import post_save

from geventbatch import Processor, ResourceMissing, current_batch
from geventbatch.stores import DjangoStore
from tests.support.callers import answer_of
from tests.support.django_accounts import MARIADB, entries, opening

from tests.support.django_project.bank.models import Account, Audited, Card, Entry, Outcome, Savings, Ticket  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable

alias = opening("sqlite", "postgresql", MARIADB)
postgres = opening("postgresql")
mariadb = opening("mariadb")

MODES = pytest.mark.parametrize("mode", ["lock", "version"])


def store_of(alias: str, mode: Any = None) -> DjangoStore[Any]:
    """Of accounts by name and tickets by number."""
    models: Any = {"account": Account, "ticket": Ticket}
    by, version = {"account": "name"}, {"ticket": "version"}
    return DjangoStore(models, by=by, version=version, mode=mode, using=alias, idempotency=Outcome)


def opened(alias: str, mode: Any = None, **options: Any) -> Processor[Any]:
    """Over accounts and tickets; it runs all that comes together as one bulk."""
    for name in "bcdef":
        Account.objects.using(alias).create(name=name, balance=10)
    Account.objects.using(alias).filter(name="a").update(balance=10)
    for number in range(4):
        Ticket.objects.using(alias).create(number=number)
    store = store_of(alias, mode)
    how = {"min_duration": 0, "max_duration": 10, "workers": 1, "max_batches": 1, "max_attempts": 20}
    return Processor(open_resources=store.open_resources, **{**how, **options})


def account(name: str) -> tuple[str, str]:
    return "account", name


def ticket(number: int) -> tuple[str, int]:
    return "ticket", number


def together(processor: Processor[Any], *runs: Any) -> list[Any]:
    """What the callers were told, each of whom named keys, an operation and its arguments."""

    def call(*run: Any) -> Any:
        try:
            return answer_of(processor.run_across, *run)
        finally:
            for connection in connections.all(initialized_only=True):  # of an unbatched operation
                connection.close()

    return [one.get() for one in [gevent.spawn(call, *run) for run in runs]]


def balances(alias: str) -> str:
    found = Account.objects.using(alias).order_by("name").values_list("balance", flat=True)
    return " ".join(map(str, found))


SEVERAL = r"these are several keys: call run_across\(\) with a list of them"


def totals(alias: str) -> list[tuple[int, int]]:
    return list(Ticket.objects.using(alias).order_by("number").values_list("total", "version"))


def pay(resources: tuple[Any, ...], amount: int) -> int:
    """Take from an account, and put into a ticket or another account."""
    source, target = resources
    source.balance -= amount
    if isinstance(target, Ticket):
        target.total += amount
    else:
        target.balance += amount
    if source.balance < 0:
        raise ValueError("too little")
    return int(source.balance)


def elsewhere(function: Callable[..., object], *args: Any) -> Any:
    """Let *function* run as somebody else, on a connection of its own."""

    def run() -> object:
        try:
            return function(*args)
        finally:
            for connection in connections.all(initialized_only=True):
                connection.close()

    return gevent.spawn(run).get()


# -- several models -----------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("batching", [True, False])
def test_rows_of_several_models_are_saved_together_or_not_at_all(alias: str, mode: str, batching: bool) -> None:
    with opened(alias, mode, batching=batching) as processor:
        answers = together(
            processor,
            ([account("a"), ticket(1)], pay, 3),
            ([account("b"), ticket(2)], pay, 11),
            ([account("c"), account("d")], pay, 1),
        )
        processor.run(ticket(3), setattr, "total", 8)
    assert answers[0] == 7
    assert str(answers[1]) == "too little"
    assert answers[2] == 9
    assert balances(alias) == "7 10 9 11 10 10"
    assert totals(alias) == [(0, 0), (3, 1), (0, 0), (8, 1)]


@MODES
def test_a_missing_row_of_one_model_is_the_answer_of_those_that_name_it(alias: str, mode: str) -> None:
    with opened(alias, mode) as processor:
        answers = together(
            processor,
            ([account("a"), ticket(9)], pay, 3),
            ([account("a"), account("nobody")], pay, 3),
            ([account("a"), ticket(1)], pay, 2),
        )
    assert [type(answer) for answer in answers] == [ResourceMissing, ResourceMissing, int]
    assert [answer.key for answer in answers[:2]] == [ticket(9), account("nobody")]
    assert (balances(alias), totals(alias)[1]) == ("8 10 10 10 10 10", (2, 1))


@pytest.mark.parametrize(
    ("key", "error", "told"),
    [
        (
            "a",
            TypeError,
            "'a' is no key of .* by number: it must be a pair of a name, of 'account', 'ticket', and a key$",
        ),
        ((account("a"), ticket(1)), ValueError, f"its first part must be one of 'account', 'ticket'; {SEVERAL}$"),
        ([account("a"), account("b"), ticket(1)], TypeError, f"and a key; {SEVERAL}$"),
        (("seat", 1), ValueError, "its first part must be one of 'account', 'ticket'"),
        (("ticket", "x"), ValueError, "'x' is no key for the column bank.Ticket.number"),
        ((1, 2), ValueError, "its first part must be one of 'account', 'ticket'$"),
    ],
)
def test_a_key_that_is_of_none_of_the_models_is_refused_at_the_door(
    alias: str, key: Any, error: type[Exception], told: str
) -> None:
    with opened(alias) as processor:
        for run in (partial(processor.run, key), partial(processor.run_across, [key])):
            with pytest.raises(error, match=told):
                run(print)


def test_keys_of_several_models_have_one_form(alias: str) -> None:
    store: Any = DjangoStore({"account": Account, "ticket": Ticket}, by={"account": "name"}, using=alias)
    assert store.normalize_key(["ticket", "12"]) == ("ticket", 12)
    assert repr(store) == f"<DjangoStore: bank.Account by name and bank.Ticket by number in {alias!r}>"


def test_options_of_models_that_are_none_of_the_store_are_refused(alias: str) -> None:
    models: Any = {"account": Account, "ticket": Ticket}
    wrong: Any = {1: Account}
    no_model: Any = {"account": "Account"}
    with pytest.raises(ValueError, match="version names 'tickets', which is no name of a model"):
        DjangoStore(models, version={"tickets": "version"}, using=alias)
    with pytest.raises(TypeError, match="model has the name 1, but must have strings"):
        DjangoStore(wrong, using=alias)
    with pytest.raises(ValueError, match="model has no model"):
        DjangoStore({}, using=alias)
    with pytest.raises(TypeError, match="model is 'Account', but must be a concrete model class"):
        DjangoStore(no_model, using=alias)


def test_a_store_that_prepares_its_connection_for_each_key_has_no_form_for_many(alias: str) -> None:
    store = DjangoStore(Account, by="name", using=alias, prepare_connection=lambda connection, key: None)
    with Processor(open_resource=store, min_duration=0) as processor:
        assert processor.run("a", lambda one: one.name) == "a"
        with pytest.raises(TypeError, match="prepare_connection prepares a transaction for one of them"):
            processor.run_across(["a"], print)


@MODES
def test_a_store_of_single_keys_takes_operations_across_keys(alias: str, mode: Any) -> None:
    Account.objects.using(alias).create(name="b", balance=10)
    store = DjangoStore(Account, by="name", using=alias, mode=mode)
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        runs = [*[(["b", "a"], pay, 1)] * 3, (["a"], lambda resources: resources[0].balance)]
        assert together(processor, *runs) == [9, 8, 7, 3]
        assert processor.run("a", lambda one: one.balance) == 3
    assert balances(alias) == "3 7"


@MODES
@pytest.mark.parametrize("batching", [True, False])
def test_an_operation_across_keys_deletes_one_of_them(alias: str, mode: str, batching: bool) -> None:
    def close(resources: tuple[Any, ...]) -> None:
        target, source = resources
        target.balance += source.balance
        source.delete()

    runs = [
        ([account("a"), account("b")], pay, 3),
        ([account("a"), account("b")], close),
        ([account("e"), account("f")], pay, 1),
        ([account("a"), account("b")], pay, 1),
        ([account("a"), account("c")], pay, 1),
    ]
    with opened(alias, mode, batching=batching) as processor:
        if batching:
            answers = together(processor, *runs)
        else:  # without an order among callers
            answers = [answer for run in runs for answer in together(processor, run)]
    assert [*answers[:3], answers[4]] == [7, None, 9, 19]
    assert isinstance(answers[3], ResourceMissing)
    assert balances(alias) == "19 11 10 9 11"


@MODES
def test_what_one_form_of_the_store_has_recorded_is_found_by_the_other(alias: str, mode: str) -> None:
    def add(one: Any) -> int:
        one.total += 1
        return int(one.total)

    with opened(alias, mode) as many, Processor(open_resource=store_of(alias, mode), min_duration=0) as single:
        assert single.run(ticket(1), add, idempotency_key="k") == 1
        assert many.run(("ticket", "1"), add, idempotency_key="k") == 1
        assert many.run(ticket(2), add, idempotency_key="k") == 1
        assert single.run(ticket(2), add, idempotency_key="k") == 1
        for processor in (many, single):
            keys = [account("a"), ticket(1)]
            assert processor.run_across(keys, pay, 3, idempotency_key="k") == 7
    assert (balances(alias), totals(alias)[1:3]) == ("7 10 10 10 10 10", [(4, 2), (1, 1)])


@pytest.mark.parametrize("batching", [True, False])
def test_a_refusal_across_keys_is_recorded_and_raised_again(alias: str, batching: bool) -> None:
    with opened(alias, batching=batching) as processor:
        for _ in range(2):
            with pytest.raises(ValueError, match="too little"):
                processor.run_across([account("a"), account("b")], pay, 11, idempotency_key="k")
            Account.objects.using(alias).filter(name="a").update(balance=90)
    assert balances(alias) == "90 10 10 10 10 10"


# -- statements of operations ------------------------------------------------------------------------------------


def note(resources: tuple[Any, ...], text: str, *, fails: bool = False) -> str:
    """Change all resources, and write beside them."""
    for resource in resources:
        resource.balance += 1
    Entry.objects.using(resources[0]._state.db).create(text=text)
    if fails:
        raise ValueError(text)
    return text


@MODES
def test_what_operations_write_is_committed_with_their_keys(alias: str, mode: str) -> None:
    with opened(alias, mode) as processor:
        answers = together(
            processor,
            ([account("a"), account("b")], note, "one"),
            ([account("b"), account("c")], note, "two"),
            ([account("d")], note, "three"),
            ([account("e"), account("f")], pay, 1),
        )
    assert answers == ["one", "two", "three", 9]
    assert sorted(entries(alias)) == ["one", "three", "two"]
    assert balances(alias) == "11 12 11 11 9 11"


@MODES
@pytest.mark.parametrize("clean", [(), (ValueError,)])
def test_what_an_operation_wrote_that_raised_is_not_committed_with_other_keys(
    alias: str, mode: str, clean: Any
) -> None:
    with opened(alias, mode, clean_errors=clean) as processor:
        answers = together(
            processor,
            ([account("a"), account("b")], note, "one"),
            ([account("b"), account("c")], partial(note, fails=True), "two"),
            ([account("d")], partial(note, fails=True), "three"),
            ([account("e"), account("f")], pay, 1),
            ([account("e")], note, "four"),
        )
    assert [str(answer) for answer in answers] == ["one", "two", "three", "9", "four"]
    assert [type(answer) for answer in answers] == [str, ValueError, ValueError, int, str]
    assert sorted(entries(alias)) == ["four", "one"]
    assert balances(alias) == "11 11 10 10 10 11"


@MODES
def test_what_an_operation_wrote_before_another_one_raised_is_committed_once(alias: str, mode: str) -> None:
    def refuse(resources: tuple[Any, ...]) -> None:
        resources[0].balance = 99
        raise KeyError("no")

    with opened(alias, mode) as processor:
        answers = together(
            processor,
            ([account("a"), account("b")], note, "one"),
            ([account("b"), account("c")], refuse),
            ([account("d"), account("e")], pay, 1),
        )
    assert (answers[0], type(answers[1]), answers[2]) == ("one", KeyError, 9)
    assert entries(alias) == ["one"]
    assert balances(alias) == "11 11 10 9 11 10"


@pytest.mark.parametrize("writes", [False, True])
def test_statements_of_a_key_that_was_lost_are_not_committed_with_other_keys(postgres: str, writes: bool) -> None:
    once = iter([True])

    def lose(resources: tuple[Any, ...]) -> str:
        for _ in once:
            elsewhere(partial(Account.objects.using(postgres).filter(name="b").update, balance=50))
        if writes:
            return note(resources, "lost")
        resources[0].balance += 1
        resources[1].balance += 1
        return "lost"

    with opened(postgres, "version") as processor:
        answers = together(
            processor,
            ([account("a"), account("b")], lose),
            ([account("c"), account("d")], pay, 1),
            ([account("e")], note, "e"),
        )
    assert answers == ["lost", 9, "e"]
    assert sorted(entries(postgres)) == ["e", *(["lost"] if writes else [])]
    assert balances(postgres) == "11 51 9 11 11 10"


@MODES
def test_a_row_of_the_bulk_that_the_statement_of_another_key_has_changed_is_loaded_again(alias: str, mode: str) -> None:
    def give(resources: tuple[Any, ...]) -> int:
        return Account.objects.using(alias).filter(name="c").update(balance=70)

    with opened(alias, mode) as processor:
        answers = together(
            processor,
            ([account("c"), account("d")], pay, 1),
            ([account("a"), account("b")], give),
            ([account("e"), account("f")], pay, 1),
        )
    assert answers == [69, 1, 9]
    assert balances(alias) == "10 10 69 11 9 11"


@MODES
def test_an_operation_that_reads_what_others_have_changed_before_it_finds_that(alias: str, mode: str) -> None:
    def count(resources: tuple[Any, ...]) -> int:
        found = Account.objects.using(alias).filter(name__in="ab").values_list("balance", flat=True)
        return sum(found)

    with opened(alias, mode) as processor:
        answers = together(
            processor,
            ([account("a"), ticket(1)], pay, 3),
            ([account("a"), account("b")], count),
            ([account("b"), ticket(2)], pay, 1),
            ([account("e"), account("f")], pay, 1),
        )
    assert answers == [7, 17, 9, 9]
    assert balances(alias) == "7 9 10 10 9 11"


@pytest.mark.parametrize("across", [True, False])
def test_answers_of_one_key_are_never_of_two_states_though_nothing_is_saved(postgres: str, across: bool) -> None:
    once = iter([True])

    def see(resources: Any) -> int:
        return int((resources[0] if across else resources).balance)

    def query(_: Any) -> int:
        for _ in once:
            elsewhere(partial(Account.objects.using(postgres).filter(name="a").update, balance=50))
        return Account.objects.using(postgres).get(name="a").balance

    with opened(postgres, "version") as processor:
        keys: Any = [account("a"), account("b")] if across else account("a")
        run: Any = processor.run_across if across else processor.run
        callers: list[Any] = [gevent.spawn(run, keys, operation, read_only=True) for operation in (see, query, see)]
        callers.append(gevent.spawn(processor.run_across, [account("e"), account("f")], pay, 1))
        assert [caller.get() for caller in callers] == [50, 50, 50, 9]


# -- what a single key has too -----------------------------------------------------------------------------------


@MODES
def test_a_value_that_a_column_does_not_take_is_the_error_of_its_operation(alias: str, mode: str) -> None:
    def spoil(resources: tuple[Any, ...]) -> None:
        resources[0].balance += 5
        resources[1].balance = "many"

    with opened(alias, mode) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(
            processor,
            ([account("a"), account("b")], pay, 1),
            ([account("b"), account("c")], spoil),
            ([account("b"), account("a")], pay, 2),
            ([account("e"), account("f")], pay, 1),
        )
    assert (answers[0], answers[2:]) == (9, [9, 9])
    assert isinstance(answers[1], ValueError)
    assert "many" in str(answers[1])
    assert balances(alias) == "11 9 10 10 9 11"
    assert min(metric.attempts for metric in metrics) == 1


@MODES
def test_an_operation_that_changes_a_key_is_refused_alone(alias: str, mode: str) -> None:
    def rename(resources: tuple[Any, ...]) -> None:
        resources[1].name = "z"

    with opened(alias, mode) as processor:
        answers = together(processor, ([account("a"), account("b")], pay, 1), ([account("b"), account("c")], rename))
    assert answers[0] == 9
    assert "changed name, the key" in str(answers[1])
    assert balances(alias) == "9 11 10 10 10 10"


@MODES
def test_callbacks_of_operations_are_called_once_all_are_answered_and_of_those_that_are_saved_only(
    alias: str, mode: str
) -> None:
    called: list[str] = []

    def hook(resources: tuple[Any, ...], text: str, *, fails: bool = False) -> str:
        for resource in resources:
            resource.balance += 1
        transaction.on_commit(partial(called.append, text), using=alias)
        if fails:
            raise ValueError(text)
        return text

    def spoil(resources: tuple[Any, ...]) -> None:
        hook(resources, "spoilt")
        resources[0].balance = "many"

    with opened(alias, mode) as processor:
        together(
            processor,
            ([account("a"), account("b")], hook, "one"),
            ([account("b"), account("c")], partial(hook, fails=True), "two"),
            ([account("b"), account("c")], hook, "three"),
            ([account("d")], spoil),
            ([account("e"), account("f")], hook, "four"),
        )
    assert called == ["one", "three", "four"]
    assert balances(alias) == "11 12 11 10 11 11"


@MODES
def test_a_save_of_the_models_own_and_signals_are_called_once_for_each_key(alias: str, mode: Any) -> None:
    for name in "abc":
        Audited.objects.using(alias).create(name=name)
    Entry.objects.using(alias).all().delete()
    saved: list[str] = []

    def see(sender: Any, instance: Any, **_: Any) -> None:
        saved.append(instance.name)

    def add(resources: tuple[Any, ...], amount: int) -> None:
        for one in resources:
            one.total += amount
            one.save()

    store = DjangoStore(Audited, by="name", using=alias, mode=mode)
    post_save.connect(see, Audited)
    try:
        with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
            together(processor, (["a", "b"], add, 1), (["b", "c"], add, 1))
    finally:
        post_save.disconnect(see, Audited)
    assert sorted(saved) == ["a", "b", "c"]
    assert sorted(entries(alias)) == ["a 1", "b 2", "c 1"]


@MODES
def test_a_model_in_several_tables_is_saved_across_keys(alias: str, mode: Any) -> None:
    for name in ("x", "y"):
        Savings.objects.using(alias).create(name=name, balance=10)

    def move(resources: tuple[Any, ...]) -> None:
        resources[0].balance -= 1
        resources[1].rate += 1

    store = DjangoStore(Savings, by="name", using=alias, mode=mode)
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        together(processor, (["x", "y"], move), (["y", "x"], move))
    found = Savings.objects.using(alias).order_by("name").values_list("balance", "rate")
    assert list(found) == [(9, 1), (9, 1)]


@MODES
def test_a_constraint_that_one_operation_violates_is_its_error_alone(alias: str, mode: str) -> None:
    Entry.objects.using(alias).create(text="taken")

    def add(resources: tuple[Any, ...], text: str) -> str:
        current_batch().add_row(Entry(text=text))
        for resource in resources:
            resource.balance += 1
        return text

    with opened(alias, mode) as processor:
        answers = together(
            processor,
            ([account("a"), account("b")], add, "one"),
            ([account("b"), account("c")], add, "taken"),
            ([account("c"), account("b")], add, "two"),
            ([account("e"), account("f")], pay, 1),
        )
    assert isinstance(answers.pop(1), IntegrityError)
    assert answers == ["one", "two", 9]
    assert sorted(entries(alias)) == ["one", "taken", "two"]
    assert balances(alias) == "11 12 11 10 9 11"


def test_a_failed_statement_of_an_operation_is_its_error_alone(alias: str) -> None:
    def fail(resources: tuple[Any, ...]) -> None:
        resources[0].balance += 1
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT nothing FROM nowhere")

    with opened(alias) as processor:
        answers = together(
            processor,
            ([account("a"), account("b")], pay, 1),
            ([account("b"), account("c")], fail),
            ([account("e"), account("f")], pay, 1),
        )
    assert isinstance(answers.pop(1), DatabaseError)
    assert answers == [9, 9]
    assert balances(alias) == "9 11 10 10 9 11"


@pytest.mark.mariadb
def test_two_spellings_of_a_row_are_loaded_one_after_the_other(mariadb: str) -> None:
    with connections[mariadb].cursor() as cursor:
        cursor.execute("ALTER TABLE bank_account MODIFY name VARCHAR(200) COLLATE utf8mb4_general_ci NOT NULL")
    with opened(mariadb) as processor:
        answers = together(processor, ([account("b"), account("c")], pay, 1), ([account("B"), account("d")], pay, 1))
    assert answers == [9, 8]
    assert balances(mariadb) == "10 8 11 11 10 10"


def test_a_row_that_is_not_saved_yet_is_refused_as_the_one_that_another_refers_to(alias: str) -> None:
    def own(resources: tuple[Any, ...]) -> None:
        resources[0].owner = resources[1]
        resources[1].balance += 1

    Card.objects.using(alias).create(id=1)
    models: Any = {"account": Account, "card": Card}
    missing: Any = {"account": lambda name: Account(name=name)}
    store = DjangoStore(models, by={"account": "name"}, missing=missing, using=alias)
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=10) as processor:
        keys = [("card", 1), account("new")]
        (error,) = together(processor, (keys, own))
        assert isinstance(error, ValueError)
        assert "unsaved related object" in str(error)
        assert not Account.objects.using(alias).filter(name="new").exists()
        assert processor.run(account("new"), setattr, "balance", 3) is None
        assert together(processor, (keys, own)) == [None]
    assert Account.objects.using(alias).get(name="new").balance == 4
    assert Card.objects.using(alias).get(id=1).owner == Account.objects.using(alias).get(name="new")
