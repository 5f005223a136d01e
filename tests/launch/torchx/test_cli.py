"""TorchX's commands report what users and backends have done wrong in one sentence."""

import argparse
import re

import pytest
from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
from torchx.cli.main import create_parser, get_sub_cmds

from launch.history import launch_log
from launch.torchx.cli import LogCommand
from launch.torchx.schedulers import create
from tests.launch.launching import NIGHTLY, dryrun
from tests.support.runs import TINY
from train.exits import UsageError


@pytest.fixture
def torchx(tmp_path, monkeypatch, capsys):
    """Runs a command in this process; returns its exit code, and what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-engine")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    (tmp_path / ".torchxconfig").touch()
    monkeypatch.setenv("TORCHXCONFIG", f"{tmp_path}/.torchxconfig")

    def call(*words):
        # TorchX 0.7.0 keeps which options it has seen, and the configuration, in classes.
        monkeypatch.setattr(torchxconfig, "_subcmd_configs", {}, raising=False)
        monkeypatch.setattr(torchxconfig, "called_args", set(), raising=False)
        monkeypatch.setattr(ArgOnceAction, "called_args", set(), raising=False)
        args: argparse.Namespace = create_parser(get_sub_cmds()).parse_args(words)
        with pytest.raises(SystemExit) as caught:
            args.func(args)
        return caught.value.code, capsys.readouterr().err

    return call


pytestmark = pytest.mark.process

FIT = ("isorun.fit", *TINY)
SAID = "\x1b[2J\x1b[31m3 %\x1b[0m\r4 %\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("-s", "slurm", *FIT), 64, "Cannot submit the job to slurm: sbatch is not installed"),
        (("-s", "local_docker", "--workspace=", *FIT), 75, "Docker engine does not answer (No such"),
        (("-s", "local_docker", *FIT), 75, "Docker engine does not answer (No such"),
        (("-s", "slurm", "-cfg", "partion=a", *FIT), 64, "partion is not an option of slurm (-cfg partion=a); did you mean partition?"),
        (("-s", "slurm", "-cfg", "partition", *FIT), 64, "-cfg must be KEY=VALUE,..."),
        (("-s", "local_docker", "-cfg", "privileged=yes", *FIT), 64, "privileged must be true or false, but is 'yes'"),
        (("-s", "kubernetes_job", "-cfg", "stop_deadline=soon", *FIT), 64, "but is 'stop_deadline=soon'"),
        (("-s", "kubernetes", *FIT), 64, "The options of kubernetes are wrong: Required run option: queue"),
        pytest.param(
            ("-s", "aws_batch", "--workspace=", "-cfg", "queue=q", "isorun.fit", "-j", "2x1", *TINY),
            64, "isorun supports one node with aws_batch",
            marks=pytest.mark.skipif(NIGHTLY, reason="TorchX's nightly has no aws_batch"),
        ),
        (("isorun.fit", "--check", "maybe", *TINY), 64, "isorun.fit: --check must be True or False, but is 'maybe'"),
        (("isorun.fit", "--allow_changes", "1", *TINY), 64, "--allow_changes must be True or False, but is '1'"),
        (("isorun.fit", "--cpu", "many", *TINY), 64, "isorun.fit: argument --cpu: invalid int value: 'many'; see `torchx run isorun.fit --help`"),
        (("isorun.fit", "--env", "A", *TINY), 64, "isorun.fit: --env must be KEY=VALUE,..., but is 'A'"),
        (("isorun.fitt",), 64, "'isorun.fitt' is not a component of isorun; did you mean isorun.fit?"),
        (("isorun.fit", "--cpu", "1", "--cpu", "2", *TINY), 64, "Repeated Command Line Arguments"),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_be_is_refused_in_one_sentence(torchx, words, code, said):
    got, told = torchx("run", *words)
    assert (got, said in told) == (code, True), told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("status", "nothing"), 64, "nothing is not of the form"),
        (("status", "nope://a/b"), 64, "nope"),
        (("status", "local_docker://a/b"), 75, "Docker engine does not answer"),
        (("cancel", "local_docker://a/b"), 75, "Docker engine does not answer"),
        (("describe", "local_docker://a/b"), 75, "Docker engine does not answer"),
        (("list", "-s", "local_docker"), 75, "Cannot list the jobs of local_docker"),
        (("log", "local_docker://a/b"), 75, "Docker engine does not answer"),
        (("list", "-s", "kubernetes_job"), 64, "No cluster is configured"),
    ],
)
def test_the_other_commands_are_as_short(torchx, words, code, said):
    got, told = torchx(*words)
    assert (got, said in told) == (code, True), told
    assert "Traceback" not in told


def test_a_value_in_the_configuration_file_is_checked_too(torchx, tmp_path):
    (tmp_path / ".torchxconfig").write_text("[local_docker]\nprivileged = perhaps\n")
    code, told = torchx("run", "-s", "local_docker", *FIT)
    assert code == 64
    assert re.search("The options of local_docker are wrong: .*perhaps.*; correct -cfg or", told)


def test_arguments_in_the_configuration_file_are_checked_too(torchx, tmp_path):
    text = "[cli:run]\ncomponent = isorun.fit\n[component:isorun.fit]\ncheck = maybe\n"
    (tmp_path / ".torchxconfig").write_text(text)
    assert "--check must be True or False, but is 'maybe'" in torchx("run", "--", "--cpu", "2")[1]


@pytest.mark.parametrize(
    ("terminal", "shown"), [(True, "\\x1b[2J\x1b[31m3 %\x1b[0m\r4 %\n"), (False, SAID)]
)
def test_no_terminal_obeys_a_log(monkeypatch, capsys, terminal, shown):
    monkeypatch.setattr("torchx.cli.cmd_log.get_logs", lambda file, *_, **__: file.write(SAID))
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    parser = argparse.ArgumentParser()
    LogCommand().add_arguments(parser)
    LogCommand().run(parser.parse_args(["slurm://torchx/7/fit/0"]))
    assert capsys.readouterr().out == shown


def test_a_failure_after_the_submission_says_that_the_job_runs(torchx, monkeypatch):
    """Otherwise a user who follows exit code 75 would submit it twice."""
    from torchx.schedulers.docker_scheduler import DockerScheduler

    monkeypatch.setattr(DockerScheduler, "schedule", lambda *_: "job-1")
    code, told = torchx("run", "-s", "local_docker", "--workspace=", *FIT)
    assert code == 75
    assert "local_docker://torchx/job-1 was submitted before, so do not submit it again" in told
    assert "Traceback" not in told


@pytest.mark.skipif(NIGHTLY, reason="TorchX's nightly refuses them itself")
def test_unknown_options_of_a_call_from_python_are_refused():
    with pytest.raises(UsageError, match="partion is not an option of slurm .* did you mean part"):
        dryrun("isorun.fit", *TINY, scheduler="slurm", partion="gpu")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"config": "configs/digits.yaml"}, "config must be a list of texts, such as .* but is 'conf"),
        ({"config": [1]}, r"config must be a list of texts, .*, but is \[1\]"),
        ({"check": "maybe"}, "check must be True or False, but is 'maybe'"),
        ({"cpu": "2"}, "cpu must be a whole number, but is '2'"),
        ({"cpu": True}, "cpu must be a whole number, but is True"),
        ({"env": {"A": 1}}, "env must be a dict of texts, .* but is {'A': 1}"),
        ({"env": "A=1"}, "env must be a dict of texts"),
        ({"mounts": "type=bind"}, "mounts must be a list of texts, .* or None, but is"),
        ({"j": 2}, "j must be a text, but is 2"),
    ],
)  # fmt: skip
def test_arguments_of_a_wrong_type_are_refused_in_python(given, said):
    from launch.torchx.components import fit

    with pytest.raises(UsageError, match=said):
        fit(*TINY, **given)
    with pytest.raises(UsageError, match="overrides must be a text, but is 3"):
        fit(*TINY, 3)


def test_no_container_of_a_job_stays_if_one_is_refused(monkeypatch):
    """Node 0 would wait for a node that does not exist."""
    from torchx.schedulers.docker_scheduler import DockerScheduler

    removed = []

    class Container:
        def remove(self, force):
            removed.append(force)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "/mount")

    scheduler = create("local_docker", "session")
    monkeypatch.setattr(DockerScheduler, "schedule", refuse)
    monkeypatch.setattr(scheduler, "_get_containers", lambda _: [Container(), Container()])
    info = dryrun("isorun.fit", "-j", "2x1", *TINY, scheduler="local_docker")
    with pytest.raises(
        UsageError, match="Cannot submit the job to local_docker: Permission denied"
    ):
        scheduler.schedule(info)
    assert removed == [True, True]
    assert not list(launch_log.read())
