"""Signatures of messages, and where the secret comes from."""

import os

import pytest

from launch.agent.options import parse
from train.exits import UsageError
from train.signing import MessageError, Signer, new_secret, read_secret

SECRET = "a secret of the run"


def test_a_signature_holds_for_one_secret_run_key_and_content():
    signer = Signer(b"secret", "run")
    signed = signer.sign("key", b"content")
    assert signer.check("key", signed) == b"content"
    others = [
        Signer(),
        Signer(b"other", "run"),
        Signer(b"secret", "other"),
        Signer(b"secret", "ru"),
    ]
    for other in others:
        with pytest.raises(MessageError, match="'key'"):
            other.check("key", signed)
    for key, text in (("kez", signed), ("", signed), ("key", signed + b"x"), ("key", signed[1:])):
        with pytest.raises(MessageError):
            signer.check(key, text)
    # The same bytes, divided in another way between run, key and content.
    with pytest.raises(MessageError):
        Signer(b"secret", "runk").check("ey", signed)


@pytest.mark.parametrize("text", [b"", b":", b"-:", b"-", b"\xff\x00", b"-:content", b"content"])
def test_what_has_no_signature_is_refused(text):
    with pytest.raises(MessageError, match="ISORUN_SECRET"):
        Signer(b"secret", "run").check("key", text)


def test_the_secret_is_read_from_the_environment_or_a_private_file(tmp_path):
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    file.chmod(0o600)
    assert read_secret({}) == b""
    assert read_secret({"ISORUN_SECRET": f" {SECRET}\n"}) == SECRET.encode()
    assert read_secret({"ISORUN_SECRET": "", "ISORUN_SECRET_FILE": str(file)}) == SECRET.encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602])
def test_a_file_that_others_can_access_is_refused(tmp_path, mode):
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(mode)
    with pytest.raises(UsageError, match="chmod 600") as refused:
        read_secret({"ISORUN_SECRET_FILE": str(file)})
    assert SECRET not in str(refused.value)


def test_other_things_than_a_file_with_a_secret_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "large").touch(0o600)
    (tmp_path / "large").write_text("x" * 5000)
    (tmp_path / "empty").touch(0o600)
    for name in ("fifo", "large", "empty", "missing", "."):
        with pytest.raises(UsageError, match="ISORUN_SECRET_FILE"):
            read_secret({"ISORUN_SECRET_FILE": str(tmp_path / name)})
    with pytest.raises(UsageError, match="has 5; make one by") as refused:
        read_secret({"ISORUN_SECRET": "short"})
    assert "short" not in str(refused.value)


def test_the_agent_of_one_node_makes_its_own_secret_and_shows_none():
    made = [parse(["--", "true"], {}) for _ in range(2)]
    assert len({options.secret for options in made}) == 2
    given = parse(["--", "true"], {"ISORUN_SECRET": SECRET})
    assert given.secret == SECRET.encode()
    assert SECRET not in repr(given)
    several = ["--nnodes", "2", "--rdzv-endpoint", "a", "--", "true"]
    assert parse(several, {}).secret == b""


def test_processes_that_start_together_get_a_secret_unless_they_inherit_one():
    [[name, secret]] = new_secret({}).items()
    assert (name, len(secret)) == ("ISORUN_SECRET", 64)
    assert new_secret({"ISORUN_SECRET": SECRET}) == {}
    assert new_secret({"ISORUN_SECRET_FILE": "/a"}) == {}
