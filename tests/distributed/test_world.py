"""Rank and world size from the environment of each launcher."""

import pytest

from train.distributed.world import World, expand_counts, find_world, first_host, world_warnings
from train.exits import UsageError

RENDEZVOUS = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_without_a_launcher_there_is_one_process():
    world = find_world({})
    assert (world.rank, world.world_size, world.local_world_size) == (0, 1, 1)
    assert world.launcher == "python"


@pytest.mark.parametrize(
    ("more", "launcher", "local"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, "torchrun", 2),
        ({"TORCHELASTIC_RUN_ID": "x", "ACCELERATE_USE_CPU": "true"}, "accelerate", 1),
        ({"CROSS_RANK": "0", "LOCAL_SIZE": "4"}, "deepspeed", 4),
        ({}, "unknown", 1),
    ],
)
def test_torch_variables(more, launcher, local):
    world = find_world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **RENDEZVOUS, **more})
    assert (world.rank, world.world_size, world.local_rank) == (3, 4, 1)
    assert world.launcher == launcher
    assert world.local_world_size == local


def test_blank_variables_count_as_not_set():
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    environ = dict.fromkeys(names, " ")
    assert find_world(environ) == find_world({})
    assert environ == {}, "torch and Accelerate must not read blank values"
    assert find_world({**SLURM, **dict.fromkeys(names, "")}).launcher == "srun"


SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "gpu[07-08],login",
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "2",
}  # fmt: skip


def test_srun_is_translated():
    environ = dict(SLURM)
    world = find_world(environ)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (5, 7, 1, 3)
    assert world.launcher == "srun"
    assert environ["RANK"] == "5"
    assert environ["WORLD_SIZE"] == "7"
    assert environ["MASTER_ADDR"] == "gpu07"
    assert 20000 <= int(environ["MASTER_PORT"]) < 50000
    other = {**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert find_world(other).local_world_size == 4
    assert other["MASTER_PORT"] == environ["MASTER_PORT"]


OF_TORCH = {"RANK": "5", "WORLD_SIZE": "7", **RENDEZVOUS}


@pytest.mark.parametrize(
    ("more", "local_rank", "local_world_size"),
    [
        (SLURM, 1, 3),
        ({**SLURM, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, 2, 4),
        ({**SLURM, "SLURM_PROCID": "0"}, None, 1),  # several ranks in one of Slurm's tasks
        (
            {
                "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "7",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
            },
            1,
            3,
        ),
        ({"PMI_RANK": "5", "PMI_SIZE": "7", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "3"}, 1, 3),
        ({"PMI_RANK": "5", "PMI_SIZE": "7", "PMI_LOCAL_RANK": "2"}, 2, 1),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_LOCAL_RANK": "2"}, None, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 1, 4),
        ({}, None, 1),
    ],
)  # fmt: skip
def test_a_missing_local_rank_is_that_of_the_program_that_started_the_rank(
    more, local_rank, local_world_size
):
    world = find_world({**OF_TORCH, **more})
    assert world.local_rank_guessed == (local_rank is None)
    assert (world.local_rank, world.local_world_size) == (local_rank or 0, local_world_size)


def test_a_local_rank_that_is_no_number_is_an_error():
    with pytest.raises(UsageError, match="SLURM_LOCALID must be a whole number"):
        find_world({**OF_TORCH, **SLURM, "SLURM_LOCALID": "x"})


def test_a_batch_script_is_not_srun():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "7", "SLURM_JOB_ID": "1"}
    assert find_world(dict(batch)).world_size == 1
    inside = {**SLURM, "RANK": "0", "WORLD_SIZE": "2", **RENDEZVOUS, "TORCHELASTIC_RUN_ID": "x"}
    assert find_world(inside).launcher == "torchrun"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[03-05,9],b", "gpu03"),
        ("r[1,4]-x", "r1-x"),
        ("n01-02", "n01-02"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(hosts, first):
    assert first_host(hosts) == first


def test_slurm_task_counts():
    assert expand_counts("4(x2),3") == [4, 4, 3]
    assert expand_counts("1") == [1]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANK": "0"}, "RANK is set in the environment ('0'), but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment ('2'), but RANK is not"),
        ({"RANK": "two", "WORLD_SIZE": "2", **RENDEZVOUS}, "RANK must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", **RENDEZVOUS},
            "RANK must be less than WORLD_SIZE, 2, but is 2 (environment)",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        *[
            (
                {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": port},
                f"MASTER_PORT must be a port, 1 to 65535, but is {port!r} (environment)",
            )
            for port in ("abc", "0", "99999", "-1")
        ],
        (
            {"RANK": "\N{SUPERSCRIPT TWO}", "WORLD_SIZE": "4", **RENDEZVOUS},
            "RANK must be a whole number",
        ),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS must be a whole number"),
        ({**SLURM, "SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID must be a whole number"),
    ],
)
def test_contradictions_are_errors(environ, expected):
    with pytest.raises(UsageError) as error:
        find_world(environ)
    assert expected in str(error.value)


def world(launcher="python", local=1):
    return World(0, local, 0, local, launcher, "here")


def test_missing_processes_and_gpus_are_reported(tmp_path):
    launch = ["python", "accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "train"]
    [text] = world_warnings(world(), 0, launch)
    assert text.startswith("accelerate launch was asked for 2 processes but started 1")
    assert world_warnings(world("accelerate", 2), 0, launch) == []
    file = tmp_path / "accelerate.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    launch = ["python", "accelerate", "launch", f"--config_file={file}", "--cpu", "-m", "train"]
    [text] = world_warnings(world(), 0, launch)
    assert text.startswith("accelerate launch was asked for 2 processes but started 1")
    assert world_warnings(world(), 0, ["python", "x.py", "--num_processes", "2"]) == []
    [text] = world_warnings(world(), 8, [])
    assert text.startswith("here has 8 GPUs, but the run has 1 process(es) there")


def test_torchrun_variables_without_torchrun(monkeypatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    for launcher in ("unknown", "python"):
        [text] = world_warnings(world(launcher), 0, [])
        assert (
            "PET_NPROC_PER_NODE is 2 (environment), but only torchrun and the node agent read it"
            in text
        )
    monkeypatch.setenv("PET_NNODES", "1:2")
    assert len(world_warnings(world(), 0, [])) == 2
    assert world_warnings(world("torchrun", 2), 0, []) == []
