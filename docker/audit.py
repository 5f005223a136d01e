"""Fails if a package of a lock file has a known vulnerability, or if it cannot be looked up.

    python audit.py LOCK

Uses pip-audit, which asks PyPI. An index without advisories, such as a mirror, answers as if there
were none. So a version with a known vulnerability is looked up first: if the answer has none, the
exit code is 75, as without an answer. It is 1 if a package has a vulnerability.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from requirements import Package, read

KNOWN = "jinja2==2.4.1"
"""A version whose vulnerabilities were published years ago."""


IMAGE = {
    "python_version": "3.11", "python_full_version": "3.11.9", "implementation_name": "cpython",
    "platform_python_implementation": "CPython", "sys_platform": "linux", "os_name": "posix",
    "platform_system": "Linux", "platform_machine": "x86_64",
}  # fmt: skip
"""What the markers of the lock file mean in the image."""


class UnknownError(Exception):
    """The advisories cannot be looked up."""


def of_image(lock: str) -> list[Package]:
    """The packages of the lock file that the image's Python installs on Linux, whatever Python runs
    this program."""
    from packaging.markers import Marker

    def is_wanted(package: Package) -> bool:
        marker = package.requirement.partition(";")[2].strip()
        return not marker or Marker(marker).evaluate(IMAGE)

    return list(filter(is_wanted, read(Path(lock).read_text(encoding="utf-8"))))


def vulnerabilities(*options: str) -> tuple[list[str], int]:
    """A line for each known vulnerability of the packages, and the number of packages that were
    looked up. Raises UnknownError if the answer does not cover all of them."""
    words = ["--strict", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", *words, *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        packages = json.loads(done.stdout)["dependencies"]
        skipped = [p["name"] for p in packages if "vulns" not in p]
        found = [
            f"{p['name']} {p['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or '-'}"
            for p in packages
            for v in p.get("vulns", [])
        ]
    except (ValueError, KeyError, TypeError):
        raise UnknownError(done.stderr.strip() or "pip-audit gives no answer") from None
    if skipped or not packages:
        raise UnknownError(f"no answer for {', '.join(skipped) or 'any package'}")
    if done.returncode != bool(found):
        raise UnknownError(done.stderr.strip() or f"pip-audit ended with {done.returncode}")
    return found, len(packages)


def main(lock: str) -> int:
    """The exit code: 0 without a vulnerability, 1 with one, 75 if nobody could look."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            known = Path(folder, "known.txt")
            known.write_text(f"{KNOWN}\n", encoding="utf-8")
            if not vulnerabilities("--no-deps", "--requirement", str(known))[0]:
                raise UnknownError(f"the index has no advisory for {KNOWN}, so it has none at all")
            pinned = [p.requirement.partition(";")[0].strip() for p in of_image(lock)]
            chosen = Path(folder, "chosen.txt")
            chosen.write_text("\n".join(pinned) + "\n", encoding="utf-8")
            found, looked_up = vulnerabilities("--no-deps", "--requirement", str(chosen))
            if looked_up != len(pinned):
                raise UnknownError(f"{looked_up} of {len(pinned)} packages were looked up")
    except UnknownError as error:
        print(
            f"The advisories cannot be looked up: {error}\nUse an index that has them, such as "
            "pypi.org, then run it again.",
            file=sys.stderr,
        )
        return 75
    print("\n".join(found) or f"No package in {lock} has a known vulnerability.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
