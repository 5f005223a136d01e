"""Code that the config of another user's run directory names is imported only if the user names it."""

import json
import os
import sys

import pytest

from tests.support.runs import TINY
from train.config.load import check, load_config
from train.exits import UsageError

OTHER = 4321


@pytest.fixture
def run(tmp_path):
    """The directory of a run whose task has a name that only its config knows."""
    (tmp_path / "code_of_others.py").write_text(
        "from pathlib import Path\nfrom tests.support.tiny import TinyTask\nPath('ran').touch()\n"
    )
    directory = tmp_path / "run"
    directory.mkdir()
    values = load_config([], TINY, runs=False).config.model_dump(mode="json")
    values["task"]["use"] = "code_of_others:TinyTask"
    values["hooks"] = [{"use": "tests.support.none:Hook", "options": {}}]
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.fixture
def other(run, monkeypatch):
    """The same, of another user."""
    if os.geteuid() == 0:
        os.chown(run / "config.json", OTHER, OTHER)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    return run


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])


def test_the_task_of_another_users_run_is_not_imported(other, tmp_path):
    with pytest.raises(UsageError, match=r"task.use is .*belongs to another user.*uid") as refused:
        load_config([str(other)], [], runs=False)
    assert "add task.use=code_of_others:TinyTask to the command" in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_the_command_line_may_name_it(other, tmp_path):
    loaded = load_config([str(other)], ["task.use=code_of_others:TinyTask"], runs=False)
    assert loaded.task.__name__ == "TinyTask"
    assert (tmp_path / "ran").exists()


def test_a_later_config_file_may_name_it(other, tmp_path):
    (tmp_path / "mine.yaml").write_text("task:\n  use: code_of_others:TinyTask\n")
    load_config([str(other), "mine.yaml"], [], runs=False)


def test_a_run_trains_with_no_hook_that_only_another_user_names(other):
    with pytest.raises(UsageError, match=r"hooks.*is 'tests.support.none:Hook'"):
        load_config([str(other)], ["task.use=code_of_others:TinyTask"])


def test_a_directory_of_another_user_is_not_trusted_for_its_files(run):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another user")
    os.chown(run, OTHER, OTHER)
    with pytest.raises(UsageError, match="belongs to another user"):
        load_config([str(run)], [], runs=False)


def test_a_config_that_everyone_may_change_is_not_trusted(run):
    (run / "config.json").chmod(0o666)
    with pytest.raises(UsageError, match="which everyone may change"):
        load_config([str(run)], [], runs=False)


def test_the_own_run_needs_nothing(run):
    load_config([str(run)], [], runs=False)


def test_built_in_tasks_of_others_need_nothing(run, other):
    values = json.loads((run / "config.json").read_text())
    values |= {"task": {"use": "digits"}, "model": {}, "data": {}}
    (run / "config.json").write_text(json.dumps(values))
    load_config([str(run)], [], runs=False)
    values["task"]["loss"] = "code_of_others:loss"
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="task.loss is 'code_of_others:loss'"):
        load_config([str(run)], [], runs=False)


def change(run, **values):
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values",
    [
        {"task": "${oc.create:{use: 'code_of_others:TinyTask'}}"},
        {"task": {"use": "${optim.options.a}"}},
        {"task": {"use": "digits", "list": ["a", "x${run.name}:y"]}},
        {"data": {"path": "${oc.env:PATH}"}},
    ],
)
def test_a_stored_config_has_no_references(run, values, tmp_path):
    change(run, **values)
    with pytest.raises(UsageError, match=r"config.json has a reference .* add .* to the command"):
        load_config([str(run)], [], runs=False)
    assert not (tmp_path / "ran").exists()


def test_the_command_line_may_replace_a_stored_text_like_a_reference(run):
    change(run, task={"use": "tests.support.tiny:TinyTask", "shown": "${x}"}, hooks=[])
    with pytest.raises(UsageError, match="task.shown is not a known key .value .\\$.x"):
        load_config([str(run)], ["task.shown='\\${x}'"], runs=False)


@pytest.mark.parametrize(
    ("task", "override"),
    [
        ({"use": "os:system"}, "task={shown: 32}"),
        ({"use": "digits", "loss": "os:system"}, "task={use: digits}"),
        ({"use": "digits", "deep": {"a": ["os:system"]}}, "task={deep: {b: 1}}"),
        ({"use": "digits", "loss": "os:system"}, "task.other=os:system"),
    ],
)
def test_an_override_of_a_section_does_not_vouch_for_the_rest_of_it(other, task, override):
    change(other, task=task)
    with pytest.raises(UsageError, match="is 'os:system' in .*config.json, which belongs to"):
        load_config([str(other)], [override], runs=False)


def test_a_config_file_that_refers_to_anothers_value_does_not_vouch_for_it(other, tmp_path):
    change(other, task={"use": "digits"}, optim={"options": {"a": "code_of_others:TinyTask"}})
    (tmp_path / "mine.yaml").write_text("task:\n  use: ${optim.options.a}\n")
    with pytest.raises(UsageError, match=r"task.use is .* by a reference .* belongs to another"):
        load_config([str(other), "mine.yaml"], [], runs=False)
    assert not (tmp_path / "ran").exists()


def test_a_dotted_key_of_anothers_run_is_not_the_key_of_the_command_line(other):
    change(other, task={"use": "digits"}, model={"a.b": "os:system"})
    with pytest.raises(UsageError, match="model.a.b is 'os:system'"):
        load_config([str(other)], ["model.a.b=os:path"], runs=False)
    change(other, model={"a.b": "os:system"}, task={"use": "digits"})
    with pytest.raises(UsageError, match="model.a.b is 'os:system'"):
        load_config([str(other)], ["model.a={b: 'os:system'}"], runs=False)


def test_hooks_of_others_are_not_imported_by_a_check_of_the_config(other, tmp_path):
    change(other, hooks=[{"use": "code_of_others:H", "options": {}}])
    loaded = load_config([str(other)], ["task.use=tests.support.tiny:TinyTask"], runs=False)
    with pytest.raises(UsageError, match=r"hooks.use is 'code_of_others:H'"):
        check(loaded.config, loaded.composed, 1)
    assert not (tmp_path / "ran").exists()
