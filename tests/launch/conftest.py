"""Gives each test its own home directory, without the user's launch log and resources."""

import pytest


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "ISORUN_RESOURCES", "ISORUN_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
