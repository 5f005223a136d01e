"""`python -m launch render`: its output and its errors."""

import itertools
import subprocess
import sys

import pytest
import yaml

from launch.cli import main
from launch.kubernetes import checks, kustomize
from launch.kubernetes.command_line import render_words
from launch.kubernetes.rendering import as_yaml
from launch.kubernetes.values import number
from tests.launch.kubernetes.objects import (
    OVERLAYS,
    built,
    environment_with_kubectl,
    one,
    templates,
)
from tests.support.lanes import thinned
from tests.support.runs import ROOT
from train.exits import UsageError

DIGEST = "registry.example/isorun@sha256:" + "0" * 64
LONG = "a" * 62


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_objects_are_printed_on_stdout_and_warnings_on_stderr():
    done = subprocess.run(
        [sys.executable, "-m", "launch", "render", "cpu-demo", "--set", "nodes=3"],
        cwd=ROOT, env=environment_with_kubectl(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = one(list(yaml.safe_load_all(done.stdout)), "Job")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    assert "isorun:cpu has no digest" in done.stderr


def test_an_error_is_one_sentence_with_exit_code_64():
    done = subprocess.run(
        [sys.executable, "-m", "launch", "render", "cpu-dmo"],
        cwd=ROOT, env=environment_with_kubectl(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 64
    assert done.stderr.startswith(
        "isorun: error: 'cpu-dmo' is not an overlay; did you mean cpu-demo?"
    )
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("overlay", thinned(OVERLAYS, kept=["cpu-demo", "jobset"]))
def test_without_changes_the_output_is_that_of_kubectl(overlay):
    assert render_words([overlay]).objects == built(overlay)


def test_an_image_with_a_digest_needs_no_warning():
    rendered = render_words(["cpu-demo", "--set", f"image={DIGEST}"])
    assert rendered.warnings == []
    (container,) = one(rendered.objects, "Job")["spec"]["template"]["spec"]["containers"]
    told = [each["value"] for each in container["env"] if each["name"] == "ISORUN_IMAGE"]
    assert told == [container["image"]] == [DIGEST], "each attempt records it"


def test_help_shows_all_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["render", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for text in (
        "usage: isorun render OVERLAY",
        "--set KEY=VALUE",
        "--without",
        "-n NAMESPACE",
        "isorun.fit",
    ):
        assert text in shown


@pytest.mark.parametrize(
    "words", ["-n ml cpu-demo --set nodes=3", "--set nodes=3 --namespace=ml cpu-demo"]
)
def test_options_may_precede_the_overlay(words):
    made = render_words(words.split()).objects
    assert {o["metadata"]["namespace"] for o in made} == {"ml"}
    assert one(made, "Job")["spec"]["completions"] == 3


def test_values_environment_command_and_namespace():
    command = ["python", "-m", "train", "verify", "--config", "configs/text.yaml", "run.name=x"]
    words = ["multi-node", "kueue", "--set", "nodes=4", "--set", "queue=training", "-n", "ml"]
    words += ["--set", "queuePriority=research", "--set", "env.NCCL_DEBUG=INFO", "--", *command]
    made = render_words(words).objects
    job = one(made, "Job")
    assert {o["metadata"]["namespace"] for o in made} == {"ml"}
    assert job["spec"]["completions"] == 4
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == command
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]


def test_a_longer_stop_deadline_extends_all_later_deadlines():
    job = one(render_words(["cpu-demo", "--set", "stopDeadline=600"]).objects, "Job")
    pod = job["spec"]["template"]["spec"]
    env = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    assert env["ISORUN_STOP_DEADLINE"] == "600"
    assert pod["terminationGracePeriodSeconds"] > int(env["PET_SHUTDOWN_TIMEOUT"]) > 600


@pytest.mark.parametrize(
    ("seconds", "said"), [((), 604800), (("time-limit", "--set", "timeLimit=3600"), 3600)]
)
@pytest.mark.parametrize("overlay", ["cpu-demo", "jobset", "trainjob"])
def test_a_time_limit_is_that_of_the_job_and_of_restarts(overlay, seconds, said):
    made = render_words([overlay, *seconds]).objects
    if overlay == "cpu-demo":
        assert one(made, "Job")["spec"]["activeDeadlineSeconds"] == said
        return
    spec = one(made, {"jobset": "JobSet", "trainjob": "TrainingRuntime"}[overlay])["spec"]
    spec = spec if overlay == "jobset" else spec["template"]["spec"]
    child = spec["replicatedJobs"][0]["template"]["spec"]
    assert child["activeDeadlineSeconds"] == said
    env = {e["name"]: e for e in child["template"]["spec"]["containers"][0]["env"]}
    assert env["PET_RESTART_DEADLINE"]["value"] == str(said)
    for name, label in (("RESTARTED_BY", "jobset-uid"), ("RESTARTS", "restart-attempt")):
        path = env[f"ISORUN_{name}"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert path == f"metadata.labels['jobset.sigs.k8s.io/{label}']"


def test_a_component_can_be_left_out():
    for overlay, component in itertools.product(("cpu-demo", "jobset"), ("pvc", "pvc-single-node")):
        made = render_words([overlay, "--without", component]).objects
        assert "PersistentVolumeClaim" not in {o["kind"] for o in made}


@pytest.mark.parametrize(
    ("overlay", "component", "claim"),
    [("cpu-demo", "pvc", "runs"), ("jobset", "pvc-single-node", "runs-single-node")],
)
def test_an_added_claim_replaces_that_of_the_overlay(overlay, component, claim):
    rendered = render_words([overlay, component])
    assert one(rendered.objects, "PersistentVolumeClaim")["metadata"]["name"] == claim
    (template,) = templates(rendered.workload)
    volumes = {v["name"]: v for v in template["spec"]["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim
    with pytest.raises(UsageError, match="pvc and pvc-single-node cannot be combined"):
        render_words([overlay, "pvc", "pvc-single-node"])


def test_config_files_may_exist_in_the_image_only(capsys):
    """Then the config is not checked, however the command names them."""
    for words in ("--config /only/in/the/image.yaml", "--config=/only/in/the/image.yaml", "--help"):
        assert checks.training(["python", "-m", "train", "fit", *words.split()], None) is None
    assert capsys.readouterr().out == ""


TRAIN = "-- python -m train fit --config configs/text.yaml"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "Nothing to render; .* or an overlay: cpu-demo, "),
        ("multinode", "'multinode' is not an overlay; did you mean multi-node?"),
        ("cpu-demo pcv", "'pcv' is not a component; did you mean pvc?"),
        ("isorun.fit --cfg nope", "--cfg must be KEY=VALUE,..., .* but is 'nope'"),
        ("isorun.fit --cfg stop_deadline=abc", "--cfg must be .* but is 'stop_deadline=abc'"),
        ("isorun.fit --cfg=overlai=cpu-demo", "overlai is not an option of kubernetes_job .--cfg overlai=cpu-demo.; did you mean overlay?"),
        ("isorun.fit --check False --config gone.yaml --cfg overlay=cpu-demo,stop_deadline=0", "stopDeadline .* must be a whole number of seconds of at least 1 and at most 604800, but is '0'"),
        ("isorun.fit --nope 1", "isorun.fit: unrecognized arguments: --nope; see `isorun render isorun.fit --help`"),
        ("isorun.fit --check False --env X", "isorun.fit: --env must be KEY=VALUE,..., but is 'X'"),
        ("isorun.fitt", "'isorun.fitt' is not a component of isorun; did you mean isorun.fit?"),
        ("cpu-demo --set nodes=0", r"nodes must be a whole number of at least 1 and at most 100000, but is 0 \(--set"),
        ("cpu-demo --set nodes=two", "nodes must be a whole number of at least 1 and at most 100000, but is 'two'"),
        ("cpu-demo --set nodes=2001-13-45", "nodes must be a whole number of at least 1 and at most 100000, but is '2001-13-45'"),
        ("cpu-demo --set memory=lots", "memory must be a quantity of bytes of at least 1Mi, such as 512Mi"),
        ("cpu-demo --set command=[]", "command must be a list with at least one word"),
        ("cpu-demo --set node=2", "node is not a key; did you mean nodes?"),
        ("cpu-demo --set nodes", "--set must be KEY=VALUE"),
        ("cpu-demo --set gpus=1", "gpus is 1 .* no component of the overlay cpu-demo reads it"),
        (
            "cpu-demo kueue",
            "queue is required by a component; add --set queue=VALUE .with TorchX: -cfg "
            "queue=VALUE., or `queue: VALUE` to spec in the run.yaml of the overlay cpu-demo, where "
            "VALUE is the name of an object",
        ),
        ("cpu-demo efa", "or `efaDevices: VALUE` to spec .*, where VALUE is a whole number"),
        ("cpu-demo --set name=", "The name of the run is ''"),
        ("cpu-demo --set env.=x", "env. is not a key"),
        ("cpu-demo -n A_B", "The namespace is 'A_B', but must have at most 63 lower-case letters"),
        ("cpu-demo --set name=Text_1", "The name of the run is 'Text_1' .--set name=Text_1., but a name in a cluster"),
        (f"cpu-demo --set name={LONG}", "with 64 characters, but host names have at most 63; .* shorter by 1"),
        (f"jobset --set name={LONG[:55]}", "a-node-0-1. with 64 characters"),
        ("elastic --set minNodes=9", "minNodes is 9, more than nodes, 4"),
        ("multi-node jobset volcano", "jobset and volcano cannot be combined"),
        *[
            (f"multi-node {lone} {gang} --set minNodes=1 --set trials=1 --set parallel=1",
             f"{lone} and {gang} cannot be combined: .* remove one of them, .* plain Job")
            for lone in ("elastic", "independent", "sweep") for gang in ("jobset", "trainjob", "volcano")
        ],
        ("sweep --set trials=5", r"trials is 5 \(--set trials=5\), but the overlay sweep has only 3 trials, and no 3.yaml, 4.yaml; "),
        ("cpu-demo sweep --set trials=1 --set parallel=1 --set nodes=1", "cpu-demo has only 0 trials, and no 0.yaml"),
        ("sweep --set nodes=3", r"nodes is 3 \(--set nodes=3\), but each trial of a sweep has one node"),
        ("cpu-demo --set env.WANDB_API_KEY=1", "WANDB_API_KEY would be in plain text in the Job"),
        ("cpu-demo --set env.ISORUN_STOP_DEADLINE=200", "must increase, but the ranks have 200 s"),
        ("cpu-demo --set env.ISORUN_STOP_DEADLINE=abc", "ISORUN_STOP_DEADLINE must be a number of seconds above 0, but is 'abc' .the pods' environment"),
        ("cpu-demo --set env.PET_SHUTDOWN_TIMEOUT=500", "must increase, but .* kills them after 500 s"),
        (f"cpu-demo {TRAIN} stop.deadline=100", "config has stop.deadline=100, but in the pods ISORUN_STOP_DEADLINE sets 90 s"),
        ("cpu-demo --set stopDeadline=\N{SUPERSCRIPT TWO}", "stopDeadline .* must be a whole number of seconds"),
        ("cpu-demo --set stopDeadline=soon", "stopDeadline .* must be a whole number of seconds"),
        ("cpu-demo --set sharedMemory=2Gi", "sharedMemory is 2Gi, but /dev/shm counts toward memory"),
        (f"cpu-demo {TRAIN} optim.lrr=1", "did you mean optim.lr?"),
        ("cpu-demo --set name=true", r"name of the run is 'true' .--set name=true., which is not a text"),
        ("cpu-demo --set name=null", "which is not a text in YAML"),
        ("cpu-demo -n a.b", "The namespace is 'a.b', but must have"),
        ("cpu-demo -n research-", "The namespace is 'research-', but must have"),
        ("cpu-demo --set image=UPPER", r"image must be the name of an image, .* but is 'UPPER' .--set image=UPPER"),
        ("cpu-demo --set image=a/b:c:d", "image must be the name"),
        ("cpu-demo --set image=a@sha256:12", "image must be the name"),
        ("cpu-demo --set image=https://a.b/c", "image must be the name"),
        ("cpu-demo --set cpu=0", "cpu must be a number of cores above 0, such as 8 or 500m, but is 0"),
        ("cpu-demo --set cpu=0.0001", "cpu must be a number of cores above 0"),
        ("cpu-demo --set cpu=4Gi", "cpu must be a number of cores above 0"),
        ("cpu-demo --set memory=64", "memory must be a quantity of bytes of at least 1Mi, .* but is 64 "),
        ("cpu-demo --set memory=512m", "memory must be a quantity of bytes"),
        ("cpu-demo --set scratch=0Gi", "scratch must be a quantity of bytes"),
        ("cpu-demo --set nodes=true", "nodes must be a whole number .* but is True"),
        ("cpu-demo --set nodes=2.5", "nodes must be a whole number .* but is 2.5"),
        ("cpu-demo --set nodes=200000", "nodes must be a whole number of at least 1 and at most 100000"),
        ("cpu-demo --set retries=2147483648", "retries must be a whole number of at least 0 and at most 2147483647"),
        ("cpu-demo --set processes=true", "processes must be a whole number of at least 1, or auto"),
        ("cpu-demo --set nodes=", "nodes has no value .--set nodes=.; add one"),
        ("cpu-demo --set stopDeadline=9999999", "stopDeadline .* at most 604800, but is '9999999'"),
        ("cpu-demo time-limit --set timeLimit=0", r"timeLimit must be a whole number of seconds of at least 1 and at most 1000000000, but is 0 .--set timeLimit=0."),
        ("jobset time-limit --set timeLimit=1d", "timeLimit must be a whole number of seconds .* but is '1d'"),
        ("jobset time-limit", "timeLimit is required by a component; add --set timeLimit=VALUE .with TorchX: -cfg time_limit=VALUE."),
        ("volcano time-limit --set timeLimit=60", "time-limit and volcano cannot be combined: a Volcano job has no time limit"),
        ("jobset --set env.PET_RESTART_DEADLINE=60", "PET_RESTART_DEADLINE is '60' .*, but the pods get this variable from timeLimit"),
        ("cpu-demo priority --set priorityClass=High", "priorityClass must be the name of an object"),
        ("cpu-demo priority --set priorityClass=true", "priorityClass must be the name .* but is True"),
        (f"cpu-demo kueue --set queuePriority=a --set queue={LONG}aa", "queue must be the name of an object: at most 63"),
        ("cpu-demo --set env.PET_NNODES=3", r"PET_NNODES is '3' .--set env.PET_NNODES.*, but the pods get this variable from nodes"),
        ("cpu-demo --set env.POD_IP=1.2.3.4", "POD_IP is .* from the address of the pod"),
        ("cpu-demo --set env.1A=x", "'1A' is not a name of an environment variable"),
        ("cpu-demo --set env.A+B=x", r"'A\+B' is not a name of an environment variable"),
        ("cpu-demo --set env.PET_RDZV_PORT=99999", "port of the rendezvous must be a number from 1 to 65535, but is '99999' .environment variable PET_RDZV_PORT"),
        ("cpu-demo --set env.PET_PREFLIGHT=ful", "--preflight must be off, quick, full or auto, but is 'ful' .environment variable PET_PREFLIGHT"),
        ("cpu-demo --set env.PET_MAX_RESTARTS=-1", "--max-restarts must be a whole number of at least 0"),
        ("isorun.fit --check False --rdzv_port 70000", "--rdzv_port must be a port from 1 to 65535, or 0 .* but is 70000"),
        ("isorun.fit --check False --metadata a_b/c=d", "--metadata has the key 'a_b/c', which becomes an annotation"),
        ("isorun.fit --check False --mounts type=bind,src=/a,dst=b", "--mounts: dst=b must be an absolute path"),
        ("isorun.fit --check False --mounts type=bind,src=/a,dst=/tmp", "--mounts: dst=/tmp has a mount already"),
        ("isorun.fit --check False --mounts type=bind,src=/a/../b,dst=/c", "--mounts: src=/a/../b must be an absolute path"),
        ("isorun.fit --check False --mounts type=volume,src=My_Claim,dst=/c", "--mounts: src=My_Claim must be the name of a Pers"),
        ("isorun.fit --check maybe", "isorun.fit: --check must be True or False, but is 'maybe'"),
        ("cpu-demo --nodes 2", "Unrecognized arguments|expected"),
    ],
)  # fmt: skip
def test_errors_are_reported_before_any_object_is_printed(words, said):
    with pytest.raises(UsageError, match=said):
        render_words(words.split())


@pytest.mark.parametrize(
    "image",
    thinned(
        ["isorun", "isorun:cpu", "a/b_c/d__e.f-g:V1.2_x", "localhost/a", "HOST:5000/a/b:T", "r.io/a",
         DIGEST, DIGEST.replace("@", ":tag@")],
        kept=["HOST:5000/a/b:T", DIGEST.replace("@", ":tag@")],
    ),
)  # fmt: skip
def test_names_of_images(image):
    assert render_words(["cpu-demo", "--set", f"image={image}"]).objects


@pytest.mark.parametrize(
    "text",
    thinned(["1e3", "1e-3", "0o7", "012", "1:30", "true", "null", "y", ""], kept=["1e3", "y", ""]),
)
def test_text_that_looks_like_another_type_stays_text_for_kubectl(text, tmp_path):
    """Versions of YAML differ in what they take as a number: kubectl would refuse such an argument."""
    words = ["cpu-demo", "-n", "1e3", "--set", f"env.A={text}", "--", "python", "x.py", text]
    made = render_words(words).objects
    (tmp_path / "kustomization.yaml").write_text("resources: [objects.yaml]")
    (tmp_path / "objects.yaml").write_text(as_yaml(made))
    for objects in (made, kustomize.build(tmp_path)):
        container = one(objects, "Job")["spec"]["template"]["spec"]["containers"][0]
        assert container["args"][-1] == text
        assert {e["name"]: e.get("value", "") for e in container["env"]}["A"] == text
        assert {o["metadata"]["namespace"] for o in objects} == {"1e3"}


def test_fewer_trials_than_files():
    assert (
        one(render_words(["sweep", "--set", "trials=2"]).objects, "Job")["spec"]["completions"] == 2
    )


def test_a_name_of_the_maximum_length():
    assert render_words(["cpu-demo", "--set", f"name={LONG[:61]}"]).objects


def test_a_missing_kubectl_is_reported_with_how_to_install_it(monkeypatch):
    monkeypatch.delenv("ISORUN_KUSTOMIZE")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        UsageError, match="Neither kubectl nor kustomize is installed .* install kubectl"
    ):
        kustomize.command()
    monkeypatch.setenv("ISORUN_KUSTOMIZE", "kubectll")
    with pytest.raises(UsageError, match="ISORUN_KUSTOMIZE is 'kubectll', which is not a program"):
        kustomize.command()


def test_the_error_of_kustomize_is_passed_on(tmp_path):
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(UsageError, match=r"could not build the manifests: .*missing\.yaml"):
        kustomize.build(tmp_path)


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("500m", 0.5),
        ("8", 8),
        (8, 8),
        ("1.5Gi", 1.5 * 2**30),
        ("2Mi", 2**21),
        ("3k", 3000),
        ("1G", 1e9),
    ],
)
def test_quantities(quantity, value):
    assert number(quantity) == value
