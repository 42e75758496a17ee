"""Trains over HTTP: the seat map as a page and as JSON, booking and cancelling; and what the batches do.

An answer with a status of 200 or 201 means that the change is saved. Every error says in its body what happened and
whether it is safe to ask again.
"""

import os
import re
from collections.abc import Container
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from typing import Any
from wsgiref.types import WSGIEnvironment

from flask import Blueprint, Flask, Response, current_app, jsonify, render_template, request
from werkzeug.exceptions import BadRequest, HTTPException

from examples.tickets.domain import (
    BadName,
    NotTheHolder,
    Refused,
    SeatTaken,
    Ticket,
    Train,
    UnknownSeat,
    UnknownTrain,
    taken,
)
from examples.tickets.settings import TRAINS, Settings
from examples.tickets.storage import CONNECTIONS, AnyStore, open_store
from geventbatch import Processor, ResourceMissing
from geventbatch.integrations.flask import GeventBatch
from geventbatch.integrations.page import Page

STATUS_OF: dict[type[Refused], HTTPStatus] = {
    UnknownTrain: HTTPStatus.NOT_FOUND,
    UnknownSeat: HTTPStatus.NOT_FOUND,
    SeatTaken: HTTPStatus.CONFLICT,
    NotTheHolder: HTTPStatus.FORBIDDEN,
    BadName: HTTPStatus.BAD_REQUEST,
}

pages = Blueprint("tickets", __name__)


@dataclass
class Tickets:
    """What the views share: the store, and the processor in front of it."""

    store: AnyStore
    processor: Processor[Train]
    page: Page
    """What the processor does, for who may see it."""


def create_app(settings: Settings) -> Flask:
    """The application; the trains that are missing from its database are added."""
    app = Flask(__name__)
    app.config.update(
        MAX_CONTENT_LENGTH=16 * 1024,
        GEVENTBATCH_BATCHING=settings.batching,
        GEVENTBATCH_MAX_DURATION=settings.max_duration,
        GEVENTBATCH_MAX_PENDING=settings.max_pending,
    )
    store = open_store(settings.database_url)
    store.create(TRAINS)
    # With gunicorn's --preload, the workers are forked after this, and a connection must never be in two processes.
    store.close()
    trains = GeventBatch(app).processor(
        open_resource=store.open_train,
        name="trains",
        # No window: a booking that comes alone waits for nobody, and those that come during a save share the next.
        min_duration=0,
        # Each checks first and changes then. Whatever else an operation raises is undone.
        clean_errors=(Refused,),
        # Two workers that save the same train at the same time meet often; whoever lost loads again and replays.
        max_attempts=30,
        max_batches=CONNECTIONS,
    )
    processor = trains.for_app(app)
    page = Page(allow=partial(is_near, settings.admin_addresses), processors=[processor])
    app.extensions["tickets"] = Tickets(store, processor, page)
    app.register_blueprint(pages)
    app.register_error_handler(Refused, refused)
    app.register_error_handler(ResourceMissing, not_found)
    app.register_error_handler(HTTPException, not_understood)
    if settings.backend:
        app.after_request(partial(signed, settings.backend))
    return app


@pages.get("/")
def index() -> str:
    """All trains."""
    return render_template("index.html", names=_tickets().store.names())


@pages.get("/trains/<name>")
def train_page(name: str) -> str:
    """One train, live."""
    return render_template("train.html", seat_map=_tickets().store.seat_map(name))


@pages.get("/trains/<name>/seats")
def seat_map(name: str) -> Response:
    """Who sits where, and what it took to get there, in all workers together."""
    found = _tickets().store.seat_map(name)
    train = found.train
    return jsonify(
        train=train.name,
        seats=len(train.seats),
        taken=taken(train.seats),
        changes=train.changes,
        saves=found.saves,
    )


@pages.post("/trains/<name>/seats/<int:seat>")
def book(name: str, seat: int) -> tuple[Response, HTTPStatus]:
    """Book one seat; once, however often a client sends the same Idempotency-Key."""
    key = _idempotency_key()
    ticket = _tickets().processor.run(name, Train.book, seat, _passenger(), idempotency_key=key)
    return _shown(ticket), HTTPStatus.CREATED


@pages.delete("/trains/<name>/seats/<int:seat>")
def cancel(name: str, seat: int) -> Response:
    """Give a seat back; once, as above."""
    key = _idempotency_key()
    return _shown(_tickets().processor.run(name, Train.cancel, seat, _passenger(), idempotency_key=key))


@pages.get("/healthz")
def health() -> Response:
    """Whether this worker reaches its database, how busy it is, and what it has done."""
    tickets = _tickets()
    stats = tickets.processor.stats()
    return jsonify(
        trains=len(tickets.store.names()),
        processor=repr(tickets.processor),
        batches=stats.batches_total,
        replays=stats.conflicts_total,
        worker=os.getpid(),
    )


@pages.get("/admin/batches")
def batches() -> Page:
    """What this worker's batches do, live."""
    return _tickets().page


def is_near(addresses: Container[str], environ: WSGIEnvironment) -> bool:
    """Whether a client that no proxy stands in front of is at one of the *addresses*."""
    return environ.get("REMOTE_ADDR") in addresses and "HTTP_X_FORWARDED_FOR" not in environ


def signed(backend: str, response: Response) -> Response:
    """Say who has answered, where there are several."""
    response.headers["X-Backend"] = backend
    return response


def refused(error: Refused) -> tuple[Response, HTTPStatus]:
    """A train said no, or there is none."""
    return _problem(type(error).__name__, str(error)), STATUS_OF[type(error)]


def not_found(error: ResourceMissing) -> tuple[Response, HTTPStatus]:
    """A batch found no train; to what else may happen to a batch, `GeventBatch` has the answers."""
    return refused(UnknownTrain(f"there is no train {error.key}"))


def not_understood(error: HTTPException) -> tuple[Response, int]:
    """What Flask refuses, as JSON like everything else."""
    return _problem(error.name, error.description or error.name), error.code or HTTPStatus.INTERNAL_SERVER_ERROR


def _tickets() -> Tickets:
    tickets = current_app.extensions["tickets"]
    assert isinstance(tickets, Tickets)
    return tickets


def _passenger() -> str:
    """From JSON; a page of another site cannot send that here without being asked."""
    sent = request.get_json()
    passenger = sent.get("passenger") if isinstance(sent, dict) else None
    if not isinstance(passenger, str):
        raise BadRequest('send {"passenger": "a name"}')
    return passenger


def _idempotency_key() -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch("[!-~]{1,255}", key):
        raise BadRequest("the Idempotency-Key has to be 1 to 255 visible ASCII characters")
    return key


def _shown(ticket: Ticket) -> Response:
    return jsonify(asdict(ticket))


def _problem(error: str, detail: str) -> Response:
    body: dict[str, Any] = {"error": error, "detail": detail}
    return jsonify(body)
