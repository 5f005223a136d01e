"""The requirements that the manifests document, field by field, in every overlay."""

import re

import pytest
import yaml

from launch import deadlines
from launch.agent.restarts import Restart
from launch.kubernetes.command_line import render_words
from launch.kubernetes.manifests import needs
from launch.kubernetes.values import number
from tests.launch.kubernetes.objects import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    built,
    main_container,
    one,
    templates,
    unresolved,
    variables,
)
from tests.support.runs import ROOT
from train.exits import Exit, is_worth_retrying

HOPELESS = sorted(int(e) for e in Exit if e and not is_worth_retrying(e))
RETRIED = sorted(int(e) for e in Exit if is_worth_retrying(e))
JOBS = ["cpu-demo", "single-gpu", "multi-node", "elastic"]  # overlays with a plain Job
SETS = {"jobset": "JobSet", "trainjob": "TrainingRuntime"}


def pods(overlay):
    return [t for o in built(overlay) for t in templates(o)]


def rules(spec):
    """Maps an exit code or a condition to the action of the Job."""
    found = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        for code in rule.get("onExitCodes", {}).get("values", []):
            found.setdefault(code, rule["action"])
        for condition in rule.get("onPodConditions", []):
            assert condition["status"] == "True"
            found.setdefault(condition["type"], rule["action"])
    return found


def test_the_exit_codes_named_in_the_manifests():
    assert {64, 65, 78} <= set(HOPELESS)
    assert RETRIED == [75, 143]


@pytest.mark.parametrize("overlay", JOBS)
def test_a_job_fails_or_retries_by_the_exit_code_table(overlay):
    spec = one(built(overlay), "Job")["spec"]
    expected = {**dict.fromkeys(HOPELESS, "FailJob"), **dict.fromkeys(RETRIED, "Ignore")}
    assert rules(spec) == {**expected, "DisruptionTarget": "Ignore"}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_trials_of_a_sweep_fail_independently():
    spec = one(built("sweep"), "Job")["spec"]
    assert {rules(spec)[code] for code in HOPELESS} == {"FailIndex"}
    assert {rules(spec)[code] for code in (*RETRIED, "DisruptionTarget")} == {"Ignore"}
    assert "maxFailedIndexes" not in spec
    assert (spec["completions"], spec["parallelism"]) == (3, 2)


def failure_policy(overlay):
    made = one(built(overlay), SETS[overlay])["spec"]
    return (
        made["failurePolicy"] if overlay == "jobset" else made["template"]["spec"]["failurePolicy"]
    )


def child_job(overlay):
    made = one(built(overlay), SETS[overlay])["spec"]
    jobs = made if overlay == "jobset" else made["template"]["spec"]
    return jobs["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize("overlay", SETS)
def test_a_set_restarts_together_by_the_exit_code_table(overlay):
    """Simulates the controller: the first failure ends the Job; the first rule that matches its
    reason and message decides whether the set restarts."""
    spec = child_job(overlay)
    assert spec["backoffLimit"] == 0
    kinds = {code: rules(spec)[code] for code in (*HOPELESS, *RETRIED, "DisruptionTarget")}
    assert set(kinds.values()) == {"FailJob"}  # tells the set that this policy ended the Job

    def action(reason, message):
        for rule in failure_policy(overlay)["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(
                re.search(p, message) for p in patterns
            ):
                return rule["action"]
        return "RestartJobSet"

    words = "Container train for pod ml/text-node-0-1-x failed with exit code {} matching FailJob rule at index 0"
    for code in HOPELESS:
        assert action("PodFailurePolicy", words.format(code)) == "FailJobSet"
    for code in RETRIED:
        assert action("PodFailurePolicy", words.format(code)) == "RestartJobSetAndIgnoreMaxRestarts"
    evicted = (
        "Pod ml/text-node-0-64-x has condition DisruptionTarget matching FailJob rule at index 2"
    )
    assert action("PodFailurePolicy", evicted) == "RestartJobSetAndIgnoreMaxRestarts"
    assert (
        action("BackoffLimitExceeded", "Job has reached the specified backoff limit")
        == "RestartJobSet"
    )
    assert failure_policy(overlay)["maxRestarts"] == 3
    assert spec["activeDeadlineSeconds"] > 0  # of one attempt, after which none follows
    assert (
        action("DeadlineExceeded", "Job was active longer than specified deadline") == "FailJobSet"
    )


def test_a_volcano_job_follows_the_exit_code_table():
    policies = one(built("volcano"), "Job", "batch.volcano.sh/v1alpha1")["spec"]["policies"]
    by_code = {p["exitCode"]: p["action"] for p in policies if "exitCode" in p}
    assert by_code == dict.fromkeys(HOPELESS, "TerminateJob")
    by_event = {p["event"]: p["action"] for p in policies if "event" in p}
    assert by_event == {"PodFailed": "RestartJob", "PodEvicted": "RestartJob"}
    assert policies.index({"event": "PodFailed", "action": "RestartJob"}) == len(HOPELESS)


@pytest.mark.parametrize("overlay", JOBS)
def test_an_indexed_job_and_its_service_match(overlay):
    objects = built(overlay)
    job, service = one(objects, "Job"), one(objects, "Service")
    spec, name = job["spec"], job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["backoffLimitPerIndex"] == 3  # failures of the gang, for any number of nodes
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    pod = spec["template"]["spec"]
    assert "activeDeadlineSeconds" not in pod
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"] == name


def test_a_gang_fails_together_and_an_elastic_one_does_not():
    assert one(built("multi-node"), "Job")["spec"]["maxFailedIndexes"] == 0
    elastic = one(built("elastic"), "Job")["spec"]
    assert "maxFailedIndexes" not in elastic
    assert elastic["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert variables(main_container(elastic["template"]))["PET_NNODES"] == "2:4"
    assert elastic["completions"] == 4


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_the_agent(overlay):
    for pod in pods(overlay):
        container = main_container(pod)
        command = container["command"]
        assert command[:6] == ["tini", "--", "python", "-P", "-m", "launch.agent"]
        assert command[-1] == "--"
        assert container["args"][:4] == ["python", "-m", "train", "fit"]
        if overlay != "sweep":
            assert "--local-addr=$(POD_IP)" in command
            (item,) = [e for e in container["env"] if e["name"] == "POD_IP"]
            assert item["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_variable_refers_only_to_variables_before_it(overlay):
    for pod in pods(overlay):
        assert not unresolved(main_container(pod))


@pytest.mark.parametrize("overlay", ["cpu-demo", "single-gpu", "multi-node", "volcano"])
def test_a_volcano_job_of_any_overlay_finds_node_0_by_volcano_s_names(overlay):
    """Volcano appends VC_TASK_INDEX to the variables, so none of ours can refer to it."""
    from launch.agent.options import parse

    added = [] if overlay == "volcano" else ["volcano", "--set", "queue=training"]
    job = one(render_words([overlay, *added]).objects, "Job", "batch.volcano.sh/v1alpha1")
    name = job["metadata"]["name"]
    (pod,) = templates(job)
    container = main_container(pod)
    assert not unresolved(container)
    line, values = expanded(container, name, {"volcano.sh/job-name": name}, {"VC_TASK_INDEX": "1"})
    options = parse(agent_words(line), {**values, "PET_NNODES": "2"})
    assert (options.host, options.port) == (f"{name}-node-0.{name}", 29500)
    assert options.node_rank == 1


def agent_words(line):
    """The options and the command of the agent in a command line."""
    words = line.split()
    return words[words.index("launch.agent") + 1 :]


def expanded(container, job_name, labels, extra=()):
    """The command line after the kubelet's substitution: a variable can refer to those before
    it."""
    values = {}
    for item in container["env"]:
        if "value" in item:
            text = item["value"]
        else:
            path = item["valueFrom"]["fieldRef"]["fieldPath"]
            text = labels[path.split("'")[1]] if "'" in path else "10.0.0.7"
        values[item["name"]] = re.sub(r"\$\((\w+)\)", lambda m: values.get(m[1], m[0]), text)
    values |= dict(extra)
    line = " ".join([*container["command"], *container["args"]])
    return re.sub(r"\$\((\w+)\)", lambda m: values.get(m[1], m[0]), line), values


BY_JOBSET = {
    "jobset.sigs.k8s.io/jobset-uid": "5d8f0b1c-1111-4222-8333-abcdefabcdef",
    "jobset.sigs.k8s.io/restart-attempt": "2",
}


@pytest.mark.parametrize(
    ("overlay", "labels", "head"),
    [
        ("multi-node", {"batch.kubernetes.io/job-name": "text"}, "text-0.text"),
        (
            "jobset",
            {
                "batch.kubernetes.io/job-name": "text-node-0",
                "jobset.sigs.k8s.io/jobset-name": "text",
                **BY_JOBSET,
            },
            "text-node-0-0.text",
        ),
        ("volcano", {"volcano.sh/job-name": "text"}, "text-node-0.text"),
    ],
)
def test_the_agent_accepts_the_variables_of_a_pod(overlay, labels, head):
    from launch.agent.options import parse

    (pod,) = pods(overlay)
    index = "VC_TASK_INDEX" if overlay == "volcano" else "JOB_COMPLETION_INDEX"
    line, values = expanded(main_container(pod), "text", labels, {index: "1"})
    options = parse(agent_words(line), values)
    assert (options.host, options.port) == (head, 29500)
    assert (options.min_nodes, options.max_nodes, options.processes) == (2, 2, 8)
    assert (options.node_rank, options.local_addr) == (1, "10.0.0.7")
    assert (options.shutdown_timeout, options.stop_deadline) == (105, 90)
    restart = Restart(BY_JOBSET["jobset.sigs.k8s.io/jobset-uid"], 2)
    if overlay == "jobset":
        assert (Restart.of(values), options.restart_deadline) == (restart, 604800)
    else:
        assert (Restart.of(values), options.restart_deadline) == (None, 0)
    assert options.command[1:] == ("-m", "train", "fit", "--config", "configs/text.yaml")


def test_the_agent_accepts_the_variables_of_kubeflow():
    """PET_* as the trainer sets them, without variables of the manifest that override them."""
    from launch.agent.options import parse

    (pod,) = pods("trainjob")
    kubeflow = {
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "text-node-0-0.text", "PET_MASTER_PORT": "29400",
    }  # fmt: skip
    container = main_container(pod)
    assert not variables(container).keys() & kubeflow.keys()
    line, values = expanded(container, "text", BY_JOBSET, kubeflow)
    options = parse(agent_words(line), {**values, "JOB_COMPLETION_INDEX": "1"})
    assert (options.host, options.port) == ("text-node-0-0.text", 29400)
    assert (options.max_nodes, options.processes, options.node_rank) == (2, 8, 1)
    train_job = one(built("trainjob"), "TrainJob")["spec"]
    assert train_job["trainer"]["numNodes"] == 2
    assert (
        train_job["runtimeRef"]["name"]
        == one(built("trainjob"), "TrainingRuntime")["metadata"]["name"]
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_grace_period_is_long_enough_for_a_checkpoint(overlay):
    for pod in pods(overlay):
        env = variables(main_container(pod))
        ranks, agent = int(env["ISORUN_STOP_DEADLINE"]), int(env["PET_SHUTDOWN_TIMEOUT"])
        assert ranks > 0
        assert deadlines.adds_up(ranks, agent, pod["spec"]["terminationGracePeriodSeconds"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_memory_and_disk_have_limits_that_cover_their_volumes(overlay):
    for pod in pods(overlay):
        container = main_container(pod)
        assert container["resources"]["requests"] == container["resources"]["limits"]
        limits = container["resources"]["limits"]
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        memory = volumes["shared-memory"]["emptyDir"]
        assert memory["medium"] == "Memory"
        assert number(memory["sizeLimit"]) < number(limits["memory"])
        assert number(volumes["scratch"]["emptyDir"]["sizeLimit"]) <= number(
            limits["ephemeral-storage"]
        )
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert mounts["/dev/shm"] == "shared-memory"
        assert mounts["/scratch"] == mounts["/tmp"] == "scratch"
        assert mounts["/runs"] == "runs"
        claim = one(built(overlay), "PersistentVolumeClaim")["metadata"]["name"]
        assert volumes["runs"] == {"name": "runs", "persistentVolumeClaim": {"claimName": claim}}


def test_claims_of_the_same_name_are_equal():
    """So that all overlays can be applied in one namespace: a claim cannot be changed."""
    found = {}
    for overlay in OVERLAYS:
        claim = one(built(overlay), "PersistentVolumeClaim")
        assert found.setdefault(claim["metadata"]["name"], claim) == claim, overlay
    assert len(found) == 2


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_minimal_rights(overlay):
    objects = built(overlay)
    assert one(objects, "ServiceAccount")["automountServiceAccountToken"] is False
    assert not [o for o in objects if "Role" in o["kind"]]
    for pod in pods(overlay):
        spec, container = pod["spec"], main_container(pod)
        assert spec["automountServiceAccountToken"] is False
        assert spec["serviceAccountName"] == one(objects, "ServiceAccount")["metadata"]["name"]
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_pods_of_the_same_run_can_connect(overlay):
    objects = built(overlay)
    (policy,) = [o for o in objects if o["kind"] == "NetworkPolicy"] or [None]
    assert policy, "the overlay lacks the component"
    spec, name = policy["spec"], policy["metadata"]["name"]
    mine = {"podSelector": {"matchLabels": {"app.kubernetes.io/instance": name}}}
    assert spec["podSelector"] == mine["podSelector"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert spec["ingress"] == [{"from": [mine]}]
    ports = [
        {(p["protocol"], p["port"]) for p in rule["ports"]}
        for rule in spec["egress"]
        if "ports" in rule
    ]
    assert {"to": [mine]} in spec["egress"]
    status = [{("TCP", 10443)}] if overlay == "trainjob" else []  # of Kubeflow Trainer
    assert ports == [{("UDP", 53), ("TCP", 53)}, {("TCP", 443)}, *status]
    for pod in pods(overlay):
        assert pod["metadata"]["labels"]["app.kubernetes.io/instance"] == name


# In the first case, the component that it patches is added after it.
@pytest.mark.parametrize(
    "words",
    ["cpu-demo --without network-policy openshift network-policy wandb-offline-sync",
     "jobset openshift", "trainjob openshift"],
)  # fmt: skip
def test_openshift_can_assign_ids_and_dns_ports(words):
    objects = render_words(words.split()).objects
    found = [t for o in objects for t in templates(o)]
    assert found
    for pod in found:
        context = pod["spec"]["securityContext"]
        assert context.keys() & {"runAsUser", "runAsGroup", "fsGroup"} == set()
        assert context["runAsNonRoot"] is True
    rules = one(objects, "NetworkPolicy")["spec"]["egress"]
    ports = [{(p["protocol"], p["port"]) for p in rule["ports"]} for rule in rules[1:]]
    names = {(protocol, port) for protocol in ("UDP", "TCP") for port in (53, 5353)}
    assert ports[:2] == [names, {("TCP", 443)}]


def test_openshift_without_a_network_policy():
    for overlay in ("cpu-demo", "trainjob"):
        words = [overlay, "openshift", "--without", "network-policy"]
        assert "NetworkPolicy" not in {o["kind"] for o in render_words(words).objects}


def test_the_templates_name_no_namespace():
    for path in K8S.rglob("*.yaml"):
        assert "namespace:" not in path.read_text(), path


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_value_of_a_run_is_in_one_file(overlay):
    """No value of run.yaml is repeated in another file of the overlay."""
    folder = K8S / "overlays" / overlay
    run = yaml.safe_load((folder / "run.yaml").read_text())
    rest = "".join(p.read_text() for p in folder.glob("*.yaml") if p.name != "run.yaml")
    for key in ("image", "nodes", "processes", "command", "cpu", "memory", "gpus"):
        assert f"{key}:" not in rest
    assert str(run["spec"]["image"]) not in rest


def test_the_page_names_every_overlay_and_component():
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    rows = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert {n for n in (*OVERLAYS, *COMPONENTS) if f"`{n}`" not in rows} == {"run"}


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_comment_of_a_component_has_the_values_to_add_to_run_yaml(component):
    """kustomize itself only says that a fieldPath is missing."""
    if component == "run":
        return  # its values are in every overlay
    path = K8S / "components" / component / "kustomization.yaml"
    comment = [x for x in path.read_text().splitlines() if x.startswith("#")]
    in_all = {"nodes", "processes", "image", "command", "cpu", "memory", "scratch", "retries"}
    in_all |= {"processes", "sharedMemory"}
    for key in needs(component) - in_all:
        assert [x for x in comment if re.match(rf"#   {key}: \S", x)], key
    if needs(component) - in_all:
        assert re.search(r"fieldPath `spec\.\w+` is missing", " ".join(comment).replace(" # ", " "))


@pytest.mark.parametrize("words", [["trainjob"], ["cpu-demo", "trainjob"]])
def test_a_training_runtime_comes_first_and_its_train_job_last(words):
    """The trainer refuses a TrainJob whose runtime it does not know yet."""
    kinds = [made["kind"] for made in render_words(words).objects]
    assert (kinds[0], kinds[-1]) == ("TrainingRuntime", "TrainJob")
    assert len(kinds) > 3, "what is between them gives the trainer time"


def test_every_kustomization_has_a_comment():
    for path in K8S.glob("*/*/kustomization.yaml"):
        assert path.read_text().startswith("# "), path
