"""An HTTP proxy on loopback before the S3 server of the tests: spoils a share of the requests, and logs all.

What it does to request number n follows from the seed and n alone. It can also go away for good.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

FAULTS = ("busy", "error", "close", "reset", "delay", "truncate", "shorten", "lost")
"""busy: 503 SlowDown. error: 500. close, reset: the connection ends before an answer, nothing was done.
delay: the answer takes longer. truncate: the connection ends in the middle of the body. shorten: half of a
range, in good form. lost: what was asked is done, and the connection ends before the answer.

By `choose` alone: full (507), region (400), conflict (409), late error (it is done, and a 200 holds an
error), keys (a deletion of many is answered with an error for each and not done). By `expired` alone: expired
(400 ExpiredToken).
"""
_REFUSALS: dict[str | None, tuple[int, str, str]] = {
    "busy": (503, "SlowDown", "Please reduce your request rate."),
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "full": (507, "InsufficientStorage", "The store is full."),
    "region": (400, "AuthorizationHeaderMalformed", "The region 'us-east-1' is wrong."),
    "conflict": (409, "ConditionalRequestConflict", "A conflicting operation is in progress."),
}
"""Faults that are an answer of the store's: status, code, message."""
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}


@dataclass
class Seen:
    """A request, and what became of it."""

    method: str
    path: str
    query: str
    range: str | None
    key: str
    """Id of the access key that has signed it; "" where nothing has."""
    fault: str | None
    status: int | None = None
    """Of the server's answer; None where it was not asked."""
    sent: int = 0
    """Bytes of the body that went back."""


@dataclass
class FaultyProxy:
    """Stands before `upstream` (http://host:port) until `close`; spoils a share of requests by `faults`."""

    upstream: str
    share: float = 0.0
    seed: int = 0
    faults: Sequence[str] = FAULTS
    delay_s: float = 0.2
    choose: Callable[[str, str, str], str | None] | None = None
    """(method, path, query) -> a fault or None: instead of chance."""
    expired: set[str] = field(default_factory=set)
    """Ids of access keys that are refused."""
    tls: ssl.SSLContext | None = None
    """Speak HTTPS by it; None: HTTP."""
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0
        self._open: set[socket.socket] = set()
        self._silent = threading.Event()
        self._over = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        scheme = "http" if self.tls is None else "https"
        self.endpoint = f"{scheme}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def go_away(self, silent: bool = False) -> None:
        """From here on refuse connections, and end those that are open; or take them and be silent."""
        if silent:
            self._silent.set()
            return
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._over.set()
        self.go_away()

    def spoilt(self) -> Counter[str]:
        """How many requests met each fault so far."""
        with self._lock:
            return Counter(each.fault for each in self.seen if each.fault is not None)

    def requests(self, method: str, under: str = "/") -> list[Seen]:
        """The requests of one method for paths that begin with `under`, so far."""
        with self._lock:
            return [each for each in self.seen if each.method == method and each.path.startswith(under)]

    def meet(self, method: str, path: str, query: str, wanted: str | None, key: str) -> Seen:
        with self._lock:
            number, self._count = self._count, self._count + 1
            fault = None
            if key in self.expired:
                fault = "expired"
            elif self.choose is not None:
                fault = self.choose(method, path, query)
            else:
                chance = random.Random(f"{self.seed}|{number}")
                if chance.random() < self.share:
                    fault = chance.choice(self.faults)
            seen = Seen(method, path, query, wanted, key, fault)
            self.seen.append(seen)
            return seen

    def hold(self, connection: socket.socket, held: bool) -> None:
        with self._lock:
            (self._open.add if held else self._open.discard)(connection)

    def wait_if_silent(self) -> bool:
        """Whether the proxy is silent: then only once it is closed."""
        if self._silent.is_set():
            self._over.wait()
            return True
        return False


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        """Without the FIN of the base, so that a socket that lingers for 0 s ends by RST."""
        self.close_request(request)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyProxy

    def setup(self) -> None:
        super().setup()
        # An answer goes out in two pieces; without this the second waits for the first's receipt.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.owner.hold(self.connection, True)

    def finish(self) -> None:
        self.owner.hold(self.connection, False)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self._body()
        if self.owner.wait_if_silent():
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parts.query
        key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        seen = self.owner.meet(self.command, path, query, self.headers.get("Range"), key)
        fault = seen.fault
        if fault in ("close", "reset"):
            self._hang_up(fault == "reset")
            return
        if fault in _REFUSALS:
            self._fail(*_REFUSALS[fault])
            return
        if fault == "keys":
            self._reply(
                200, b"<DeleteResult><Error><Key>any</Key><Code>SlowDown</Code></Error></DeleteResult>"
            )
            return
        if fault == "delay":
            time.sleep(self.owner.delay_s)
        status, headers, answer = self._ask(body)
        seen.status = status
        if fault == "lost":
            self._hang_up(reset=False)
            return
        if fault == "late error":
            # S3 answers 200 to a long request before it knows how it ends.
            answer = _error("InternalError", "We encountered an internal error. Please try again.")
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(answer))))
        if fault == "shorten" and status == 206:
            answer = answer[: len(answer) // 2]
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(answer))))
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if fault == "truncate" and answer and self.command == "GET":
            answer = answer[: len(answer) // 2]
        if self.command != "HEAD":
            self.wfile.write(answer)
            seen.sent = len(answer)
        if fault == "truncate":
            self._hang_up(reset=False)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # As uploads over HTTPS come, whose checksum follows them.
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        host = urlsplit(self.owner.upstream)
        connection = http.client.HTTPConnection(host.hostname or "", host.port)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            connection.request(self.command, self.path, body or None, headers)
            found = connection.getresponse()
            answer = found.read()
            kept = [
                (name, value)
                for name, value in found.getheaders()
                if name.lower() not in (*_HOP, "server", "date")
            ]
            if not any(name.lower() == "content-length" for name, _ in kept) and found.status != 204:
                kept.append(("Content-Length", str(len(answer))))
            return found.status, kept, answer
        finally:
            connection.close()

    def _fail(self, status: int, code: str, message: str) -> None:
        self._reply(status, _error(code, message))

    def _reply(self, status: int, answer: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.connection.shutdown(socket.SHUT_RDWR)


def _error(code: str, message: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    ).encode()


@contextlib.contextmanager
def faulty_proxy(upstream: str, **options: Any) -> Iterator[FaultyProxy]:
    """A proxy that ends with the block; options as of `FaultyProxy`."""
    proxy = FaultyProxy(upstream, **options)
    try:
        yield proxy
    finally:
        proxy.close()
