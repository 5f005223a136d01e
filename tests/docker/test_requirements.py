"""What the image installs: pinned with hashes, torch apart, and only what its extras need."""

import json
import re
import runpy
import subprocess
import sys
import tomllib

import pytest

from tests.support.runs import ROOT

LOCK = ROOT / "docker" / "requirements.lock"
FILES = ("build", "torch-cpu", "torch-cuda", "rest")
requirements = runpy.run_path(str(ROOT / "docker" / "requirements.py"))
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def lists(directory, extras="deepspeed,digits,plot,s3,tokenizers", hashes="required"):
    requirements["main"](str(ROOT / "pyproject.toml"), str(LOCK), extras, hashes, str(directory))
    return {name: (directory / f"{name}.txt").read_text() for name in FILES}


def names(text):
    return set(re.findall(r"^([a-z0-9][\w.-]*)==", text, re.M))


def test_every_package_has_a_hash_but_the_wheel_of_torch_for_cpus(tmp_path):
    found = lists(tmp_path)
    assert found["torch-cpu"] == "torch==2.13.0\n"
    for name in ("build", "torch-cuda", "rest"):
        assert found[name].startswith("--require-hashes\n")
        entries = re.split(r"\n(?=\S)", found[name].strip())[1:]
        assert entries
        assert all("--hash=sha256:" in entry for entry in entries)


def test_torch_is_the_version_of_the_tests(tmp_path):
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert lists(tmp_path)["torch-cpu"] == f"torch=={pinned}\n"


def test_no_package_is_in_two_lists_except_the_build_tools(tmp_path):
    found = {name: names(text) for name, text in lists(tmp_path).items()}
    assert found["build"] == {"setuptools"}
    assert found["torch-cpu"] == {"torch"}
    assert not found["torch-cuda"] & found["rest"]
    assert {"torch", "triton"} < found["torch-cuda"]
    assert not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in found["rest"])


def test_only_what_the_extras_need_is_installed(tmp_path):
    least, default = (names(lists(tmp_path, e)["rest"]) for e in ("", "deepspeed,s3"))
    assert {"accelerate", "numpy", "wandb", "sympy", "setuptools"} <= least
    assert not {"deepspeed", "s3fs", "aiohttp", "scikit-learn", "gcsfs"} & least
    assert {"deepspeed", "ninja", "s3fs", "aiohttp"} <= default
    assert "scikit-learn" not in default


def test_every_requirement_of_the_project_is_in_the_lock_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("deepspeed", "digits", "gcs", "plot", "s3", "tokenizers")
    lines = sum((project["optional-dependencies"][e] for e in extras), project["dependencies"])
    locked = {package.name for package in requirements["read"](LOCK.read_text())}
    assert {requirements["normal"](line) for line in lines} <= locked
    assert not {"torchx", "pytest"} & locked


def test_without_hashes_the_versions_are_the_same(tmp_path):
    found = lists(tmp_path, hashes="none")
    assert "--" not in "".join(found.values())
    assert names(found["rest"]) == names(lists(tmp_path)["rest"])


def test_a_package_that_the_lock_file_lacks_is_named(tmp_path):
    (tmp_path / "lock").write_text("numpy==2.0\n")
    with pytest.raises(KeyError, match="lacks .*torch.*make lock"):
        requirements["main"](
            str(ROOT / "pyproject.toml"), str(tmp_path / "lock"), "", "required", str(tmp_path)
        )


def test_each_installation_uses_the_lists_and_torch_one_index():
    text = re.sub(r"\\\n\s*", "", DOCKERFILE)
    installs = re.findall(r"pip install ([^&\n]*)", text)
    of_lists = [words for words in installs if words.split()[-1] != "/build"]
    assert len(of_lists) == 7
    assert all("-r /mnt/requirements/" in words for words in of_lists)
    assert "--extra-index-url" not in text
    torch = [words for words in installs if "/torch-" in words]
    assert len(torch) == 2
    assert all('--index-url "$TORCH_INDEX" --no-deps' in words for words in torch)
    assert all("--no-build-isolation" in words for words in installs if "/rest.txt" in words)


PIP_AUDIT = """
import json, os, sys
answers = json.loads(os.environ["ANSWERS"])
code, out, *more = answers["known" if any("known.txt" in word for word in sys.argv) else "lock"]
lines = open(sys.argv[sys.argv.index("--requirement") + 1]).read().split()
if more:
    out += more * (len(lines) - len(out))
print("" if out is None else json.dumps({"dependencies": out}))
sys.exit(code)
"""
BAD = {"name": "x", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
GOOD = {"name": "x", "version": "1", "vulns": []}
SKIPPED = {"name": "x", "skip_reason": "not found"}


@pytest.mark.normal
@pytest.mark.parametrize(
    ("known", "lock", "code"),
    [
        ([1, [BAD]], [0, [GOOD], GOOD], 0),
        ([1, [BAD]], [1, [GOOD, BAD], GOOD], 1),
        ([1, [BAD]], [0, [GOOD]], 75),  # not all packages
        ([0, [GOOD]], [0, [GOOD]], 75),  # an index without advisories
        ([1, None], [0, [GOOD]], 75),
        ([1, [BAD]], [1, None], 75),
        ([1, [BAD]], [0, [GOOD, SKIPPED]], 75),
        ([1, [BAD]], [0, []], 75),
        ([1, [BAD]], [1, [GOOD]], 75),
    ],
)
def test_an_audit_that_could_not_look_fails(tmp_path, known, lock, code):
    (tmp_path / "pip_audit.py").write_text(PIP_AUDIT)
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "audit.py", LOCK], capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path), "ANSWERS": json.dumps({"known": known, "lock": lock})},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert ("cannot be looked up" in done.stderr) is (code == 75)
    assert ("PYSEC-1" in done.stdout) is (code == 1)
