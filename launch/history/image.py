"""The digest of a container image, for the launch log."""

from __future__ import annotations

import re
from importlib import import_module


def image_digest(image: str) -> str | None:
    """The digest that an image's tag refers to now, if it is known without a pull."""
    if match := re.search(r"sha256:[0-9a-f]{64}", image):
        return match[0]
    try:
        # import_module: type checkers take `docker` for the directory of this project.
        client = import_module("docker").from_env(timeout=5)
        try:
            found = client.images.get(image)
            names: list[str] = found.attrs["RepoDigests"]
            return names[0].partition("@")[2] if names else str(found.id)
        finally:
            client.close()
    except Exception:  # no Docker engine, no such image, or no client library
        return None
