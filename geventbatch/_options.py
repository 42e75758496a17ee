"""The options of a processor, checked at the door (guarantee 15)."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, Final, NoReturn

from gevent import Timeout

from geventbatch._check_callables import Told, check_function, check_functions, check_no_store, check_opener
from geventbatch._core.operation import name_of
from geventbatch._core.pair import Pair
from geventbatch._misspelt import first_look
from geventbatch._safe_repr import named, said, shown
from geventbatch._store_abilities import Door, Store, door_of, look_at
from geventbatch._worker_number import worker_number_for_key as default_worker_number

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from geventbatch._core.operation import Operation

_SHORT_WINDOW: Final = 0.1
"""Seconds; under it twice the window is too short for any database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a processor was told, complete and checked."""

    open_resource: Callable[[Any], AbstractContextManager[Any]]
    open_resources: Callable[[list[Any]], AbstractContextManager[Any]] | None
    """Of many keys; then *open_resource* opens one of those by means of it."""
    max_bulk: int
    store: Store
    observers: tuple[Callable[[Operation[Any]], object], ...] = ()
    door: Door | None
    min_duration: float
    max_duration: float
    workers: int
    worker_number_for_key: Callable[[Any, int], int]
    max_attempts: int
    clean_errors: tuple[type[BaseException], ...]
    recorded_errors: tuple[type[BaseException], ...]
    copy_resource: Callable[[Any], Any] | None
    max_batches: int | None
    max_batch_size: int | None
    max_pending: int | None
    max_blocking_time: float | None
    name: str
    idempotency: Any
    """The module `once`, where the store records outcomes; else None."""

    def once(
        self,
        resource_key: Any,
        key: str,
        operation: Callable[..., Any],
        args: tuple[Any, ...],
        identified_by: Any,
    ) -> Any:
        """What stands for *operation* when it has an idempotency key. Raises what is wrong with that."""
        if identified_by is not None:
            check_identity(identified_by)
        if self.idempotency is None:
            raise TypeError(
                f"run() was given the idempotency_key {shown(key)}, but the processor's store records no outcomes: a "
                "SQLAlchemyStore and a DjangoStore need idempotency=…, their table or model; a RedisStore needs an "
                "idempotency_ttl; a load and save pair cannot, nor can what opens many keys"
            )
        if self.store.check_outcomes is not None:
            self.store.check_outcomes(resource_key)
        return self.idempotency.Once(key, operation, args, identified_by)


def check_options(
    *,
    open_resource: Any = None,
    load_resource: Any = None,
    save_resource: Any = None,
    open_resources: Any = None,
    load_resources: Any = None,
    save_resources: Any = None,
    compares: Any = None,
    max_bulk: Any = None,
    min_duration: Any = 0.1,
    max_duration: Any = None,
    workers: Any = None,
    worker_number_for_key: Any = default_worker_number,
    max_attempts: Any = 5,
    clean_errors: Any = (),
    recorded_errors: Any = (Exception,),
    copy_resource: Any = deepcopy,
    max_batches: Any = None,
    max_batch_size: Any = None,
    max_pending: Any = None,
    max_blocking_time: Any = 0.1,
    name: Any = None,
    **unknown: Any,
) -> Options:
    """Give the options, or raise the `TypeError` or `ValueError` that names argument, value, and what is allowed."""
    if unknown:
        _refuse_unknown(*unknown)
    check_seconds("min_duration", min_duration)
    if max_duration is None:
        max_duration = 2 * min_duration if min_duration >= _SHORT_WINDOW else 1.0
    check_seconds("max_duration", max_duration)
    if max_duration <= min_duration:
        raise ValueError(
            f"max_duration is {shown(max_duration)}, but must be more than min_duration, which is "
            f"{shown(min_duration)}: it has "
            "to hold the window, the load and the save"
        )
    if compares is not None:
        check_flag("compares", compares)
    many = bulk_scope(open_resources, load_resources, save_resources, compares=compares)
    one = resource_scope(open_resource, load_resource, save_resource, compares=compares if many is None else None)
    if many is None and max_bulk is not None:
        raise TypeError("max_bulk is for open_resources, or for load_resources and save_resources, and there is none")
    if many is not None and not (open_resource is load_resource is save_resource is None):
        raise TypeError("pass functions of one key (open_resource), or functions of many (open_resources), not both")
    if many is None:
        one = first_look(one)
    else:
        many = first_look(many)
        one = _one_of(many)
    store = look_at(one if many is None else many)
    if workers is None:
        workers = 16 * (os.cpu_count() or 1) if many is None else 1
    check_function("worker_number_for_key", worker_number_for_key, "key", "workers")
    return Options(
        open_resource=one,
        open_resources=many,
        max_bulk=_count("max_bulk", 100 if max_bulk is None else max_bulk),
        store=store,
        door=door_of(store, ()),
        min_duration=float(min_duration),
        max_duration=float(max_duration),
        workers=_count("workers", workers),
        worker_number_for_key=worker_number_for_key,
        max_attempts=_count("max_attempts", max_attempts),
        clean_errors=_exception_classes("clean_errors", clean_errors),
        recorded_errors=_exception_classes("recorded_errors", recorded_errors),
        copy_resource=_copy_resource(copy_resource),
        max_batches=_limit("max_batches", max_batches),
        max_batch_size=_limit("max_batch_size", max_batch_size),
        max_pending=_limit("max_pending", max_pending),
        max_blocking_time=_blocking_time(max_blocking_time),
        name=_name(open_resource, open_resources, load_resources, load_resource) if name is None else _check_name(name),
        idempotency=_idempotency(store),
    )


def reopened(options: Options, around: Callable[[Any], Any]) -> Options:
    """Give *options* that open resources by what *around* makes of the function that did. For `_seam`."""
    many = options.open_resources
    opener = around(options.open_resource if many is None else many)
    opened = replace(
        options,
        open_resource=opener if many is None else _one_of(opener),
        open_resources=None if many is None else opener,
        store=look_at(opener),
    )
    return observed(opened, options.observers)


def observed(options: Options, observers: tuple[Callable[[Operation[Any]], object], ...]) -> Options:
    """Give *options* with these observers. For `_seam`."""
    return replace(options, observers=observers, door=door_of(options.store, observers))


def _one_of(many: Any) -> Any:
    from geventbatch._bulk.scopes import OneOfBulk

    return partial(OneOfBulk, many)


def _refuse_unknown(name: str, *_: str) -> NoReturn:
    from difflib import get_close_matches  # only now, since it is slow to import

    near = get_close_matches(name, [*(check_options.__kwdefaults__ or ()), "batching"], n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    raise TypeError(f"Processor() has no option {name}{hint}")


def check_seconds(name: str, value: object) -> None:
    """Raise unless *value* is a finite number of seconds, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {shown(value)}, but must be a number of seconds (int or float)")
    try:
        allowed = isfinite(value) and value >= 0
    except OverflowError:  # an int beyond all floats
        allowed = False
    if not allowed:
        raise ValueError(f"{name} is {shown(value)}, but must be a finite number of seconds, 0 or more")


def _blocking_time(value: Any) -> float | None:
    if value is None:
        return None
    check_seconds("max_blocking_time", value)
    return float(value)


def _copy_resource(value: Any) -> Any:
    if value is not None and not callable(value):
        raise TypeError(f"copy_resource is {shown(value)}, but must be callable, or None: it cannot be copied")
    check_functions(("resource",), copy_resource=value)
    return value


def _check_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"name is {shown(value)}, but must be a str that is not empty")
    return value


def _name(*given: Any) -> str:
    """Say how a processor is called that nobody gave a name: as what loads its resources, and so in every process."""
    return next((name_of(loads) for loads in given if loads is not None), "geventbatch")


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
    """Raise: *value* was passed to `Processor` by its place."""
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
    """Raise what says why *key* cannot be one: it has no hash, which said *error*, or is not equal to itself."""
    if error is None:
        raise ValueError(f"key is {shown(key)}, which is not equal to itself: no two operations could ever share it")
    msg = f"key is {shown(key)}, but must be hashable: a str, an int, a UUID or a tuple of them ({said(error)})"
    raise TypeError(msg) from error


def resource_scope(open_resource: Any, load_resource: Any, save_resource: Any, *, compares: bool | None = None) -> Any:
    """Give the ``open_resource`` that was passed, or the one that a pair makes."""
    if open_resource is None:
        if load_resource is not None:
            check_no_store("load_resource", load_resource)
            check_function("load_resource", load_resource, "key")
        if save_resource is not None:
            check_function("save_resource", save_resource, "key", "resource")
        told = Told(load_resource, saves=save_resource is not None, compares=bool(compares))
        return Pair(load_resource, save_resource, told)
    if load_resource is not None or save_resource is not None:
        raise TypeError(
            "open_resource takes the place of load_resource and save_resource: pass it, or the pair, not both"
        )
    _check_no_pair(compares=compares)
    check_opener("open_resource", open_resource, "key")
    return open_resource


def bulk_scope(open_resources: Any, load_resources: Any, save_resources: Any, *, compares: bool | None = None) -> Any:
    """Give the ``open_resources`` that was passed, or the one that a pair makes; None when there is none."""
    if open_resources is load_resources is save_resources is None:
        return None
    if open_resources is None:
        check_function("load_resources", load_resources, "keys")
        check_function("save_resources", save_resources, "resources")
        from geventbatch._bulk.scopes import BulkPair

        return BulkPair(load_resources, save_resources, compares=bool(compares))
    if load_resources is not None or save_resources is not None:
        raise TypeError(
            "open_resources takes the place of load_resources and save_resources: pass it, or the pair, not both"
        )
    _check_no_pair(compares=compares)
    check_no_store("open_resources", open_resources)
    check_opener("open_resources", open_resources, "keys")
    return open_resources


def _check_no_pair(*, compares: bool | None) -> None:
    if compares is not None:
        raise TypeError(
            "compares says of a pair that its save compares what was loaded, and there is no pair: leave it out"
        )


def _idempotency(store: Store) -> Any:
    if not store.keeps_outcomes:
        return None
    from geventbatch._idempotency import once as _idempotency  # which is slow to import

    return _idempotency


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {shown(value)}, but must be an int")
    if value < 1:
        raise ValueError(f"{name} is {shown(value)}, but must be 1 or more")
    return value


def _limit(name: str, value: Any) -> int | None:
    return None if value is None else _count(name, value)


def _exception_classes(name: str, value: Any) -> tuple[type[BaseException], ...]:
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
