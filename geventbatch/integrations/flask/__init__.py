"""Processors of a Flask application: configured by it, run in its context; their errors are answered.

    batches = GeventBatch()
    trains = batches.processor(open_resource=open_train, min_duration=0)

    def create_app():
        app = Flask(__name__)
        batches.init_app(app)
        ...

    @app.post("/trains/<name>/seats/<int:seat>")
    def book(name, seat):
        return asdict(trains.run(name, Train.book, seat, request.json["passenger"]))

A batch has an application context of its own from load to save, and so a ``db.session`` of Flask-SQLAlchemy of its own,
which its operations see instead of the request's. If the resource is a mapped instance, that is the session of the
resource. In an operation, ``request``, ``session`` and ``g`` are the caller's. In a load or save there is no request,
and ``g`` is the batch's.

A request that has used ``db.session`` before `run` would hold a connection, and maybe locks, as long as it waits. If
its transaction has only read by the ORM (a login, say), without ``FOR UPDATE``, its connection is given back first, and
its instances are loaded again when they are used after `run`. If it has done anything else, `run` is refused by a
`RuntimeError`: call ``db.session.commit()`` first, or do it in the operation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, TypeVarTuple, Unpack, cast, overload
from weakref import WeakSet

from flask import Flask, Response, appcontext_pushed, current_app, request, request_started
from flask.globals import app_ctx

from geventbatch._check_values import check_callable, check_flag
from geventbatch._options import PLAIN, bulk_scope, resource_scope, shows_options
from geventbatch._processor import Processor
from geventbatch._safe_repr import shown
from geventbatch._watch import setup_problems
from geventbatch.errors import BatchError
from geventbatch.integrations._answers import Answer, answer_to, log
from geventbatch.integrations.flask._scope import AppStore, InBatch
from geventbatch.integrations.flask._sqlalchemy import leaving, watch_session

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping
    from contextlib import AbstractContextManager

    from geventbatch._options import OptionTypes
    from geventbatch._processor import _ScopeOfMany
    from geventbatch._watch.metrics import MetricSubscription
    from geventbatch._watch.stats import LiveBatch, ProcessorStats

    class _OptionTypes(OptionTypes, total=False):
        release_session: bool | None


__all__ = ["Answer", "AppProcessor", "GeventBatch", "answer_to"]

R = TypeVar("R")
T = TypeVar("T")
Args = TypeVarTuple("Args")

_NAME: Final = "geventbatch"
_PREFIX: Final = "GEVENTBATCH_"
_RELEASE: Final = "release_session"


class GeventBatch:
    """The extension: the processors of an application, or of each application that a factory makes.

    ``app.config`` may have:

    - ``GEVENTBATCH_MIN_DURATION``, ``…_MAX_DURATION``, ``…_MAX_PENDING``, ``…_MAX_BATCHES``, ``…_MAX_BATCH_SIZE``,
      ``…_MAX_ATTEMPTS``, ``…_MAX_BLOCKING_TIME``, ``…_WORKERS``, ``…_BATCHING``: for every processor that is not given
      the option itself. They are read by `init_app`, once.
    - ``GEVENTBATCH_RELEASE_SESSION``: likewise; see `processor`.
    - ``GEVENTBATCH_ERROR_ANSWERS``: By default `BatchError`s are answered (503 with Retry-After, 504, 404, or 500 if it
      is unknown whether anything was saved) as JSON or as text, by the client's Accept header. An error handler of
      yours for `BatchError`, or for one of its children, goes first. False: no error is answered.
    - ``GEVENTBATCH_RETRY_AFTER``: whole seconds for that header, 1 by default.

    Args:
        app: The application, if there is no factory: `init_app` is called with it.
    """

    def __init__(self, app: Flask | None = None) -> None:
        """See the class."""
        # -- mutable state ---------------------------------------------------------------------------------
        self._declared: list[AppProcessor[Any]] = []
        self._apps: WeakSet[Flask] = WeakSet()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Make the declared processors for *app*, and answer their errors.

        Raises:
            RuntimeError: It was called for *app* before.
            TypeError: A name in ``app.config`` is unknown, or its value is of a wrong type.
            ValueError: The value of a name in ``app.config`` is out of range.
        Switches: no.
        """
        if _NAME in app.extensions:
            raise RuntimeError("init_app() was called for this application before: one GeventBatch has all processors")
        state = _AppState.from_config(app.config)
        for declared in self._declared:
            state.make(declared, app)
        app.extensions[_NAME] = state
        self._apps.add(app)
        request_started.connect(_see_first_request, app)
        if not watch_session(app):
            appcontext_pushed.connect(watch_session, app)  # Flask-SQLAlchemy may be initialised later
        if state.error_answers and BatchError not in app.error_handler_spec[None][None]:
            app.register_error_handler(BatchError, partial(_answer, retry_after=state.retry_after))

    @overload
    def processor(
        self, *, open_resource: Callable[[Any], AbstractContextManager[R, Any]], **options: Unpack[_OptionTypes]
    ) -> AppProcessor[R]: ...

    @overload
    def processor(
        self,
        *,
        make_store: Callable[[], Callable[[Any], AbstractContextManager[R, Any]]],
        **options: Unpack[_OptionTypes],
    ) -> AppProcessor[R]: ...

    @overload
    def processor(
        self,
        *,
        load_resource: Callable[[Any], R],
        save_resource: Callable[[Any, R], object] = ...,
        compares: bool = ...,
        **options: Unpack[_OptionTypes],
    ) -> AppProcessor[R]: ...

    @overload
    def processor(
        self, *, open_resources: Callable[[list[Any]], _ScopeOfMany[R]], **options: Unpack[_OptionTypes]
    ) -> AppProcessor[R]: ...

    @overload
    def processor(
        self,
        *,
        load_resources: Callable[[list[Any]], Mapping[Any, R | Exception]],
        save_resources: Callable[[dict[Any, R]], object],
        compares: bool = ...,
        **options: Unpack[_OptionTypes],
    ) -> AppProcessor[R]: ...

    @overload
    def processor(
        self, *, save_resource: Callable[[Any, None], object] = ..., **options: Unpack[_OptionTypes]
    ) -> AppProcessor[None]: ...

    @shows_options("make_store", "release_session")
    def processor(self, **options: Any) -> AppProcessor[Any]:
        """Declare a processor, with the arguments of `geventbatch.Processor`, before or after `init_app`.

        Args:
            make_store: Called for each application, in its context, to make its ``open_resource``; for a store that
                needs to know the application: ``lambda: SQLAlchemyStore.mapped(db.session, Account)``. The extensions
                that it uses have to be initialised before this one.
            release_session: What `run` does in a request whose ``db.session`` has read. True: its connection is given
                back while `run` waits. None: likewise, and the log says so once. False: `run` is refused.
            **options: As `geventbatch.Processor` takes them.

        Raises:
            TypeError: An option is of a wrong type. (Before `init_app`, that method raises it.)
            ValueError: An option is out of range. (Likewise.)
        Switches: no.
        """
        declared: AppProcessor[Any] = AppProcessor(options)
        for app in tuple(self._apps):
            _state_of(app).make(declared, app)
        self._declared.append(declared)
        return declared


class AppProcessor(Generic[R]):
    """A declared processor: each application has one, and calls go to the one of the current application."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Declare it; called by `GeventBatch.processor`."""
        self.options = options

    def run(  # noqa: PLR0913 - every option is a keyword
        self,
        key: Hashable,
        operation: Callable[[R, Unpack[Args]], T],
        /,
        *args: *Args,
        start_timeout: float | None = None,
        idempotency_key: str | None = None,
        identified_by: tuple[object, ...] | None = None,
        read_only: bool = False,
    ) -> T:
        """Apply *operation* to the resource at *key* and wait until its batch is saved: `geventbatch.Processor.run`.

        Raises:
            RuntimeError: Called outside of an application context, too.
        Switches: yes, until the batch has ended.
        """
        return self.for_app().run(
            key,
            operation,
            *args,
            start_timeout=start_timeout,
            idempotency_key=idempotency_key,
            identified_by=identified_by,
            read_only=read_only,
        )

    def run_across(  # noqa: PLR0913 - every option is a keyword
        self,
        keys: Iterable[Hashable],
        operation: Callable[[tuple[R, ...], Unpack[Args]], T],
        /,
        *args: *Args,
        start_timeout: float | None = None,
        idempotency_key: str | None = None,
        identified_by: tuple[object, ...] | None = None,
        read_only: bool = False,
    ) -> T:
        """Apply *operation* to the resources at all of *keys*, all saved or none: `geventbatch.Processor.run_across`.

        Raises:
            RuntimeError: Called outside of an application context, too.
        Switches: yes, until all is saved.
        """
        return self.for_app().run_across(
            keys,
            operation,
            *args,
            start_timeout=start_timeout,
            idempotency_key=idempotency_key,
            identified_by=identified_by,
            read_only=read_only,
        )

    @property
    def batching(self) -> bool:
        """The off-switch of the current application's processor: `geventbatch.Processor.batching`.

        Raises:
            RuntimeError: Called outside of an application context. (So do the methods below.)
        Switches: no.
        """
        return self.for_app().batching

    @batching.setter
    def batching(self, on: bool) -> None:
        self.for_app().batching = on

    @property
    def name(self) -> str:
        """The processor's name: `geventbatch.Processor.name`. Switches: no."""
        return self.for_app().name

    @property
    def store(self) -> Any:
        """The store that ``make_store`` made, or the ``open_resource`` that was given; None if there is neither.

        For ``trains.store.create_table()`` and ``trains.store.purge_outcomes()``. Switches: no.
        """
        return cast("_Processor[R]", self.for_app()).given_store

    def stats(self) -> ProcessorStats:
        """Return the processor's counters in this process: `geventbatch.Processor.stats`. Switches: no."""
        return self.for_app().stats()

    def live_batches(self) -> list[LiveBatch]:
        """Return the batches that have not ended: `geventbatch.Processor.live_batches`. Switches: no."""
        return self.for_app().live_batches()

    def subscribe_batch_metrics(self) -> MetricSubscription:
        """Iterate over the metrics of batches: `geventbatch.Processor.subscribe_batch_metrics`. Switches: no."""
        return self.for_app().subscribe_batch_metrics()

    def for_app(self, app: Flask | None = None) -> Processor[R]:
        """Return the processor of *app*, by default of the current application.

        Its own `run` works outside of an application context, too.

        Raises:
            RuntimeError: There is no such application, or `GeventBatch.init_app` was not called for it.
        Switches: no.
        """
        if app is None:
            try:
                app = app_ctx.app
            except RuntimeError:
                raise RuntimeError(
                    "a processor of GeventBatch was used outside of application context, so that nothing tells which "
                    "application's is meant. Nothing was run: use it in a request or in `with app.app_context():`, or "
                    "take for_app(app), whose run() needs no context"
                ) from None
        try:
            return _state_of(app).processors[self]
        except KeyError:
            raise RuntimeError(
                f"the processor was declared on another GeventBatch than the one whose init_app() got {shown(app)}"
            ) from None


class _Processor(Processor[R]):
    """The processor of one application."""

    app: Flask
    release_session: bool | None
    given_store: Any

    def run(  # noqa: PLR0913 - every option is a keyword
        self,
        key: Hashable,
        operation: Callable[[R, Unpack[Args]], T],
        /,
        *args: *Args,
        start_timeout: float | None = None,
        idempotency_key: str | None = None,
        identified_by: tuple[object, ...] | None = None,
        read_only: bool = False,
    ) -> T:
        check_callable("operation", operation)
        with leaving(self.app, "run", (key,), release=self.release_session) as caller:
            return super().run(
                key,
                cast("Callable[[R, Unpack[Args]], T]", InBatch(operation, caller)),
                *args,
                start_timeout=start_timeout,
                idempotency_key=idempotency_key,
                identified_by=identified_by,
                read_only=read_only,
            )

    def run_across(  # noqa: PLR0913 - every option is a keyword
        self,
        keys: Iterable[Hashable],
        operation: Callable[[tuple[R, ...], Unpack[Args]], T],
        /,
        *args: *Args,
        start_timeout: float | None = None,
        idempotency_key: str | None = None,
        identified_by: tuple[object, ...] | None = None,
        read_only: bool = False,
    ) -> T:
        check_callable("operation", operation)
        known = tuple(keys) if isinstance(keys, (list, tuple)) else (keys,)
        with leaving(self.app, "run_across", known, release=self.release_session) as caller:
            return super().run_across(
                keys,
                cast("Callable[[tuple[R, ...], Unpack[Args]], T]", InBatch(operation, caller)),
                *args,
                start_timeout=start_timeout,
                idempotency_key=idempotency_key,
                identified_by=identified_by,
                read_only=read_only,
            )


@dataclass(frozen=True, slots=True)
class _AppState:
    """The extension's state for one application."""

    options: Mapping[str, Any]
    error_answers: bool
    retry_after: int
    processors: dict[AppProcessor[Any], Processor[Any]] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read and check the names that begin with ``GEVENTBATCH_``."""
        given = {name.removeprefix(_PREFIX).lower(): config[name] for name in config if name.startswith(_PREFIX)}
        error_answers = given.pop("error_answers", True)
        if not isinstance(error_answers, bool):
            raise TypeError(f"{_PREFIX}ERROR_ANSWERS is {shown(error_answers)}, but must be True or False")
        retry_after = given.pop("retry_after", 1)
        if isinstance(retry_after, bool) or not isinstance(retry_after, int):
            raise TypeError(
                f"{_PREFIX}RETRY_AFTER is {shown(retry_after)}, but must be a whole number of seconds (int)"
            )
        if retry_after < 0:
            raise ValueError(f"{_PREFIX}RETRY_AFTER is {shown(retry_after)}, but must be 0 or more")
        for name in given.keys() - PLAIN - {_RELEASE}:
            _refuse(name)
        return cls(given, error_answers, retry_after)

    def make(self, declared: AppProcessor[Any], app: Flask) -> None:
        """Make the processor of *app*."""
        options = {**self.options, **declared.options}
        release = options.pop(_RELEASE, None)
        if release is not None:
            check_flag(_RELEASE, release)
        if "make_store" in options:
            options["open_resource"] = _made_store(app, options)
        store = options.get("open_resource")
        compares = options.pop("compares", None)
        if compares is not None:
            check_flag("compares", compares)
        given = (options.pop(name, None) for name in ("open_resources", "load_resources", "save_resources"))
        many = bulk_scope(*given, compares=compares)
        if many is not None:
            options["open_resources"] = AppStore(app, many, "open_resources")
        else:
            one = (options.pop(name, None) for name in ("open_resource", "load_resource", "save_resource"))
            options["open_resource"] = AppStore(app, resource_scope(*one, compares=compares))
        try:
            made = self.processors[declared] = _Processor(**options)
        except (TypeError, ValueError) as error:
            configured = ", ".join(f"{_PREFIX}{name.upper()} = {shown(value)}" for name, value in self.options.items())
            error.add_note(f"app.config has {configured or 'no options for it'}")
            raise
        made.app, made.release_session, made.given_store = app, release, store


def _made_store(app: Flask, options: dict[str, Any]) -> object:
    make_store = options.pop("make_store")
    check_callable("make_store", make_store)
    if "open_resource" in options:
        raise TypeError("make_store makes the open_resource: pass one of them, not both")
    with app.app_context():
        return make_store()


def _refuse(name: str) -> None:
    names = [*PLAIN, _RELEASE, "error_answers", "retry_after"]
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {_PREFIX}{near[0].upper()}?" if near else "there are " + ", ".join(sorted(names)).upper()
    raise TypeError(f"app.config has {_PREFIX}{name.upper()}, which means nothing: {hint}")


def _state_of(app: Flask) -> _AppState:
    if _NAME not in app.extensions:
        raise RuntimeError(f"GeventBatch.init_app() was not called for {shown(app)}")
    state: _AppState = app.extensions[_NAME]
    return state


def _see_first_request(app: Flask, **_: object) -> None:
    """Note, in the first request, how many processes serve."""
    request_started.disconnect(_see_first_request, app)
    appcontext_pushed.disconnect(watch_session, app)  # from now on no extension can be initialised
    setup_problems.see_environment(request.environ)


def _answer(error: BatchError, *, retry_after: int) -> Response:
    answer = answer_to(error, retry_after)
    log(current_app.logger, error, request.method, request.path)
    kind, body = answer.content(request.headers.get("Accept"))
    response = Response(body, answer.status, content_type=kind)
    response.headers.extend(answer.headers(request.environ.get("SERVER_SOFTWARE", "")))
    return response
