"""The app's configuration: finds the processors, and registers the checks."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any, Final

from django.apps import AppConfig, apps
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_started
from django.db.models.signals import post_migrate
from django.utils.module_loading import module_has_submodule

from geventbatch._watch import setup_problems
from geventbatch.integrations import django as integration

_log: Final = logging.getLogger("geventbatch")


class GeventbatchConfig(AppConfig):
    """Finds the processors, and checks how the project is set up."""

    name = "geventbatch.integrations.django"
    label = "geventbatch"
    verbose_name = "geventbatch"

    def ready(self) -> None:
        """Import the module ``processors`` of each app that has one, and register the checks."""
        from geventbatch.integrations.django import checks

        for app in apps.get_app_configs():
            if app.module is not None and module_has_submodule(app.module, "processors"):
                module = import_module(f"{app.name}.processors")
                if module not in integration._modules:
                    integration._modules.append(module)
        checks.register_all()
        # A test database cannot be dropped while anyone is connected. A TransactionTestCase sends this signal too, when
        # it empties the database at its end.
        post_migrate.connect(_close_idle, dispatch_uid="geventbatch")
        request_started.connect(_see_environment, dispatch_uid="geventbatch")
        if checks.in_gevent_worker():
            for message in checks.of_process():
                _log.warning("%s", message)


def _see_environment(sender: type, environ: dict[str, Any] | None = None, **_: Any) -> None:
    """Note, in a server's first request, how many processes serve."""
    if issubclass(sender, WSGIHandler):  # not the test client, which reports several processes
        request_started.disconnect(dispatch_uid="geventbatch")
        setup_problems.see_environment(environ or {})


def _close_idle(using: str, **_: Any) -> None:
    connections = sys.modules.get("geventbatch.stores.django._connections")
    if connections is not None:  # else there is no store
        connections.close_idle(using)
