"""The API server's own validation of each overlay, alone and with each component: a dry run on the
server, in which unknown fields are errors and the webhooks of JobSet, Kubeflow Trainer and Kueue
answer; and pod security, which it enforces. Of Volcano there are only the types.

Nothing is created except TrainingRuntimes, without which no TrainJob is accepted.
"""

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch.contract import UsageError
from launch.kubernetes import manifests
from launch.kubernetes.rendering import RenderRequest, render
from launch.kubernetes.values import parse
from tests.launch.kubernetes.objects import COMPONENTS, OVERLAYS, VALUES, templates
from tests.launch.kubernetes.test_pod_security import LOOSENED
from tests.real.kubernetes.kube import Kube
from tests.real.kubernetes.local import ADD_ONS
from tests.support.kubectl import kubectl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# What the renderer refuses to combine; tests/launch/kubernetes/test_render.py tests its messages.
REFUSED = ("cannot be combined", "of a sweep has one node", "has only 0 trials")
CRDS = {
    "batch/v1": None,
    "jobset.x-k8s.io/v1alpha2": "jobsets.jobset.x-k8s.io",
    "trainer.kubeflow.org/v1alpha1": "trainjobs.trainer.kubeflow.org",
    "batch.volcano.sh/v1alpha1": "jobs.batch.volcano.sh",
}


def combination(number, overlay, component):
    """The objects of an overlay with a component; None if the renderer refuses them."""
    own = manifests.overlay(overlay).components
    wanted = {key for name in (*own, component) if name for key in manifests.needs(name)}
    values = [f"{key}={VALUES[key]}" for key in sorted(wanted & VALUES.keys())]
    add = [component] if component else []
    try:
        return render(RenderRequest(overlay, parse([f"name=c{number}", *values]), add)).objects
    except UsageError as error:
        if any(text in str(error) for text in REFUSED):
            return None
        raise


@pytest.fixture(scope="module")
def combinations(cluster):
    """{(overlay, component): objects}; each has a name of its own."""
    if cluster:
        cluster.add(*ADD_ONS)
    added = [None, *(name for name in COMPONENTS if name != "run")]
    pairs = [(overlay, component) for overlay in OVERLAYS for component in added]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISORUN_KUSTOMIZE", kubectl())
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each starts kustomize
            made = list(pool.map(lambda n: combination(n, *pairs[n]), range(len(pairs))))
    return {pair: objects for pair, objects in zip(pairs, made, strict=True) if objects}


@pytest.fixture(scope="module")
def empty(kube):
    """A namespace without the objects that the runs of a namespace share."""
    made = Kube(f"{kube.namespace}-empty", kube.image, kube.local)
    made.create_namespace("restricted")
    yield made
    made.delete_namespace()


def workload(objects):
    return next(o for o in objects if o["kind"] in ("Job", "JobSet", "TrainJob"))


def dry_run(kube, objects):
    """What the server says that is not the name of an accepted object."""
    said = kube.create(objects, "--dry-run=server", "--validate=strict")
    return [line for line in said.splitlines() if not line.endswith("created (server dry run)")]


@pytest.mark.parametrize("api", CRDS)
def test_every_combination_is_valid(empty, combinations, api):
    made = {p: o for p, o in combinations.items() if workload(o)["apiVersion"] == api}
    assert len(made) > len(COMPONENTS) / 2
    if CRDS[api] and CRDS[api] not in empty.run("get", "crd", "-o", "name", namespace=False):
        pytest.skip(f"the cluster has no {CRDS[api]}")
    objects = [o for found in made.values() for o in found]
    runtimes = [o for o in objects if o["kind"] == "TrainingRuntime"]
    if runtimes:
        empty.create(runtimes, "--validate=strict")
        time.sleep(5)  # until the webhook knows them
    said = dry_run(empty, [o for o in objects if o not in runtimes])
    warned = [line for line in said if line.startswith("Warning: would violate PodSecurity")]
    # The server warns about Jobs only, and kubectl prints each text once; all pods are in the next
    # test.
    assert len(warned) == (api == "batch/v1"), warned
    assert all("IPC_LOCK" in line for line in warned), warned
    rest = [line for line in said if line not in warned]
    assert rest == [], "\n".join(rest)


def test_pods_of_every_combination_are_admitted_by_the_restricted_level(empty, combinations):
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{'-'.join(filter(None, pair))}-{number}"},
            # A pod without its controller: these two objects need not exist.
            "spec": {**template["spec"], "serviceAccountName": None, "priorityClassName": None},
        }
        for pair, objects in combinations.items()
        for number, template in enumerate(t for o in objects for t in templates(o))
    ]
    said = dry_run(empty, pods)
    refused = {re.search(r'pods "([^"]+)" is forbidden: violates PodSecurity', s) for s in said}
    assert None not in refused, "\n".join(said)
    names = {found[1].rpartition("-")[0] for found in refused}
    wanted = {"-".join(pair) for pair in combinations if pair[1] in LOOSENED}
    assert names == wanted, "\n".join(said)
