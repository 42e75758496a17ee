"""How a resource is brought back whose scope has no ``restore`` of its own: a pair's, a bulk's, one written by hand.

What a pair saves may be another object than was loaded: it gets a copy. A scope that was written by hand saves what it
has in its own hands: that is brought back in place, by a `Photo`. Where neither can be done there is `CannotUndo`.
"""

from __future__ import annotations

from copy import deepcopy
from gc import get_referents
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final
from weakref import ProxyTypes, ReferenceType, WeakKeyDictionary, WeakValueDictionary

from geventbatch._bulk.scopes import BulkPairScope
from geventbatch._core.pair import IMMUTABLE, PairScope
from geventbatch._safe_repr import shown
from geventbatch._values.answers import PLAIN, Copying
from geventbatch.errors import CannotUndo

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch._core.attempt import Attempt
    from geventbatch.scopes import Undoes


def copies_of(attempt: Attempt, resource: Any) -> Undoes[Any]:
    """Give what brings *resource* back to what it is now. Raises `CannotUndo`, or what copying it raises."""
    copy = attempt.dispatcher.options.copy_resource
    in_place = not _saves_what_it_is_given(attempt)
    if in_place and is_fixed(resource):
        raise CannotUndo(f"its resource is {shown(resource)}: what operations change is somewhere else")
    if copy is None:
        raise CannotUndo("copy_resource is None")
    if in_place and copy is deepcopy:
        return InPlace(resource)
    passes_on = attempt.scope.replace if type(attempt.scope) is PairScope else None
    return Copies(resource, _copy_all if copy is deepcopy else _checked(copy), passes_on, in_place=in_place)


def _saves_what_it_is_given(attempt: Attempt) -> bool:
    """Whether another object can take the place of what was loaded: who wrote a scope by hand may hold that itself."""
    return type(attempt.scope) in {PairScope, BulkPairScope}


def needs_no_copy(attempt: Attempt, resource: Any) -> bool:
    """Whether there is nothing that an operation could have changed: a pair, or a bulk, has nothing else."""
    return is_fixed(resource) and _saves_what_it_is_given(attempt)


def is_fixed(resource: Any) -> bool:
    """Whether no operation can change *resource*."""
    return resource is None or (type(resource) in IMMUTABLE and type(resource) not in {tuple, frozenset})


class InPlace:
    """Brings the object itself back, and all that it holds."""

    def __init__(self, resource: Any) -> None:
        """To what it is now. Raises `CannotUndo`."""
        self._resource = resource
        self._first = self.checkpoint()

    def checkpoint(self) -> Any:
        """Give what it is now."""
        from geventbatch._values.photo import Photo  # which is slow to import

        return Photo(self._resource)

    def restore(self, checkpoint: Any) -> Any:
        """Bring it back."""
        (self._first if checkpoint is None else checkpoint).put_back()
        return self._resource


class Copies:
    """Puts a copy in its place; or, in place, what the copy holds."""

    def __init__(
        self, resource: Any, copy: Callable[[Any], Any], pass_on: Callable[[Any], object] | None, *, in_place: bool
    ) -> None:
        """Copy *resource* as it is now, by *copy*; *pass_on* is told of what comes in its place."""
        self._copy = copy
        self._pass_on = pass_on
        self._in_place = in_place
        if in_place:
            from geventbatch._values import photo  # which is slow to import

            photo.check_changeable(resource)
            self._bring_over = photo.bring_over
        self._first = copy(resource)
        self._resource = resource

    def checkpoint(self) -> object:
        """Copy what it is now."""
        return _Held(self._copy(self._resource))

    def restore(self, checkpoint: Any) -> Any:
        """Bring it back."""
        return self._go_on_with(self._copy(self._first if checkpoint is None else checkpoint.copy))

    def give(self, checkpoint: Any) -> Any:
        """Bring it back for the last time: with the copy itself, where another one is to be made in any case."""
        return self._go_on_with(checkpoint.copy)

    def _go_on_with(self, copied: Any) -> Any:
        if self._in_place:
            self._bring_over(self._resource, copied)
            return self._resource
        self._resource = copied
        if self._pass_on is not None:
            self._pass_on(copied)
        return copied


class _Held:
    """A copy, which may be None or anything else."""

    def __init__(self, copy: Any) -> None:
        self.copy = copy


# -- the default ------------------------------------------------------------------------------------------------


class _Plain(Copying):
    """Copies lists, dicts, sets and tuples of plain values, several times as quick as `deepcopy`."""

    containers = frozenset({dict, list, set, tuple})

    def _copy_changeable(self, value: Any) -> Any:
        if type(value) is dict:
            self.others += [name for name in value if not _is_plain(name)]
        return super()._copy_changeable(value)


def _is_plain(name: Any) -> bool:
    return type(name) in PLAIN or (type(name) is tuple and all(map(_is_plain, name)))


def _copy_all(resource: Any) -> Any:
    plain = _Plain()
    copied = plain.copy(resource)
    if not plain.others:
        return copied
    memo: dict[int, Any] = {}
    copied = _other_than(resource, deepcopy(resource, memo))
    originals: list[Any] = memo.get(id(memo), [])  # all that it has made copies of
    for one in originals:
        if "_sa_instance_state" in getattr(one, "__dict__", ()):
            raise CannotUndo(
                f"{type(one).__qualname__} belongs to a session of SQLAlchemy, which would save nothing of a copy"
            )
        _check_complete(one, memo.get(id(one)))
    _check_sharing(originals)
    return copied


def _check_complete(one: Any, copied: Any) -> None:
    """Raise `CannotUndo` if *copied* lacks what *one* leaves out when it is pickled, and nobody makes it anew."""
    kind: Any = type(one)
    if getattr(kind, "__getstate__", None) is getattr(object, "__getstate__", None) or hasattr(kind, "__setstate__"):
        return
    if not hasattr(kind, "__deepcopy__") and kind.__reduce_ex__ is object.__reduce_ex__:
        lost = getattr(one, "__dict__", {}).keys() - getattr(copied, "__dict__", {}).keys()
        if lost:
            raise CannotUndo(f"a copy of {shown(one)} has no {shown(min(lost))}: its __getstate__ leaves that out")


def _check_sharing(originals: list[Any]) -> None:
    """Raise `CannotUndo` if copies of *originals* lead back to one of them, and so to what operations have changed."""
    inside = get_referents(*originals)
    for kind in {*map(type, originals), *map(type, inside)}:
        if issubclass(kind, _WEAK):
            raise CannotUndo(f"there is a {kind.__qualname__} in it: that of a copy leads to what it was copied from")
    for one in inside:
        if type(one) is FunctionType and one.__closure__:
            raise CannotUndo(
                f"there is the function {one.__qualname__} in it, which closes over something: that of a copy has "
                "the same"
            )


_WEAK: Final[tuple[Any, ...]] = (ReferenceType, *ProxyTypes, WeakKeyDictionary, WeakValueDictionary)


def _checked(copy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda resource: _other_than(resource, copy(resource))


def _other_than(resource: Any, copied: Any) -> Any:
    if copied is resource and type(resource) not in {tuple, frozenset} and not is_fixed(resource):
        raise CannotUndo(f"the copy of {shown(resource)} is the very object itself")
    return copied
