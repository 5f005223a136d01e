"""A server on loopback that speaks as much of W&B's protocol as its client needs to log runs.

It keeps what it gets: ``server.runs[ID]`` has the lines of each file stream, such as
``history``, the upserts of the run, and the uploaded files. ``server.fault`` makes it fail.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbRun:
    """What the server knows of a run."""

    def __init__(self):
        self.streams: dict[str, list[str]] = {}
        self.upserts: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.exit_codes: list[int] = []

    @property
    def history(self):
        """The rows, in order."""
        return [json.loads(line) for line in self.streams.get("wandb-history.jsonl", [])]

    @property
    def summary(self):
        return json.loads((self.streams.get("wandb-summary.json") or ["{}"])[-1])

    @property
    def steps(self):
        """The column ``step`` of all rows."""
        return [row["step"] for row in self.history if "step" in row]


class WandbServer:
    """A context manager; ``environment`` makes W&B's client use it."""

    def __init__(self):
        self.runs: dict[str, WandbRun] = {}
        self.operations: list[str] = []
        self.fault = None
        """A function of the operation's name ("file_stream", "UpsertBucket", "upload", ...) that
        returns an HTTP status, "hang", "close", or None for the right answer."""
        self.ended = threading.Event()

    def __enter__(self):
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.of = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "a" * 40}
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, operation, variables):
        """The data of a GraphQL operation."""
        name = variables.get("name") or variables.get("run")
        if operation == "Viewer":
            return {"viewer": {"id": "V", "entity": "me", "username": "me", "email": "", "flags": "{}",
                               "teams": {"edges": []}, "capabilities": []}}  # fmt: skip
        if operation == "UpsertBucket":
            is_new = name not in self.runs
            self.runs.setdefault(name, WandbRun()).upserts.append(variables)
            return {"upsertBucket": {"bucket": self._bucket(name, variables), "inserted": is_new}}
        if operation == "RunResumeStatus":
            bucket = self._bucket(name, variables) if name in self.runs else None
            return {"model": {**self._project(variables), "bucket": bucket}}
        if operation == "CreateRunFiles":
            files = [
                {"name": f, "uploadUrl": f"{self.url}/storage/{name}/{f}"}
                for f in variables["files"]
            ]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        return {}

    def _project(self, variables):
        entity = {"id": "E", "name": variables.get("entity") or "me"}
        return {"id": "P", "name": variables.get("project"), "entity": entity}

    def _bucket(self, name, variables):
        run = self.runs[name]
        tails = {kind: run.streams.get(f"wandb-{kind}.jsonl", []) for kind in ("history", "events")}
        return {
            "id": f"id-{name}", "name": name, "displayName": "", "description": "", "config": "{}",
            "notes": None, "tags": [], "sweepName": None, "project": self._project(variables),
            "summaryMetrics": json.dumps(run.summary), "logLineCount": 0,
            "wandbConfig": json.dumps({"t": 1}),  # the run has started
            **{f"{kind}LineCount": len(lines) for kind, lines in tails.items()},
            **{f"{kind}Tail": json.dumps(lines[-1:]) for kind, lines in tails.items()},
        }  # fmt: skip

    def take_stream(self, name, message):
        """Stores a part of the file streams: lines from an offset on."""
        run = self.runs.setdefault(name, WandbRun())
        for file, part in (message.get("files") or {}).items():
            lines = run.streams.setdefault(file, [])
            del lines[part["offset"] :]
            lines += part["content"]
        if "exitcode" in message:
            run.exit_codes.append(message["exitcode"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that was killed is none of the test's errors."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """No output."""

    def _body(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _fails(self, operation):
        """Whether the server fails as ``fault`` says."""
        server = self.server.of
        server.operations.append(operation)
        fault = server.fault and server.fault(operation)
        if fault == "hang":
            server.ended.wait(60)
        if fault in ("hang", "close"):
            self.close_connection = True
        elif fault:
            self._send(fault, {"error": "as the test wants it"})
        return fault is not None and bool(fault)

    def _send(self, status, value):
        data = json.dumps(value).encode()
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def do_POST(self):
        server, body = self.server.of, json.loads(self._body() or b"{}")
        if self.path.endswith("/file_stream"):
            if not self._fails("file_stream"):
                server.take_stream(self.path.split("/")[-2], body)
                self._send(200, {})
            return
        named = re.search(r"\b(?:query|mutation)\s+(\w+)", body["query"])
        operation = named[1] if named else ("Viewer" if "viewer" in body["query"] else "")
        if not self._fails(operation):
            self._send(200, {"data": server.answer(operation, body.get("variables") or {})})

    def do_PUT(self):
        data = self._body()
        if not self._fails("upload"):
            _, _, name, file = self.path.split("/", 3)
            self.server.of.runs.setdefault(name, WandbRun()).files[file] = data
            self._send(200, {})

    def do_GET(self):
        self._send(404, {})
