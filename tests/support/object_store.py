"""An object store for tests."""

import pytest


@pytest.fixture(scope="module")
def bucket():
    """An S3 server on the loopback interface, and the URL of an empty bucket with its options."""
    server_module = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        options = {"endpoint_url": f"http://{host}:{port}"}
        import s3fs

        name = f"bucket-{port}"  # all servers of a process have the same buckets
        s3fs.S3FileSystem(**options).mkdir(name)
        yield f"s3://{name}", options
    server.stop()
