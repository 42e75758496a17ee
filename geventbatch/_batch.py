"""The public face of a batch: an abstract class, of which the class in `_core` is a virtual subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

import gevent

from geventbatch._core import batch as _core
from geventbatch._core import process

if TYPE_CHECKING:  # a protocol for type checkers, so that they compare the class in `_core` with it
    from collections.abc import Callable, Hashable, Mapping
    from typing import Protocol as _Face
    from typing import runtime_checkable as _face
else:
    _Face = ABC

    def _face(face: type) -> type:
        """Make the class in `_core` a virtual subclass: then `isinstance` reads no property."""
        face.register(_core.Batch)
        return face


@_face
class Batch(_Face):
    """The batch that the caller is inside, from `current_batch`.

    `key`, `keys`, `alone`, `remaining`, `add_row` and `delete` are for operations. `rows`, `deleted`, `completed`,
    `deleted_keys`, `outcomes`, `bulk`, `ask_scope` and `cut` are for resource scopes.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """The key of its resource, as the store's ``normalize_key`` returned it."""

    @property
    @abstractmethod
    def keys(self) -> tuple[Hashable, ...]:
        """Its key; in an operation across keys, all its keys, as `run_across` named them."""

    @property
    @abstractmethod
    def alone(self) -> bool:
        """True for an unbatched operation, which runs in its caller's own greenlet or thread (``batching=False``)."""

    @abstractmethod
    def remaining(self) -> float:
        """Return the seconds until the deadline, at least 0.001, to use as a statement timeout. Switches: no."""
        raise NotImplementedError

    @abstractmethod
    def add_row(self, row: object) -> None:
        """Let the store insert *row* with the save, in its transaction: an audit line, an event of an outbox.

        The row is dropped if the operation raises, and if the batch is replayed: the replay adds it again. Lists and
        dicts in it are inserted as the operation has left them, even if later operations change them in the resource.

        Args:
            row: The row, in a form that the store takes: see its documentation.

        Raises:
            RuntimeError: The scope inserts no rows.
        Switches: no.
        """
        raise NotImplementedError

    @abstractmethod
    def delete(self, key: Hashable = ..., /) -> None:
        """Let the store delete the resource, when the operation has returned.

        Earlier operations are saved with the deletion. Later ones are applied to the resources of another load.

        Args:
            key: Which one, in an operation of several keys. By default the only one.

        Raises:
            RuntimeError: The scope deletes no resources; or the operation has several keys, and *key* was left out; or
                it has not this *key*.
        Switches: no.
        """
        raise NotImplementedError

    # -- for resource scopes ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def rows(self) -> list[object]:
        """The rows that were added for the save, in the order of the operations.

        A row belongs to the batch, and not to a key. Keys that operations have connected have the same batch in `bulk`:
        a scope of many keys inserts the rows of each batch once, and none of a batch that it does not save.
        """

    @property
    @abstractmethod
    def deleted(self) -> bool:
        """Return whether the last operation that returned deletes the resource. For a scope of one key.

        Raises:
            RuntimeError: Operations have connected several keys, and some are deleted: ask for `deleted_keys`.
        """

    @property
    @abstractmethod
    def deleted_keys(self) -> tuple[Hashable, ...]:
        """The keys whose resources the last operation that returned deletes. For a scope of many keys.

        It asks ``key in current_batch().bulk[key].deleted_keys`` of each key in its dict when it saves. If so, it
        deletes the row in place of saving it: in the same transaction as all that is connected with it.
        """

    @property
    @abstractmethod
    def completed(self) -> int:
        """The number of operations that have returned, in the attempt at hand."""

    @property
    @abstractmethod
    def outcomes(self) -> dict[str, str]:
        """Outcomes as text, by idempotency key, for the store to record with the save."""

    @property
    @abstractmethod
    def bulk(self) -> Mapping[Any, Batch]:
        """By key: the batches loaded with it, or to be saved with it; empty without a bulk."""

    @abstractmethod
    def ask_scope(self, *, first: bool = False) -> None:
        """Ask the scope's ``operation_returned`` when the operation at hand has returned. For a scope to call.

        In a load, it does nothing, unless *first* is True: then it is asked after the first operation. In a save, it
        does nothing. Switches: no.
        """
        raise NotImplementedError

    @abstractmethod
    def cut(self) -> None:
        """Apply the operations behind the one at hand to the resource of another load. For a scope to call.

        In a load or a save, it does nothing. Switches: no.
        """
        raise NotImplementedError


def current_batch() -> Batch:
    """Return the batch that the caller is inside: in a load, an operation or a save.

    Its ``key`` is the key of the batch; ``remaining()`` returns the seconds until its deadline, at least 0.001.

    Raises:
        RuntimeError: Called elsewhere, as in a greenlet that an operation has spawned.
    Switches: no.
    """
    attempt = process.running.get(gevent.getcurrent())
    if attempt is None:
        raise RuntimeError("current_batch() was called outside of a load, an operation or a save")
    return attempt.batch


batch_at_hand = cast("Callable[[], _core.Batch]", current_batch)
"""`current_batch` for the library's own stores, with the type of the class in `_core`."""
