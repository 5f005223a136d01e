import json
import shlex

import pytest
import yaml
from torchx.runner import get_runner

from launch import secrets
from launch.history import launch_log
from launch.kubernetes import checks
from launch.torchx.schedulers import SCHEDULERS
from launch.torchx.schedulers.watched import LOCAL
from tests.launch.launching import app, dryrun
from tests.support.runs import TINY
from train.exits import UsageError

SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("WANDB_API_KEY", "abc", True), ("TOKEN", "abc", True), ("WANDB_API_KEY", "", False),
        ("NCCL_DEBUG", "INFO", False), ("TOKENIZERS_PARALLELISM", "false", False),
        ("DATABASE_URL", "postgres://u:p@h/d", True), ("DATABASE_URL", "postgres://h/d", False),
    ],
)  # fmt: skip
def test_variables_that_hold_secrets(name, value, secret):
    assert secrets.is_secret(name, value) is secret


@pytest.mark.parametrize("component", ["isorun.fit", "isorun.doctor"])
@pytest.mark.parametrize(
    ("scheduler", "instead"), [("slurm", "`export` it"), ("kubernetes", "Secret")]
)
def test_a_secret_for_a_remote_scheduler_is_refused(component, scheduler, instead):
    cfg = {"queue": "q"} if scheduler == "kubernetes" else {}
    with pytest.raises(UsageError, match="--env gives WANDB_API_KEY in plain text") as refused:
        dryrun(component, "--env", f"WANDB_API_KEY={SECRET}", *TINY, scheduler=scheduler, **cfg)
    assert instead in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_password_in_a_variable_with_another_name_is_refused():
    with pytest.raises(UsageError, match="--env gives PROXY in plain text"):
        dryrun("isorun.fit", "--env", f"PROXY=http://me:{SECRET}@proxy", *TINY, scheduler="slurm")


def test_a_secret_among_the_arguments_of_a_remote_job_is_refused():
    words = ["--", "python", "x.py", f"--db=postgres://me:{SECRET}@db/x"]
    dryrun("isorun.run", *words)
    with pytest.raises(UsageError, match="argument '--db=postgres://me:") as refused:
        dryrun("isorun.run", *words, scheduler="slurm")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--password", SECRET], "--password ***"), (["--api-key", SECRET], "--api-key ***"),
        (["env", f"WANDB_API_KEY={SECRET}"], "WANDB_API_KEY=***"),
        ([f"checkpoint.mirror.options.password={SECRET}"], "checkpoint.mirror.options.password=***"),
        (["bash", "-c", f"x --password {SECRET}"], "x --password ***"),
    ],
)  # fmt: skip
def test_arguments_with_secret_names_are_refused(words, shown):
    command = ["python", "x.py", *words]
    with pytest.raises(UsageError) as refused:
        secrets.refuse({}, command, "slurm")
    assert f"has the argument {shown!r}, which gives a secret" in str(refused.value)
    assert SECRET not in str(refused.value)
    pod = {"name": "x", "image": "x", "command": command[:1], "args": command[1:]}
    job = {"kind": "Job", "metadata": {"name": "run"}}
    with pytest.raises(UsageError, match="The command of the Job run has the argument") as refused:
        checks._secrets(job, pod)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--password", "$$DB_PASSWORD"], ["--password=$(DB_PASSWORD)"], ["--token", "/run/secrets/x"],
        ["--key", "image"], ["data.key=image"], ["DATASET_KEY=imagenet-1k/train"], ["--password"],
        ["bash", "-c", 'x --password "$$DB_PASSWORD"'], ["--token-file", "x"],
    ],
)  # fmt: skip
def test_references_and_other_arguments_are_accepted(words):
    secrets.refuse({}, ["python", "x.py", *words], "slurm")
    checks._secrets({"kind": "Job", "metadata": {"name": "run"}}, {"args": words})


@pytest.mark.parametrize("secret", [SECRET, 'it\'s a "pass" $$word', "two\nlines-of-it"])
def test_a_request_shows_no_secret_of_a_command(secret):
    words = ["python", "x.py", "--password", secret, f"MY_TOKEN={secret}", "--epochs", "5"]
    spelled = (
        str(words),
        json.dumps(words),
        shlex.join(words),
        yaml.safe_dump(words),
        f"x: {secret}",
    )
    for text in (*spelled, *(text.replace("$$", "$") for text in spelled)):
        shown = secrets.hide(text, [], [words])
        for part in ("s3cr3t", "word", "lines-of-it"):
            assert part not in shown.replace("--password", "")
        assert "--epochs" in shown or text.startswith("x: ")


@pytest.mark.normal
def test_other_variables_are_passed_on():
    dryrun("isorun.fit", "--env", "NCCL_DEBUG=INFO,NUM_KEYS=2", *TINY, scheduler="slurm")


def test_a_local_job_gets_its_secrets():
    info = dryrun("isorun.fit", "--env", f"WANDB_API_KEY={SECRET}", *TINY)
    assert info.request.role_params["fit"][0].env["WANDB_API_KEY"] == SECRET


@pytest.mark.normal
def test_a_secret_is_replaced_by_a_placeholder_if_the_scheduler_is_not_checked():
    """Such as a scheduler of another package, or one that TorchX found in another way."""
    from torchx.components.dist import ddp  # noqa: F401 - TorchX's components are loaded
    from torchx.schedulers.slurm_scheduler import create_scheduler
    from torchx.specs import materialize_appdef
    from torchx.specs.finder import get_component

    made = materialize_appdef(
        get_component("isorun.fit").fn, ["--env", f"WANDB_API_KEY={SECRET}", *TINY]
    )
    unwatched = create_scheduler("session")
    assert SECRET not in repr(unwatched.submit_dryrun(made, {}))
    assert "withheld-by-isorun" in made.roles[0].env["WANDB_API_KEY"]


def test_a_secret_that_was_added_to_an_app_later_is_refused():
    made = app("isorun.fit", *TINY)
    made.roles[0].env["HF_TOKEN"] = SECRET
    with get_runner() as runner, pytest.raises(UsageError, match="--env gives HF_TOKEN"):
        runner.dryrun(made, "slurm")


@pytest.mark.normal
def test_components_of_others_are_not_checked():
    dryrun("utils.echo", scheduler="slurm")
    dryrun("dist.ddp", "--script", "x.py", "--env", "SOME_KEY=1", scheduler="slurm")


def test_only_local_schedulers_count_as_local():
    assert set(LOCAL) == {name for name in SCHEDULERS if name.startswith("local")}


def test_the_launch_log_holds_no_secret_that_docker_copies(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    info = dryrun("isorun.fit", *TINY, scheduler="local_docker", copy_env=["WANDB_*"])
    assert SECRET in str(info)
    made = getattr(info, "app", None) or info._app
    launch_log.record_start("local_docker://torchx/x", "local_docker", made, str(info))
    assert SECRET not in launch_log.path().read_text()


def test_the_launch_log_holds_no_secret():
    info = dryrun("isorun.fit", "--env", f"WANDB_API_KEY={SECRET}", *TINY)
    made = getattr(info, "app", None) or info._app
    assert made.roles[0].env["WANDB_API_KEY"] == SECRET
    launch_log.record_start("local_cwd://torchx/x", "local_cwd", made, str(info))
    (line,) = launch_log.read()
    assert SECRET not in json.dumps(line)
    assert SECRET not in launch_log.path().read_text()
    assert line["env"]["WANDB_API_KEY"] == "***"
    assert "***" in line["request"]


def test_the_launch_log_holds_no_secret_of_the_command_line():
    info = dryrun("isorun.run", "--", "python", "x.py", "--password", SECRET, f"HF_TOKEN={SECRET}",
                  f"--db=postgres://me:{SECRET}@db/x")  # fmt: skip
    made = getattr(info, "app", None) or info._app
    assert SECRET in str(info)
    launch_log.record_start("local_cwd://torchx/x", "local_cwd", made, str(info))
    (line,) = launch_log.read()
    assert line["command"][-4:] == [
        "--password",
        "***",
        "HF_TOKEN=***",
        "--db=postgres://me:***@db/x",
    ]
    assert SECRET not in launch_log.path().read_text()
    assert SECRET in " ".join(made.roles[0].args)
