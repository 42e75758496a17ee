"""For docs/page.md."""

import os
import warnings
from contextlib import suppress
from types import SimpleNamespace

os.environ["DJANGO_SETTINGS_MODULE"] = "tests.support.django_project.settings"

import bottle
import django
from django.test import RequestFactory
from django.urls import NoReverseMatch
from flask import Flask

django.setup()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of `cgi` and `pkg_resources`, which they import
    from pyramid.config import Configurator
    from pyramid.request import Request

from geventbatch import Processor


class ByHeader:
    """A security policy of Pyramid that believes what it reads."""

    def identity(self, request):
        return request.headers.get("X-User")

    def permits(self, request, context, permission):
        return self.identity(request) == permission


app = Flask(__name__)
config = Configurator()
config.set_security_policy(ByHeader())
root = bottle.Bottle()
processor = Processor(min_duration=0, name="trains")


def login_required(view):
    return view


def ask(wsgi, path, address="127.0.0.1"):
    """Give status and text."""
    begun = []
    environ = RequestFactory().get(path, REMOTE_ADDR=address).environ
    body = b"".join(wsgi(environ, lambda status, headers, *_: begun.append(status)))
    return begun[0], body.decode()


def check(page):
    processor.run("ICE 1", lambda _: None)
    assert ask(page["page"], "/")[0] == "200 OK"
    assert ask(page["page"], "/", "10.0.0.1") == ("403 Forbidden", "")
    for wsgi in (app, root):
        status, text = ask(wsgi, "/admin/batches")
        assert status == "200 OK"
        assert "trains" in text
        assert "ICE 1" in text
    for method, expected in (("get", 200), ("post", 405)):
        request = getattr(RequestFactory(), method)("/admin/batches")
        request.user = SimpleNamespace(is_active=True, is_staff=True)
        response = page["batches_view"](request)
        assert response.status_code == expected
        assert response["Cache-Control"] == "no-store"
    request.user = SimpleNamespace(is_active=True, is_staff=False)
    with suppress(NoReverseMatch):  # there is no admin to log in at
        assert page["batches_view"](request).status_code == 302
    for user, status in (("admin", 200), ("passer-by", 403)):
        request = Request.blank("/admin/batches", headers={"X-User": user}, remote_addr="127.0.0.1")
        response = request.get_response(config.make_wsgi_app())
        assert response.status_code == status
        assert ("ICE 1" in response.text) is (status == 200)
    processor.stop()
