"""A store in memory that opens one key, and many keys by its `open_resources`: each form does all that the other does.

It takes rows, deletes, and has work left when its callers are answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch import Processor, ResourceMissing, current_batch
from tests.support.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.ledger import Account


class TwoForms:
    """The store. Both forms load and save by the same ledger, which notes how many keys each has had."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.rows: list[Any] = []
        self.hooked: list[list[Any]] = []  # the keys of each scope whose hook was called
        self.on_hook: Callable[[], object] = lambda: None
        self.ones: list[Any] = []  # keys that were opened by the form for one key
        self.manys: list[list[Any]] = []

    def __call__(self, key: Any) -> OneScope:
        self.ones.append(key)
        return OneScope(self, [key])

    @property
    def open_resources(self) -> Many:
        return Many(self)

    def processor(self, **options: Any) -> Processor[Account]:
        return Processor(open_resource=self, **{"min_duration": 0, "max_duration": 5, **options})


class Many:
    """The form for many keys."""

    all_or_nothing = True

    def __init__(self, store: TwoForms) -> None:
        self.store = store

    def __call__(self, keys: list[Any]) -> ManyScope:
        self.store.manys.append(list(keys))
        return ManyScope(self.store, keys)


class ManyScope:
    """The scope of many keys."""

    takes_rows = deletes = True

    def __init__(self, store: TwoForms, keys: list[Any]) -> None:
        self.store, self.keys = store, keys
        self.inner: Any = store.ledger.open(keys)

    def __enter__(self) -> Any:
        self.resources = self.inner.__enter__()
        return self.resources

    def __exit__(self, *error: object) -> Any:
        batches = {id(one): one for key, one in current_batch().bulk.items() if key in self.resources}
        rows = [row for batch in batches.values() for row in batch.rows]
        gone = [key for key in self.resources if key in current_batch().bulk[key].deleted_keys]
        return self.leave(error, rows, gone)

    def leave(self, error: tuple[object, ...], rows: list[Any], gone: list[Any]) -> Any:
        left = self.inner.__exit__(*error)
        if error[0] is None:
            self.store.rows += rows
            for key in gone:
                del self.store.ledger.kept[key]
        return left

    def saved(self) -> None:
        self.store.hooked.append(self.keys)
        self.store.on_hook()


class OneScope(ManyScope):
    """The scope of one key."""

    def __enter__(self) -> Any:
        self.resources = self.inner.__enter__()
        found = self.resources.get(self.keys[0], ResourceMissing())
        if isinstance(found, Exception):
            self.inner.__exit__(type(found), found, None)
            raise found
        return found

    def __exit__(self, *error: object) -> Any:
        batch = current_batch()
        return self.leave(error, batch.rows, self.keys if batch.deleted else [])
