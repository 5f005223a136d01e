"""Configs that hold secrets are refused, and the way to pass a secret is shown."""

import pytest

from tests.support.runs import TINY
from train.config.compose import compose
from train.config.load import load_config
from train.exits import UsageError

SECRET = "s3cr3t-value"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setenv("SCRATCH", "/scratch/me")


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:MY_API_KEY}", "x-${oc.env:MY_API_KEY}", "${oc.env:MY_API_KEY,none}",
        "${oc.decode:${oc.env:MY_API_KEY}}", "[1, '${oc.env:MY_API_KEY}']",
        "{a: [{b: '${oc.env:MY_API_KEY}'}]}", "${oc.env:HF_TOKEN,''}", "${oc.env:${name}}",
    ],
)  # fmt: skip
def test_a_secret_variable_is_refused(value):
    with pytest.raises(UsageError, match="environment variable (MY_API_KEY|HF_TOKEN)") as refused:
        compose([], ["name=MY_API_KEY", f"data.some={value}"])
    assert "command line" in str(refused.value)
    assert "os.environ" in str(refused.value)
    assert SECRET not in str(refused.value)


def test_the_file_and_line_of_a_secret_variable_are_named(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("run:\n  name: a\ndata:\n  items: [a, '${oc.env:MY_API_KEY}']\n")
    with pytest.raises(UsageError, match=r"data.items\[1\] refers .*x.yaml:4"):
        compose([str(path)], [])


def test_other_variables_may_be_used():
    values = compose([], ["run.dir=${oc.env:SCRATCH}/x", "data.n=${oc.env:NUM_TOKENS,5}"]).values
    assert values == {"run": {"dir": "/scratch/me/x"}, "data": {"n": "5"}}


@pytest.mark.parametrize(
    "override",
    [
        "data.url=https://me:s3cr3t-value@host/x", "data.urls=['https://me:s3cr3t-value@host/x']",
        "checkpoint.mirror.url=s3://key:s3cr3t-value@bucket/x",
        "checkpoint.mirror.url='https://host/x?access_token=s3cr3t-value'",
        "strategy_options={a: {b: {password: s3cr3t-value}}}", "task.api_key=s3cr3t-value",
        "hooks=[{use: 'a:B', options: {apiKey: s3cr3t-value}}]",
    ],
)  # fmt: skip
def test_secrets_in_any_field_are_refused(override):
    with pytest.raises(UsageError, match="secret.*environment variable") as refused:
        compose([], [override])
    assert SECRET not in str(refused.value)
    assert override.partition("=")[0] in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "data.key=image", "model.pad_token='<pad>'", "data.max_tokens=5", "data.password=false",
        "task.password_file=/run/secrets/x", "data.url=https://me@host/x", "task.api_key=",
    ],
)  # fmt: skip
def test_other_fields_may_have_such_names(override):
    compose([], [override])


@pytest.mark.parametrize(
    "options",
    [
        "{client_kwargs: {aws_secret_access_key: abc}}",
        "{a: [{b: {key: abc}}]}",
        "{token: abc}",
        "{config_kwargs: {auth: abc}}",
    ],
)
def test_nested_options_of_the_mirror_hold_no_secret(options):
    overrides = ["checkpoint.mirror.url=s3://x", f"checkpoint.mirror.options={options}"]
    with pytest.raises(UsageError, match="without|secret"):
        load_config([], [*TINY, *overrides], runs=False)


def test_other_options_of_the_mirror_are_accepted():
    options = (
        "{endpoint_url: 'http://s:9000', s3_additional_kwargs: {SSEKMSKeyId: abc}, key_file: f}"
    )
    overrides = ["checkpoint.mirror.url=s3://x", f"checkpoint.mirror.options={options}"]
    load_config([], [*TINY, *overrides], runs=False)


def test_the_command_that_resumes_hides_secrets():
    # Such as those that a task accepts under a name that means nothing.
    loaded = load_config([], [*TINY, "run.name=a"], runs=False)
    vars(loaded)["overrides"] = ("run.name=a", "MY_API_KEY=abc", "x.url=s3://a:b@c")
    assert loaded.command("fit").endswith("run.name=a 'MY_API_KEY=***' 'x.url=s3://a:***@c'")


LONG = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "override",
    [
        "model={'a.b': '${oc.env:${run.name}_KEY}'}", "model={'a.b': ['${oc.env:${run.name}_KEY}']}",
    ],
)  # fmt: skip
def test_a_secret_variable_is_found_below_any_key(override):
    with pytest.raises(UsageError, match="secret") as refused:
        compose([], ["run.name=MY_API", override])
    assert SECRET not in str(refused.value)


def test_a_decoded_number_or_list_is_compared_with_secret_variables(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "1234567890")
    monkeypatch.setenv("ITEMS_SECRET", "['hunter2-a', 'hunter2-b']")
    for name in ("MY_PASSWORD", "ITEMS_SECRET"):
        with pytest.raises(UsageError, match="environment variable"):
            compose([], [f"run.name={name}", "data.x=${oc.decode:${oc.env:${run.name}}}"])


@pytest.mark.parametrize(
    "override",
    [
        "task.password=12345678", "task.password=1.5", "task.passwords=[12345678, abc]",
        "task.api_keys={openai: abc, other: 5}", "task.a={credentials: [{user: me}]}",
        "hooks=[{use: 'a:B', options: {secret: [[abc]]}}]", "task.password=!!binary YWJj",
    ],
)  # fmt: skip
def test_values_of_any_type_below_names_of_secrets_are_refused(override):
    with pytest.raises(UsageError, match="is a secret by its name"):
        compose([], [override])


@pytest.mark.parametrize(
    "override",
    [
        "task.credentials={file: /run/x, timeout: 5}", "task.secrets=[]", "task.password=[null]",
        "task.max_tokens={a: 5}", "task.password_file=[a, b]", "task.api_key={}",
    ],
)  # fmt: skip
def test_properties_of_secrets_and_nothing_are_accepted(override):
    compose([], [override])


@pytest.mark.parametrize("place", ["{x}", "[a, {{b: 'it is {x}.'}}]", "{{a: {{{x}: 1}}}}"])
def test_a_pasted_secret_is_refused_wherever_it_is(monkeypatch, place):
    monkeypatch.setenv("WANDB_API_KEY", LONG)
    with pytest.raises(
        UsageError, match=r"data.* \(from command line\) contains .*secret"
    ) as refused:
        compose([], [f"data.some={place.format(x=LONG)}"])
    assert LONG not in str(refused.value)


def test_a_key_with_the_form_of_a_token_is_refused_and_not_shown():
    token = "sk-proj-a1B2c3D4e5a1B2c3D4e5a1B2c3D4e5"
    with pytest.raises(UsageError, match="A key of data") as refused:
        compose([], [f"data.items={{{token}: 1}}"])
    assert token not in str(refused.value)


def test_words_and_paths_that_are_also_in_variables_are_accepted(monkeypatch):
    monkeypatch.setenv("DATASET_KEY", "imagenet-1k/train")
    monkeypatch.setenv("SAMPLE_KEY", "soprano_voice")
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    compose([], ["data.a=imagenet-1k/train", "data.b=soprano_voice", "data.c=postgres://host/x"])


def test_the_default_of_a_variable_that_is_not_set_decides(monkeypatch):
    for name in ("IMAGE_KEY", "TRAIN_TOKENS"):
        monkeypatch.delenv(name, raising=False)
    overrides = [
        "a.x=${oc.env:IMAGE_KEY,jpg}", "a.y=${oc.env:TRAIN_TOKENS,300000000}",
        "a.z=${oc.env:IMAGE_KEY,${b.c}}", "b.c=png", "a.w='dir/${oc.env:IMAGE_KEY, \"jpg\"}/files'",
    ]  # fmt: skip
    values = compose([], overrides).values["a"]
    assert values == {"x": "jpg", "y": "300000000", "z": "png", "w": "dir/jpg/files"}
    monkeypatch.setenv("IMAGE_KEY", "Ab1Ab1Ab1Ab1")
    with pytest.raises(UsageError, match="environment variable IMAGE_KEY"):
        compose([], overrides)
