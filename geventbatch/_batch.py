"""What users see of a batch: its public face, of which the class in `_core` is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

import gevent

from geventbatch._core import batch as _core
from geventbatch._core import process

if TYPE_CHECKING:  # for checkers a protocol, so that they compare the class in `_core` with it
    from collections.abc import Callable, Hashable, Mapping
    from typing import Protocol as _Face
    from typing import runtime_checkable as _face
else:
    _Face = ABC

    def _face(face: type) -> type:
        """Make the class in `_core` a virtual subclass: `isinstance` asks no property then."""
        face.register(_core.Batch)
        return face


@_face
class Batch(_Face):
    """The batch that the caller is inside of, from `current_batch`.

    For operations are `key`, `alone`, `remaining`, `add_row` and `delete`. For resource scopes are `rows`, `deleted`,
    `completed`, `outcomes`, `bulk`, `ask_scope` and `cut` besides.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """The key of its resource, as the store's ``normalize_key`` gave it."""

    @property
    @abstractmethod
    def alone(self) -> bool:
        """Whether it runs in the greenlet or thread of its one caller (``batching=False``)."""

    @abstractmethod
    def remaining(self) -> float:
        """Seconds until the deadline, never under 0.001: ready to be a statement timeout. Switches: no."""

    @abstractmethod
    def add_row(self, row: object) -> None:
        """Have the store insert *row* with the save, in its transaction: an audit line, an event of an outbox.

        It is dropped when the operation raises, and when the batch is replayed, which adds it again. Lists and dicts in
        it are inserted as the operation has left them, whatever those behind it do to them in the resource.

        Args:
            row: What the store inserts: see there.

        Raises:
            RuntimeError: What the processor's ``open_resource`` gave inserts no rows.
        Switches: no.
        """

    @abstractmethod
    def delete(self) -> None:
        """Have the store delete the resource, when the operation has returned.

        The operations before are saved with it; those behind are applied to what the next load gives.

        Raises:
            RuntimeError: What the processor's ``open_resource`` gave deletes nothing.
        Switches: no.
        """

    # -- for resource scopes ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def rows(self) -> list[object]:
        """What was added for the save, in the order of the operations."""

    @property
    @abstractmethod
    def deleted(self) -> bool:
        """Whether the last operation that returned deletes the resource."""

    @property
    @abstractmethod
    def completed(self) -> int:
        """Operations that returned, in the attempt at hand."""

    @property
    @abstractmethod
    def outcomes(self) -> dict[str, str]:
        """Texts by idempotency key, for the store to record with the save."""

    @property
    @abstractmethod
    def bulk(self) -> Mapping[Any, Batch]:
        """By key: the batches that are loaded with it, or are to be saved with it; empty if it has no bulk."""

    @abstractmethod
    def ask_scope(self, *, first: bool = False) -> None:
        """Have the scope's ``operation_returned`` asked when the operation at hand has returned. For a scope to call.

        It does nothing in a load or a save, but that in a load *first* has it asked behind the first operation.
        Switches: no.
        """

    @abstractmethod
    def cut(self) -> None:
        """Have the operations behind the one at hand applied to what the next load gives. For a scope to call.

        It does nothing in a load or a save. Switches: no.
        """


def current_batch() -> Batch:
    """Give the batch that the caller is inside of: in a load, an operation or a save.

    Its ``key`` is the batch's; ``remaining()`` gives the seconds until its deadline, never under 0.001.

    Raises:
        RuntimeError: Called elsewhere, a greenlet that an operation spawned included.
    Switches: no.
    """
    attempt = process.running.get(gevent.getcurrent())
    if attempt is None:
        raise RuntimeError("current_batch() was called outside of a load, an operation or a save")
    return attempt.batch


batch_at_hand = cast("Callable[[], _core.Batch]", current_batch)
"""`current_batch`, for the library's own stores: with all that the batch has."""
