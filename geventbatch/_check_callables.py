"""Checks, at the door, of the functions that users pass: can they be called so, and do they work when called?"""

from __future__ import annotations

import inspect
from contextlib import ContextDecorator, contextmanager, suppress
from types import AsyncGeneratorType, BuiltinFunctionType, CoroutineType, GeneratorType, MethodType
from typing import Any, Final, NamedTuple

from gevent import Greenlet, getcurrent

from geventbatch._core.operation import attribute, name_of
from geventbatch._safe_repr import named, said
from geventbatch._watch.log import place_of

_STORE: Final = (
    "a store, such as SQLAlchemyStore.documents(engine, table), DjangoStore(Model), RedisStore(client) or "
    "SQLStore(pool, load=…, save=…), or a function that returns a context manager"
)


LAZY: Final = frozenset({CoroutineType, GeneratorType, AsyncGeneratorType, map, filter})
"""Types of objects whose code runs only when they are awaited or read. (Other such types have an ``__await__``.)"""


def close(value: object) -> None:
    """If *value* is a coroutine, keep Python from warning that it was never awaited."""
    if isinstance(value, CoroutineType):
        with suppress(Exception):
            value.close()


def refuse_lazy(name: str, value: object) -> None:
    """Raise if the code of *value*, which the option *name* returned, has not run yet."""
    kind = type(value)
    if kind in LAZY or hasattr(kind, "__await__") or goes_on(value):
        close(value)
        raise TypeError(
            f"{name} returned a {kind.__name__}, which is never awaited or read, so that its code has not run: {_PLAIN}"
        )


def goes_on(value: object) -> bool:
    """Return whether *value* stands for work that another greenlet or thread still does."""
    if isinstance(value, Greenlet):
        return value is not getcurrent() and not value.ready()
    return hasattr(type(value), "add_done_callback")


_PLAIN: Final = "write a plain function (def, without async and yield), which has done its work when it returns"


def check_function(name: str, value: Any, *takes: str) -> None:
    """Raise unless *value*, the option *name*, can be called with the arguments *takes*, and works when called."""
    if not callable(value):
        raise TypeError(f"{name} is {named(value)}, but must be callable")
    _check_arguments(name, value, takes)
    kind = _kind(value)
    if kind is not None:
        raise TypeError(
            f"{name} is {_shown(value)}, {kind}: its result would have to be awaited or read, but never is: {_PLAIN}"
        )


def check_functions(takes: tuple[str, ...], **given: Any) -> None:
    """Raise unless each option in *given* is None, or can be called with the arguments *takes*."""
    for name, value in given.items():
        if value is not None:
            check_function(name, value, *takes)


def check_opener(name: str, value: Any, takes: str) -> None:
    """Raise unless *value*, the option *name*, can return a context manager."""
    if not callable(value) or isinstance(value, ContextDecorator):
        called = "; it looks like the result of a call: pass the function itself" if _is_scope(value) else ""
        raise TypeError(f"{name} is {named(value)}, but must be callable: {_STORE}{called}")
    if isinstance(value, type) and _makes_no_scope(value):
        raise TypeError(
            f"{name} is the class {value.__qualname__}, whose instances are no context managers, but must be {_STORE}"
        )
    _check_arguments(name, value, (takes,), f"; it has to be {_STORE}" if name == "open_resource" else "")
    kind = _kind(value)
    if kind == _GENERATOR:
        raise TypeError(f"{name} is {_shown(value)}, {kind}: decorate it with contextlib.contextmanager")
    if kind is not None:
        raise TypeError(f"{name} is {_shown(value)}, {kind}, but must return a context manager: write it without async")


def check_missing(missing: Any) -> None:
    """Raise unless *missing* is "raise", or a callable that makes a resource of a key."""
    if missing == "raise":
        return
    if not callable(missing):
        raise TypeError(
            f'missing is {named(missing)}, but must be "raise" or a callable that makes the resource of a key'
        )
    if isinstance(missing, type) and missing.__module__ in _PYTHONS_OWN:
        name = missing.__qualname__
        raise TypeError(f"missing is the class {name}, which would be called with the key: pass lambda key: {name}()")
    check_function("missing", missing, "key")


_PYTHONS_OWN: Final = frozenset({"builtins", "collections"})
"""Modules whose classes take a key for contents: `list` makes a list of its letters, say."""


def check_no_store(name: str, value: Any) -> None:
    """Raise if *value*, the option *name*, is a store of one key."""
    mark = "open_resources" if name == "open_resources" else "normalize_key"
    if hasattr(type(value), mark):
        instead = "its open_resources, or it as open_resource" if mark == name else "it as open_resource"
        raise TypeError(f"{name} is {named(value)}, a store of one key at a time: pass {instead}")


class PairFacts(NamedTuple):
    """The facts about a load and save pair, of one key or of many: its attribute ``pair_facts``."""

    load: Any
    """The function that loads, or None."""
    saves: bool
    compares: bool


NOT_OPENED: Final = object()
"""Stands for a scope that has not been opened."""


def no_scope(name: str, given: object) -> TypeError | None:
    """Return a `TypeError` if *given*, which the option *name* returned, is no context manager; else None."""
    if given is NOT_OPENED or _is_scope(given):
        return None
    if hasattr(given, "__aenter__"):
        instead = "it is one for async with, and is never awaited: write it with def and contextlib.contextmanager"
    else:
        instead = (
            "entering it has to load, and leaving it to save. Decorate a generator function with "
            "contextlib.contextmanager; a function that only loads is a load_resource, beside a save_resource"
        )
    return TypeError(f"{name} returned {named(given)}, which is no context manager: {instead}")


def check_scope(name: str, given: object) -> None:
    """Raise the error of `no_scope`, if there is one."""
    error = no_scope(name, given)
    if error is not None:
        raise error


def blame_opener(error: BaseException, name: str, given: object) -> BaseException:
    """Return the error to report for *error*, which opening or entering *given* has raised.

    If *given* is no context manager, that is the error of `no_scope`; else *error* itself.
    """
    return (no_scope(name, given) if type(error) is AttributeError else None) or error


def _makes_no_scope(kind: type) -> bool:
    """Return whether calling *kind* returns no context manager. False if the call may return any other object."""
    own: Any = kind.__new__
    is_plain = type(kind).__call__ is type.__call__ and type(own) is BuiltinFunctionType
    return is_plain and not _is_scope(kind) and not hasattr(kind, "__getattr__")


def _is_scope(value: object) -> bool:
    return hasattr(value, "__enter__") and hasattr(value, "__exit__")


_CONTEXT_MANAGER: Final = contextmanager(lambda: iter(())).__code__


def _check_arguments(name: str, value: Any, takes: tuple[str, ...], instead: str = "") -> None:
    try:
        signature = inspect.signature(_undecorated(value), follow_wrapped=False)
    except Exception:  # it is written in C, or has an odd signature
        return
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise TypeError(
            f"{name} is {_shown(value)}, which cannot be called as {name}({', '.join(takes)}): {said(error)}{instead}"
        ) from None


def _undecorated(value: Any) -> Any:
    """Return the generator function inside of `contextmanager`. Other decorators may pass more arguments: they stay."""
    if attribute(value, "__code__") is not _CONTEXT_MANAGER:
        return value
    inner = value.__wrapped__
    return MethodType(inner, value.__self__) if type(value) is MethodType else inner


_GENERATOR: Final = "a generator function"


def _kind(value: Any) -> str | None:
    """Return what kind of function *value* is, if calling it does not run its code; else None."""
    for function in (value, type(value).__call__):
        if inspect.isgeneratorfunction(function):
            return _GENERATOR
        if inspect.iscoroutinefunction(function):
            return "an async function"
        if inspect.isasyncgenfunction(function):
            return "an async generator function"
    return None


def _shown(function: Any) -> str:
    return f"{name_of(function)} ({place_of(function)})"
