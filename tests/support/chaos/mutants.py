"""Some ways to be wrong, one at a time. Each has to be found by the same chaos that finds nothing in what is right."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

import sqlalchemy as sa

from geventbatch import _options
from geventbatch._bulk.round import Round
from geventbatch._core.attempt import Attempt
from geventbatch.errors import NotSaved
from geventbatch.stores._sql import errors
from geventbatch.stores.redis import _save, _scripts
from geventbatch.stores.sqlalchemy import _document_scope, _documents, _transaction

if TYPE_CHECKING:
    from collections.abc import Callable


def mutate(mutant: str) -> None:
    """Make this process wrong in that way."""
    _WAYS[mutant]()


def detect_no_conflicts() -> None:
    """Save over what somebody else has saved meanwhile, without a lock too."""
    original = _documents.Statements.__init__

    def init(self: Any, table: sa.Table, dialect: sa.Dialect, **options: Any) -> None:
        original(self, table, dialect, **{**options, "locking": False})
        saves = sa.update(table).where(table.c.key == sa.bindparam("_key"))
        self.update = saves.values(state=sa.bindparam("_state"), version=sa.bindparam("_new"))

    _replace(_documents.Statements, "__init__", init)
    compares = "if not as_loaded then return -i end"
    assert compares in _scripts.SAVE
    _replace(_save, "SAVE", _scripts.SAVE.replace(compares, ""))


def lie_that_nothing_was_saved() -> None:
    """Say `NotSaved` of a save whose answer was lost, as if that meant that it was not carried out."""

    def resolve_commit(self: Any, error: Exception) -> NoReturn:
        raise (errors.of_commit(error, self.key) or NotSaved(f"the connection was lost: {error}")) from error

    def resolve(self: Any, lost: Exception) -> NoReturn:
        raise NotSaved(f"the connection was lost: {lost}")

    _replace(_transaction.Transaction, "resolve", resolve_commit)
    _replace(_save.Save, "_resolve", resolve)


def answer_before_the_save() -> None:
    """Answer everybody when the operations have been applied, and save then."""
    save: Callable[[Any, Any], bool] = Attempt._save

    def answer_first(attempt: Any, leave: Any) -> bool:
        attempt.batch.end()
        return save(attempt, leave)

    _replace(Attempt, "_save", answer_first)


def forget_idempotency_keys() -> None:
    """Take an operation with an idempotency key for any other one."""

    def once(self: Any, resource_key: Any, key: str, operation: Any, *told: object, **across: object) -> Any:
        forgotten: Any = partial(operation)
        forgotten.go_across = lambda _: None
        return forgotten

    _replace(_options.Options, "once", once)


def trust_what_is_kept() -> None:
    """Save what was made of a kept state whatever the version is: somebody else may have saved since."""
    original = _document_scope.DocumentScope._change

    def change(self: Any, row: Any, *, beside: bool) -> Any:
        if self.reused:
            with self._documents.engine.connect() as connection:
                there = connection.execute(self._documents.statements.load, {"_key": self._key}).one_or_none()
            self._loaded = self._loaded._replace(version=there and there.version)
        return original(self, row, beside=beside)

    _replace(_document_scope.DocumentScope, "_change", change)


def save_halves() -> None:
    """Save what operations across keys have changed without one of the keys, now and then."""
    original = Round._settle

    def settle(self: Any) -> None:
        original(self)
        for attempt in dict.fromkeys(self._at_hand.values()):
            keys = [key for key in attempt.batch.loads if key in self._at_hand]
            if len(keys) > 1 and random.random() < 0.1:
                self._leave_key_out(keys[-1])

    _replace(Round, "_settle", settle)


def _replace(owner: Any, name: str, by: object) -> None:
    assert hasattr(owner, name)
    setattr(owner, name, by)


_WAYS: Final[dict[str, Callable[[], None]]] = {
    "no-conflicts": detect_no_conflicts,
    "lying": lie_that_nothing_was_saved,
    "early": answer_before_the_save,
    "forgetful": forget_idempotency_keys,
    "trusting": trust_what_is_kept,
    "halves": save_halves,
}
