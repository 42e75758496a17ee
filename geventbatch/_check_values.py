"""Values that users pass, checked at the door: each error names the argument, the value and what is allowed."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, NoReturn

from gevent import Timeout

from geventbatch._check_callables import check_function, check_functions
from geventbatch._safe_repr import named, said, shown

if TYPE_CHECKING:
    from collections.abc import Callable


def check_seconds(name: str, value: object, *, positive: bool = False) -> None:
    """Raise unless *value* is a finite number of seconds, 0 or more; if *positive*, more than 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {shown(value)}, but must be a number of seconds (int or float)")
    try:
        allowed = isfinite(value) and (value > 0 if positive else value >= 0)
    except OverflowError:  # an int beyond all floats
        allowed = False
    if not allowed:
        least = "more than 0" if positive else "0 or more"
        raise ValueError(f"{name} is {shown(value)}, but must be a finite number of seconds, {least}")


def check_flag(name: str, value: object) -> None:
    """Raise unless *value* is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}, but must be True or False")


def check_identity(value: object) -> None:
    """Raise unless *value* is a tuple."""
    if type(value) is not tuple:
        raise TypeError(f"identified_by is {shown(value)}, but must be a tuple of what the client sends again")


def check_callable(name: str, value: object) -> None:
    """Raise unless *value* can be called."""
    if not callable(value):
        hint = ": pass the function itself, and behind it its arguments, as in run(key, book, 12)"
        raise TypeError(f"{name} is {shown(value)}, but must be callable{hint if name == 'operation' else ''}")


def refuse_unnamed(value: object, *_: object) -> NoReturn:
    """Raise a `TypeError`: *value* was passed to `Processor` without a name."""
    raise TypeError(
        f"Processor() was given {named(value)} without a name, but takes every option by its name, as in "
        "Processor(open_resource=store)"
    )


def check_key(key: object) -> None:
    """Raise unless *key* is hashable and equal to itself."""
    try:
        hash(key)
    except TypeError as error:
        refuse_key(key, error)
    if key != key:  # noqa: PLR0124 - such as a NaN
        refuse_key(key)


def refuse_key(key: object, error: TypeError | None = None) -> NoReturn:
    """Raise the reason why *key* cannot be a key: it has no hash (*error*), or is not equal to itself."""
    if error is None:
        raise ValueError(f"key is {shown(key)}, which is not equal to itself: no two operations could ever share it")
    msg = f"key is {shown(key)}, but must be hashable: a str, an int, a UUID or a tuple of them ({said(error)})"
    raise TypeError(msg) from error


# -- options of a processor: each returns the value as it is used ---------------------------------------------------


def seconds(name: str, value: Any) -> float:
    """Return *value*, a finite number of seconds, 0 or more."""
    check_seconds(name, value)
    return float(value)


def seconds_or_none(name: str, value: Any) -> float | None:
    """Return *value*, such a number or None."""
    return None if value is None else seconds(name, value)


def count(name: str, value: Any) -> int:
    """Return *value*, an int of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {shown(value)}, but must be an int")
    if value < 1:
        raise ValueError(f"{name} is {shown(value)}, but must be 1 or more")
    return value


def count_or_none(name: str, value: Any) -> int | None:
    """Return *value*, such an int or None."""
    return None if value is None else count(name, value)


def flag(name: str, value: Any) -> bool:
    """Return *value*, a bool."""
    check_flag(name, value)
    return bool(value)


def text_or_none(name: str, value: Any) -> str | None:
    """Return *value*, a str that is not empty, or None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise TypeError(f"{name} is {shown(value)}, but must be a str that is not empty")
    return value


def copies(name: str, value: Any) -> Callable[[Any], Any] | None:
    """Return *value*, a function of a resource, or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} is {shown(value)}, but must be callable, or None: it cannot be copied")
    check_functions(("resource",), **{name: value})
    copy: Callable[[Any], Any] | None = value
    return copy


def numbers_shards(name: str, value: Any) -> Callable[[Any, int], int]:
    """Return *value*, a function of a key and the number of shards."""
    check_function(name, value, "key", "workers")
    number: Callable[[Any, int], int] = value
    return number


def exception_classes(name: str, value: Any) -> tuple[type[BaseException], ...]:
    """Return *value*, a tuple of exception classes that an operation may raise as its answer."""
    classes = value if isinstance(value, tuple) else None
    if classes is None or not all(isinstance(one, type) and issubclass(one, BaseException) for one in classes):
        raise TypeError(f"{name} is {shown(value)}, but must be a tuple of exception classes")
    for one in classes:
        if not issubclass(one, (Exception, Timeout)) and one is not BaseException:
            raise TypeError(
                f"{name} is {shown(value)}, but must have subclasses of Exception, or gevent.Timeout: what else "
                "an operation raises is no answer of its own, and kills its batch"
            )
    return classes
