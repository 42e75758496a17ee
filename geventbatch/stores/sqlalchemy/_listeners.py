"""Watches for listeners that an operation adds to its session: other operations and the save would call them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import Session, SessionEvents

if TYPE_CHECKING:
    from geventbatch.stores.sqlalchemy._guard import Guard

_EVENTS: Final = tuple(name for name in vars(SessionEvents) if not name.startswith(("_", "dispatch")))

_Dispatch: Any = type(Session.dispatch)


class _Watched(_Dispatch):  # type: ignore[misc]  # SQLAlchemy makes the class as it runs
    """A session's dispatcher. It sets an attribute when it gets the first listener of an event."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        """Return the empty listeners of the event *name*."""
        try:
            empty = self._empty_listeners[name]
        except KeyError:
            raise AttributeError(name) from None
        object.__setattr__(self, name, empty)
        return empty

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        self.__dict__["has_own"] = True
        self.__dict__["guard"].check_later()


class _Full(_Watched):
    """A dispatcher with listeners, to which others are added without setting an attribute: each read may do that."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "__dict__")["guard"].check_later()
        return object.__getattribute__(self, name)


def watch(session: Session, guard: Guard) -> None:
    """Tell *guard* when an operation may have added a listener to *session*."""
    has_own = "dispatch" in vars(session)  # its class has added some, or just looked
    dispatch: Any = session.dispatch
    vars(dispatch).update(guard=guard, has_own=has_own)
    dispatch.__class__ = _Full if has_own else _Watched


def count(session: Session) -> int:
    """Return the number of *session*'s own listeners."""
    dispatch: Any = vars(session)["dispatch"]
    if not vars(dispatch)["has_own"]:
        return 0
    return sum(len(getattr(dispatch, name).listeners) for name in _EVENTS)
