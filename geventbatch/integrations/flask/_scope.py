"""The application context of a batch, from load to save, and what operations see of it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from flask.globals import _cv_app

from geventbatch._batch import batch_at_hand, current_batch
from geventbatch._check_callables import check_scope
from geventbatch._watch import threads
from geventbatch._wrapper import Around
from geventbatch.integrations.flask._sqlalchemy import adopt_session, tell_of_lost_changes
from geventbatch.stores._give_back import error_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextlib import AbstractContextManager
    from types import TracebackType

    from flask import Flask
    from flask.ctx import AppContext

    from geventbatch._check_callables import PairFacts
    from geventbatch.integrations.flask._door import Caller

_batch_context: Final[ContextVar[AppContext]] = ContextVar("geventbatch.flask")
"""The batch's application context, in the `contextvars` context of its load and save."""


class AppStore(Around):
    """Wraps an ``open_resource``: each scope gets an application context of its own."""

    def __init__(
        self, app: Flask, open_resource: Callable[[Any], AbstractContextManager[Any]], option: str = "open_resource"
    ) -> None:
        """Wrap *open_resource*, given as the option of the name *option*, for *app*."""
        pair = getattr(open_resource, "load_resource", None) or getattr(open_resource, "load_resources", None)
        self.__wrapped__ = pair or open_resource  # its name is shown by the processor, metrics and logs
        super().__init__(open_resource)
        self._app = app
        self._option = option

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the store; its form for many keys is wrapped likewise."""
        found = super().__getattr__(name)
        return AppStore(self._app, found, name) if name == "open_resources" else found

    def admit(self, key: Hashable) -> bool:
        """Return whether an operation called here runs unbatched: in a thread that gevent has not patched, it does.

        So it does under ``flask run``, which is warned once, and wherever the store asks for it.
        """
        facts: PairFacts | None = getattr(self._inner, "pair_facts", None)
        loses = facts is not None and facts.load is not None and facts.saves and not facts.compares
        unpatched = threads.run_unbatched(comparing=not loses)
        asks = getattr(self._inner, "admit", None)
        return bool(asks is not None and asks(key)) or unpatched

    def __call__(self, key: Hashable) -> AppScope:
        """Open the scope of *key* in a new application context."""
        context = self._app.app_context()
        context.push()
        try:
            scope = self._inner(key)
            check_scope(self._option, scope)
        except BaseException as error:
            _pop(context, error)
            raise
        _batch_context.set(context)
        return AppScope(context, scope)


class AppScope(Around):
    """Wraps a scope: the application context is popped after the scope's exit."""

    def __init__(self, context: AppContext, scope: AbstractContextManager[Any]) -> None:
        """Wrap *scope*; *context* is pushed already."""
        super().__init__(scope)
        self._context = context

    def __enter__(self) -> Any:
        """Load, and make the resource's session ``db.session``."""
        try:
            resource = self._inner.__enter__()
        except BaseException as error:
            _pop(self._context, error)
            raise
        adopt_session(self._context.app, resource)
        return resource

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Exit the scope, and pop the application context."""
        try:
            self._inner.__exit__(kind, error, traceback)
        except BaseException as raised:
            _pop(self._context, raised)
            raise
        if error is None:
            batch = current_batch()
            tell_of_lost_changes(self._context.app, tuple(batch.bulk) or batch.keys)
        _pop(self._context, error)

    @property
    def saved(self) -> Callable[[], None] | None:
        """The wrapped scope's ``saved``, to be called in an application context of its own."""
        saved = getattr(self._inner, "saved", None)
        if saved is None:
            return None

        def saved_in_context() -> None:
            with self._context.app.app_context():
                saved()

        return saved_in_context


def _pop(context: AppContext, error: BaseException | None) -> None:
    """Call the teardown functions. They come after the save, so none can make it fail."""
    failed = error_of(context.pop, error)
    if failed is not None:
        context.app.logger.error(
            "a teardown function failed after a batch; what the batch has saved stays saved", exc_info=failed
        )


class InBatch:
    """Calls an operation in its batch's application context, but with its caller's ``g``.

    In the caller's application context, objects that are kept per context, such as Flask-SQLAlchemy's session, would be
    the request's. Operations run one after the other, and while one runs no other code looks at ``g``.
    """

    __slots__ = ("__wrapped__", "_caller")

    def __init__(self, operation: Callable[..., Any], caller: Caller | None) -> None:
        self.__wrapped__ = operation
        self._caller = caller

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    @property
    def stands_for(self) -> Callable[..., Any]:
        """The operation itself, by which an idempotency key identifies it, however it is wrapped."""
        return self.__wrapped__

    def __call__(self, resource: Any, *args: Any) -> Any:
        """Call the operation."""
        caller = self._caller
        if caller is None:
            return self._call(resource, *args)
        try:
            answer = self._call(resource, *args)
        except Exception:  # after any other, nothing may wait
            caller.give_back_again()
            raise
        caller.give_back_again()
        return answer

    def _call(self, resource: Any, *args: Any) -> Any:
        batch = batch_at_hand()
        context = batch.context[_batch_context]
        callers = _cv_app.get(None)
        _cv_app.set(context)  # never reset: this copy of the caller's context is for this call only
        if batch.bulk:  # its keys may have several sessions; else it has adopted the only one when it was loaded
            adopt_session(context.app, resource[0] if type(resource) is tuple else resource)
        if callers is None or callers.app is not context.app:
            return self.__wrapped__(resource, *args)
        own, context.g = context.g, callers.g
        try:
            return self.__wrapped__(resource, *args)
        finally:
            context.g = own
