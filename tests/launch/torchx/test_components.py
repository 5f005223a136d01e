import re

import pytest

from launch.agent.command import is_doctor
from launch.agent.options import parse
from launch.doctor.cli import parse as doctor
from tests.launch.launching import app, dryrun, fit, role
from tests.support.runs import ROOT, TINY
from train.exits import UsageError


def agent(made, **environ):
    """The options that the agent parses from these arguments on one of the nodes."""
    words = [w.replace("${rank0_env}", "NODE0").replace("${replica_id}", "0") for w in made.args]
    assert words[:2] == ["-m", "launch.agent"]
    return parse(words[2:], {"NODE0": "first", **environ})


def test_one_role_starts_the_agent_with_the_training_under_it():
    made = fit("-j", "2x4", "--max_restarts", "3", "--preflight", "full")
    assert made.entrypoint == "python"
    assert made.args == [
        "-m", "launch.agent", "--nnodes", "2", "--nproc-per-node", "4",
        "--rdzv-host-env", "${rank0_env}", "--node-rank", "${replica_id}",
        "--max-restarts", "3", "--preflight", "full",
        "--", "python", "-m", "train", "fit", *TINY,
    ]  # fmt: skip
    assert (made.num_replicas, made.min_replicas) == (2, None)
    options = agent(made)
    assert (options.host, options.processes, options.max_restarts) == ("first", 4, 3)


def test_several_config_files_are_one_argument_since_torchx_refuses_repeated_flags(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("length: {epochs: 1}\n")
    made = role("isorun.fit", "--config", f"{ROOT}/configs/digits.yaml,{more}", "optim.lr=0.1")
    assert made.args[-6:] == [
        "fit", "--config", f"{ROOT}/configs/digits.yaml", "--config", str(more), "optim.lr=0.1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("j", "nodes", "least", "processes"),
    [("4", 1, None, 4), ("2x4", 2, None, 4), ("1:3x2", 3, 1, 2), ("1x1", 1, None, 1)],
)
def test_j(j, nodes, least, processes):
    made = fit("-j", j)
    assert (made.num_replicas, made.min_replicas) == (nodes, least)
    options = agent(made)
    assert (options.min_nodes, options.max_nodes) == (least or nodes, nodes)
    assert options.processes == processes


def test_auto_starts_a_process_per_gpu_of_the_resource():
    made = fit("-h", "gpu_l4_4")
    assert made.args[5] == "4"
    assert fit().args[5] == "auto"


@pytest.mark.parametrize("j", ["0x1", "1x0", "2:1x1", "x2", "2x", "two", "1:2", "", "-1x2", "1x00"])
def test_an_invalid_j_is_reported(j):
    with pytest.raises(UsageError, match=r"-j is .*, but must be NODESxPROCESSES"):
        app("isorun.fit", f"-j={j}", *TINY)


def test_the_default_memory_is_enough_to_import_torch():
    """TorchX's default is 1024 MB, with which a rank is killed at its start."""
    assert fit("-j", "1x2").resource.memMB == 2 * 8192
    assert fit("-j", "1x2").resource.cpu == 4
    assert fit("-j", "1x2", "--gpu", "2").resource.memMB == 2 * 16384
    given = fit("-j", "1x2", "--cpu", "7", "--memMB", "9000").resource
    assert (given.cpu, given.memMB, given.gpu) == (7, 9000, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("-h", "gpu_l4_1", "--cpu", "3"),
            "-h gpu_l4_1 sets cpu, gpu and memMB, but --cpu 3 is given too",
        ),
        (
            ("-h", "gpu_l4_2", "-j", "1x4"),
            "4 processes per node, but -h gpu_l4_2 gives each node 2",
        ),
        (("--gpu", "1", "-j", "1x2"), "2 processes per node, but --gpu gives each node 1"),
        (("--memMB", "-1"), "--memMB must not be negative, but is -1"),
        (("-h", "gpu_l4"), "-h is 'gpu_l4', which is not a named resource; did you mean gpu_l4_"),
        (("--max_restarts", "-2"), "--max_restarts must not be negative, but is -2"),
        (("--max_retries", "-2"), "--max_retries must not be negative, but is -2"),
        (("--preflight", "ful"), "--preflight is 'ful', but must be one of auto, off, quick, full"),
        (
            ("--mounts", "type=bind,src=/a"),
            "--mounts type=bind,src=/a: dst is missing; write type=",
        ),
        (("--mounts", "src=/a,dst=/b"), "type must be specified first; write type=bind"),
    ],
)
def test_an_invalid_placement_is_reported_in_one_sentence(words, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        app("isorun.fit", *words, *TINY)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("task.use=digits", "optim.lrr=1"),
            "optim.lrr is not a known key (value 1, from command line); did you",
        ),
        (("task.use=digits", "optim.lr=fast"), "optim.lr"),
        (
            ("--config", "no.yaml"),
            "The config file 'no.yaml' (--config) does not exist in",
        ),
        (("task.use=digits", "-j", "2x2"), "The option '-j' comes after a key=value override"),
        (("-j", "1x16", *TINY), "batch.global_batch_size"),
    ],
)
@pytest.mark.parametrize("component", ["isorun.fit", "isorun.doctor"])
def test_a_config_error_is_reported_before_submission(component, words, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        app(component, *words, scheduler="slurm")


def test_unchecked_config_files_can_exist_only_in_the_image():
    made = role("isorun.fit", "--check", "False", "--config", "/app/x.yaml", "run.name=far")
    assert made.args[-3:] == ["--config", "/app/x.yaml", "run.name=far"]


def test_options_are_passed_to_the_app(home):
    made = app(
        "isorun.fit", "--image", "mine:1", "--env", "A=1,B=2", "--max_retries", "4",
        "--metadata", "team=us", "--name", "My Job!", "--allow_changes", "True", "--dry_run", "True",
        "--mounts", "type=bind,src=/a,dst=/b,readonly,type=volume,src=v,dst=/c", *TINY,
    )  # fmt: skip
    (only,) = made.roles
    assert (made.name, made.metadata) == ("my-job", {"team": "us"})
    assert (only.image, only.max_retries) == ("mine:1", 4)
    assert (only.env["A"], only.env["B"]) == ("1", "2")
    assert [mount.dst_path for mount in only.mounts] == ["/b", "/c"]
    assert only.port_map == {"c10d": 29500}
    assert {"--allow-changes", "--dry-run"} <= {*only.args}


def test_a_dollar_in_an_override_is_passed_to_the_config():
    """TorchX would replace $$ and ${app_id}."""
    info = dryrun("isorun.fit", *TINY, "run.name=x-${length.steps}", "track.wandb_tags=['$$5']")
    (node,) = info.request.role_params["fit"]
    assert node.args[-2:] == ["run.name=x-${length.steps}", "track.wandb_tags=['$$5']"]


def test_the_name_of_the_job_is_that_of_the_run():
    assert app("isorun.fit", *TINY, "run.name=Big_Run.2").name == "big-run-2"
    assert app("isorun.fit", *TINY, "run.name=7b").name == "run-7b"


def test_the_default_image_follows_the_hardware():
    assert fit().image == "isorun:cpu"
    assert fit("-h", "gpu_t4_1").image == "isorun:cuda"


def test_doctor_checks_nodes_without_training():
    made = role("isorun.doctor", "-j", "2x1", "--level", "quick", *TINY)
    options = agent(made)
    assert (options.preflight, options.preflight_only) == ("off", False)
    arguments = doctor(options.command[options.command.index("launch.doctor") + 1 :])
    assert arguments.level == "quick"
    assert arguments.command == ["python", "-m", "train", "fit", *TINY]
    assert is_doctor(options.command)


@pytest.mark.parametrize("level", ["off", "auto", "ful"])
def test_the_doctor_has_two_levels(level):
    with pytest.raises(UsageError, match=f"--level is '{level}', but must be one of quick, full"):
        app("isorun.doctor", "--level", level, *TINY)


def test_run_takes_any_command():
    made = role("isorun.run", "-j", "1x2", "--", "python", "prepare.py", "--fast", "--fast")
    assert made.args[made.args.index("--") + 1 :] == ["python", "prepare.py", "--fast", "--fast"]
    with pytest.raises(UsageError, match=r"isorun\.run needs a command"):
        role("isorun.run")


def test_a_component_is_found_by_its_path():
    words = ("-j", "1x2", *TINY)
    by_path = app(f"{ROOT}/launch/torchx/components.py:fit", *words)
    assert by_path.roles[0].args == app("isorun.fit", *words).roles[0].args
