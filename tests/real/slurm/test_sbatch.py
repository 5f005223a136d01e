"""``configs/slurm/fit.sbatch`` on a real Slurm: jobs train, stop and resume."""

import json

import pytest

from tests.real.slurm.conftest import SBATCH, Job, attempts, wait_until
from tests.support.runs import ROOT, TINY, checkpoints, metrics, run
from train.parity.compare import curve, largest_difference

pytestmark = pytest.mark.slow

TWO = ("--nodes=2", "--cpus-per-task=2")
KILLED = "task.kill_at_step=5"
LONG = ("task.sleep=0.05", "length.steps=100", "loader.workers=1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run("fit", directory, *LONG, "task.sleep=0", "batch.micro_batch_size=6")
    return directory


def assert_undisturbed(directory, undisturbed):
    """The run is complete and equals the run without faults."""
    assert max(row["step"] for row in metrics(directory)) == 100
    assert "all well" in run("verify", directory, *LONG).stdout
    key = "train/loss"
    assert largest_difference(curve(undisturbed, key), curve(directory, key)) <= 1e-5


def identity(directory):
    return json.loads((directory / "run.json").read_text())["id"]


def test_two_nodes_train_to_the_end(user, tmp_path):
    user.environment["PET_PREFLIGHT"] = "auto"
    job = user.fit(tmp_path / "run", options=TWO)
    assert job.end() == ("COMPLETED", 0), job.log
    assert "Preflight (quick): 2 nodes" in job.log
    assert "Placement: 2 x cpu on 2 hosts (node1, node2)" in job.log
    assert "all well" in run("verify", tmp_path / "run").stdout
    assert job.restarts == 0


def test_a_job_from_the_shell_of_an_allocation_gets_its_own_resources(user, tmp_path):
    """sbatch passes on the allocation's tasks, cores and memory."""
    salloc = ("salloc", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem-per-cpu=200")
    submit = ("sbatch", "--parsable", f"--output={user.home}/%j.out", "--no-requeue", *TWO)
    words = (*TINY, f"run.dir={tmp_path / 'run'}", KILLED)
    done = user.run(*salloc, *submit, "--mem=2000", SBATCH, *words)
    job = Job(user, done.stdout.strip())
    assert job.end() == ("FAILED", 137), job.log
    assert "2 hosts (node1, node2)" in job.log
    assert "submitted with --no-requeue, so it is not requeued" in job.log
    assert job.restarts == 0


def test_an_infrastructure_failure_is_requeued(user, tmp_path):
    """A rank is killed in the first attempt."""
    job = user.fit(tmp_path / "run", KILLED)
    assert job.end() == ("COMPLETED", 0), job.log
    assert job.restarts == 1
    assert "exit code 137; the job is requeued" in job.log
    told = (ROOT / f"isorun-{job.number}.failures").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in told] == ["exit code 137 on node1"]
    assert "all well" in run("verify", tmp_path / "run", KILLED).stdout


def test_a_failure_that_would_repeat_is_not_requeued(user, tmp_path):
    wrong = {
        64: ("optim.lrr=1",),
        65: ("data.fail_at=20",),
        78: ("task.nan_at_steps=[2,3,4,5,6,7]", "optim.max_skipped_steps=2"),
    }
    jobs = {code: user.fit(tmp_path / str(code), *words) for code, words in wrong.items()}
    for code, job in jobs.items():
        assert job.end() == ("FAILED", code), job.log
        assert job.restarts == 0


def test_a_stopped_job_saves_and_another_job_resumes(user, tmp_path, undisturbed):
    directory = tmp_path / "run"
    job = user.fit(directory, *LONG, options=(*TWO, "--no-requeue"))
    job.trains(directory)
    user.run("scancel", "--signal=TERM", job.number)
    assert job.end() == ("FAILED", 143), job.log
    assert checkpoints(directory)
    born = identity(directory)

    job = user.fit(directory, *LONG, options=TWO)
    assert job.end() == ("COMPLETED", 0), job.log
    assert identity(directory) == born
    assert_undisturbed(directory, undisturbed)


def test_a_cancelled_job_saves_and_is_not_requeued(user, tmp_path):
    directory = tmp_path / "run"
    job = user.fit(directory, *LONG, options=TWO)
    job.trains(directory)
    user.run("scancel", job.number)
    assert job.end()[0] == "CANCELLED"
    wait_until(lambda: "ended first: preempted (143)" in job.log, lambda: job.log)
    assert checkpoints(directory)
    assert job.restarts == 0


def test_a_preempted_job_resumes_later(user, tmp_path, undisturbed):
    directory = tmp_path / "run"
    job = user.fit(directory, *LONG, options=(*TWO, "--partition=low"))
    job.trains(directory)
    urgent = user.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    assert urgent.end() == ("COMPLETED", 0)
    assert job.end() == ("COMPLETED", 0), job.log
    assert job.restarts == 1
    assert [attempt["resumed_from_step"] for attempt in attempts(directory)][1] > 0
    assert_undisturbed(directory, undisturbed)


def test_before_the_time_limit_a_checkpoint_is_saved(user, tmp_path):
    directory = tmp_path / "run"
    job = user.fit(directory, *LONG, "length.steps=100000", options=TWO)
    job.trains(directory)
    # Lowers the time limit so that less time is left than the two minutes of --signal.
    user.run("scontrol", "update", f"jobid={job.number}", f"timelimit={minutes(job) + 2}")
    job.wait_for(lambda: job.restarts == 1)
    saved = max(checkpoints(directory))
    user.run("scontrol", "update", f"jobid={job.number}", "timelimit=60")
    job.wait_for(lambda: len(attempts(directory)) == 2)
    assert "exit code 143; the job is requeued" in job.log
    assert [attempt["resumed_from_step"] for attempt in attempts(directory)] == [None, saved]


def minutes(job):
    hours, minutes, _ = job.facts["RunTime"].split(":")
    return int(hours) * 60 + int(minutes)


def test_srun_alone_starts_ranks(user, tmp_path):
    done = user.run(
        "srun", "--nodes=2", "--ntasks=2", "python", "-m", "train", "fit", *TINY,
        f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "started by srun" in done.stdout
    assert "2 hosts (node1, node2)" in done.stdout
    assert "all well" in run("verify", tmp_path / "run").stdout
