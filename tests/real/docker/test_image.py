"""The image: its user, where it can write, and what it contains."""

import json
import re
import subprocess

import pytest

from tests.support.runs import ROOT, curve, run

# The first test waits until the image is built.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DIGITS = [
    "--config", "configs/digits.yaml", "length.epochs=null", "length.steps=30",
    "evaluate.every_epochs=null", "checkpoint.every_steps=20", "track.log_every_steps=1",
]  # fmt: skip


def inside(docker, image, *command, options=(), **kwargs):
    """Runs a command in a new container."""
    words = ["run", "--rm", "--network", "none", "--env", "OMP_NUM_THREADS=1", *options]
    return docker(*words, image, *command, **kwargs)


def python(docker, image, code, **kwargs):
    return inside(docker, image, "python", "-c", code, **kwargs).stdout.strip()


def test_the_user_is_a_number_other_than_root(docker, image):
    assert docker("inspect", "-f", "{{.Config.User}}", image).stdout.strip() == "1000:1000"
    assert inside(docker, image, "id", "-u").stdout.strip() == "1000"


READ_ONLY = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
             "--tmpfs", "/scratch", "--tmpfs", "/runs"]  # fmt: skip


@pytest.mark.parametrize("user", ["1000:1000", "1000680000:0", "54321:54321"])
def test_it_trains_on_a_read_only_root_with_any_user_id(docker, image, user):
    # Covers everything that writes files: W&B, TensorBoard, the cache of matplotlib.
    said = inside(
        docker, image, "sh", "-c",
        "python -m train fit $* && python -m train verify $* && ls /runs/digits && "
        "python -c 'import matplotlib.pyplot, getpass; print(getpass.getuser())'",
        "sh", *DIGITS, options=[*READ_ONLY, "--user", user], check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    assert "Finished: 30 steps" in said.stdout
    assert "all well" in said.stdout
    assert {"wandb", "tensorboard", "ledger.bin"} <= set(said.stdout.split())


def test_a_read_only_root_without_mounts_is_reported(docker, image):
    """Shows that the mounts in the test above are needed."""
    said = inside(docker, image, "python", "-m", "train", "fit", *DIGITS,
                  options=["--read-only"], check=False)  # fmt: skip
    assert said.returncode == 64
    assert "Read-only file system" in said.stderr
    assert "Traceback" not in said.stderr


def test_deepspeed_needs_no_compiled_operators(docker, image):
    """zero3 trains without a compiler."""
    said = inside(
        docker, image, "python", "-m", "launch.agent", "--", "python", "-m", "train", "fit",
        *DIGITS, "strategy=zero3", options=READ_ONLY, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    assert "zero3" in said.stdout
    assert "Finished: 30 steps" in said.stdout


def test_the_image_contains_no_build_tools_and_no_secrets(docker, image, builder):
    tools = "gcc cc g++ c++ make cmake git nvcc ld"
    assert inside(docker, image, "which", *tools.split(), check=False).stdout == ""
    history = docker("history", "--no-trunc", image).stdout
    assert "no-index" not in history
    found = inside(docker, image, "find", "/", "-xdev", "(", "-name", "pip.conf", "-o", "-name",
                   "*.whl", "-path", "/opt/*", "-o", "-name", ".git", ")",
                   options=["--user", "0"]).stdout  # fmt: skip
    assert found == ""


def test_downloads_of_pip_are_not_in_the_image(docker, image):
    """The empty mount point may be."""
    find = "find /root/.cache /var/cache/pip /scratch -type f 2> /dev/null || true"
    assert inside(docker, image, "sh", "-c", find, options=["--user", "0"]).stdout == ""


def test_labels_name_the_base_the_source_and_the_revision(docker, image):
    labels = json.loads(docker("inspect", "-f", "{{json .Config.Labels}}", image).stdout)
    assert labels["org.opencontainers.image.base.name"] == "isorun-test-base"
    assert re.fullmatch("[0-9a-f]{40}|unknown", labels["org.opencontainers.image.revision"])
    assert "org.opencontainers.image.source" in labels


COMPILED = [
    "python", "-m", "train", "fit", "--config", "configs/text.yaml", "compile=true",
    "length.steps=3", "schedule.warmup_steps=1", "model.layers=1", "model.width=64",
    "data.context=64", "evaluate.every_steps=null", "task.sample_tokens=8", "track.wandb=disabled",
]  # fmt: skip


def test_a_compiled_model_trains_in_the_image_with_compilers(docker, image, builder):
    builder.build("isorun-test:cpu-compile", target="cpu-compile")
    options = [word.replace("/scratch", "/scratch:exec") for word in READ_ONLY]
    said = inside(docker, "isorun-test:cpu-compile", *COMPILED, options=options, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "Finished: 3 steps" in said.stdout
    said = inside(docker, "isorun-test:cpu-compile", *COMPILED, options=READ_ONLY, check=False)
    assert (said.returncode, said.stderr.count("\n")) == (64, 1), said.stderr
    assert "/scratch/.cache/torchinductor, which is mounted noexec; mount it with" in said.stderr
    said = inside(docker, image, *COMPILED, options=READ_ONLY, check=False)
    assert (said.returncode, said.stderr.count("\n")) == (64, 1), said.stderr
    assert "has no C++ compiler (g++); install one" in said.stderr


ORPHAN = """
import os, time
if os.fork() == 0:
    os.fork() == 0 and (time.sleep(0.2), os._exit(0))  # its parent is gone by then
    os._exit(0)
os.wait()
time.sleep(1)
states = [open(f'/proc/{pid}/stat').read().rsplit(')')[1].split()[0]
          for pid in os.listdir('/proc') if pid.isdigit()]
print(open('/proc/1/comm').read().strip(), states.count('Z'))
"""

COUNT = """
import signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
print('ready', flush=True)
while not heard: time.sleep(0.05)
time.sleep(1)
sys.exit(len(heard))
"""


def test_orphans_are_reaped(docker, image):
    assert python(docker, image, ORPHAN) == "tini 0"


def test_a_signal_is_forwarded_once_and_the_exit_code_is_returned(docker, nodes):
    name = nodes.start("signals", "python", "-c", COUNT)
    while "ready" not in nodes.logs(name):
        pass
    docker("kill", "--signal", "TERM", name)
    assert nodes.finish([name]) == [1]


def layers(docker, image):
    return json.loads(docker("inspect", "-f", "{{json .RootFS.Layers}}", image).stdout)


def test_a_change_of_code_adds_a_small_layer(docker, builder, image, capsys):
    before = layers(docker, image)
    changed = builder.context / "train" / "version_of_a_test.py"
    changed.write_text("CHANGED = True\n")
    # A change of pyproject.toml that does not change the dependencies.
    project = builder.context / "pyproject.toml"
    original = project.read_text()
    project.write_text(original.replace("line-length = 100", "line-length = 101"))
    try:
        said = builder.build("isorun-test:changed")
    finally:
        changed.unlink()
        project.write_text(original)
    after = layers(docker, "isorun-test:changed")
    assert (
        python(
            docker, "isorun-test:changed", "import train.version_of_a_test as v; print(v.CHANGED)"
        )
        == "True"
    )
    assert after[:-1] == before[:-1], said
    assert after[-1] != before[-1]
    sizes = docker("history", "--format", "{{.Size}}\t{{.CreatedBy}}", "isorun-test:changed").stdout
    rows = [line.split("\t") for line in sizes.splitlines() if not line.startswith("0B")]
    with capsys.disabled():
        print("\n" + "\n".join(f"{size:>8}  {by[:90]}" for size, by in rows))
    assert rows[0][1].startswith("COPY")
    # A registry receives the layer compressed; its content is /app.
    packed = inside(docker, "isorun-test:changed", "sh", "-c", "tar -C /app -cz . | wc -c").stdout
    with capsys.disabled():
        print(f"{int(packed) / 1000:6.0f}kB  the top layer, compressed")
    assert int(packed) < 3_000_000


def test_a_newer_source_on_top_of_the_image_is_used(docker, image):
    """Compiled files in the image must not hide it: TorchX copies a workspace over /app."""
    dockerfile = f"FROM {image}\nUSER 0\nRUN echo 'NEW = True' >> /app/train/exits.py\nUSER 1000\n"
    docker("build", "--network", "host", "--tag", "isorun-test:newer", "-", input=dockerfile)
    assert python(docker, "isorun-test:newer", "import train.exits as e; print(e.NEW)") == "True"


def test_own_dependencies_can_be_added_on_top(docker, builder, image):
    """As in docs/docker.md, with wheels instead of an index."""
    dockerfile = (
        f"FROM {image}\nUSER 0\n"
        "RUN --mount=type=bind,from=isorun-test-wheels,target=/mnt "
        "pip install --no-index --find-links /mnt cyclonedx-bom\nUSER 1000:1000\n"
    )
    docker("build", "--network", "host", "--tag", "isorun-test:own", "-", input=dockerfile)
    assert inside(docker, "isorun-test:own", "cyclonedx-py", "--version").returncode == 0


def test_the_sbom_lists_all_packages_of_the_image(docker, builder, image, tmp_path):
    options = f"--volume {builder.wheels}:/mnt:ro --env PIP_NO_INDEX=1 --env PIP_FIND_LINKS=/mnt"
    done = subprocess.run(
        ["make", "sbom", f"DOCKER={docker.client}", f"IMAGE={image}",
         f"SBOM={tmp_path}/sbom.json", f"RUN_OPTIONS={options}"],
        cwd=ROOT, env=docker.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    listed = {part["name"]: part["version"] for part in bill["components"]}
    there = json.loads(inside(docker, image, "pip", "list", "--format", "json").stdout)
    assert listed.keys() >= {"torch", "deepspeed", "isorun", "pip"}
    assert listed == {part["name"]: part["version"] for part in there}


def test_the_curve_matches_that_of_the_host(nodes):
    """The same config in the image and on the host, on one process."""
    name = nodes.start("one", "python", "-m", "train", "fit", *DIGITS, "run.dir=/runs/one")
    assert nodes.finish([name]) == [0], nodes.said
    run("fit", nodes.runs / "host", base=DIGITS)
    here, there = curve(nodes.runs / "host"), curve(nodes.runs / "one")
    assert len(here) == 30
    assert there == pytest.approx(here, abs=1e-6)
