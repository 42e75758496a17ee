"""Read by mypy and pyright, never run: what `run_across` promises to a type checker. See `usage`."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import assert_type

from geventbatch import Processor
from geventbatch.scopes import AllOrNothing, ChecksKeys


class Account:
    """A resource."""

    def put(self, amount: int) -> int:
        return amount


def transfer(accounts: tuple[Account, ...], amount: int, note: str = "") -> bool:
    source, target = accounts
    return source.put(-amount) == target.put(amount) and bool(note)


def total(accounts: tuple[Account, ...]) -> int:
    return sum(account.put(0) for account in accounts)


@contextmanager
def open_accounts(keys: list[str]) -> Generator[dict[str, Account]]:
    yield {key: Account() for key in keys}


class Accounts:
    all_or_nothing = True

    def check_keys(self, keys: tuple[str, ...]) -> None: ...

    def __call__(self, keys: list[str]) -> AbstractContextManager[dict[str, Account]]:
        return open_accounts(keys)


promise: AllOrNothing = Accounts()
checks: ChecksKeys = Accounts()

processor: Processor[Account] = Processor(open_resources=Accounts())

assert_type(processor.run_across(["Ann", "shop"], transfer, 10), bool)
assert_type(processor.run_across(("Ann", ("seat", 5)), transfer, 10, "rent", start_timeout=1.0), bool)
assert_type(processor.run_across(["Ann", "shop"], total, read_only=True), int)
assert_type(processor.run_across(["a", "b"], lambda accounts: accounts[0].put(1)), int)
assert_type(processor.run_across(["a", "b"], transfer, 1, "", idempotency_key="k", identified_by=(1,)), bool)

processor.run_across("Ann", Account.put, 10)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run_across(["Ann"], transfer, "10")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run_across(["Ann"], transfer)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
processor.run_across([["Ann"]], total)  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
processor.run_across(5, total)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
