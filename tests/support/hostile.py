"""What somebody who means harm writes into files and stores."""

import json
import os

from train.checkpoint.layout import dumps_with_sha256


class Evil:
    """Creates a directory where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rewrite_hashed(path, change):
    """Changes a JSON file together with the hash of itself."""
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    path.write_text(dumps_with_sha256(body))
