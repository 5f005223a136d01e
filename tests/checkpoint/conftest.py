"""An object store for the tests of mirrors and of weights in them."""

from tests.support.object_store import bucket

__all__ = ["bucket"]
