"""The options of a processor, checked at the door (guarantee 15)."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypedDict, TypeVar

from geventbatch._check_callables import PairFacts, check_function, check_no_store, check_opener
from geventbatch._check_values import (
    check_flag,
    check_identity,
    copies,
    count,
    count_or_none,
    exception_classes,
    flag,
    numbers_shards,
    seconds,
    seconds_or_none,
    text_or_none,
)
from geventbatch._core.operation import name_of
from geventbatch._core.pair import Pair
from geventbatch._misspelt import first_look
from geventbatch._safe_repr import shown
from geventbatch._store_abilities import Door, Store, across_form, door_of, look_at
from geventbatch._worker_number import worker_number_for_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from geventbatch._core.operation import Operation

F = TypeVar("F", bound="Callable[..., object]")

_SHORT_WINDOW: Final = 0.1
"""Seconds; under it twice the window is too short for any database."""


class OptionTypes(TypedDict, total=False):
    """The options besides those that open resources, as type checkers see them."""

    max_bulk: int
    min_duration: float
    max_duration: float | None
    workers: int | None
    worker_number_for_key: Callable[[Any, int], int]
    max_attempts: int
    clean_errors: tuple[type[BaseException], ...]
    recorded_errors: tuple[type[BaseException], ...]
    copy_resource: Callable[[Any], Any] | None
    max_batches: int | None
    max_batch_size: int | None
    max_pending: int | None
    max_blocking_time: float | None
    name: str | None
    batching: bool


def _option(check: Callable[[str, Any], Any], *, default: Any) -> Any:
    """Declare an option: its *default*, and the function that checks a value and returns it in the form to use."""
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a processor, complete and checked. Each field with an `_option` is the option of the same name."""

    open_resource: Callable[[Any], AbstractContextManager[Any]]
    open_resources: Callable[[list[Any]], AbstractContextManager[Any]] | None
    """For many keys; if it is set, *open_resource* opens one key by means of it."""
    open_across: Callable[[list[Any]], AbstractContextManager[Any]] | None
    """For operations across keys: *open_resources*, or the form for many keys of the store; None if it has none."""
    store: Store
    across: Store
    """The abilities of *open_across*."""
    why_not_across: Exception | None = None
    """What the store raised when it was asked for its form for many keys."""
    observers: tuple[Callable[[Operation[Any]], object], ...] = ()
    door: Door | None
    idempotency: Any
    """The module `once`, if the store records outcomes; else None."""

    max_bulk: int = _option(count, default=100)
    min_duration: float = _option(seconds, default=0.1)
    max_duration: float = _option(seconds_or_none, default=None)  # None: it depends on the window
    workers: int = _option(count_or_none, default=None)  # None: it depends on the CPUs
    worker_number_for_key: Callable[[Any, int], int] = _option(numbers_shards, default=worker_number_for_key)
    max_attempts: int = _option(count, default=5)
    clean_errors: tuple[type[BaseException], ...] = _option(exception_classes, default=())
    recorded_errors: tuple[type[BaseException], ...] = _option(exception_classes, default=(Exception,))
    copy_resource: Callable[[Any], Any] | None = _option(copies, default=deepcopy)
    max_batches: int | None = _option(count_or_none, default=None)
    max_batch_size: int | None = _option(count_or_none, default=None)
    max_pending: int | None = _option(count_or_none, default=None)
    max_blocking_time: float | None = _option(seconds_or_none, default=0.1)
    name: str = _option(text_or_none, default=None)  # None: the name of the function that loads
    batching: bool = _option(flag, default=True)  # only its first value: the processor keeps the present one

    def once(
        self,
        resource_key: Any,
        key: str,
        operation: Callable[..., Any],
        args: tuple[Any, ...],
        identified_by: Any,
        *,
        across: bool = False,
    ) -> Any:
        """Return the `Once` that stands for *operation* with an idempotency key. Raise if it cannot have one.

        If it is *across* keys, *resource_key* is a tuple of them.
        """
        if identified_by is not None:
            check_identity(identified_by)
        method = "run_across" if across else "run"
        if self.idempotency is None:
            raise TypeError(
                f"{method}() was given the idempotency_key {shown(key)}, but the processor's store records no outcomes"
                ": a SQLAlchemyStore, a SQLStore and a DjangoStore need idempotency=…, their table or model; a "
                "RedisStore needs an idempotency_ttl; what opens many keys has to say keeps_outcomes; a load and save "
                "pair cannot"
            )
        if across and not self.across.keeps_outcomes:
            raise TypeError(
                f"run_across() was given the idempotency_key {shown(key)}, but the store of {self.name} records "
                "outcomes of single keys only: its open_resources does not say keeps_outcomes"
            )
        check = self.across.check_outcomes or self.store.check_outcomes if across else self.store.check_outcomes
        if check is not None:
            for one in resource_key if across else (resource_key,):
                check(one)
        return self.idempotency.Once(key, operation, args, identified_by, method)


_OPENING: Final = (
    *("open_resource", "load_resource", "save_resource"),
    *("open_resources", "load_resources", "save_resources", "compares"),
)
"""The options that open resources. `_opened` checks how they go together."""

_TABLE: Final = {one.name: one for one in fields(Options) if "check" in one.metadata}

DEFAULTS: Final[dict[str, Any]] = {**dict.fromkeys(_OPENING), **{name: one.default for name, one in _TABLE.items()}}
"""Every option of `Processor`, and its default."""

_NUMBERS_AND_FLAGS: Final = {count, count_or_none, flag, seconds, seconds_or_none}

PLAIN: Final = {name for name, one in _TABLE.items() if one.metadata["check"] in _NUMBERS_AND_FLAGS} - {"max_bulk"}
"""The numbers and flags that the configuration of an application may set for all its processors."""


def shows_options(*others: str) -> Callable[[F], F]:
    """Show *others* and all options in the signature of a method that takes them as keywords: for `help` and docs."""
    types = {name: getattr(one, "__forward_arg__", one) for name, one in OptionTypes.__annotations__.items()}
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=types.get(name, Parameter.empty))
        for name, default in {**dict.fromkeys(others), **DEFAULTS}.items()
    ]
    signature = Signature([Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *options])

    def show(method: F) -> F:
        vars(method)["__signature__"] = signature
        return method

    return show


def check_options(**given: Any) -> Options:
    """Return the options, or raise a `TypeError` or `ValueError` that names argument, value, and the allowed values."""
    for name in given:
        if name not in DEFAULTS:
            _refuse_unknown(name)
    opening = {name: given.pop(name, None) for name in _OPENING}
    if given.get("max_bulk", 0) is None:
        del given["max_bulk"]
    values = {name: one.metadata["check"](name, given.get(name, one.default)) for name, one in _TABLE.items()}
    window, most = values["min_duration"], values["max_duration"]
    if most is None:
        most = seconds("max_duration", 2 * window if window >= _SHORT_WINDOW else 1.0)
        values["max_duration"] = most
    if most <= window:
        raise ValueError(
            f"max_duration is {shown(most)}, but must be more than min_duration, which is {shown(window)}: it has "
            "to hold the window, the load and the save"
        )
    one, many = _opened(**opening)
    across, why_not = (many, None) if many is not None else across_form(one)
    if across is None and "max_bulk" in given:
        raise TypeError(
            "max_bulk is for open_resources, for load_resources and save_resources, or for a store that saves many "
            "keys at once, and there is none"
        ) from why_not
    store = look_at(one if many is None else many)
    abilities = look_at(across)
    if values["workers"] is None:
        values["workers"] = 16 * (os.cpu_count() or 1) if many is None else 1
    if values["name"] is None:
        loads = [opening[name] for name in ("open_resource", "open_resources", "load_resources", "load_resource")]
        values["name"] = next((name_of(load) for load in loads if load is not None), "geventbatch")
    return Options(
        open_resource=one,
        open_resources=many,
        open_across=across if across is many else first_look(across),
        store=store,
        across=abilities,
        why_not_across=why_not,
        door=door_of(store, (), abilities),
        idempotency=_idempotency(store),
        **values,
    )


def _opened(
    *,
    open_resource: Any,
    load_resource: Any,
    save_resource: Any,
    open_resources: Any,
    load_resources: Any,
    save_resources: Any,
    compares: Any,
) -> tuple[Any, Any]:
    """Return the function that opens one resource, and the function that opens many, or None."""
    if compares is not None:
        check_flag("compares", compares)
    many = bulk_scope(open_resources, load_resources, save_resources, compares=compares)
    one = resource_scope(open_resource, load_resource, save_resource, compares=compares if many is None else None)
    if many is None:
        return first_look(one), None
    if not (open_resource is load_resource is save_resource is None):
        raise TypeError("pass functions of one key (open_resource), or functions of many (open_resources), not both")
    many = first_look(many)
    return _one_of(many), many


def reopened(options: Options, around: Callable[[Any], Any], around_many: Callable[[Any], Any]) -> Options:
    """Return *options* with the functions that open one key, or many, wrapped by these. For `_seam`."""
    across = None if options.open_across is None else around_many(options.open_across)
    many = None if options.open_resources is None else across
    one = _one_of(many) if many is not None else around(options.open_resource)
    store = look_at(one if many is None else many)
    opened = replace(
        options, open_resource=one, open_resources=many, open_across=across, store=store, across=look_at(across)
    )
    return observed(opened, options.observers)


def observed(options: Options, observers: tuple[Callable[[Operation[Any]], object], ...]) -> Options:
    """Return *options* with these observers. For `_seam`."""
    return replace(options, observers=observers, door=door_of(options.store, observers, options.across))


def _one_of(many: Any) -> Any:
    from geventbatch._bulk.scopes import OneOfBulk

    return partial(OneOfBulk, many)


def _refuse_unknown(name: str) -> NoReturn:
    from difflib import get_close_matches  # here, since it is slow to import

    near = get_close_matches(name, [*DEFAULTS], n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    raise TypeError(f"Processor() has no option {name}{hint}")


def resource_scope(open_resource: Any, load_resource: Any, save_resource: Any, *, compares: bool | None = None) -> Any:
    """Return the ``open_resource`` that was passed, or a `Pair` as one."""
    if open_resource is None:
        if load_resource is not None:
            check_no_store("load_resource", load_resource)
            check_function("load_resource", load_resource, "key")
        if save_resource is not None:
            check_function("save_resource", save_resource, "key", "resource")
        facts = PairFacts(load_resource, saves=save_resource is not None, compares=bool(compares))
        return Pair(load_resource, save_resource, facts)
    if load_resource is not None or save_resource is not None:
        raise TypeError(
            "open_resource takes the place of load_resource and save_resource: pass it, or the pair, not both"
        )
    _check_no_pair(compares=compares)
    check_opener("open_resource", open_resource, "key")
    return open_resource


def bulk_scope(open_resources: Any, load_resources: Any, save_resources: Any, *, compares: bool | None = None) -> Any:
    """Return the ``open_resources`` that was passed, or a `BulkPair` as one, or None."""
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
            "compares says of a pair that its save compares with the loaded state, and there is no pair: leave it out"
        )


def _idempotency(store: Store) -> Any:
    if not store.keeps_outcomes:
        return None
    from geventbatch._idempotency import once as _idempotency  # here, since it is slow to import

    return _idempotency
