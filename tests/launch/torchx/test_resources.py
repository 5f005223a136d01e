import re
from importlib.metadata import entry_points

import pytest
from torchx.specs import resource

from launch.torchx import resources
from tests.launch.launching import dryrun, fit
from train.exits import UsageError

NAMES = ["cpu_small", "cpu_large"] + [
    f"gpu_{kind}_{count}" for kind in ("a100", "h100", "h200", "l4", "t4") for count in (1, 2, 4, 8)
]


@pytest.mark.parametrize("name", NAMES)
def test_torchx_knows_every_built_in_name(name):
    found = resource(h=name)
    assert found.gpu == (int(name.rpartition("_")[2]) if name.startswith("gpu") else 0)
    assert found.memMB >= 8192
    assert found.cpu >= 2


def test_entry_points_match_the_built_in_names():
    registered = {p.name: p.value for p in entry_points(group="torchx.named_resources")}
    assert {n: f"launch.torchx.resources:{n}" for n in resources.BUILT_IN} == registered
    assert set(NAMES) == set(resources.BUILT_IN)


def test_each_call_returns_a_new_resource():
    """Schedulers modify the resources that they get."""
    resources.find_resource("gpu_h100_8").capabilities["x"] = 1
    assert "x" not in resources.find_resource("gpu_h100_8").capabilities


@pytest.fixture
def own(home, monkeypatch):
    def write(text):
        path = home / "nodes.yaml"
        path.write_text(text)
        monkeypatch.setenv("ISORUN_RESOURCES", str(path))
        return path

    return write


def test_user_resources_are_found_by_name_and_override_built_in_ones(own):
    own(
        "ours:\n  cpu: 60\n  memMB: 500000\n  gpu: 8\n"
        "  capabilities: {node.kubernetes.io/instance-type: big}\n  devices: {fast/net: 4}\n"
        "cpu_small:\n  cpu: 1\n  memMB: 100\n"
    )
    made = fit("-h", "ours", "-j", "1xauto")
    assert (made.resource.cpu, made.resource.gpu, made.resource.memMB) == (60, 8, 500000)
    assert made.resource.capabilities == {"node.kubernetes.io/instance-type": "big"}
    assert made.resource.devices == {"fast/net": 4}
    assert made.args[5] == "8"
    assert fit("-h", "cpu_small").resource.memMB == 100


def test_user_resources_are_read_from_the_config_directory(home, monkeypatch):
    (home / ".config/isorun").mkdir(parents=True)
    (home / ".config/isorun/resources.yaml").write_text("ours: {cpu: 1, memMB: 100}\n")
    assert resources.find_resource("ours").cpu == 1
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "elsewhere"))
    with pytest.raises(UsageError, match="-h is 'ours', which is not a named resource"):
        resources.find_resource("ours")


def test_an_empty_file_is_valid(own):
    own("# none yet\n")
    assert resources.user_resources() == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {cpu: 1, memMB: 1, gpus: 2}", "a.gpus is not a known key (value 2, from {path} (ISORUN_RESOURCES)); did you mean gpu?"),
        ("a: {cpu: 1}", "a.memMB is missing in {path}"),
        ("a: {cpu: many, memMB: 1}", "a.cpu is 'many' in {path}"),
        ("a: {cpu: 0, memMB: 1}", "a.cpu is 0 in {path}"),
        ("a: {cpu: 1, memMB: 1, gpu: -1}", "a.gpu is -1 in {path}"),
        ("- a", "{path} (ISORUN_RESOURCES) must be a mapping from names"),
        ("a: 3", "a is 3 in {path}"),
        ("a: [1,", "not valid YAML in line 1"),
        ("a: {cpu: 2001-13-45, memMB: 1}", "in {path} (ISORUN_RESOURCES) cannot be read: month must be in 1..12"),
    ],
)  # fmt: skip
def test_an_error_names_the_file(own, text, said):
    path = own(text)
    with pytest.raises(UsageError, match=re.escape(said.format(path=path))):
        dryrun("isorun.fit", "-h", "cpu_small", "task.use=digits")


def test_a_named_file_must_exist(monkeypatch):
    monkeypatch.setenv("ISORUN_RESOURCES", "/nowhere.yaml")
    with pytest.raises(
        UsageError, match=r"ISORUN_RESOURCES is '/nowhere\.yaml', but this file does not"
    ):
        resources.user_resources()


def test_torchx_s_own_names_work():
    assert (
        fit("-h", "aws_t3.medium").resource.capabilities["node.kubernetes.io/instance-type"]
        == "t3.medium"
    )
