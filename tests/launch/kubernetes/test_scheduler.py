"""The scheduler kubernetes_job with the small Kubernetes of the tests."""

import itertools
import json
import re
import threading
import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from torchx.schedulers.api import Stream
from torchx.specs import AppState, AppStatus, ReplicaState, macros

from launch.agent.failure import Outcome, RankFailure
from launch.kubernetes import state, trainer
from launch.kubernetes.scheduler import create_scheduler
from launch.torchx.components import fit, run
from launch.torchx.components import sweep as sweep_component
from tests.support.api_server import Server
from tests.support.cluster import Cluster, Refused
from tests.support.lanes import slow, thinned
from tests.support.runs import ROOT
from train.exits import RetryError, UsageError

CFG = {"overlay": "cpu-demo"}


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def scheduler(cluster):
    return create_scheduler("test")


def app(**words):
    return fit(config=["configs/text.yaml"], **{"j": "2x1", "max_retries": 1, **words})


def kinds(cluster):
    return sorted(o["kind"] for o in cluster.objects.values())


def told(scheduler, app_id):
    found = scheduler.describe(app_id)
    return found.state, [r.state for r in found.roles_statuses[0].replicas]


def test_submit_creates_all_objects_and_delete_removes_them(cluster, scheduler):
    app_id = scheduler.submit(app(), CFG)
    assert app_id.startswith("ml:")  # from the context of the kubeconfig
    assert kinds(cluster) == sorted(
        ["ServiceAccount", "PersistentVolumeClaim", "Service", "NetworkPolicy", "Secret", "Job",
         "Pod", "Pod"]
    )  # fmt: skip
    scheduler.delete(app_id)
    # Objects that the runs of a namespace share stay, such as the volume.
    assert kinds(cluster) == ["PersistentVolumeClaim", "ServiceAccount"]
    assert scheduler.describe(app_id) is None
    scheduler.cancel(app_id)  # has no effect
    assert scheduler.submit(app(), CFG) != app_id  # existing objects are not an error


def signing(objects):
    """The secrets of the messages, and where the pods read theirs from."""
    keys = [o["stringData"]["key"] for o in objects if o["kind"] == "Secret"]
    env = [
        item for o in objects if o["kind"] == "Pod" for item in o["spec"]["containers"][0]["env"]
    ]
    return keys, [item["valueFrom"] for item in env if item["name"] == "ISORUN_SECRET"]


@pytest.mark.parametrize(
    ("j", "more"), [("2x1", {}), *map(slow, [("2x1", {"components": ["jobset"]}), ("1:2x1", {})])]
)
def test_each_run_has_a_secret_of_its_own(cluster, scheduler, j, more):
    """With other nodes only: a node alone makes its own. Nobody reads it on the way."""
    found = []
    for nodes in ("1x1", j, j):
        before = list(cluster.objects.values())
        made = scheduler.submit_dryrun(app(j=nodes), {**CFG, **more})
        text = str(made)
        name = scheduler.schedule(made).split(":")[1]
        now = [o for o in cluster.objects.values() if o not in before]
        keys, read = signing(now)
        assert read == [{"secretKeyRef": {"name": name, "key": "key"}}] * (len(keys) * len(read))
        assert "ISORUN_SECRET" not in text
        assert not any(key in json.dumps(o) for key in keys for o in now if o["kind"] != "Secret")
        found.append((keys, len(read)))
    assert [(len(keys), pods) for keys, pods in found] == [(0, 0), (1, 2), (1, 2)]
    assert found[1] != found[2]
    assert all(len(key) == 64 for keys, _ in found for key in keys)


def test_a_secret_that_the_user_has_chosen_is_kept(cluster, scheduler):
    scheduler.submit(app(), {**CFG, "components": ["run-secret"]})
    assert "Secret" not in kinds(cluster)
    assert [p["status"]["phase"] for p in cluster.pods()] == ["Pending"] * 2, (
        "it does not exist yet"
    )


def test_without_permission_to_create_secrets_the_reason_is_told(cluster, scheduler):
    cluster.refuse["POST", "secrets"] = Refused(403, "Forbidden", "secrets is forbidden")
    with pytest.raises(UsageError, match="refused to create the Secret .*secrets is forbidden"):
        scheduler.submit(app(), CFG)
    assert "Job" not in kinds(cluster)


@pytest.mark.parametrize("more", [{"overlay": "sweep"}, {"components": ["wandb-offline-sync"]}])
def test_objects_shared_by_two_runs_are_created_once_and_outlive_both(cluster, scheduler, more):
    made = run("true", j="1x1") if more.get("overlay") == "sweep" else app()
    first, second = (scheduler.submit(made, {**CFG, **more}) for _ in range(2))
    (shared,) = (o for o in cluster.objects.values() if o["kind"] in ("ConfigMap", "CronJob"))
    scheduler.delete(first)
    assert shared in cluster.objects.values(), "an object that the second run needs must stay"
    scheduler.delete(second)
    assert kinds(cluster) == sorted(["PersistentVolumeClaim", "ServiceAccount", shared["kind"]])


def test_states_of_a_successful_run(cluster, scheduler):
    cluster.starts_pods = False
    app_id = scheduler.submit(app(), CFG)
    assert told(scheduler, app_id) == (AppState.PENDING, [ReplicaState.PENDING] * 2)
    for pod in cluster.pods():
        cluster.start(pod)
    assert told(scheduler, app_id) == (AppState.RUNNING, [ReplicaState.RUNNING] * 2)
    found = scheduler.describe(app_id)
    assert (found.roles[0].name, found.roles[0].num_replicas) == ("fit", 2)
    assert found.roles_statuses[0].replicas[1].hostname == "node-1"
    for pod in cluster.pods():
        cluster.end(pod)
    assert told(scheduler, app_id) == (AppState.SUCCEEDED, [ReplicaState.SUCCEEDED] * 2)
    assert scheduler.exit_codes(app_id) == [0, 0]


FIRST = RankFailure(rank=1, local_rank=0, host="text-1", pid=7, exit_code=64,
                error="optim.lrr is not a known key", time=0.0, log=[])  # fmt: skip
RECORD = Outcome(FIRST, [FIRST], []).record(run_id="x")


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("the end of its log", "the end of its log"),
        ("137", "137"),
        ('["x"]', '["x"]'),
        (
            json.dumps(RECORD),
            "Rank 1 on text-1 ended first: exit code 64 (USAGE), optim.lrr is not a known key",
        ),
    ],
)
def test_a_config_error_fails_the_run_at_once_and_is_reported(cluster, scheduler, message, told):
    app_id = scheduler.submit(app(), CFG)
    cluster.end(cluster.pod(1), 64, message)
    found = scheduler.describe(app_id)
    assert found.state == AppState.FAILED
    assert "PodFailurePolicy" in found.msg
    assert f"(exit 64): {told}" in found.msg
    status = AppStatus(found.state, roles=found.roles_statuses, msg=found.msg)
    assert told in " ".join(status.format().split()), "`torchx status` must print the cause"
    assert len([p for p in cluster.pods() if p["status"]["phase"] == "Running"]) == 0
    assert scheduler.exit_codes(app_id)[-1] == 64


def test_infrastructure_failures_are_retried_without_limit_and_others_up_to_max_retries(
    cluster, scheduler
):
    app_id = scheduler.submit(app(max_retries=1), CFG)
    for code in (75, 143, 75, 143, 75):
        cluster.end(cluster.pod(0), code)
        assert scheduler.describe(app_id).state == AppState.RUNNING
    assert scheduler.describe(app_id).num_restarts == 5
    cluster.end(cluster.pod(0), 137)
    assert scheduler.describe(app_id).state == AppState.RUNNING
    cluster.end(cluster.pod(0), 137)
    assert scheduler.describe(app_id).state == AppState.FAILED


def test_a_pod_that_cannot_be_scheduled_or_pulled_is_reported(cluster, scheduler):
    cluster.starts_pods = False
    app_id = scheduler.submit(app(), CFG)
    first, second = cluster.pods()
    first["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
         "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}
    ]  # fmt: skip
    cluster._container(
        second, {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    )
    found = scheduler.describe(app_id)
    assert found.state == AppState.PENDING
    assert "Unschedulable: 0/3 nodes are available" in found.msg
    assert "ImagePullBackOff: no such image" in found.msg


def test_cancel_stops_the_pods_and_keeps_the_job(cluster, scheduler):
    app_id = scheduler.submit(app(), CFG)
    scheduler.cancel(app_id)
    assert scheduler.describe(app_id).state == AppState.CANCELLED
    assert cluster.pods() == []
    scheduler.cancel(app_id)  # a second time has no effect


def test_a_run_in_a_queue_waits_and_is_deleted_when_cancelled(cluster, scheduler):
    cfg = {**CFG, "components": ["kueue"], "queue": "training", "queue_priority": "research"}
    app_id = scheduler.submit(app(), cfg)
    job = next(o for o in cluster.objects.values() if o["kind"] == "Job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    job["spec"]["suspend"] = True  # as Kueue does
    assert scheduler.describe(app_id).state == AppState.PENDING
    scheduler.cancel(app_id)
    assert scheduler.describe(app_id) is None


def test_list_shows_the_jobs_of_isorun_and_their_states(cluster, scheduler):
    cluster.create("jobs", "ml", {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "other"},
                                  "spec": {"suspend": True}})  # fmt: skip
    first = scheduler.submit(app(), CFG)
    second = scheduler.submit(app(), {"overlay": "jobset"})
    cluster.end(cluster.pod(0, first.split(":")[1]), 65)
    listed = {a.app_id: a.state for a in scheduler.list()}
    assert listed == {first: AppState.FAILED, second: AppState.PENDING}
    assert len(scheduler.list()) == 2, "the Job of the JobSet must not be listed"


def test_a_jobset_has_the_same_operations(cluster, scheduler):
    app_id = scheduler.submit(app(max_retries=1), {"overlay": "jobset"})
    name = app_id.split(":")[1]
    assert "Service" not in kinds(cluster)
    assert told(scheduler, app_id) == (AppState.RUNNING, [ReplicaState.RUNNING] * 2)
    cluster.end(cluster.pod(1), 75)  # the whole gang restarts, and the failure is not counted
    assert scheduler.describe(app_id).num_restarts == 1
    assert (
        "Restarted 1 time(s); restarts end 604800 s after the first. The pods"
        in scheduler.describe(app_id).msg
    )
    cluster.end(cluster.pod(0), 1)
    assert scheduler.describe(app_id).num_restarts == 2
    assert list(scheduler.log_iter(app_id, "fit", 0)) == []
    cluster.end(cluster.pod(0), 64)
    assert scheduler.describe(app_id).state == AppState.FAILED
    (ends,) = [line for line in scheduler.describe(app_id).msg.splitlines() if "ended:" in line]
    codes = [r"\S+ \S+ exit code 75 in the pod \S+-node-0-1-\S+", ".* BackoffLimitExceeded: .*"]
    codes += [r"\S+ \S+ exit code 64 in the pod \S+-node-0-0-\S+"]
    assert re.fullmatch(f"Attempts ended: {'; '.join(codes)}", ends), "also of pods that are gone"
    other = scheduler.submit(app(), {"overlay": "jobset"})
    scheduler.cancel(other)
    assert scheduler.describe(other).state == AppState.CANCELLED
    scheduler.delete(app_id)
    assert ("jobsets", "ml", name) not in cluster.objects


def test_nodes_of_a_sweep_are_independent(cluster, scheduler):
    made = sweep_component("optim.lr=1e-3,3e-3", config=["configs/text.yaml"], j="2x1")
    app_id = scheduler.submit(made, CFG)
    cluster.end(cluster.pod(0), 64)
    assert scheduler.describe(app_id).state == AppState.RUNNING
    container = cluster.pod(1)["spec"]["containers"][0]
    assert container["command"] == ["tini", "--"]
    assert "$(JOB_COMPLETION_INDEX)/2" in container["args"]


def test_the_number_of_the_node_in_a_variable(cluster, scheduler):
    """Kubernetes expands only variables that come before, and the Job controller appends its own."""
    scheduler.submit(app(env={"SHARD": f"part-{macros.replica_id}", "PLAIN": "$(SHARD)"}), CFG)
    env = cluster.pod(1)["spec"]["containers"][0]["env"]
    names = [entry["name"] for entry in env]
    values = {entry["name"]: entry.get("value") for entry in env}
    assert values["SHARD"] == "part-$(JOB_COMPLETION_INDEX)"
    assert values["PLAIN"] == "$$(SHARD)"
    assert names.count("JOB_COMPLETION_INDEX") == 1
    assert names.index("JOB_COMPLETION_INDEX") < names.index("SHARD")


# ---------------------------------------------------------------------------------------- logs


def test_a_log_contains_the_lines_of_its_node(cluster, scheduler):
    app_id = scheduler.submit(app(), CFG)
    for index in (0, 1):
        cluster.say(cluster.pod(index), f"step 1 of node {index}", "", "  indented")
    assert list(scheduler.log_iter(app_id, "fit", 1)) == [
        "step 1 of node 1\n",
        "\n",
        "  indented\n",
    ]
    assert list(scheduler.log_iter(app_id, "fit", 0, regex="step")) == ["step 1 of node 0\n"]


def test_following_continues_after_restarts_until_the_end(cluster, scheduler):
    app_id = scheduler.submit(app(), CFG)
    seen, done = [], threading.Event()

    def read():
        seen.extend(scheduler.log_iter(app_id, "fit", 0, should_tail=True))
        done.set()

    threading.Thread(target=read, daemon=True).start()
    cluster.say(cluster.pod(0), "first")
    cluster.end(cluster.pod(0), 75)
    again = cluster.pod(0)
    cluster.say(again, "second")
    assert not done.wait(0.2), "following must not end while the run continues"
    cluster.end(again)
    cluster.end(cluster.pod(1))
    assert done.wait(30)
    name = again["metadata"]["name"]
    assert seen == ["first\n", f"isorun: restarted as pod {name} on node-0\n", "second\n"]


def test_following_continues_after_a_broken_connection(cluster, scheduler):
    app_id = scheduler.submit(app(), CFG)
    pod = cluster.pod(0)
    cluster.cut_after = 2
    cluster.say(pod, *[f"line {n}" for n in range(5)])
    seen, done = [], threading.Event()

    def read():
        seen.extend(scheduler.log_iter(app_id, "fit", 0, should_tail=True))
        done.set()

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + 60
    while len(seen) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    cluster.say(pod, "last")
    cluster.end(pod)
    cluster.end(cluster.pod(1))
    assert done.wait(60)
    assert seen == [*(f"line {n}\n" for n in range(5)), "last\n"], (
        "each line must appear once, in order"
    )
    assert cluster.cut_after is None, "the connection was not broken"


def stamps(*seconds, zone=UTC):
    """Timestamps in the kubelet's format, so many seconds ago."""
    moments = [datetime.now(zone) - timedelta(seconds=ago) for ago in seconds]
    return [m.isoformat(timespec="microseconds").replace(m.strftime("%f"), m.strftime("%f000"))
            for m in moments]  # fmt: skip


def test_lines_with_unordered_timestamps_are_all_returned(cluster, scheduler):
    """Two streams of a container are written in an order that can differ from that of their
    timestamps."""
    app_id = scheduler.submit(app(), CFG)
    log = cluster.logs[cluster.pod(0)["metadata"]["uid"]]
    log += zip(stamps(3, 1, 2, 2), ["first", "third", "second", "second"], strict=True)
    seen = list(scheduler.log_iter(app_id, "fit", 0))
    assert seen == ["first\n", "third\n", "second\n", "second\n"]


@pytest.mark.parametrize(
    ("gone", "hours"),
    thinned(list(itertools.product([0, 2], [-5, 0, 9])), kept=[(0, 9), (2, -5)]),
)
def test_after_a_broken_connection_no_line_is_lost_or_repeated(cluster, scheduler, hours, gone):
    """Older lines, from a node with any time zone. The connection breaks between two lines with
    unordered timestamps, or when the log has been rotated."""
    app_id = scheduler.submit(app(), CFG)
    pod = cluster.pod(0)
    log = cluster.logs[pod["metadata"]["uid"]]
    times = stamps(34, 32, 32 if gone else 33, 31, zone=timezone(timedelta(hours=hours)))
    log += zip(times, ["a", "c", "b", "d"], strict=True)
    if gone:
        log[2] = (log[3][0], "b")
    cluster.cut_after = 2
    lines = iter(scheduler.log_iter(app_id, "fit", 0, should_tail=True))
    seen = [next(lines), next(lines)]
    del log[:gone]
    cluster.say(pod, "last")
    cluster.end(pod)
    cluster.end(cluster.pod(1))
    assert [*seen, *lines] == ["a\n", "c\n", "b\n", "d\n", "last\n"]
    assert cluster.cut_after is None, "the connection was not broken"


def test_messages_of_the_cluster_have_no_timestamp(cluster, scheduler, monkeypatch):
    app_id = scheduler.submit(app(), CFG)
    said = "unable to retrieve container logs for containerd://4f1\n"
    monkeypatch.setattr(Cluster, "_follow", lambda *_: iter([said]))
    assert list(scheduler.log_iter(app_id, "fit", 0)) == [said]


def test_following_waits_for_a_pod_that_has_not_started(cluster, scheduler):
    cluster.starts_pods = False
    app_id = scheduler.submit(app(), CFG)
    lines = scheduler.log_iter(app_id, "fit", 0, should_tail=True)
    cluster.start(cluster.pod(0))
    cluster.say(cluster.pod(0), "here")
    assert next(iter(lines)) == "here\n"


def test_since_omits_older_lines(cluster, scheduler):
    app_id = scheduler.submit(app(), CFG)
    pod = cluster.pod(0)
    cluster.say(pod, "old", "new")
    log = cluster.logs[pod["metadata"]["uid"]]
    log[0] = ("2020-01-01T00:00:00.000000Z", "old")
    since = datetime.now() - timedelta(seconds=30)
    assert list(scheduler.log_iter(app_id, "fit", 0, since=since)) == ["new\n"]


def test_following_outlasts_a_cluster_that_does_not_answer(cluster, scheduler, monkeypatch, capfd):
    app_id = scheduler.submit(app(), CFG)
    pod = cluster.pod(0)
    cluster.say(pod, "first")
    lines = iter(scheduler.log_iter(app_id, "", 0, should_tail=True))
    assert next(lines) == "first\n"
    answer, refusals = cluster.answer, iter([503] * 5)

    def refuse(*words):
        for code in refusals:
            raise Refused(code, "ServiceUnavailable", "the server is starting")
        return answer(*words)

    monkeypatch.setattr(cluster, "answer", refuse)
    cluster.say(pod, "second")
    cluster.end(pod)
    cluster.end(cluster.pod(1))
    assert list(lines) == ["second\n"]
    assert next(refusals, None) is None
    assert capfd.readouterr().err.count("waiting for the cluster: ") == 1


def test_without_following_a_cluster_that_does_not_answer_is_an_error(cluster, scheduler):
    app_id = scheduler.submit(app(), CFG)
    cluster.refuse["GET", "pods"] = Refused(503, "ServiceUnavailable", "the server is starting")
    with pytest.raises(RetryError, match="failed to list the pods"):
        list(scheduler.log_iter(app_id, "", 0))


def test_unsupported_log_options_are_reported(scheduler, cluster):
    app_id = scheduler.submit(app(), CFG)
    with pytest.raises(UsageError, match="until"):
        scheduler.log_iter(app_id, "fit", 0, until=datetime.now())
    with pytest.raises(UsageError, match="cannot select the stream"):
        scheduler.log_iter(app_id, "fit", 0, streams=Stream.STDERR)


# -------------------------------------------------------------------------------------- errors


def test_a_refusal_is_reported_and_the_created_objects_are_removed(cluster, scheduler):
    cluster.refuse["POST", "services"] = Refused(403, "Forbidden", "services is forbidden")
    with pytest.raises(
        UsageError, match=r"refused to create the Service .*: services is forbidden"
    ):
        scheduler.submit(app(), CFG)
    assert kinds(cluster) == ["PersistentVolumeClaim", "ServiceAccount"]


def test_a_server_error_is_worth_a_retry(cluster, scheduler):
    cluster.refuse["POST", "jobs"] = Refused(503, "ServiceUnavailable", "etcd leader changed")
    with pytest.raises(RetryError, match="etcd leader changed"):
        scheduler.submit(app(), CFG)


def test_no_controller_for_jobsets(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with Server(Cluster(jobsets=False), tmp_path) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        scheduler = create_scheduler("test")
        with pytest.raises(
            UsageError, match="check that the namespace exists and that the controller"
        ):
            scheduler.submit(app(), {"overlay": "jobset"})
        assert scheduler.list() == []


def test_no_cluster_is_configured(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="No cluster is configured.*KUBECONFIG"):
        create_scheduler("test").list()


def test_a_cluster_that_cannot_be_reached(tmp_path, monkeypatch):
    server = Server(Cluster(), tmp_path)
    server._server.server_close()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    with pytest.raises(RetryError, match="could not be reached to list the Jobs"):
        create_scheduler("test").list()


def test_an_overlay_that_can_only_be_rendered_is_not_submitted(cluster, scheduler):
    with pytest.raises(
        UsageError, match="submits Jobs, JobSets and TrainJobs only, but the overlay makes a Job of"
    ):
        scheduler.submit(app(), {"overlay": "volcano"})
    assert cluster.objects == {}


LATE = Refused(422, "Invalid", 'admission webhook "validator.trainjob.trainer.kubeflow.org" denied '
               "the request: specified trainingRuntime must be created before the TrainJob")  # fmt: skip


def only(cluster, kind):
    (found,) = (each for each in cluster.objects.values() if each["kind"] == kind)
    return found


def test_a_train_job_is_submitted_once_its_runtime_is_noticed(cluster, scheduler, monkeypatch):
    monkeypatch.setattr(trainer, "POLL", 0.01)
    cluster.refuse["POST", "trainjobs"] = LATE
    app_id = scheduler.submit(app(), {"overlay": "trainjob"})
    name = app_id.split(":")[1]
    posted = [path.rpartition("/")[2] for method, path in cluster.requests if method == "POST"]
    assert posted.count("trainjobs") == 2
    assert posted.index("trainingruntimes") < posted.index("trainjobs")
    train_job, runtime = only(cluster, "TrainJob"), only(cluster, "TrainingRuntime")
    (owner,) = runtime["metadata"]["ownerReferences"]
    assert owner["uid"] == train_job["metadata"]["uid"]
    template = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    env = template["template"]["spec"]["containers"][0]["env"]
    secret = {"secretKeyRef": {"name": name, "key": "key"}}
    assert {"name": "ISORUN_SECRET", "valueFrom": secret} in env
    assert only(cluster, "Secret")["metadata"]["ownerReferences"] == [owner]
    assert told(scheduler, app_id)[0] == AppState.SUBMITTED
    assert len(told(scheduler, app_id)[1]) == 2
    train_job["status"] = {"jobsStatus": [{"name": "node", "ready": 1}]}
    assert told(scheduler, app_id)[0] == AppState.RUNNING
    assert [each.app_id for each in scheduler.list({"namespace": "ml"})] == [app_id]
    scheduler.cancel(app_id)
    assert only(cluster, "TrainJob")["spec"]["suspend"] is True
    assert told(scheduler, app_id)[0] == AppState.CANCELLED
    scheduler.delete(app_id)
    assert kinds(cluster) == ["PersistentVolumeClaim", "ServiceAccount"]


def test_the_job_set_of_a_train_job_is_changed_by_its_owner(cluster, scheduler):
    app_id = scheduler.submit(app(), {"overlay": "trainjob"})
    owner = {"kind": "TrainJob", "name": app_id.split(":")[1]}
    metadata = {"name": owner["name"], "ownerReferences": [owner]}
    job = {"name": "node", "template": {"spec": {"completions": 2, "parallelism": 2}}}
    made = {
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {"suspend": True, "replicatedJobs": [job]},
    }
    cluster.objects["jobsets", "ml", owner["name"]] = made  # by Kubeflow Trainer
    assert told(scheduler, app_id)[0] == AppState.PENDING
    assert scheduler.describe(app_id).roles[0].name == "fit"
    scheduler.cancel(app_id)
    assert only(cluster, "TrainJob")["spec"]["suspend"] is True
    assert told(scheduler, app_id)[0] == AppState.CANCELLED
    assert len(scheduler.list({"namespace": "ml"})) == 1


def test_a_train_job_that_is_refused_leaves_nothing(cluster, scheduler):
    cluster.refuse["POST", "trainjobs"] = Refused(403, "Forbidden", "trainjobs is forbidden")
    with pytest.raises(UsageError, match="trainjobs is forbidden"):
        scheduler.submit(app(), {"overlay": "trainjob"})
    assert kinds(cluster) == ["PersistentVolumeClaim", "ServiceAccount"]


def test_a_dry_run_needs_no_cluster(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert "kind: Job" in str(create_scheduler("test").submit_dryrun(app(), CFG))


# --------------------------------------------------------------------- options of an app


def job_of(made, **cfg):
    info = create_scheduler("test").submit_dryrun(made, {**CFG, **cfg})
    return info.request.rendered.workload


def container_of(job):
    return job["spec"]["template"]["spec"]["containers"][0]


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("here")
def test_agent_options_reach_the_agent():
    job = job_of(app(max_restarts=2, preflight="full", rdzv_port=29600, j="2:3x4"))
    env = {e["name"]: e.get("value") for e in container_of(job)["env"]}
    assert env["PET_MAX_RESTARTS"] == "2"
    assert env["PET_PREFLIGHT"] == "full"
    assert env["PET_RDZV_PORT"] == "29600"
    assert (env["PET_NNODES"], env["PET_NPROC_PER_NODE"]) == ("2:3", "4")
    assert job["spec"]["completions"] == 3
    assert "successPolicy" in job["spec"]


@pytest.mark.usefixtures("here")
def test_an_agent_is_recognised_with_and_without_p():
    made, with_p = app(), app()
    with_p.roles[0].args.insert(0, "-P")
    assert container_of(job_of(with_p))["args"] == container_of(job_of(made))["args"]


@pytest.mark.usefixtures("here")
def test_the_doctor_never_trains_even_with_an_older_agent_in_the_image():
    """An older agent ignores variables that it does not know, so the command itself must not
    train."""
    from launch.agent.command import is_doctor
    from launch.agent.options import parse
    from launch.torchx.components import doctor

    job = job_of(doctor(config=["configs/text.yaml"], j="2x1", level="quick"))
    container = container_of(job)
    env = {item["name"]: item.get("value", "") for item in container["env"]}
    command = [*container["command"], *container["args"]]
    options = parse(command[command.index("launch.agent") + 1 :], env)
    assert options.preflight == "off"
    assert is_doctor(options.command)
    assert "--level quick -- python -m train fit" in " ".join(container["args"])


@pytest.mark.usefixtures("here")
def test_an_option_that_an_older_agent_would_ignore_is_refused():
    made = run("python", "-m", "train", "fit", j="1x1")
    made.roles[0].args.insert(2, "--preflight-only")
    with pytest.raises(UsageError, match="--preflight-only.*use the component isorun.doctor"):
        job_of(made)


@pytest.mark.usefixtures("here")
def test_mounts_replace_the_volume_or_are_added():
    mounts = [
        "type=volume",
        "src=team",
        "dst=/runs",
        "type=bind",
        "src=/data",
        "dst=/data",
        "readonly",
    ]
    info = create_scheduler("test").submit_dryrun(app(mounts=mounts), CFG)
    objects = info.request.rendered.objects
    assert "PersistentVolumeClaim" not in {o["kind"] for o in objects}, (
        "a claim that nothing uses must not be created"
    )
    pod = info.request.rendered.workload["spec"]["template"]["spec"]
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["runs"] == {"name": "runs", "persistentVolumeClaim": {"claimName": "team"}}
    assert volumes["mount-1"] == {"name": "mount-1", "hostPath": {"path": "/data"}}
    assert {"name": "mount-1", "mountPath": "/data", "readOnly": True} in pod["containers"][0][
        "volumeMounts"
    ]


@pytest.mark.usefixtures("here")
def test_only_the_node_number_is_substituted_in_a_command():
    made = run("echo", "$(POD_IP)", "$HOME", "${x}", j="1x1")
    assert container_of(job_of(made))["args"] == ["echo", "$$(POD_IP)", "$HOME", "${x}"]


@pytest.mark.usefixtures("here")
def test_scheduler_options_that_add_a_component():
    job = job_of(
        app(), priority_class="research", queue="q", queue_priority="high", stop_deadline=300,
        time_limit=7200,
    )  # fmt: skip
    assert job["spec"]["activeDeadlineSeconds"] == 7200
    pod = job["spec"]["template"]["spec"]
    assert pod["priorityClassName"] == "research"
    assert pod["terminationGracePeriodSeconds"] == 330
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "cfg", "said"),
    [
        ({}, {"overlay": "cpu-dem"}, "'cpu-dem' is not an overlay; did you mean cpu-demo?"),
        ({}, {"namespace": "My_Team"}, "The namespace is 'My_Team'"),
        ({"j": "1:2x1"}, {"overlay": "jobset"}, "elastic and jobset cannot be combined"),
        ({"j": "2x1"}, {"overlay": "sweep"}, r"nodes is 2 \(the app text\), but each trial"),
        ({}, {"queue": "q"}, "queue is 'q' .*no component of the overlay cpu-demo reads it"),
        (
            {"env": {"AWS_SECRET_ACCESS_KEY": "x"}},
            {},
            "AWS_SECRET_ACCESS_KEY would be in plain text",
        ),
        (
            {"mounts": ["type=device", "src=/dev/fuse"]},
            {},
            r"The device /dev/fuse \(--mounts\) cannot be mounted",
        ),
    ],
)
def test_invalid_options_are_reported(words, cfg, said):
    with pytest.raises(UsageError, match=said):
        job_of(app(**words), **cfg)


def test_an_evicted_pod_says_why_and_what_the_run_did(cluster, scheduler):
    app_id = scheduler.submit(app(), CFG)
    pod = cluster.pod(1, app_id.split(":")[1])
    cluster.end(pod, 143, "Rank 0 was preempted")
    pod["status"] |= {"reason": "Evicted", "message": "The node was low on memory."}
    said = "(exit 143): Evicted: The node was low on memory.; Rank 0 was preempted"
    assert said in scheduler.describe(app_id).msg


def test_an_invalid_id(scheduler):
    with pytest.raises(UsageError, match="is not the id of a kubernetes_job job"):
        scheduler.describe("text-123")


def test_a_pod_without_a_container_state_is_valid():
    pod = {"metadata": {"name": "x"}, "spec": {"containers": [{"name": "train"}]}, "status": {}}
    assert state.exit_code(pod) is None
    assert not state.has_started(pod)


def test_status_says_why_pods_are_missing(cluster, scheduler):
    app_id = scheduler.submit(app(), CFG)
    name = app_id.split(":")[1]
    for number, (job, text) in enumerate([(name, "exceeded quota: small"), ("other", "no")]):
        event = {
            "metadata": {"name": f"e{number}"}, "reason": "FailedCreate", "message": text,
            "involvedObject": {"kind": "Job", "name": job},
        }  # fmt: skip
        cluster.create("events", "ml", event)
    assert scheduler.describe(app_id).msg == "<NONE>", "an old event: all pods are there"
    pod = cluster.pod(1, name)
    del cluster.objects["pods", "ml", pod["metadata"]["name"]]
    assert scheduler.describe(app_id).msg == "Pods are missing: exceeded quota: small"
    cluster.refuse["GET", "events"] = Refused(403, "Forbidden", "events is forbidden")
    assert scheduler.describe(app_id).msg == "<NONE>", "not everybody may read events"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("", "OOMKilled, it used more than its limit of memory"),
        ("the end", "OOMKilled, it used more than its limit of memory; the end"),
    ],
)
def test_status_says_that_memory_was_the_cause(cluster, scheduler, message, said):
    app_id = scheduler.submit(app(), CFG)
    pod = cluster.pod(1, app_id.split(":")[1])
    cluster.end(pod, 137, message)
    pod["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] = "OOMKilled"
    assert f"(exit 137): {said}" in scheduler.describe(app_id).msg
