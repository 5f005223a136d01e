"""checkov, the scanner of container policies, in an environment of its own: its pins conflict with
everybody else's."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("ISORUN_TEST_CACHE") or Path.home() / ".cache" / "isorun-tests")
VERSION = "3.3.30"


def checkov(*arguments):
    """Runs it; returns how many checks ``passed``, and those that ``failed`` in words. Skips the
    test where it cannot be installed."""
    done = subprocess.run(
        [_program(), "--quiet", "--compact", "--skip-download", "--output", "json",
         *map(str, arguments)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    try:
        reports = json.loads(done.stdout)
    except ValueError:
        raise AssertionError(f"checkov failed: {done.stdout}{done.stderr}") from None
    reports = reports if isinstance(reports, list) else [reports]
    failed = [
        f"{check['check_id']} {check['resource']}: {check['check_name']}"
        for report in reports
        for check in report["results"]["failed_checks"]
    ]
    return {"passed": sum(r["summary"]["passed"] for r in reports), "failed": failed}


def _program():
    home = CACHE / f"checkov-{VERSION}-py{sys.version_info[0]}{sys.version_info[1]}"
    if not (home / "ready").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        venv.create(home, with_pip=True, clear=True)
        done = subprocess.run(
            [home / "bin" / "python", "-m", "pip", "install", "--quiet", f"checkov=={VERSION}"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            pytest.skip(f"checkov cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        (home / "ready").touch()
    return home / "bin" / "checkov"
