"""TorchX's own scheduler for Volcano accepts isorun's component.

Compares its objects with stored ones. To store them again, delete the file and run this test twice.
"""

import re
from pathlib import Path

import yaml

from tests.launch.launching import NIGHTLY, dryrun
from tests.support.runs import TINY

GOLDEN = Path(__file__).parent / "golden" / f"volcano-{'nightly' if NIGHTLY else '0.7'}.yaml"


def objects():
    info = dryrun(
        "isorun.fit", "-j", "2x8", "-h", "gpu_h100_8", "--max_retries", "3", "--image", "isorun:1",
        "--env", "NCCL_DEBUG=INFO", "--mounts", "type=volume,src=runs,dst=/runs",
        *TINY, "batch.global_batch_size=64", "run.name=demo", "run.dir=/runs/demo",
        scheduler="kubernetes", queue="default", **({"validate_spec": False} if NIGHTLY else {}),
    )  # fmt: skip
    text = str(info)
    text = re.sub(r"demo-\d{8}-\d{6}-[0-9a-f]{6}", "RUN-ID", text)
    text = re.sub(r"demo-[a-z0-9]{8,}", "APP-ID", text)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}", "SESSION-ID", text)  # nightly
    found = yaml.safe_load(re.sub(r"(torchx.pytorch.org/version:) \S+", r"\1 VERSION", text))
    for task in found["spec"]["tasks"]:
        for container in task["template"]["spec"]["containers"]:
            container["env"] = [
                e
                for e in container["env"]
                if e["name"] != "ISORUN_SUBMITTED_AT"  # the time now
            ]
    return found


def test_volcano_objects_match_the_stored_ones():
    found = objects()
    if not GOLDEN.exists():
        GOLDEN.write_text(yaml.safe_dump(found))
        raise AssertionError(f"{GOLDEN} was written; check it and run this test again.")
    assert found == yaml.safe_load(GOLDEN.read_text())


def test_node_1_gets_node_0_from_volcano_s_variable():
    tasks = objects()["spec"]["tasks"]
    containers = [task["template"]["spec"]["containers"][0] for task in tasks]
    named = [c["command"][c["command"].index("--rdzv-host-env") + 1] for c in containers]
    assert named == ["TORCHX_RANK0_HOST", "VC_FIT_0_HOSTS"]
    assert {"name": "TORCHX_RANK0_HOST", "value": "localhost"} in containers[0]["env"]
    assert [c["resources"]["limits"]["nvidia.com/gpu"] for c in containers] == ["8", "8"]
