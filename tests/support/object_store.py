"""An object store for tests."""

from contextlib import contextmanager

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(address="127.0.0.1"):
    """An S3 server on an address of this machine, for the credentials ``KEYS`` of the environment:
    the URL of an empty bucket, and that of the server."""
    server_module = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = server_module.ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in KEYS.items():
                patch.setenv(name, value)
            name = f"bucket-{port}"  # all servers of a process have the same buckets
            endpoint = f"http://{host}:{port}"
            s3fs.S3FileSystem(endpoint_url=endpoint).mkdir(name)
            yield f"s3://{name}", endpoint
    finally:
        server.stop()


@pytest.fixture(scope="module")
def bucket():
    """The URL of an empty bucket, with its options."""
    with s3_server() as (url, endpoint):
        yield url, {"endpoint_url": endpoint}
