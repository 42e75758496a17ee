"""Restores a resource whose scope has no ``restore`` of its own: the scope of a pair, of a bulk, or written by hand.

A pair may save another object than it loaded: so a copy takes the resource's place. A scope written by hand saves the
object that it holds: so that is restored in place, by a `Photo`. If neither is possible, `CannotUndo` is raised.
"""

from __future__ import annotations

from copy import deepcopy
from gc import get_referents
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final
from weakref import ProxyTypes, ReferenceType, WeakKeyDictionary, WeakValueDictionary

from geventbatch._bulk.composite import Composite
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
    """Return an object that restores *resource* to its present state. Raise `CannotUndo`, or the error of copying."""
    if type(resource) is Composite:
        return resource.copy_from_now_on(attempt)
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
    """Return whether another object can take the resource's place. A scope written by hand may hold it itself."""
    return type(attempt.scope) in {PairScope, BulkPairScope}


def needs_no_copy(attempt: Attempt, resource: Any) -> bool:
    """Return whether an operation could have changed nothing: a pair or a bulk has no state beside its resource."""
    return is_fixed(resource) and _saves_what_it_is_given(attempt)


def restored_by(scope: Any, resource: Any) -> Undoes[Any]:
    """Return the object that restores *resource* of *scope*, which has a ``restore`` of its own."""
    memory: Undoes[Any] = resource.restored_by(scope) if type(resource) is Composite else scope
    return memory


def in_place_of(attempt: Attempt, resource: Any) -> Undoes[Any]:
    """Return an object that restores *resource*, which has lived on since an earlier load."""
    return copies_of(attempt, resource) if type(resource) is Composite else InPlace(resource)


def is_again(resource: Any, before: Any) -> bool:
    """Return whether a load returned the very object again that the one *before* returned, and that can change."""
    if type(resource) is Composite:
        return resource.is_again(before)
    return resource is before and not is_fixed(resource)


def is_fixed(resource: Any) -> bool:
    """Return whether no operation can change *resource*."""
    return resource is None or (type(resource) in IMMUTABLE and type(resource) not in {tuple, frozenset})


class InPlace:
    """Restores the object itself, and all that it holds."""

    def __init__(self, resource: Any) -> None:
        """Keep the present state of *resource*. Raise `CannotUndo` if that is impossible."""
        self._resource = resource
        self._first = self.checkpoint()

    def checkpoint(self) -> Any:
        """Return the present state."""
        from geventbatch._values.photo import Photo  # here, since it is slow to import

        return Photo(self._resource)

    def restore(self, checkpoint: Any) -> Any:
        """Restore *checkpoint*; None stands for the loaded state."""
        (self._first if checkpoint is None else checkpoint).put_back()
        return self._resource


class Copies:
    """Puts a copy into the resource's place; or, in place, the contents of the copy into the resource."""

    def __init__(
        self, resource: Any, copy: Callable[[Any], Any], pass_on: Callable[[Any], object] | None, *, in_place: bool
    ) -> None:
        """Copy *resource* as it is now, by *copy*. *pass_on* is called with each object that takes its place."""
        self._copy = copy
        self._pass_on = pass_on
        self._in_place = in_place
        if in_place:
            from geventbatch._values import photo  # here, since it is slow to import

            photo.check_changeable(resource)
            self._bring_over = photo.bring_over
        self._first = copy(resource)
        self._resource = resource

    def checkpoint(self) -> object:
        """Return a copy of the present state."""
        return _Held(self._copy(self._resource))

    def restore(self, checkpoint: Any) -> Any:
        """Restore *checkpoint*; None stands for the loaded state."""
        return self._go_on_with(self._copy(self._first if checkpoint is None else checkpoint.copy))

    def give(self, checkpoint: Any) -> Any:
        """Restore *checkpoint* for the last time: the copy itself is used, since another one will be made anyway."""
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
    """Holds a copy, which may be None."""

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
    originals: list[Any] = memo.get(id(memo), [])  # the objects that it has copied
    for one in originals:
        if "_sa_instance_state" in getattr(one, "__dict__", ()):
            raise CannotUndo(
                f"{type(one).__qualname__} belongs to a session of SQLAlchemy, which would save nothing of a copy"
            )
        _check_complete(one, memo.get(id(one)))
    _check_sharing(originals)
    return copied


def _check_complete(one: Any, copied: Any) -> None:
    """Raise `CannotUndo` if *copied* lacks an attribute, since ``__getstate__`` of *one* leaves it out."""
    kind: Any = type(one)
    if getattr(kind, "__getstate__", None) is getattr(object, "__getstate__", None) or hasattr(kind, "__setstate__"):
        return
    if not hasattr(kind, "__deepcopy__") and kind.__reduce_ex__ is object.__reduce_ex__:
        lost = getattr(one, "__dict__", {}).keys() - getattr(copied, "__dict__", {}).keys()
        if lost:
            raise CannotUndo(f"a copy of {shown(one)} has no {shown(min(lost))}: its __getstate__ leaves it out")


def _check_sharing(originals: list[Any]) -> None:
    """Raise `CannotUndo` if copies of *originals* refer to one of the originals, which operations change."""
    inside = get_referents(*originals)
    for kind in {*map(type, originals), *map(type, inside)}:
        if issubclass(kind, _WEAK):
            raise CannotUndo(f"there is a {kind.__qualname__} in it: in a copy, it would still refer to the original")
    for one in inside:
        if type(one) is FunctionType and one.__closure__:
            raise CannotUndo(
                f"there is the function {one.__qualname__} in it, which closes over variables: a copy would share them"
            )


_WEAK: Final[tuple[Any, ...]] = (ReferenceType, *ProxyTypes, WeakKeyDictionary, WeakValueDictionary)


def _checked(copy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda resource: _other_than(resource, copy(resource))


def _other_than(resource: Any, copied: Any) -> Any:
    if copied is resource and type(resource) not in {tuple, frozenset} and not is_fixed(resource):
        raise CannotUndo(f"the copy of {shown(resource)} is the very object itself")
    return copied
