"""The changes of the code since its commit, which a run records."""

import os
import subprocess
import time

import pytest

from train.code.changes import attempts_with_changes, path_of, read, write
from train.code.collect import CodeRecord, collect
from train.code.git import GitError, git
from train.code.version import code_version
from train.secret_files import is_secret_file

LIMIT = 500_000


def call(*arguments, cwd):
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a commit, which is the working directory."""
    top = tmp_path / "project"
    top.mkdir()
    call("init", "-q", cwd=top)
    (top / "model.py").write_text("layers = 2\nwidth = 8\n")
    (top / "data.bin").write_bytes(b"\0\1")
    (top / ".gitignore").write_text("ignored*\n")
    call("add", ".", cwd=top)
    call("commit", "-qm", "first", cwd=top)
    monkeypatch.chdir(top)
    return top


def collected(top, limit=LIMIT):
    return collect(limit, top / "runs/mine")


def test_the_recorded_patch_gives_the_working_tree_again(repository, tmp_path):
    (repository / "model.py").write_text("layers = 3\nwidth = 8\n")
    (repository / "sub").mkdir()
    (repository / "sub/new task.py").write_text("a = 1\n\fb = 2")
    (repository / "sub/empty.py").write_text("")
    (repository / "ignored.py").write_text("x = 1\n")
    (repository / "weights.pt").write_bytes(b"0" * 100)
    found = collected(repository)
    assert [change.path for change in found.files] == [
        "model.py", "sub/empty.py", "sub/new task.py"
    ]  # fmt: skip
    assert str(found.files[0]).startswith("+1 -1 (")
    assert found.notes == ["Left out: weights.pt (new, and no source file)."]
    (tmp_path / "run").mkdir()
    path = write(found, tmp_path / "run", 3)
    call("clone", "-q", str(repository), str(tmp_path / "clone"), cwd=tmp_path)
    call("apply", str(path), cwd=tmp_path / "clone")
    for name in ("model.py", "sub/new task.py", "sub/empty.py"):
        assert (tmp_path / "clone" / name).read_text() == (repository / name).read_text()
    again = read(tmp_path / "run", 3)
    assert again == found
    assert attempts_with_changes(tmp_path / "run") == [3]


def test_an_unchanged_tree_has_no_changes(repository):
    found = collected(repository)
    assert (found.files, found.notes) == ([], [])


SECRETS = [
    ".env", "conf/.env.local", "prod.env", "key.pem", "server.key", "home/.ssh/id_rsa",
    "id_ed25519.old", "credentials.json", "credentials_prod.json", "Credentials", ".netrc",
    "aws_credentials.yaml", "secrets.yaml", "k8s/secrets/db.yaml", ".aws/config",
    "service-account-7.json", "terraform.tfvars", "api_key.txt", "passwords.txt", "cert.p12",
]  # fmt: skip
NO_SECRETS = [
    "model.py", "tests/test_secrets.py", "train/secret_names.py", "keys.py", "environment.yml",
    "tokenizer.json", "configs/base.yaml", "monkey.py", "docs/secret-files.md", "env.py", "keyboard.c",
    "secrets.py", "credentials_prod.py", "secrets/token.py", "app/password.ts", ".aws/client_secret.go",
    "src/Secrets.PY",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_names_of_files_with_secrets(name):
    assert is_secret_file(name)


@pytest.mark.parametrize("name", NO_SECRETS)
def test_names_of_other_files(name):
    assert not is_secret_file(name)


def test_files_with_secrets_are_named_but_not_recorded(repository):
    (repository / ".env").write_text("A=1\n")
    call("add", "-f", ".env", cwd=repository)
    call("commit", "-qm", "env", cwd=repository)
    (repository / ".env").write_text("A=hunter2\n")
    (repository / "credentials.yaml").write_text("x: hunter2\n")
    key = "-----BEGIN PRIVATE KEY-----\nhunter2\n"
    (repository / "signing.py").write_text(f"KEY = '''{key}'''\n")
    found = collected(repository)
    assert found.files == []
    assert "hunter2" not in found.text
    assert found.notes == [
        "Left out: .env (its name is that of a secret).",
        "Left out: credentials.yaml (its name is that of a secret).",
        "Left out: signing.py (it has a private key).",
    ]


def test_secrets_in_texts_are_replaced(repository, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", "correct-horse-battery-1")
    (repository / "model.py").write_text(
        "password = 'hunter2'\nurl = 'https://me:hunter2@host'\nt = 'correct-horse-battery-1'\n"
    )
    (repository / "new.py").write_text("opened = open_it('hf_" + "aB3" * 12 + "')\n")
    text = collected(repository).text
    assert "hunter2" not in text
    assert "correct-horse" not in text
    assert "aB3" not in text
    assert "+password = '***'" in text


def test_what_is_too_large_is_named(repository):
    (repository / "model.py").write_text("x = 1\n" * 1000)
    (repository / "large.py").write_text("y = 1\n" * 1000)
    (repository / "small.py").write_text("z = 1\n")
    (repository / "data.bin").write_bytes(b"\0\2")
    found = collected(repository, limit=3000)
    assert [change.path for change in found.files] == ["small.py"]
    assert len(found.notes) == 3
    assert "Left out: data.bin (binary)." in found.notes
    assert "Left out: large.py (6,000 bytes, more than track.code_diff_kb leaves)." in found.notes
    for number in range(150):
        (repository / f"weights-{number}.pt").write_bytes(b"")
    assert collected(repository, limit=3000).notes[-1] == "Left out: 53 more files."


def test_files_of_runs_links_and_pipes_are_left_out(repository, tmp_path):
    for run in ("runs/mine", "elsewhere/other"):
        (repository / run / "deep").mkdir(parents=True)
        (repository / run / "deep/config.yaml").write_text("a: 1\n")
    (repository / "elsewhere/other/run.json").write_text("{}")
    (tmp_path / "outside.py").write_text("hunter2\n")
    (repository / "link.py").symlink_to(tmp_path / "outside.py")
    found = collected(repository)
    assert found.files == []
    assert "hunter2" not in found.text
    assert len(found.notes) == 1
    assert found.notes[0].startswith("Left out: link.py (new, and cannot be read")


def test_the_settings_of_the_user_and_the_environment_do_not_count(repository, monkeypatch):
    (repository / "model.py").write_text("layers = 3\nwidth = 8\n")
    usual = collected(repository).text
    for name, value in (
        ("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "false"),
        ("core.fsmonitor", "exit 3"), ("core.pager", "false"), ("diff.renames", "copies"),
    ):  # fmt: skip
        call("config", name, value, cwd=repository)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    assert collected(repository).text == usual
    assert code_version()["dirty"] is True


def test_a_directory_without_a_repository_and_one_without_a_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert collect(LIMIT, tmp_path).text == ""
    assert set(code_version()) == {"isorun"}
    call("init", "-q", cwd=tmp_path)
    (tmp_path / "new.py").write_text("a = 1\n")
    (tmp_path / "staged.py").write_text("b = 1\n")
    call("add", "staged.py", cwd=tmp_path)
    assert [change.path for change in collect(LIMIT, tmp_path).files] == ["staged.py", "new.py"]
    assert set(code_version()) == {"isorun"}


def test_without_git_there_is_no_commit(repository, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert collected(repository).text == ""
    assert set(code_version()) == {"isorun"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")
def test_a_repository_of_another_user_is_reported(repository):
    os.chown(repository, 12345, 12345)
    os.chown(repository / ".git", 12345, 12345)
    said = code_version()["git"]
    assert "another user owns the repository" in said
    assert "git config --global --add safe.directory" in said
    assert collected(repository).notes == [f"Not recorded: {said}."]


def slow_git(directory, monkeypatch):
    """A git that does not answer, first on the PATH; its children keep its output open."""
    directory.mkdir()
    (directory / "git").write_text("#!/bin/sh\nsleep 60 & sleep 60\n")
    (directory / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_a_git_that_hangs_is_given_up(repository, tmp_path, monkeypatch):
    slow_git(tmp_path / "bin", monkeypatch)
    with pytest.raises(GitError, match=r"`git status` did not end within 0 s"):
        git("status", until=time.monotonic() + 0.2)
    found = collect(LIMIT, tmp_path, seconds=0.2)
    assert found.notes == ["Not recorded: `git rev-parse` did not end within 0 s."]


def test_output_without_an_end_is_cut(repository, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\nexec yes\n")
    (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with pytest.raises(GitError, match="too large"):
        git("status", until=time.monotonic() + 30, limit=1000)


def test_the_file_is_written_once_the_attempt_is_recorded(repository, tmp_path):
    (repository / "new.py").write_text("a = 1\n")
    refused = CodeRecord(tmp_path, 1, 500)
    refused.close()
    record = CodeRecord(tmp_path, 2, 500)
    record.store()
    assert record.wait() == path_of(tmp_path, 2)
    assert attempts_with_changes(tmp_path) == [2]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/code").symlink_to(tmp_path)
    linked = CodeRecord(tmp_path / "other", 1, 500)
    linked.store()
    assert linked.wait() is None
    assert not (tmp_path / "attempt-1.diff").exists()
    assert read(tmp_path / "other", 1) is None
