"""``show-config`` prints the origin of every value; ``schema`` describes all valid configs."""

import json

import pytest
import yaml

from tests.support.forked import command
from tests.support.runs import ROOT
from train.cli import main

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_each_value_has_its_origin(tmp_path):
    extra = tmp_path / "extra.yaml"
    extra.write_text("optim:\n  lr: 0.5\nrun:\n  seed: ${oc.decode:${oc.env:OMP_NUM_THREADS}}\n")
    done = command(
        "show-config", "--config", "configs/digits.yaml", "--config", extra, "model.channels=8"
    )
    origins = {}
    for line in done.stdout.splitlines():
        setting, _, origin = line.partition("# ")
        key, _, value = setting.partition(" = ")
        origins[key] = value.strip(), origin
    lines = (ROOT / "configs/digits.yaml").read_text().splitlines()
    at = lines.index("  global_batch_size: 64") + 1
    assert origins["batch.global_batch_size"] == ("64", f"configs/digits.yaml:{at}")
    assert origins["optim.lr"] == ("0.5", f"{extra}:2")
    assert origins["model.channels"] == ("8", "command line")
    assert origins["model.dropout"] == ("0.2", "default")
    value, origin = origins["run.seed"]
    assert value == "1"
    assert "environment variable OMP_NUM_THREADS" in origin


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_plain_output_is_a_valid_config(config, tmp_path):
    changed = ["optim.lr=1.0e-05", "optim.options={a: [1, null]}", "run.name=a b", "ema.decay=0.5"]
    first = command("show-config", "--config", config, *changed, "--plain").stdout
    (tmp_path / "resolved.yaml").write_text(first)
    second = command("show-config", "--config", tmp_path / "resolved.yaml", "--plain").stdout
    assert second == first
    values = yaml.safe_load(first)
    assert values["optim"]["lr"] == 1e-5
    assert values["optim"]["options"] == {"a": [1, None]}


def schema(*words):
    return json.loads(command("schema", *words).stdout)


def section(schema, *keys):
    """The schema of a dotted key; resolves references and optional sections."""
    here = schema
    for key in [*keys, None]:
        while "$ref" in here or "anyOf" in here or "allOf" in here:
            if "$ref" in here:
                here = schema["$defs"][here["$ref"].rpartition("/")[2]]
            else:
                options = here.get("anyOf") or here["allOf"]
                refs = [o for o in options if "$ref" in o]
                if not refs:
                    break
                here = refs[0]
        if key is not None:
            here = here["properties"][key]
    return here


def leaves(values, keys=()):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*keys, key))
        else:
            yield (*keys, key)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_has_every_key_of_our_configs(config):
    found = schema("--config", config)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    values = yaml.safe_load(config.read_text())
    for keys in leaves(values):
        assert section(found, *keys) is not None, keys
    with pytest.raises(KeyError):
        section(found, "optim", "lrr")
    for name in values:
        assert section(found, name)["additionalProperties"] is False
    assert set(found["required"]) >= {"task", "batch", "length"}


@pytest.mark.parametrize("task", ["digits", "text", "tests.support.tiny:TinyTask"])
def test_every_field_has_a_description(task):
    found = schema(f"task.use={task}")

    def sections(schema):
        if "properties" in schema:
            yield schema
        for inner in schema.values():
            for item in inner if isinstance(inner, list) else [inner]:
                if isinstance(item, dict):
                    yield from sections(item)

    for section in sections(found):
        for field, entry in section["properties"].items():
            assert entry.get("description"), f"{section['title']}.{field}"


def test_a_json_schema_validator_accepts_our_configs(tmp_path):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    for config in CONFIGS:
        found, values = schema("--config", config), yaml.safe_load(config.read_text())
        jsonschema.validate(values, found)
        values["optim"]["lrr"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values, found)


def test_the_schema_includes_the_sections_of_the_task():
    assert "channels" in section(schema("task.use=digits"), "model")["properties"]
    tiny = schema("task.use=tests.support.tiny:TinyTask")
    assert "hidden" in section(tiny, "model")["properties"]
    assert "kill_at_step" in section(tiny, "task")["properties"]


def test_show_config_needs_no_run_directory_that_is_writable(capsys):
    words = ["batch.global_batch_size=8", "length.steps=3", "run.dir=/proc/isorun"]
    assert main(["show-config", "task.use=digits", *words]) == 0
    assert "run.dir = '/proc/isorun'" in capsys.readouterr().out
    assert main(["show-config", "task.use=digits", *words, "schedule.warmup_steps=9"]) == 64
    assert "longer than the run of 3 steps" in capsys.readouterr().err
    assert main(["--config", "x", "show-config"]) == 64
    assert "write `python -m train show-config ...`" in capsys.readouterr().err
