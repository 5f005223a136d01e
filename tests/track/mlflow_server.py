"""MLflow's own server on the loopback, with faults on demand."""

import threading

from werkzeug.serving import WSGIRequestHandler, make_server


class Quiet(WSGIRequestHandler):
    def log(self, *_, **__):
        pass


class MlflowServer:
    """``fault(path, count)`` gets the path of a request and how many there were with it before;
    returns "500" to refuse it, "lost" to carry it out and answer 500, "hang", or None."""

    def __init__(self, app):
        self.app, self.fault, self.counts = app, None, {}
        self.stopped = threading.Event()
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        count = self.counts[path] = self.counts.get(path, -1) + 1
        fault = self.fault and self.fault(path.rpartition("/mlflow/")[2], count)
        if fault == "hang":
            self.stopped.wait(60)
        if fault == "lost":
            list(self.app(environ, lambda *_: None))
        if fault:
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"broken"]
        return self.app(environ, start_response)

    def stop(self):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()
