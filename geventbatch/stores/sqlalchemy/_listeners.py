"""The listeners of a batch's session: those that an operation adds would be called for the others, and for the save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.orm import Session, SessionEvents

if TYPE_CHECKING:
    from geventbatch.stores.sqlalchemy._guard import Guard

_EVENTS: Final = tuple(name for name in vars(SessionEvents) if not name.startswith(("_", "dispatch")))

_Dispatch: Any = type(Session.dispatch)


class _Watched(_Dispatch):  # type: ignore[misc]  # SQLAlchemy makes the class as it runs
    """What a session calls its listeners by. It sets an attribute when it gets its first one for an event."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        """Nobody listens to that so far."""
        try:
            nobody = self._empty_listeners[name]
        except KeyError:
            raise AttributeError(name) from None
        object.__setattr__(self, name, nobody)
        return nobody

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        self.__dict__["has_own"] = True
        self.__dict__["guard"].sees()


class _Full(_Watched):
    """It has some already, to which others are added without setting an attribute: whoever asks may do that."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "__dict__")["guard"].sees()
        return object.__getattribute__(self, name)


def watch(session: Session, guard: Guard) -> None:
    """Have *guard* told when an operation may have added a listener to *session*."""
    has_own = "dispatch" in vars(session)  # since its class has added some as it was made, or has just looked
    dispatch: Any = session.dispatch
    vars(dispatch).update(guard=guard, has_own=has_own)
    dispatch.__class__ = _Full if has_own else _Watched


def count(session: Session) -> int:
    """How many listeners *session* has for itself alone."""
    dispatch: Any = vars(session)["dispatch"]
    if not vars(dispatch)["has_own"]:
        return 0
    return sum(len(getattr(dispatch, name).listeners) for name in _EVENTS)
