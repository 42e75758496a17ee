"""What a resource scope may have besides ``__enter__`` and ``__exit__``, typed: for scopes written by hand, and stores.

docs/stores.md says of each attribute when it is asked. Here are those that undo an operation that raised.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

R_co = TypeVar("R_co", covariant=True)

__all__ = ["Undoes"]


@runtime_checkable
class Undoes(Protocol[R_co]):
    """A scope that brings its resource back to what it was, in memory, when an operation has raised (guarantee 18).

    Both are called between two operations, in the batch's context (`current_batch` gives it; in a scope of many keys,
    its ``key`` says of which). They must not switch: no round trip to a database. An operation that raised costs one
    `restore` at most, and what was applied since the last copy is applied again then; a `checkpoint` is asked for when
    that has become dearer than a copy.
    """

    def checkpoint(self) -> object:
        """Give a copy of the state as it is, that nothing changes any more; any object, but not None.

        Raises:
            CannotUndo: There is none to be had of this state. The next one that raises is undone from the copy before.
        Switches: no.
        """

    def restore(self, checkpoint: object | None) -> R_co:
        """Bring the resource back to what it was when `checkpoint` gave *checkpoint*, or, of None, to what was loaded.

        The same one may be restored many times.

        Returns:
            The resource to go on with: the same object, or another one, which is then saved in its place.

        Raises:
            CannotUndo: What was done since cannot be taken back in memory: something was written, say. The batch is
                loaded again then, and judged step by step, where the scope has ``steps``.
        Switches: no.
        """
        raise NotImplementedError
