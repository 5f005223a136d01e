"""Damaged and lost files of the run directory."""

import json
import shutil
import struct
import zlib

import pytest

from tests.support.forked import run
from tests.support.lanes import thinned
from tests.support.runs import assert_same_bits, checkpoints, curve, metrics, tensors

BASE = [
    "checkpoint.every_steps=10", "checkpoint.keep_last=99", "evaluate.every_steps=10",
    "early_stop.patience=30", "ema.decay=0.9",
]  # fmt: skip
RECORD = 44  # bytes of a record in the ledger; the header has 16


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory, *BASE)
    return directory


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("killed")
    run("fit", directory, *BASE, "task.kill_at_step=36", "checkpoint.asynchronous=false", expect=-9)
    assert checkpoints(directory) == [10, 20, 30]
    return directory


@pytest.fixture
def killed(killed_once, tmp_path):
    """A run that was killed after step 35, with checkpoints of steps 10, 20 and 30."""
    return shutil.copytree(killed_once, tmp_path / "run")


def checkpoint(directory, step):
    return directory / f"checkpoints/step-{step:012d}"


def flip_a_bit(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def change_a_number(path):
    path.write_text(path.read_text().replace('"position": 360', '"position": 348'))


DAMAGES = [
    (lambda p: flip_a_bit(p / "__0_0.distcp"), "__0_0.distcp does not match its SHA-256"),
    (lambda p: truncate(p / "__0_0.distcp"), "bytes instead of"),
    (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp cannot be read (No such file"),
    (lambda p: flip_a_bit(p / ".metadata"), ".metadata does not match its SHA-256"),
    (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda p: truncate(p / "manifest.json"), "manifest.json cannot be read"),
    (lambda p: change_a_number(p / "manifest.json"), "does not match its own SHA-256"),
    (lambda p: (p / "manifest.json").write_bytes(b"\xff\0"), "manifest.json cannot be read"),
    (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    (lambda p: [f.unlink() for f in p.iterdir()], "manifest.json is missing"),
]


@pytest.mark.parametrize(
    ("damage", "named"), thinned(DAMAGES, kept=[DAMAGES[n] for n in (0, 1, 4, 6)])
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    undisturbed, killed, damage, named
):
    damage(checkpoint(killed, 30))
    done = run("fit", killed, *BASE)
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("warning: The checkpoint of step 30 is damaged (")
    assert named in warning
    (aside,) = (killed / "checkpoints").glob("damaged-step-000000000030-*")
    assert f"renamed it to {aside.name}" in warning
    assert "resumes at step 20" in done.stdout
    assert_finished_as(undisturbed, killed)


def assert_finished_as(undisturbed, directory):
    assert_same_bits(tensors(undisturbed), tensors(directory))
    for key in ("train/loss", "eval/loss"):
        assert curve(directory, key) == curve(undisturbed, key)
    assert "all well" in run("verify", directory).stdout


def test_without_a_valid_checkpoint_the_run_starts_from_the_beginning(undisturbed, killed):
    for step in (10, 20, 30):
        flip_a_bit(checkpoint(killed, step) / "__0_0.distcp")
    done = run("fit", killed, *BASE)
    assert "step 30 is damaged" in done.stderr
    assert "step 20 is damaged" in done.stderr
    assert "step 10 is damaged" in done.stderr
    assert "There is no valid checkpoint, so the run starts from the beginning." in done.stderr
    assert "starts (attempt 2)" in done.stdout
    assert len(list((killed / "checkpoints").glob("damaged-*"))) == 3
    assert_finished_as(undisturbed, killed)


def test_incomplete_checkpoints_are_removed(undisturbed, killed):
    for name in (".writing-000000000040-0123abcd", ".writing-removing-000000000005-0123abcd"):
        left = killed / "checkpoints" / name
        left.mkdir()
        (left / "__0_0.distcp").write_bytes(b"half")
    done = run("fit", killed, *BASE)
    assert "Removed 2 incomplete checkpoint(s)" in done.stderr
    assert not list((killed / "checkpoints").glob(".writing-*"))
    assert_finished_as(undisturbed, killed)


def test_a_checkpoint_of_another_model_is_refused(undisturbed, killed):
    before = (killed / "config.json").read_text()
    done = run("fit", killed, *BASE, "model.hidden=32", "--allow-changes", expect=76)
    (line,) = done.stderr.splitlines()
    assert "step-000000000030 does not match the model" in line
    assert "has shape (16, 8) in the checkpoint and (32, 8) in the model" in line
    assert (killed / "config.json").read_text() == before, "the refused run changed the config"
    done = run("fit", killed, *BASE[:-1], "--allow-changes", expect=76)
    assert "ema.0.weight is only in the checkpoint" in done.stderr
    run("fit", killed, *BASE)
    assert_finished_as(undisturbed, killed)


@pytest.mark.parametrize("name", ["run.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b'{"id": "x', b"\xff\xfe", b"[]", b"{}"])
def test_a_damaged_identity_or_config_is_refused_by_name(killed, name, content):
    (killed / name).write_bytes(content)
    done = run("fit", killed, *BASE, expect=76)
    assert "Traceback" not in done.stderr
    if (name, content) == ("config.json", b"{}"):  # a valid file, but of another run
        assert "these differences change its results" in done.stderr
    else:
        assert f"{killed / name} is damaged (" in done.stderr.splitlines()[-1]


def test_a_lost_identity_is_not_replaced_by_a_new_one(killed):
    (killed / "run.json").unlink()
    done = run("fit", killed, *BASE, expect=76)
    assert f"{killed / 'run.json'} is damaged (it is missing)" in done.stderr
    assert not (killed / "run.json").exists()


def test_without_its_config_a_run_cannot_be_compared_with_the_command(killed):
    (killed / "config.json").unlink()
    done = run("fit", killed, *BASE, "optim.lr=0.5", expect=76)
    assert f"{killed / 'config.json'} is damaged (it is missing)" in done.stderr


def test_a_damaged_line_in_attempts_does_not_affect_the_run(undisturbed, killed):
    path = killed / "attempts.jsonl"
    path.write_bytes(path.read_bytes() + b'\xff\xfe garbage\n[1]\n{"attempt": 3, "ti')
    run("fit", killed, *BASE)
    last = path.read_text(errors="replace").splitlines()[-1]
    assert json.loads(last)["attempt"] == 5, "the attempt must have a new number"
    assert_finished_as(undisturbed, killed)


def test_damaged_metrics_are_reported_and_moved(undisturbed, killed):
    path = killed / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[4])["step"] == 5
    lines[4] = lines[4][:20] + b"\xff\xff\n"
    path.write_bytes(b"".join(lines) + b'{"step": 36, "tra')
    done = run("fit", killed, *BASE)
    assert "1 line(s) of" in done.stderr
    assert (killed / "metrics.jsonl.damaged").read_bytes() == lines[4]
    steps = [row["step"] for row in metrics(killed)]
    assert steps == [step for step in range(1, 41) if step != 5], (
        "more than the damaged line is lost"
    )
    assert_same_bits(tensors(undisturbed), tensors(killed))


def test_an_incomplete_record_of_the_ledger_is_removed(undisturbed, killed):
    path = killed / "ledger.bin"
    path.write_bytes(path.read_bytes() + path.read_bytes()[-RECORD:-5])
    run("fit", killed, *BASE)
    assert_finished_as(undisturbed, killed)


def test_a_ledger_damaged_in_the_middle_is_refused_with_file_and_byte(killed):
    path = killed / "ledger.bin"
    flip_a_bit(path, at=16 + 4 * RECORD + 9)
    done = run("fit", killed, *BASE, expect=65)
    assert f"{path} is damaged at byte {16 + 4 * RECORD}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    done = run("verify", killed, expect=65)
    assert "is damaged at byte" in done.stdout
    assert "NOT well" in done.stdout


@pytest.mark.parametrize(
    ("kept", "said"),
    [(None, "does not exist"), (1, "step 1 is missing"), (11, "step 11 is missing")],
)
def test_a_truncated_ledger_fails_verification(undisturbed, killed, kept, said):
    """Training continues, since checkpoints have all that it needs; verify reports the gap."""
    path = killed / "ledger.bin"
    if kept is None:
        path.unlink()
        assert said in run("verify", killed, expect=65).stdout
    else:
        path.write_bytes(path.read_bytes()[: 16 + kept * RECORD])
    run("fit", killed, *BASE)
    assert_same_bits(tensors(undisturbed), tensors(killed))
    done = run("verify", killed, expect=65)
    assert ("step 1 is missing" if kept is None else said) in done.stdout


def test_a_forged_ledger_fails_verification(undisturbed, tmp_path):
    """Records with a valid CRC: a gap, a repeat, and samples in another order."""

    def forge(number, **changes):
        directory = tmp_path / f"{number}-{sum(changes.values())}-{'-'.join(changes)}"
        shutil.copytree(undisturbed, directory)
        path = directory / "ledger.bin"
        data = bytearray(path.read_bytes())
        at = 16 + number * RECORD
        fields = dict(
            zip(
                ("kind", "flags", "attempt", "step", "position", "first", "second"),
                struct.unpack_from("<HHIQQQQ", data, at),
                strict=True,
            )
        )
        for name, change in changes.items():
            fields[name] += change
        body = struct.pack("<HHIQQQQ", *fields.values())
        data[at : at + RECORD] = body + struct.pack("<I", zlib.crc32(body))
        path.write_bytes(data)
        return run("verify", directory, expect=65).stdout

    assert "positions 84 to 84 were never used: step 8 starts at 85" in forge(8, position=1)
    assert "positions 83 to 83 were used twice: step 8 starts at 83" in forge(8, position=-1)
    assert "step 8 did not use the samples that the seed has" in forge(8, second=1)
    assert "step 9 is repeated: it follows step 9" in forge(10, step=-1)
    assert "step 10 is missing: step 11 follows 9" in forge(10, step=+1)


def test_a_damaged_finished_json_is_refused(undisturbed, tmp_path):
    directory = shutil.copytree(undisturbed, tmp_path / "run")
    (directory / "finished.json").write_text('{"st')
    done = run("fit", directory, *BASE, expect=76)
    assert f"{directory / 'finished.json'} is damaged" in done.stderr
    (directory / "finished.json").unlink()
    run("fit", directory, *BASE)
    assert_finished_as(undisturbed, directory)
