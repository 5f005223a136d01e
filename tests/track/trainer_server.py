"""The status interface of Kubeflow Trainer on the loopback: HTTPS, a token, a body that is checked
as the API server checks it."""

import json
import re
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "header.payload.signature"
PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/ml/trainjobs/text/status"


def certificate(folder, name="localhost"):
    """Makes a certificate that signs itself, and its key, with openssl; returns both paths."""
    made, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
         "-out", str(made), "-keyout", str(key)],
        check=True, capture_output=True,
    )  # fmt: skip
    return made, key


def wrong(body):
    """What the API server finds wrong with a request; None for nothing."""
    status = body.get("trainerStatus")
    if body.keys() != {"trainerStatus"} or not isinstance(status, dict):
        return "no trainerStatus"
    known = {"progressPercentage", "estimatedRemainingSeconds", "metrics", "lastUpdatedTime"}
    if unknown := status.keys() - known:
        return f"unknown: {unknown}"
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", status["lastUpdatedTime"]):
        return "lastUpdatedTime"
    for name, most in (("progressPercentage", 100), ("estimatedRemainingSeconds", 2**31 - 1)):
        if name in status and not (type(status[name]) is int and 0 <= status[name] <= most):
            return name
    metrics = status.get("metrics", [])
    if len(metrics) > 256:
        return "too many metrics"
    for metric in metrics:
        if metric.keys() != {"name", "value"} or not all(0 < len(v) <= 64 for v in metric.values()):
            return f"metric {metric}"
    return None


class TrainerServer:
    """``received`` are the statuses that it accepted; ``requests`` the headers of all requests.
    ``answer``: None, or a status code, body and headers to refuse with, or "hang"."""

    def __init__(self, folder):
        self.received, self.requests, self.answer = [], [], None
        self.ca, key = certificate(folder)
        self._stopped = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(dict(self.headers))
                self.send_error(404)

            def do_POST(self):
                server.requests.append(dict(self.headers))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if server.answer == "hang":
                    server._stopped.wait(60)
                code, said, headers = server.answer or server.judge(self, body)
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ca, key)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._http.handle_error = lambda *_: None  # of clients that refuse the certificate
        self.url = f"https://localhost:{self._http.server_port}{PATH}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def judge(self, request, body):
        if request.path != PATH:
            return 404, {"message": "Not found"}, {}
        if request.headers["Authorization"] != f"Bearer {TOKEN}":
            return 403, {"message": "Forbidden"}, {}
        if problem := wrong(body):
            return 422, {"message": problem}, {}
        self.received.append(body["trainerStatus"])
        return 200, body, {}

    def stop(self):
        self._stopped.set()
        self._http.shutdown()
        self._http.server_close()
