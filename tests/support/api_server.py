"""The small Kubernetes of tests/support/cluster.py as an HTTP server.

It answers the few requests that our clients and kubectl make. Clients poll; there are no watches
and no access control.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.support.cluster import PATH, Refused


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: the second would wait 40 ms for an acknowledgement
    cluster = None

    def log_message(self, *_):
        pass

    def _respond(self):
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if address.path.endswith("/log"):
                match = PATH.fullmatch(address.path)
                return self._stream(self.cluster.log(match["ns"], match["name"], query))
            values = yaml.safe_load(body) if body else {}
            return self._send(200, self.cluster.answer(self.command, address.path, query, values))
        except Refused as refused:
            return self._send(refused.status["code"], refused.status)

    def _send(self, code, values):
        with self.cluster.lock:
            text = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _stream(self, lines):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for line in lines:
                data = line.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _respond  # noqa: N815


class Server:
    """A cluster on a port of the loopback interface, and a kubeconfig for it."""

    def __init__(self, cluster, folder, namespace="ml"):
        self.cluster = cluster
        handler = type("Handler", (_Handler,), {"cluster": cluster})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.kubeconfig = folder / "kubeconfig"
        context = {"cluster": "fake", "user": "fake", "namespace": namespace}
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "fake",
                    "clusters": [
                        {
                            "name": "fake",
                            "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"},
                        }
                    ],
                    "users": [{"name": "fake", "user": {"token": "none"}}],
                    "contexts": [{"name": "fake", "context": context}],
                }
            )
        )

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
