"""checkov, the scanner of container policies, from a directory of its own: its pins conflict with
everybody else's."""

import json
import os
import subprocess
import sys

from tests.support.cache import installed

VERSION = "3.3.30"


def checkov(*arguments):
    """Runs it; returns how many checks ``passed`` and the findings that ``failed``, as it tells
    them. Skips the test where it cannot be installed."""
    done = subprocess.run(
        [sys.executable, "-m", "checkov.main", "--quiet", "--compact", "--skip-download",
         "--output", "json", *map(str, arguments)],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(installed(f"checkov=={VERSION}"))},
    )  # fmt: skip
    try:
        reports = json.loads(done.stdout)
    except ValueError:
        raise AssertionError(f"checkov failed: {done.stdout}{done.stderr}") from None
    reports = reports if isinstance(reports, list) else [reports]
    assert sum(r["summary"]["parsing_errors"] for r in reports) == 0
    failed = [check for report in reports for check in report["results"]["failed_checks"]]
    return {"passed": sum(r["summary"]["passed"] for r in reports), "failed": failed}
