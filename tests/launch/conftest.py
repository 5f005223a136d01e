"""Gives each test its own home directory, without the user's launch log and resources."""

import os
from contextlib import suppress

import pytest


@pytest.fixture
def unread():
    """A pipe whose reader has closed it, as in ``2>&1 | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    yield stream
    with suppress(OSError):
        stream.close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "ISORUN_RESOURCES", "ISORUN_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
