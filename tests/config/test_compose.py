"""Files and overrides are merged into values, and each value has a known origin."""

import pytest

from train.config.compose import compose, flatten
from train.exits import UsageError


def write(path, text):
    path.write_text(text)
    return str(path)


def test_later_files_and_overrides_win_and_set_the_origin(tmp_path):
    first = write(tmp_path / "a.yaml", "optim:\n  lr: 0.1\n  use: sgd\nrun:\n  name: x\n")
    second = write(tmp_path / "b.yaml", "# a comment\noptim:\n  use: adamw\n")
    composed = compose([first, second], ["run.name=y"])
    assert composed.values == {"optim": {"lr": 0.1, "use": "adamw"}, "run": {"name": "y"}}
    assert composed.origin("optim.lr") == f"{first}:2"
    assert composed.origin("optim.use") == f"{second}:3"
    assert composed.origin("run.name") == "command line"
    assert composed.origin("loader.workers") == "default"


def test_references_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SEED", "7")
    text = "run:\n  name: abc\n  dir: out/${run.name}\n  seed: ${oc.decode:${oc.env:MY_SEED}}\n"
    composed = compose([write(tmp_path / "a.yaml", text)], [])
    assert composed.values["run"] == {"name": "abc", "dir": "out/abc", "seed": 7}
    assert "environment variable MY_SEED" in composed.origin("run.seed")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=3e-4", 3e-4),
        ("a.b=[1,2]", [1, 2]),
        ("a.b=null", None),
        ("a.b=true", True),
        ("a.b=x=y", "x=y"),
        ("a.b=text", "text"),
    ],
)
def test_overrides_are_yaml(override, value):
    assert flatten(compose([], [override]).values) == {"a.b": value}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: {name: [}", "a.yaml:1 is not valid YAML"),
        ("- 1\n- 2\n", "must contain keys and values"),
        ("just words\n", "must contain keys and values"),
        ("run:\n  dir: ${nowhere.at.all}\n", "run.dir"),
        ("run:\n  name: x\nrun:\n  name: y\n", "duplicate key"),
    ],
)
def test_invalid_files_are_reported_in_one_sentence(tmp_path, text, expected):
    with pytest.raises(UsageError) as error:
        compose([write(tmp_path / "a.yaml", text)], [])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_file_is_valid(tmp_path):
    assert compose([write(tmp_path / "a.yaml", "# nothing yet\n")], []).values == {}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="no config file or run directory .*nowhere.yaml"):
        compose([str(tmp_path / "nowhere.yaml")], [])


@pytest.mark.parametrize("override", ["run.dir=a #b", "n=1 # one", "l=[1, 2] #3", "x=#y"])
def test_a_value_that_yaml_would_cut_is_refused(override):
    with pytest.raises(UsageError, match="which YAML takes for a comment; quote the value"):
        compose([], [override])


@pytest.mark.parametrize(
    ("override", "value"), [("x=a#b", "a#b"), ("x='a #b'", "a #b"), ('x="#"', "#"), ("x=", None)]
)
def test_a_number_sign_inside_a_value_is_kept(override, value):
    assert compose([], [override]).values == {"x": value}


@pytest.mark.parametrize("override", ["lr", "=3", "a b=3", "a.=3", "a={1"])
def test_malformed_overrides_are_refused(override):
    with pytest.raises(UsageError, match="command line"):
        compose([], [override])


@pytest.mark.parametrize("override", ["hooks.0.use=a:b", "hooks={use: a:b}"])
def test_an_override_below_a_list_is_refused(tmp_path, override):
    file = write(tmp_path / "a.yaml", "hooks:\n- use: b:c\n")
    with pytest.raises(UsageError, match=r"on the command line cannot be merged .* such as hooks="):
        compose([file], [override])


def test_an_override_below_a_value_of_a_file_sets_the_origin_of_its_section(tmp_path):
    file = write(tmp_path / "a.yaml", "optim:\n  lr: 0.1\n  betas: [0.9, 0.95]\n")
    composed = compose([file], ["optim.lr.x=1"])
    assert composed.origin("optim.lr") == "command line"
    assert composed.origin("optim") == f"{file}:1"


def test_a_key_does_not_take_the_origin_of_a_sibling(tmp_path):
    file = write(tmp_path / "a.yaml", "optim:\n  lr: 0.1\n  betas: [0.9, 0.95]\n")
    composed = compose([file], ["model={layers: 2}"])
    assert composed.origin("optim.eps") == "default"
    assert composed.origin("optim.betas.0") == f"{file}:3"
    assert composed.origin("model.layers") == "command line"
    assert composed.origin("model.width") == "default"


def test_an_override_of_a_section_keeps_the_origins_of_what_it_does_not_replace(tmp_path):
    file = write(tmp_path / "a.yaml", "task:\n  use: a\n  b:\n    c: 1\n    d: 2\n")
    composed = compose([file], ["task={shown: 3, b: {c: 4}}"])
    assert composed.values["task"] == {"use": "a", "b": {"c": 4, "d": 2}, "shown": 3}
    keys = ("task.use", "task.b.d", "task.b.c", "task.shown")
    assert [composed.origin(key) for key in keys] == [
        f"{file}:2",
        f"{file}:5",
        *2 * ["command line"],
    ]
    composed = compose([file], ["task.b=1", "task.b={x: 1}"])
    assert composed.origin("task.b.c") == "default"


def test_a_section_made_by_a_reference_has_the_origin_of_the_reference(tmp_path):
    text = 'a:\n  b: 1\nx: ${a}\ny: "${oc.create:{p: {q: 1}}}"\n'
    composed = compose([write(tmp_path / "a.yaml", text)], ["z=${oc.decode:'[1, 2]'}"])
    assert composed.origin("x.b").endswith("a.yaml:3")
    assert composed.origin("y.p.q") == composed.origin("y.p") == f"{tmp_path}/a.yaml:4"
    assert composed.origin("z.0") == "command line"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("!!int x", "int"), ("!!float x", "float"), ("!!timestamp 2026-99-99", "timestamp"),
        ("!!timestamp x", "timestamp"), ("!!bool x", "bool"), ("!!int ''", "int"),
        ("9" * 5000, "int"), ("0x" + "f" * 6000, "int"), ("-" + "9" * 400, "int"),
        ("1" + ":59" * 900 + ".0", "float"), ("[a, {b: !!int x}]", "int"),
        ("{0x" + "f" * 300 + ": 1}", "int"),
    ],
)  # fmt: skip
def test_a_value_without_the_form_of_its_type_is_refused_in_one_sentence(tmp_path, value, kind):
    with pytest.raises(
        UsageError, match=rf"run.seed on the command line has .* YAML's {kind};"
    ) as e:
        compose([], [f"run.seed={value}"])
    assert len(str(e.value)) < 300
    file = write(tmp_path / "a.yaml", f"run:\n  name: x\n  seed: {value}\n")
    with pytest.raises(UsageError, match=rf"a.yaml:3 has .* cannot be read as YAML's {kind};") as e:
        compose([file], [])
    assert len(str(e.value)) < 300


def test_a_large_number_by_a_reference_is_refused():
    for digits in (400, 5000):
        with pytest.raises(UsageError, match="cannot be resolved"):
            compose([], [f"run.seed=${{oc.decode:'{'9' * digits}'}}"])


@pytest.mark.parametrize(
    ("overrides", "section"),
    [
        (["init_from=a/b"], {"source": "a/b"}),
        (["init_from=wandb:a/b:best"], {"source": "wandb:a/b:best"}),
        (["init_from=a", "init_from.strict=false"], {"source": "a", "strict": False}),
        (["init_from.strict=false", "init_from=a"], {"source": "a", "strict": False}),
        (["init_from={source: a}", "init_from=b"], {"source": "b"}),
        (["init_from=a", "init_from=null"], None),
        (["init_from=null", "init_from=a"], {"source": "a"}),
    ],
)
def test_a_text_alone_sets_the_main_key_of_its_section(overrides, section):
    assert compose([], overrides).values == {"init_from": section}


def test_a_text_alone_in_a_file_has_its_origin(tmp_path):
    file = write(tmp_path / "a.yaml", "run:\n  name: x\ninit_from: ${run.name}/b\n")
    composed = compose([file], ["init_from.strict=false"])
    assert composed.values["init_from"] == {"source": "x/b", "strict": False}
    assert composed.origin("init_from.source") == f"{file}:3"
    assert compose([file], ["init_from=c"]).origin("init_from.source") == "command line"


@pytest.mark.parametrize(
    ("value", "read"),
    [("010", "octal number 8"), ("-0_17", "octal number -15"), ("[1, 010]", "octal number 8"),
     ("1:30", "90 (base 60)"), ("1:30.5", "90.5 (base 60)")],
)  # fmt: skip
def test_a_number_that_yaml_reads_as_another_is_refused(tmp_path, value, read):
    with pytest.raises(UsageError) as error:
        compose([], [f"length.steps={value}"])
    assert read in str(error.value)
    with pytest.raises(UsageError) as error:
        compose([write(tmp_path / "a.yaml", f"run:\n  seed: {value}\n")], [])
    assert f"a.yaml:2 has {value.removeprefix('[1, ').removesuffix(']')}" in str(error.value)


@pytest.mark.parametrize(
    ("value", "found"), [("'010'", "010"), ("01", 1), ("0", 0), ("1_000", 1000), ("0x1F", 31)]
)
def test_a_number_that_yaml_reads_as_written(value, found):
    assert compose([], [f"a={value}"]).values == {"a": found}
