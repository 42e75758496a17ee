"""Whether the books are right: the balances, the audit, and what clients were told."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from django.db.models import Sum

from examples.wallet.models import Account, Kind, Movement, Pending

if TYPE_CHECKING:
    from collections.abc import Iterator

    from examples.wallet.load import Report


def differences(report: Report) -> list[str]:
    """Where the database says something else than its own audit, or than the clients were told."""
    return [*_in_money(), *_in_balances(), *_in_answers(report)]


def _in_money() -> Iterator[str]:
    balances = Account.objects.aggregate(sum=Sum("balance", default=0))["sum"]
    underway = Pending.underway()
    deposited = Movement.objects.filter(kind=Kind.DEPOSIT).aggregate(sum=Sum("amount", default=0))["sum"]
    if balances + underway != deposited:
        yield f"{deposited} was deposited, {balances} is in the accounts, {underway} underway between them"


def _in_balances() -> Iterator[str]:
    expected: Counter[int | None] = Counter()
    for source, target, amount in Movement.objects.values_list("source_id", "target_id", "amount").iterator():
        expected[source] -= amount
        expected[target] += amount
    for number, balance in Account.objects.values_list("pk", "balance"):
        if balance != expected[number] or balance < 0:
            yield f"account {number} has {balance}, by the audit {expected[number]}"


def _in_answers(report: Report) -> Iterator[str]:
    saved = {(str(reference), kind) for reference, kind in Movement.objects.values_list("reference", "kind").iterator()}
    for asked in report.asked:
        is_saved = (asked.reference, asked.kind) in saved
        if asked.outcome != "unknown" and is_saved is not (asked.outcome == "saved"):
            yield f"the {asked.kind} {asked.reference} was answered as {asked.outcome}, and is not"
