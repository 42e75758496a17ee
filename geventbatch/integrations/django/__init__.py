"""The library as an app of Django: put ``geventbatch.integrations.django`` into ``INSTALLED_APPS``.

- Processors are declared in a module ``processors`` of each app, at its top level. The app imports these modules when
  Django starts, so every processor is known before the first request, and `geventbatch.stop_all` stops them all::

      accounts = Processor(open_resource=DjangoStore(Account), min_duration=0, max_duration=5, max_batches=10)

- ``manage.py check`` reports wrong set-ups (``geventbatch.W001`` to ``W010``). Faults of a running worker are
  logged there, when the worker starts.
- The middleware ``geventbatch.integrations.django.middleware.ErrorAnswers`` answers errors that `run` raises in views.
- Test cases need no set-up: see `geventbatch.stores.DjangoStore`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch import Processor, stop_all

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["processors", "stop_all"]

_modules: list[ModuleType] = []


def processors() -> dict[str, Processor[Any]]:
    """Return the processors that apps declare, by full names (``"bank.processors.accounts"``). Switches: no."""
    return {
        f"{module.__name__}.{name}": value
        for module in _modules
        for name, value in vars(module).items()
        if isinstance(value, Processor)
    }
