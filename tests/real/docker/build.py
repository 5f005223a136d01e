"""The inputs of an image build without a registry: a base made by debootstrap, and wheels from this
machine's pip. Both are cached outside the repository.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.real.docker.engine import UnavailableError, git
from tests.support.cache import CACHE, cached
from tests.support.runs import ROOT

# The Debian release with this Python version, for which this machine's pip builds wheels.
RELEASES = {(3, 11): "bookworm", (3, 13): "trixie"}


def make_base(directory):
    """Builds a small Debian with Python, as a tar file."""
    release = RELEASES.get(sys.version_info[:2])
    if release is None:
        raise UnavailableError(f"no Debian release has Python {sys.version_info[:2]}")
    program = shutil.which("debootstrap") or shutil.which("debootstrap", path="/usr/sbin")
    if program is None:
        raise UnavailableError("debootstrap is not installed; it builds the base image")
    root = directory / "root"
    done = subprocess.run(
        [program, "--variant=minbase", "--include=python3,python3-venv,ca-certificates", release,
         root],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    if done.returncode != 0:
        raise UnavailableError(f"debootstrap failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    for path in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*")):
        if path.is_file():
            path.unlink()
    subprocess.run(["tar", "-C", root, "-cf", directory / "base.tar", "."], check=True)
    shutil.rmtree(root)


def extras():
    """The default of EXTRAS in the Dockerfile."""
    return re.search(r"^ARG EXTRAS=(.+)$", (ROOT / "docker/Dockerfile").read_text(), re.M)[1]


def wheels():
    """A directory of wheels with everything that the image installs."""
    with tempfile.TemporaryDirectory() as directory:
        # Without hashes: pip builds some of the wheels here.
        words = [sys.executable, "docker/requirements.py", "pyproject.toml"]
        words += ["docker/requirements.lock", extras(), "none", directory]
        subprocess.run(words, cwd=ROOT, check=True)
        names = ("build.txt", "torch-cpu.txt", "rest.txt")
        needed = "".join((Path(directory) / name).read_text() for name in names)
    needed += "cyclonedx-bom==7.5.0\n"

    def make(directory):
        (directory / "needed.txt").write_text(needed)
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", directory,
             "-r", directory / "needed.txt"],
            cwd=ROOT, check=True, timeout=900,
        )  # fmt: skip

    key = hashlib.sha256((needed + sys.version).encode()).hexdigest()[:16]
    return cached(f"wheels-{key}", make)


FOLDERS = ("train", "launch", "configs", "docker")
FILES = ("pyproject.toml", "README.md", ".dockerignore")


def save_image(build):
    """The CPU image as a file, cached by the content of the project's files. ``build()`` returns
    (docker client, name of the image), and is called if there is no such file."""
    digest = hashlib.sha256(sys.version.encode())
    inside = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    for path in sorted([*inside, *(ROOT / name for name in FILES)]):
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())

    def make(directory):
        docker, name = build()
        docker("save", "--output", directory / "image.tar", name)

    kept = cached(f"image-{digest.hexdigest()[:16]}", make)
    for older in set(CACHE.glob("image-*")) - {kept}:  # each has more than 1 GB
        shutil.rmtree(older, ignore_errors=True)
    return kept / "image.tar"


class Builder:
    """Builds the project's Dockerfile. ``context`` is a copy of the project that tests may
    change."""

    def __init__(self, docker, directory):
        self.docker, self.directory = docker, directory
        self.context = directory / "context"
        for name in FOLDERS:
            shutil.copytree(ROOT / name, self.context / name)
        for name in FILES:
            shutil.copy(ROOT / name, self.context / name)
        with ThreadPoolExecutor() as pool:  # each takes about a minute the first time
            base = pool.submit(cached, f"base-{RELEASES.get(sys.version_info[:2])}", make_base)
            self.wheels = pool.submit(wheels).result()
            docker.import_directory(self.wheels, "isorun-test-wheels")
            docker("import", base.result() / "base.tar", "isorun-test-base")
        # The settings of pip are passed as a user would pass private ones: as a build secret.
        self.pip_conf = directory / "pip.conf"
        self.pip_conf.write_text("[global]\nno-index = true\nfind-links = /mnt/wheels\n")

    def build(self, tag, *options, target="cpu"):
        """Builds an image; returns the output of the build."""
        done = self.docker(
            "build", "--progress", "plain", "--network", "host", "--target", target,
            "--file", self.context / "docker" / "Dockerfile", "--tag", tag,
            "--secret", f"id=pip.conf,src={self.pip_conf}",
            "--build-arg", "BASE_IMAGE=isorun-test-base", "--build-arg", "WHEELS=isorun-test-wheels",
            "--build-arg", "HASHES=none",
            "--build-arg", f"REVISION={git('rev-parse', 'HEAD') or 'unknown'}",
            *options, self.context, timeout=1200,
        )  # fmt: skip
        return done.stdout + done.stderr
