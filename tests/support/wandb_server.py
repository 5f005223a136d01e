"""A server on loopback that speaks as much of W&B's protocol as its client needs to log runs.

It keeps what it gets: ``server.runs[ID]`` has the lines of each file stream, such as
``history``, the upserts of the run, and the uploaded files. ``server.artifacts`` has the artifacts.
``server.fault`` makes it fail.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from urllib.parse import unquote

from tests.support.wandb_artifacts import WandbArtifacts
from tests.support.wandb_sweeps import WandbSweeps

_ARTIFACTS = "/artifact-storage/"


class WandbRun:
    """What the server knows of a run."""

    def __init__(self):
        self.streams: dict[str, list[str]] = {}
        self.upserts: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.exit_codes: list[int] = []
        self.system_metrics: list[dict] = []

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
        """A function of the operation's name ("file_stream", "UpsertBucket", "upload",
        "artifact_upload", "artifact_download", "CreateArtifact", ...) that returns an HTTP status,
        "hang", "close", or None for the right answer. "cut" closes the connection in the middle of
        the upload or download of an artifact's file."""
        self.artifacts = WandbArtifacts()
        self.sweeps = WandbSweeps()
        self.ended = threading.Event()

    def __enter__(self):
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.of = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.artifacts.url = self.url
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "a" * 40}
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, operation, query, variables):
        """The data of a GraphQL operation."""
        if (found := self.artifacts.answer(operation, query, variables)) is not None:
            return found
        project = {"id": "P", "name": variables.get("projectName"),
                   "entity": {"id": "E", "name": variables.get("entityName") or "me"}}  # fmt: skip
        if (found := self.sweeps.answer(operation, variables, project)) is not None:
            return found
        name = variables.get("name") or variables.get("run")
        if operation in ("Viewer", "GetDefaultEntity"):
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
            if "events" in file:  # in shared mode each process has its own offsets
                run.system_metrics += map(json.loads, part["content"])
        if "exitcode" in message:
            run.exit_codes.append(message["exitcode"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self):
        """Without a look-up of the host's name, which takes long without a name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address

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
        if fault == "cut":
            half = int(self.headers.get("Content-Length") or 0) // 2
            if self.command == "PUT":
                self.rfile.read(half)
            else:
                self._send_bytes(200, bytes(1000), until=500)
        if fault in ("hang", "close", "cut"):
            self.close_connection = True
        elif fault:
            self._send(fault, {"error": "as the test wants it"})
        return fault is not None and bool(fault)

    def _send(self, status, value):
        self._send_bytes(status, json.dumps(value).encode(), "application/json")

    def _send_bytes(self, status, data, kind="application/octet-stream", *, until=None):
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:until])

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
            try:
                data = server.answer(operation, body["query"], body.get("variables") or {})
            except ValueError as error:  # as W&B refuses what it does not have
                self._send(200, {"data": None, "errors": [{"message": str(error)}]})
            else:
                self._send(200, {"data": data})

    def do_PUT(self):
        if self.path.startswith(_ARTIFACTS):
            self._put_artifact(unquote(self.path.removeprefix(_ARTIFACTS)))
            return
        data = self._body()
        if not self._fails("upload"):
            _, _, name, file = self.path.split("/", 3)
            self.server.of.runs.setdefault(name, WandbRun()).files[file] = data
            self._send(200, {})

    def _put_artifact(self, path):
        if self._fails("artifact_upload"):
            return
        data = self._body()
        self.server.of.artifacts.put(path, data)
        self._send(200, {})

    def do_GET(self):
        artifacts = self.server.of.artifacts
        if not self.path.startswith(_ARTIFACTS):
            self._send(404, {})
        elif not self._fails("artifact_download"):
            data = artifacts.get(unquote(self.path.removeprefix(_ARTIFACTS)))
            if data is None:
                self._send(404, {})
            else:
                self._send_bytes(200, data)
