"""The tests as an application has them: `python -m django test examples.wallet`.

In a `TestCase` every operation runs in the test's own transaction, by itself: nothing is to be set up for that.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch
from uuid import uuid4

from django.db import IntegrityError, OperationalError, connection
from django.db.transaction import atomic
from django.test import TestCase

from examples.wallet import ordering, outbox, processors, transfers
from examples.wallet.models import Account, Kind, Movement, Pending
from examples.wallet.refusals import InsufficientFunds, UnknownAccount
from geventbatch import NotSaved, ProcessorOverloaded, ResourceMissing
from geventbatch.testing import check_operations, faults, state_of


def state(value: Any) -> Any:
    """What of it is the same in a second run: not the time of a row."""
    found = state_of(value)
    if isinstance(value, (Movement, Pending)):
        found[2].pop("at")
    return found


class Checked(TestCase):
    """Each operation of a test is tried twice on copies before it is applied."""

    def setUp(self) -> None:
        """Check them until the test ends."""
        self.enterContext(check_operations(processors.accounts, state=state))


class OverHttp(Checked):
    """What clients are answered."""

    def setUp(self) -> None:
        """Two accounts, with 500 in the first."""
        super().setUp()
        self.ann = Account.objects.create(owner="Ann", balance=500)
        self.bob = Account.objects.create(owner="Bob")

    def test_an_account_is_opened_empty(self) -> None:
        status, opened = self.post("/accounts", owner=" Eve ")

        assert (status, opened["owner"], opened["balance"]) == (201, "Eve", 0)
        assert self.client.get(f"/accounts/{opened['account']}").json() == opened

    def test_a_deposit_is_in_the_account_and_in_the_audit(self) -> None:
        status, movement = self.post(f"/accounts/{self.bob.pk}/deposits", amount=70)

        assert (status, movement["target_balance"]) == (201, 70)
        assert self.balances() == (500, 70)
        line = Movement.objects.get(reference=movement["reference"])
        assert (line.kind, line.amount, line.source, line.target, line.target_balance) == (
            Kind.DEPOSIT,
            70,
            None,
            self.bob,
            70,
        )

    def test_a_transfer_is_in_both_accounts_and_once_in_the_audit(self) -> None:
        status, movement = self.transfer(200)

        assert (status, movement["source_balance"], movement["target_balance"]) == (201, 300, 200)
        assert self.balances() == (300, 200)
        line = Movement.objects.get()
        assert (line.kind, line.amount, line.source, line.target) == (Kind.TRANSFER, 200, self.ann, self.bob)

    def test_who_asks_again_with_the_same_reference_is_told_the_same_and_nothing_is_moved_again(self) -> None:
        for path, status in (("/transfers", 201), ("/pending-transfers", 202)):
            asked = {"source": self.ann.pk, "target": self.bob.pk, "amount": 100, "reference": str(uuid4())}
            first = self.post(path, **asked)
            assert first[0] == status
            assert self.post(path, **asked) == first
        assert self.balances() == (300, 100)

    def test_a_reference_is_for_one_movement_only(self) -> None:
        reference = str(uuid4())
        self.transfer(100, reference=reference)

        status, told = self.transfer(101, reference=reference)

        assert (status, told["error"]) == (409, "ReferenceUsed")
        assert self.balances() == (400, 100)

    def test_a_pending_transfer_is_taken_at_once_and_arrives_later(self) -> None:
        status, _ = self.transfer(200, path="/pending-transfers")

        assert status == 202
        assert self.balances() == (300, 0)
        assert self.client.get("/").json()["pending"] == 200
        assert outbox.finish() == 1
        assert self.balances() == (300, 200)
        assert outbox.finish() == 0

    def test_nothing_is_taken_from_an_account_that_has_not_got_it(self) -> None:
        for path in ("/transfers", "/pending-transfers"):
            status, told = self.transfer(501, path=path)
            assert (status, told["error"]) == (409, "InsufficientFunds")
        assert self.balances() == (500, 0)
        assert not Movement.objects.exists()
        assert not Pending.objects.exists()

    def test_what_makes_no_sense_is_refused(self) -> None:
        both = {"source": self.ann.pk, "target": self.bob.pk}
        cases: list[tuple[str, dict[str, Any], int, str]] = [
            ("/transfers", {**both, "amount": 0}, 400, "NotUnderstood"),
            ("/transfers", {**both, "amount": -5}, 400, "NotUnderstood"),
            ("/transfers", {**both, "amount": True}, 400, "NotUnderstood"),
            ("/transfers", {**both, "amount": 1.5}, 400, "NotUnderstood"),
            ("/transfers", {**both, "amount": 2**53}, 400, "NotUnderstood"),
            ("/transfers", {**both, "amount": 5, "reference": "mine"}, 400, "NotUnderstood"),
            ("/transfers", {**both, "amount": 5, "target": self.ann.pk}, 400, "NotUnderstood"),
            ("/transfers", {**both, "amount": 5, "target": 10**9}, 404, "UnknownAccount"),
            ("/transfers", {**both, "amount": 5, "source": 10**9}, 404, "UnknownAccount"),
            ("/pending-transfers", {**both, "amount": 5, "source": 10**9}, 404, "UnknownAccount"),
            (f"/accounts/{10**30}/deposits", {"amount": 5}, 404, "UnknownAccount"),
            ("/accounts", {"owner": ""}, 400, "NotUnderstood"),
            ("/accounts", {"owner": "A" * 81}, 400, "NotUnderstood"),
        ]
        for path, sent, status, error in cases:
            with self.subTest(path=path, sent=sent):
                answer = self.post(path, **sent)
                assert (answer[0], answer[1]["error"]) == (status, error)
        assert self.client.get(f"/accounts/{10**30}").status_code == 404
        assert self.client.post("/transfers", {"amount": 5}).status_code == 400
        assert self.client.post("/transfers", "[]", content_type="application/json").status_code == 400
        assert self.balances() == (500, 0)

    def test_who_comes_when_too_many_wait_is_told_to_come_again_and_nothing_is_changed(self) -> None:
        with patch.object(processors.accounts, "run_across", side_effect=ProcessorOverloaded):
            status, told = self.transfer(1)

        assert (status, told["error"], told["retry_safe"]) == (503, "TryAgain", True)
        assert self.balances() == (500, 0)

    def test_who_is_not_told_that_it_was_saved_may_ask_again(self) -> None:
        asked = {"source": self.ann.pk, "target": self.bob.pk, "amount": 100, "reference": str(uuid4())}
        with faults(processors.accounts) as plan:
            plan.lose_answer()
            with self.assertLogs():
                status, told = self.post("/transfers", **asked)

        assert (status, told["retry_safe"]) == (500, False)
        assert self.balances() == (400, 100)
        assert self.post("/transfers", **asked)[0] == 201
        assert self.balances() == (400, 100)

    def test_who_comes_when_the_database_is_away_is_told_to_come_again(self) -> None:
        with faults(processors.accounts) as plan, self.assertLogs():
            plan.fail_load(OperationalError("gone"))
            plan.fail_save(NotSaved("the row is locked"))
            assert [self.transfer(100)[0] for _ in range(2)] == [503, 503]

        assert self.balances() == (500, 0)

    def test_an_answer_of_an_operation_is_no_part_of_the_requests_transaction(self) -> None:
        assert connection.settings_dict["ATOMIC_REQUESTS"]
        for path in ("/transfers", "/pending-transfers"):
            assert self.transfer(1, path=path)[0] in (201, 202)

    def transfer(self, amount: int, path: str = "/transfers", **more: str) -> tuple[int, Any]:
        return self.post(path, source=self.ann.pk, target=self.bob.pk, amount=amount, **more)

    def post(self, path: str, **sent: object) -> tuple[int, Any]:
        answer = self.client.post(path, sent, content_type="application/json")
        return answer.status_code, answer.json()

    def balances(self) -> tuple[int, int]:
        """What is in the database."""
        self.ann.refresh_from_db()
        self.bob.refresh_from_db()
        return self.ann.balance, self.bob.balance


class Ways(Checked):
    """The three ways to change two accounts."""

    def setUp(self) -> None:
        """Two accounts, the one with the higher number has the money."""
        super().setUp()
        self.low = Account.objects.create(owner="Ann")
        self.high = Account.objects.create(owner="Bob", balance=500)

    def test_each_moves_money_either_way_and_writes_down_both_balances(self) -> None:
        for transfer in (transfers.transfer, ordering.in_one_transaction):
            with self.subTest(transfer=transfer):
                there = transfer(self.high.pk, self.low.pk, 100, uuid4())
                assert (there.target_id, there.target_balance) == (self.low.pk, 100)
                back = transfer(self.low.pk, self.high.pk, 100, uuid4())
                assert (back.target_id, back.target_balance) == (self.high.pk, 500)
        assert list(Account.objects.order_by("pk").values_list("balance", flat=True)) == [0, 500]

    def test_each_refuses_what_is_not_there(self) -> None:
        for transfer in (transfers.transfer, ordering.in_one_transaction, outbox.send):
            with self.subTest(transfer=transfer), self.assertRaises(InsufficientFunds):
                transfer(self.low.pk, self.high.pk, 1, uuid4())
        with self.assertRaises(UnknownAccount):
            ordering.in_one_transaction(self.high.pk, 10**9, 1, uuid4())
        with self.assertRaises(ResourceMissing) as missing:
            transfers.transfer(self.high.pk, 10**9, 1, uuid4())
        assert missing.exception.key == 10**9
        assert not Movement.objects.exists()

    def test_a_transfer_that_the_database_refuses_is_in_neither_account(self) -> None:
        reference = uuid4()
        transfers.transfer(self.high.pk, self.low.pk, 100, reference)

        with self.assertRaises(IntegrityError):  # the reference is unique
            transfers.transfer(self.high.pk, self.low.pk, 100, reference)

        assert list(Account.objects.order_by("pk").values_list("balance", flat=True)) == [100, 400]

    def test_a_transfer_whose_credit_fails_stays_pending(self) -> None:
        outbox.send(self.high.pk, self.low.pk, 100, uuid4())

        with patch.object(outbox, "_credit", return_value=False):
            assert outbox.finish() == 0

        assert Pending.objects.count() == 1
        assert outbox.finish() == 1

    def test_a_credit_is_saved_once_whoever_finishes_it(self) -> None:
        outbox.send(self.high.pk, self.low.pk, 100, uuid4())
        pending = Pending.objects.get()
        outbox.finish()
        pending.save(force_insert=True)  # as if the process had died before it deleted it

        assert outbox.finish() == 1
        assert not Pending.objects.exists()
        pending.save(force_insert=True)
        with self.assertRaises(IntegrityError):  # by somebody who did not look
            credit_again(pending)
        self.low.refresh_from_db()
        assert self.low.balance == 100

    def test_the_database_keeps_balances_from_falling_below_zero_whoever_writes(self) -> None:
        with self.assertRaises(IntegrityError), atomic():
            Account.objects.filter(pk=self.high.pk).update(balance=-1)


def credit_again(pending: Pending) -> None:
    """What `outbox.finish` does with one, without looking first."""
    processors.accounts.run(pending.target_id, outbox.credit, pending.amount, pending.reference)
