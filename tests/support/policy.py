"""checkov, a scanner of container policies, in a separate directory: its pins conflict with those
of other packages.
"""

import json
import os
import subprocess
import sys

from tests.support.cache import installed

VERSION = "3.3.30"


def checkov(*arguments):
    """Runs checkov. Returns how many checks ``passed``, and its findings for those that ``failed``.
    Skips the test if checkov cannot be installed."""
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
