"""Serves a report on 127.0.0.1 while its runs train."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socket import socket
from typing import Any
from urllib.parse import parse_qs, urlsplit

from train.exits import RunError, UsageError
from train.report.data import RunData, read_run
from train.report.page import make_parts, render

HOST = "127.0.0.1"
CONNECTIONS = 8
"""The most requests that are answered at a time; others are closed."""
READ_EVERY = 2.0
"""Seconds between two readings of the runs."""
GRACE = 60.0
"""Seconds that a run may be without a process: the node agent may restart it."""
TIMEOUT = 10.0
"""Seconds that a client may take to send a request."""


class Report:
    """The report of runs, read again when it is asked for."""

    def __init__(self, paths: Sequence[str], runs: Sequence[RunData]) -> None:
        self._paths = list(paths)
        self._lock = threading.Lock()
        self._runs = list(runs)
        self._read_at = self._trained_at = time.monotonic()
        self._content = ""
        self.version = 0
        self.over = False

    def refresh(self) -> None:
        """Reads the runs, unless they were read just now."""
        with self._lock:
            if self.over or time.monotonic() - self._read_at < READ_EVERY:
                return
            try:
                self._runs = [read_run(path) for path in self._paths]
            except (RunError, OSError):
                return  # such as a file that is being replaced; what was read before stays
            finally:
                self._read_at = time.monotonic()
            now = time.monotonic()
            if any(run.state.kind == "running" for run in self._runs):
                self._trained_at = now
                return
            may_restart = any(run.state.kind in ("dead", "failed", "hung") for run in self._runs)
            self.over = now - self._trained_at > GRACE or not may_restart

    def page(self, *, live: bool) -> str:
        """The whole page."""
        with self._lock:
            return render(self._runs, live=live)

    def news(self, since: str) -> dict[str, Any]:
        """What has changed since a version, as JSON values."""
        with self._lock:
            parts = make_parts(self._runs)
            content = json.dumps([parts.html, parts.drawn], allow_nan=False)
            if content != self._content:
                self._content, self.version = content, self.version + 1
            answer: dict[str, Any] = {"version": self.version, "over": self.over}
            if since != str(self.version):
                answer |= {"html": parts.html, "drawn": parts.drawn}
            return answer


class Server(socketserver.ThreadingMixIn, HTTPServer):
    """An HTTP server on 127.0.0.1 with a bounded number of connections."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, report: Report) -> None:
        self.report = report
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((HOST, port), Handler)

    def server_bind(self) -> None:
        """Binds without a search for the name of this host, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread; closes a connection beyond the limit."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """Says nothing about a client that has gone."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET of the page and of its data, and nothing else."""

    server: Server
    timeout = TIMEOUT

    def do_GET(self) -> None:
        """The page, or what has changed in it."""
        # A name that somebody else has made to lead here (DNS rebinding) is refused.
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "The Host header is not this server.")
            return
        address = urlsplit(self.path)
        report = self.server.report
        if address.path == "/":
            report.refresh()
            self._answer(HTTPStatus.OK, "text/html", report.page(live=True))
        elif address.path == "/data.json":
            report.refresh()
            since = parse_qs(address.query).get("since", [""])[0]
            content = json.dumps(report.news(since), allow_nan=False)
            self._answer(HTTPStatus.OK, "application/json", content)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There is nothing here.")

    def _answer(self, status: HTTPStatus, kind: str, content: str) -> None:
        body = content.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""


def open_server(paths: Sequence[str], port: int) -> Server:
    """A server of the report of these runs; port 0 takes a free one. Raises UsageError if none of
    them is in progress, or the port cannot be used."""
    runs = [read_run(path) for path in paths]
    if not any(run.state.kind == "running" for run in runs):
        named = ", ".join(str(Path(path)) for path in paths)
        raise UsageError(f"No run is in progress in {named}; leave out --watch.")
    try:
        return Server(port, Report(paths, runs))
    except OSError as error:
        raise UsageError(
            f"--port is {port}, which cannot be used ({error.strerror}); choose another."
        ) from None


def serve(server: Server) -> None:
    """Answers requests until the runs have ended, and then for as long as a page needs to ask once
    more."""
    thread = threading.Thread(target=server.serve_forever, name="report", daemon=True)
    thread.start()
    try:
        while not server.report.over:
            time.sleep(READ_EVERY)
            server.report.refresh()
        time.sleep(2 * READ_EVERY)
    finally:
        server.shutdown()
        server.server_close()
