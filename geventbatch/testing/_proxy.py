"""A TCP proxy between a store and its server: it counts round trips, and breaks what a test tells it to break.

A message is recognised by a marker: bytes that are in it and in no other one (``b"COMMIT"``). The proxy runs on
greenlets of its process, so the client must wait in gevent's way.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import gevent
from gevent import socket
from gevent.event import Event
from gevent.server import StreamServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

Endpoint = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""

Act = Literal["cut before", "cut during", "cut after", "drop answer", "hold", "hold answer"]

_TAIL: Final = 64
"""Bytes of what was read before that are looked at again, since a marker may come in two pieces."""


@dataclass(eq=False)
class Rule:
    """What is done about the messages with this marker, and how often that still is."""

    act: Act
    marker: bytes
    answer: bytes = b""
    times: float = float("inf")
    met: int = 0
    """How often it was done."""
    waiting: int = 0
    """Messages, or answers, that are held back right now."""
    released: Event = field(default_factory=Event)

    def reached(self) -> bool:
        """Return whether a message, or an answer, is held back right now."""
        return self.waiting > 0


class Proxy:
    """Accepts on a free port of 127.0.0.1 and leads every connection to *server*."""

    def __init__(self, server: Endpoint) -> None:
        self._server = server
        # -- mutable state ---------------------------------------------------------------------------------
        self.round_trips = 0
        """Changes of direction: how often a client has sent after it had been answered, or for the first time."""
        self.accepted = 0
        """Connections so far."""
        self.refusing = False
        """New connections are ended at once."""
        self.delay = 0.0
        """Seconds that a piece takes each way."""
        self.done: Counter[tuple[Act, bytes]] = Counter()
        """How often it did what to messages with which marker."""
        self._rules: list[Rule] = []
        self._links: set[_Link] = set()
        self._listener = StreamServer(("127.0.0.1", 0), self._accept)

    def __enter__(self) -> Self:
        self._listener.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.stop()
        self.cut_all()
        gevent.joinall([greenlet for link in self._links for greenlet in link.greenlets])

    @property
    def host(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        return int(self._listener.address[1])

    # -- what it breaks -------------------------------------------------------------------------------------

    def cut_before(self, marker: bytes, times: int = 1) -> Rule:
        """End the connection in place of forwarding the message: it is certainly not carried out."""
        return self._rule(Rule("cut before", marker, times=times))

    def cut_during(self, marker: bytes, times: int = 1) -> Rule:
        """Forward the message and end the connection at once: it is carried out, or not, while nobody waits for it."""
        return self._rule(Rule("cut during", marker, times=times))

    def cut_after(self, marker: bytes, answer: bytes = b"", times: int = 1) -> Rule:
        """Forward the message, wait for the answer (with *answer* in it), and end the connection without giving it."""
        return self._rule(Rule("cut after", marker, answer, times=times))

    def drop_answer(self, marker: bytes, times: int = 1) -> Rule:
        """Forward the message, so that it is carried out, and give no answer on this connection any more."""
        return self._rule(Rule("drop answer", marker, times=times))

    @contextmanager
    def hold(self, marker: bytes) -> Iterator[Rule]:
        """Keep such messages back until the block is left; then they arrive, even when their client has gone."""
        rule = self._rule(Rule("hold", marker))
        try:
            yield rule
        finally:
            self._rules.remove(rule)
            rule.released.set()

    @contextmanager
    def hold_answer(self, marker: bytes) -> Iterator[Rule]:
        """Forward such messages, so that they are carried out, and keep all answers after them back until then."""
        rule = self._rule(Rule("hold answer", marker))
        try:
            yield rule
        finally:
            self._rules.remove(rule)
            rule.released.set()

    def forget_rules(self) -> None:
        """Break nothing any more."""
        for rule in self._rules:
            rule.released.set()
        self._rules.clear()

    def cut_all(self) -> None:
        """End all connections, those that are held too."""
        for rule in self._rules:
            rule.released.set()
        for link in list(self._links):
            link.cut()

    def open_connections(self) -> int:
        """Return the number of connections that neither side has ended."""
        return len(self._links)

    # -- inside ---------------------------------------------------------------------------------------------

    def _rule(self, rule: Rule) -> Rule:
        # What is over is forgotten; but for a rule that its own block will remove.
        self._rules = [one for one in self._rules if one.met < one.times or one.act.startswith("hold")]
        self._rules.append(rule)
        return rule

    def rule_for(self, seen: bytes) -> Rule | None:
        """Return what is done about a message with *seen* in it, and count that."""
        for rule in self._rules:
            if rule.met < rule.times and rule.marker in seen:
                rule.met += 1
                self.done[rule.act, rule.marker] += 1
                return rule
        return None

    def _accept(self, client: socket.socket, _: object) -> None:
        self.accepted += 1
        try:
            server = None if self.refusing else _connected(self._server)
        except OSError:  # it is down, and that is what the client sees
            server = None
        if server is None:
            client.close()
            return
        link = _Link(self, client, server)
        self._links.add(link)
        try:
            link.run()
        finally:
            self._links.discard(link)


class _Link:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self.greenlets: list[gevent.Greenlet[..., None]] = []
        # -- mutable state ---------------------------------------------------------------------------------
        self._asking = False
        """The last piece came from the client."""
        self._rule: Rule | None = None
        """What is done about the next answer."""

    def run(self) -> None:
        self.greenlets = [gevent.spawn(self._up), gevent.spawn(self._down)]
        gevent.joinall(self.greenlets)
        self._client.close()
        self._server.close()

    def cut(self) -> None:
        for side in (self._client, self._server):
            try:
                side.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has been ended by its other end
                continue

    def _up(self) -> None:
        tail = b""
        try:
            while piece := self._client.recv(65536):
                if not self._asking:
                    self._asking = True
                    self._proxy.round_trips += 1
                    tail = b""
                gevent.sleep(self._proxy.delay)
                rule = self._proxy.rule_for(tail + piece)
                tail = b"" if rule else (tail + piece)[-_TAIL:]
                if rule is not None and not self._sends_by(rule):
                    break
                self._server.sendall(piece)
                if rule is not None and rule.act == "cut during":
                    break
        except OSError:
            pass
        self.cut()

    def _sends_by(self, rule: Rule) -> bool:
        """Do what *rule* says before a piece is sent to the server; False when it is not to be sent."""
        if rule.act == "cut before":
            return False
        if rule.act == "hold":
            _wait_for_release(rule)
        elif rule.act != "cut during":
            self._rule = rule
        return True

    def _down(self) -> None:
        answer = b""
        try:
            while piece := self._server.recv(65536):
                self._asking = False
                gevent.sleep(self._proxy.delay)
                rule = self._rule
                answer = b"" if rule is None else answer + piece
                if rule is not None and rule.act == "drop answer":
                    continue
                if rule is not None and rule.act == "cut after":
                    if rule.answer in answer:
                        break
                    continue
                if rule is not None:
                    _wait_for_release(rule)
                    self._rule = None
                self._client.sendall(piece)
        except OSError:
            pass
        self.cut()


def _wait_for_release(rule: Rule) -> None:
    rule.waiting += 1
    try:
        rule.released.wait()
    finally:
        rule.waiting -= 1


def _connected(server: Endpoint) -> socket.socket:
    if isinstance(server, str):
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            unix.connect(server)
        except OSError:
            unix.close()
            raise
        return unix
    return socket.create_connection(server)
