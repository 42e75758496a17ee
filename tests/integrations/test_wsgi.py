"""Error answers as WSGI middleware, on real servers and under the validator of the standard library."""

import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import bottle  # type: ignore[import-untyped]
import pytest

from geventbatch import BatchError, ProcessorOverloaded, ProcessorStopped, SaveFailed
from geventbatch.integrations.wsgi import Answer, ErrorAnswers
from tests.support.answers import AGAIN, Make, Told, check, each_accept, each_error, form_of

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

ROOT = Path(__file__).parents[2]
OK = [("Content-Type", "text/plain"), ("X-Mine", "1")]


def overloaded() -> BatchError:
    return ProcessorOverloaded("secret")


class Client:
    """Calls an application as a server does, and keeps what it gets."""

    def __init__(self, app: "WSGIApplication") -> None:
        self._app = app
        self.begun: list[tuple[str, list[tuple[str, str]]]] = []
        self.sent: list[bytes] = []

    def get(self, **environ: Any) -> bytes:
        setup_testing_defaults(environ)
        environ.setdefault("QUERY_STRING", "")
        body = self._app(environ, self._start_response)
        try:
            for chunk in body:
                self._send(chunk)
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()
        return b"".join(self.sent)

    @property
    def status(self) -> int:
        return int(self.begun[-1][0].split()[0])

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.begun[-1][1])

    def _start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Any:
        if exc_info is not None and self.sent:
            raise exc_info[1]
        # Some servers replace what was begun, as WSGI has it. gunicorn sends the headers of both.
        assert not self.begun, "began twice"
        self.begun.append((status, headers))
        return self._send

    def _send(self, chunk: bytes) -> None:
        assert self.begun, "sent before it began"
        if chunk:
            self.sent.append(chunk)


# Where an application may fail.


def fails_at_once(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    raise overloaded()


def fails_after_it_began(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    start_response("200 OK", OK)
    raise overloaded()


def fails_in_the_first_step(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterator[bytes]:
    start_response("200 OK", OK)
    yield b""
    raise overloaded()


def fails_before_the_first_step(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterator[bytes]:
    yield from fails_at_once(environ, start_response)


class FailsWhenIterated:
    def __iter__(self) -> Iterator[bytes]:
        raise overloaded()


def gives_what_fails_when_iterated(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    start_response("200 OK", OK)
    return FailsWhenIterated()


@pytest.mark.parametrize(
    "app",
    [
        fails_at_once,
        fails_after_it_began,
        fails_in_the_first_step,
        fails_before_the_first_step,
        gives_what_fails_when_iterated,
    ],
)
def test_wherever_it_failed_before_anything_was_sent_the_client_gets_the_answer(app: "WSGIApplication") -> None:
    client = Client(ErrorAnswers(app))

    body = client.get()

    check(AGAIN, client.status, client.headers, body)


def test_a_response_that_has_begun_to_be_sent_is_broken_off_by_the_error_itself() -> None:
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterator[bytes]:
        start_response("200 OK", OK)
        yield b"half"
        raise overloaded()

    client = Client(ErrorAnswers(app))

    with pytest.raises(ProcessorOverloaded):
        client.get()
    assert client.sent == [b"half"]


def test_so_is_one_that_was_sent_with_write() -> None:
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        start_response("200 OK", OK)(b"half")
        raise overloaded()

    client = Client(ErrorAnswers(app))

    with pytest.raises(ProcessorOverloaded):
        client.get()
    assert client.sent == [b"half"]


@pytest.mark.parametrize("raised", [None, overloaded(), LookupError()], ids=repr)
def test_what_the_application_gave_is_closed_on_every_path(raised: Exception | None) -> None:
    closed: list[bool] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            if raised is not None:
                raise raised
            yield b"all"

        def close(self) -> None:
            closed.append(True)

    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        start_response("200 OK", OK)
        return Body()

    client = Client(ErrorAnswers(app))
    if isinstance(raised, LookupError):
        with pytest.raises(LookupError):
            client.get()
    else:
        client.get()

    assert closed == [True]


@pytest.mark.parametrize("form", [list, tuple, FileWrapper])
def test_bodies_that_a_server_knows_reach_it_as_they_are(form: Callable[[Any], Any]) -> None:
    body = FileWrapper(io.BytesIO(b"file")) if form is FileWrapper else form([b"one"])

    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Any:
        start_response("200 OK", OK)
        return body

    begun: list[str] = []

    def start_response(status: str, *_: Any) -> Any:
        begun.append(status)

    assert ErrorAnswers(app)({"wsgi.file_wrapper": FileWrapper}, start_response) is body
    assert begun == ["200 OK"]


def test_what_goes_well_goes_through_untouched() -> None:
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterator[bytes]:
        start_response("200 OK", OK)
        yield b"one"
        yield b"two"

    client = Client(validator(ErrorAnswers(validator(app))))

    assert client.get() == b"onetwo"
    assert client.begun == [("200 OK", OK)]


def test_an_application_may_answer_for_its_own_errors() -> None:
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterator[bytes]:
        start_response("200 OK", OK)
        try:
            environ["mine"]
        except KeyError:
            start_response("404 Not Found", OK, sys.exc_info())
        yield b"nothing"

    client = Client(validator(ErrorAnswers(validator(app))))

    assert (client.get(), client.status) == (b"nothing", 404)


def test_an_application_that_would_answer_for_an_error_too_late_gets_it_back() -> None:
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterator[bytes]:
        start_response("200 OK", OK)
        yield b"half"
        try:
            environ["mine"]
        except KeyError:
            start_response("404 Not Found", OK, sys.exc_info())

    with pytest.raises(KeyError):
        Client(ErrorAnswers(app)).get()


def test_what_the_application_writes_reaches_the_client_before_what_it_gives() -> None:
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        write = start_response("200 OK", OK)
        write(b"one")
        write(b"two")
        return iter([b"three"])

    client = Client(ErrorAnswers(app))

    assert client.get() == b"onetwothree"


def test_an_application_that_sends_nothing_sends_its_headers() -> None:
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterator[bytes]:
        start_response("204 No Content", [])
        yield b""

    client = Client(ErrorAnswers(app))

    assert (client.get(), client.status) == (b"", 204)


def test_an_application_that_begins_twice_is_told_so() -> None:
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        start_response("200 OK", OK)
        start_response("200 OK", OK)
        return []

    with pytest.raises(AssertionError, match="called twice"):
        Client(ErrorAnswers(app)).get()


def test_other_errors_are_the_applications_own() -> None:
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        raise LookupError

    with pytest.raises(LookupError):
        Client(ErrorAnswers(app)).get()


# What is answered.


def raising(make: Make) -> "WSGIApplication":
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        raise make()

    return app


@each_error
def test_each_error_has_its_answer(make: Make, told: Told) -> None:
    client = Client(validator(ErrorAnswers(raising(make))))

    body = client.get()

    check(told, client.status, client.headers, body)


@each_accept
def test_a_client_is_answered_in_the_form_that_it_accepts(accept: str, form: str) -> None:
    client = Client(ErrorAnswers(raising(overloaded)))

    body = client.get(**{"HTTP_ACCEPT": accept} if accept else {})

    assert form_of(client.headers["Content-Type"], body) == form


def test_a_head_request_is_answered_without_a_body() -> None:
    client = Client(validator(ErrorAnswers(raising(overloaded))))

    assert client.get(REQUEST_METHOD="HEAD") == b""
    assert (client.status, client.headers["Content-Length"]) == (503, "93")


def test_the_seconds_to_wait_can_be_chosen() -> None:
    client = Client(ErrorAnswers(raising(overloaded), retry_after=30))
    client.get()

    assert client.headers["Retry-After"] == "30"


def test_an_answer_can_be_overridden() -> None:
    class Teapot(ErrorAnswers):
        def answer(self, error: BatchError) -> Answer:
            if isinstance(error, ProcessorStopped):
                return super().answer(error)
            return Answer(HTTPStatus.IM_A_TEAPOT, "Teapot", "short and stout", retry_safe=True)

    client = Client(Teapot(raising(overloaded)))
    body = client.get()

    check(Told(418, "Teapot", retry_safe=True, headers={}), client.status, client.headers, body)


def test_the_log_has_what_clients_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    Client(ErrorAnswers(raising(lambda: SaveFailed("why", retry_safe=False)))).get()

    assert [(one.name, one.levelname, one.message) for one in caplog.records] == [
        ("geventbatch.wsgi", "ERROR", "GET '/': SaveFailed: why")
    ]


# Real servers and frameworks. (gunicorn is in test_gunicorn.)


@pytest.mark.parametrize("make", [overloaded, lambda: ProcessorStopped("secret")], ids=["overloaded", "stopped"])
def test_the_server_of_the_standard_library_sends_it_though_it_refuses_a_header_that_others_want(make: Make) -> None:
    sent, log = io.BytesIO(), io.StringIO()
    environ = {"SERVER_SOFTWARE": "WSGIServer/0.2"}
    setup_testing_defaults(environ)
    SimpleHandler(io.BytesIO(), sent, log, environ).run(ErrorAnswers(raising(make)))

    assert sent.getvalue().startswith(b"HTTP/1.0 503 Service Unavailable\r\n")
    assert log.getvalue() == ""


def test_bottle_lets_errors_through_when_it_is_told_to() -> None:
    app = bottle.Bottle()
    app.catchall = False

    @app.get("/")  # type: ignore[untyped-decorator]
    def view() -> None:
        raise overloaded()

    client = Client(ErrorAnswers(app))
    body = client.get()

    check(AGAIN, client.status, client.headers, body)


def test_bottle_that_catches_everything_is_warned_of_once() -> None:
    app = ErrorAnswers(bottle.Bottle())
    with pytest.warns(RuntimeWarning, match=r"Set app\.catchall = False"):
        Client(app).get()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Client(app).get()


@pytest.mark.parametrize(("module", "own"), [("wsgi", set()), ("flask", {"flask"}), ("gunicorn", set())])
def test_each_integration_imports_no_vendor_but_its_own(module: str, own: set[str]) -> None:
    vendors = "flask flask_sqlalchemy sqlalchemy django redis celery gunicorn bottle psycopg"
    code = f"import sys, geventbatch.integrations.{module}; print(*(set(sys.modules) & set({vendors.split()})))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert set(ended.stdout.split()) == own
