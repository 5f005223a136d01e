"""One process: stop requests, hang detection, error files, and the diagnosis of errors."""
