"""Read by mypy and pyright, never run: scopes and stores written by hand are compared with the protocols."""

from collections.abc import Hashable
from typing import Self, assert_type

from geventbatch import NotSaved, Processor, current_batch
from geventbatch.scopes import (
    Admits,
    AfterSave,
    ChecksOutcomes,
    Copies,
    Deletes,
    HearsStop,
    JudgesErrors,
    JudgesReturns,
    KeepsOutcomes,
    MustCompare,
    NormalizesKeys,
    OnServer,
    Owns,
    Records,
    Reuses,
    StepByStep,
    TakesRows,
    Undoes,
)


class Account:
    balance = 0


class Scope:
    takes_rows = True
    deletes = True
    steps = True

    def __init__(self) -> None:
        self.reused = False

    @property
    def must_compare(self) -> bool:
        return current_batch().alone

    def __enter__(self) -> Account:
        return Account()

    def __exit__(self, *raised: object) -> None: ...

    def operation_raised(self, error: Exception) -> NotSaved | None:
        return error if isinstance(error, NotSaved) else None

    def operation_returned(self) -> None: ...

    def begin_steps(self) -> None: ...

    def keep(self) -> None: ...

    def undo(self) -> Account:
        return Account()

    def checkpoint(self) -> int:
        return 1

    def restore(self, checkpoint: object) -> Account:
        return Account()

    def owns(self, value: object) -> bool:
        return isinstance(value, Account)

    def copied(self, value: object) -> object:
        return value

    def recorded(self, keys: list[str]) -> dict[str, str]:
        return dict.fromkeys(keys, "")

    def saved(self) -> None: ...


class Store:
    keeps_outcomes = True
    on_server = True

    def __call__(self, key: Hashable) -> Scope:
        return Scope()

    def normalize_key(self, key: Hashable) -> str:
        return str(key)

    def admit(self, key: Hashable) -> bool:
        return key == ""

    def check_outcomes(self, key: Hashable) -> None: ...

    def stopped(self) -> None: ...

    def enter(self) -> Self:
        return self


undoes: Undoes[Account] = Scope()
judges_errors: JudgesErrors = Scope()
judges_returns: JudgesReturns = Scope()
step_by_step: StepByStep[Account] = Scope()
owns: Owns = Scope()
copies: Copies = Scope()
takes_rows: TakesRows = Scope()
deletes: Deletes = Scope()
records: Records = Scope()
reuses: Reuses = Scope()
must_compare: MustCompare = Scope()
after_save: AfterSave = Scope()
assert_type(step_by_step.undo(), Account)

normalizes_keys: NormalizesKeys = Store()
admits: Admits = Store()
keeps_outcomes: KeepsOutcomes = Store()
checks_outcomes: ChecksOutcomes = Store()
on_server: OnServer = Store()
hears_stop: HearsStop = Store()

accounts = Processor(open_resource=Store())
assert_type(accounts, Processor[Account])


class Misspelt(Scope):
    take_rows = True

    def operation_raised(self, error: str) -> NotSaved | None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


class Silent:
    take_rows = True
    normalise_key = str


wrong_argument: JudgesErrors = Misspelt()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
wrong_name: TakesRows = Silent()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
wrong_key: NormalizesKeys = Silent()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
