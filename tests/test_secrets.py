"""Which names and values are secret, and what is left of texts that hold them."""

import pytest

from tests.support.lanes import thinned
from train.secrets import (
    is_credential_name,
    is_secret_name,
    is_secret_value,
    is_secret_variable,
    redact,
    redact_command,
    redact_values,
    secret_option,
)

SECRET_NAMES = """
WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN GITHUB_TOKEN GITHUB_PAT GITLAB_TOKEN AWS_ACCESS_KEY_ID
AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN aws_secret_access_key AZURE_STORAGE_KEY AZURE_CLIENT_SECRET
AZURE_STORAGE_CONNECTION_STRING AZURE_DEVOPS_EXT_PAT OPENAI_API_KEY ANTHROPIC_API_KEY OPENAI_APIKEY
COMET_API_KEY NEPTUNE_API_TOKEN MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN CLEARML_API_SECRET_KEY
PASSWORD DB_PASSWORD_2 PGPASSWORD MYSQL_PWD SSHPASS SMTP_PASS DB_PASSWD SSH_PASSPHRASE GPG_PASSPHRASE
TOKEN TOKENS KEY KEYS SECRET SECRETS CREDENTIALS DB_CREDENTIAL AUTH HTTP_BASIC_AUTH DOCKER_AUTH_CONFIG
NPM_AUTH SENTRY_DSN CONNECTION_STRING SERVICE_CONN_STR SLURM_JWT PAT CLIENT_SECRET TOKEN_GITHUB
API_KEY_PROD accessKey clientSecret sse-customer-key SSECustomerKey hfToken KAGGLE_KEY
NEW_RELIC_LICENSE_KEY AZURE_SEARCH_QUERY_KEY SECRET_ID REDIS_PASS GITHUBTOKEN SIGNING_KEY_1
DB_PW PASSCODE AUTHORIZATION COOKIE SESSION_COOKIE AZURE_STORAGE_SAS ACTIONS_CACHE_TOKEN
REDIS_CACHE_PASS PARTITION_PWD TORCH_HUB_TOKEN CUDA_API_KEY NCCL_PASSWORD DBPASSWORDPROD
"""

OTHER_NAMES = """
NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_KEY TORCH_NCCL_ASYNC_ERROR_HANDLING TOKENIZERS_PARALLELISM
OMP_NUM_THREADS CUDA_VISIBLE_DEVICES XLA_FLAGS PATH PWD OLDPWD HOME MONKEY TURKEY KEYBOARD HOTKEYS
AUTHOR GIT_AUTHOR_NAME PATTERN COMPASS BYPASS_CACHE PASSES MAX_TOKENS NUM_TOKENS TOKENS_PER_BATCH
MAX_NEW_TOKENS PAD_TOKEN EOS_TOKEN EOS_TOKEN_ID NUM_KEY_VALUE_HEADS KEY_SIZE KEY_DIM SORT_KEY
CACHE_KEY PUBLIC_KEY SSH_PUBLIC_KEY AUTH_TYPE AUTH_METHOD TOKEN_URL TOKEN_ENDPOINT PASSWORD_FILE
WANDB_IDENTITY_TOKEN_FILE SSH_AUTH_SOCK KEY_PATH TLS_KEY_FILE SECRET_NAME AWS_SHARED_CREDENTIALS_FILE
GOOGLE_APPLICATION_CREDENTIALS PASSWORD_MIN_LENGTH TOKEN_EXPIRY GIT_ASKPASS XAUTHORITY GPG_KEY
SSEKMSKeyId MASTER_ADDR WANDB_PROJECT ISORUN_RUN_ID PET_NNODES endpoint_url
detokenize_keyframes PASS_RATE MIN_KEYS FORWARD_PASS NUM_PASS PASSWORDLESS TOKEN_DTYPE KEY_NORM
"""


def test_the_tables_have_fifty_names_each():
    assert len(set(SECRET_NAMES.split())) >= 50
    assert len(set(OTHER_NAMES.split())) >= 50


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_names_of_secrets(name):
    assert is_secret_name(name)
    assert is_secret_name(f"MY_{name}") or name in {"SSHPASS"}


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_names_of_other_things(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PASS", "hunter2"), ("DB_PASS", "123456789"), ("DB_PW", "abc"), ("TORCH_HUB_TOKEN", "abc"),
        ("AZURE_BATCH_KEY", "AbC123456789=="), ("REDIS_CACHE_KEY", "Abc1234567890=="),
        ("ACTIONS_CACHE_TOKEN", "x" * 30), ("REDIS_CACHE_PASS", "abcdefghij"),
        ("PARTITION_PWD", "abcdefghi"), ("CUDA_API_KEY", "abcabcabc"), ("AZURE_STORAGE_SAS", "abc"),
        ("KAGGLE_KEY", "0123456789abcdef" * 2), ("KAGGLE_KEY", "0123456789"), ("MY_KEY", "hunter2"),
        ("MY_KEY", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLE"),
        ("MY_KEY", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"), ("NCCL_KEY", "a1B2c3D4e5f6G7"),
        ("HTTP_BASIC_AUTH", "me:hunter2"), ("PASSWORD", "$ecret123"), ("PASSWORD", "${X:-hunter2}"),
        ("AWS_SECRET_ACCESS_KEY", "/a1B2c3D4e5f6G7h8i9"),
    ],
)  # fmt: skip
def test_variables_that_hold_a_secret(name, value):
    assert is_secret_variable(name, value)
    assert redact(f"export {name}={value}") == f"export {name}=***"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATASET_KEY", "imagenet-1k/train"), ("METRIC_KEY", "val/accuracy"), ("KEY", "images"),
        ("JAX_KEY_IMPL", "threefry"), ("TOKEN_DTYPE", "uint16_le"), ("KEY_NORM", "rms_norm_x"),
        ("FORWARD_PASS", "checkpointed"), ("WANDB_KEYS", "loss,accuracy"), ("USE_AUTH", "0"),
        ("HTTP_AUTH", "kerberos"), ("TRAIN_TOKENS", "300M"), ("KV_KEY_DTYPE", "bfloat16"),
        ("LAYER_KEYS", "Conv2dNormActivation"), ("MODEL_KEY", "vit_base_patch16_224"),
        ("DB_PASSWORD", "$DB_PASSWORD"), ("DB_PASSWORD", "$(DB_PASSWORD)"), ("USE_SECRET", "true"),
        ("DB_PASSWORD", "/run/secrets/password"), ("API_KEY", "~/keys/api.txt"),
        ("IMAGE_TOKEN", "<image>"), ("NEXT_TOKEN", "5"), ("DATA_KEY", "2026-11-26"),
    ],
)  # fmt: skip
def test_variables_that_hold_other_things(name, value):
    assert not is_secret_variable(name, value)
    assert redact(f"export {name}={value}") == f"export {name}={value}"


@pytest.mark.parametrize(
    "name",
    ["secret_word", "secret_sharing", "passwordless", "password_strength", "text_secret",
     "dsn_depth", "jwt_max_age", "key", "token", "forward_pass"],
)  # fmt: skip
def test_config_keys_of_other_things(name):
    assert not is_credential_name(name)


# Put together here, so that no scanner of this repository takes them for real ones.
LONG = "a1B2c3D4e5" * 4
SECRET_VALUES = [
    "postgres://user:hunter2@db/x", "redis://:hunter2@cache:6379/0", "http://u:p%40ss@proxy:3128",
    "https://u:p@ss@host/x", f"https://{LONG}@github.example/x.git", "s3+http://key:secret@bucket/x",
    "https://x.example/f?access_token=abc", "https://x.example/f?a=1&X-Amz-Signature=abc",
    "https://x.blob.example/f?sv=1&sig=abc", "g" + f"hp_{LONG}", "github_" + f"pat_{LONG}",
    "gl" + f"pat-{LONG}", "h" + f"f_{LONG}", "s" + f"k-proj-{LONG}", "sk_" + f"live_{LONG}",
    "AK" + "IA0123456789ABCDEF", "AI" + f"za{LONG[:35]}", "xo" + f"xb-{LONG}", "np" + f"m_{LONG}",
    "py" + f"pi-Ag{LONG}", "hv" + f"s.{LONG}", "nv" + f"api-{LONG}", f"eyJ{LONG}.eyJ{LONG}.{LONG}",
    f"Authorization: Bearer {LONG}", "https://hooks.slack.com/services/" + "T0/B0/abc",
    "-----BEGIN " + "RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN " + "OPENSSH PRIVATE KEY-----\nabc", "mysql://root:pa#ss@h/x",
    "MIIEpAIBAAKCAQEA0123\nabcd==\n-----END " + "RSA PRIVATE KEY-----",
    "h" + "f_" + "abcdefghIJKLmnop" * 2 + "qR", "Basic bWU6cGFzcw==", f"bearer {'0123456789abcdef' * 2}",
    "https://u:$ecret123@host/x", "https://x.example/f#access_token=abc",
    "https://canary.discord.com/api/" + "webhooks/123/abc-DEF",
    "https://x.webhook.office.com/" + "webhookb2/aa-bb@cc/IncomingWebhook/0123/45",
    "https://api.telegram.org/" + "bot123456789:AAEhBOweik6ad9r_QXMENQjcrGbqCr4K-bc/send",
]  # fmt: skip
OTHER_VALUES = [
    "s3://bucket/folder", "https://user@host/x", "ssh://git@host/x.git", "host:29500", "a@b:c@d",
    "http://host:8080/a@b", "https://x.example/f?page=2&sort_key=name", "file:///runs/a:b@c",
    "postgres://user:${DB_PASSWORD}@db/x", "https://user:***@host", "my.module:Class", "sk-learn",
    "hf_model", "a bearer of news", "basic transformer-language-model",
    "sk-learn-classifier-baseline-v2", "ssh://git-service-account-name@host/x", "hf_internaltestingtinymodels", "-----BEGIN CERTIFICATE-----\nabc", "gpt2", "", "AKIA",
    "hf_T5ForConditionalGeneration", "Basic Conv2dNormActivation", "Basic /data/ImageNet2012/train",
    "http://mlflow:5000?user=me@example.com", "https://h/data?key=train-images",
    "s3://b/x?partition=a&key=images", "http://h:80#x@b", "https://h/x?password=$PASSWORD",
    "task-sk-1", "2026-11-26 12:00:00", "pad_token=<pad>", "3f786850e387550fdab836ed7e6dc881de23001b",
]  # fmt: skip


@pytest.mark.parametrize("value", SECRET_VALUES)
def test_values_that_show_that_they_are_secret(value):
    assert is_secret_value(value)
    assert is_secret_value(f"a text with {value} inside")
    assert "***" in redact(value)
    assert redact(redact(value)) == redact(value)


@pytest.mark.parametrize("value", OTHER_VALUES)
def test_other_values(value):
    assert not is_secret_value(value)
    assert redact(value) == value


def test_a_text_keeps_what_is_not_secret():
    text = "cannot read postgres://me:hunter2@db:5432/x?a=b, with {'api_key': 'abc', 'b': 1}"
    assert redact(text) == (
        "cannot read postgres://me:***@db:5432/x?a=b, with {'api_key': '***', 'b': 1}"
    )
    assert redact("sorted(x, key=len); next token: 5; WANDB_API_KEY=abc") == (
        "sorted(x, key=len); next token: 5; WANDB_API_KEY=***"
    )


@pytest.mark.parametrize(
    ("word", "left"),
    [
        ("--api-key=abc", "--api-key=***"),
        ("--token=abc", "--token=***"),
        ("WANDB_API_KEY=abc", "WANDB_API_KEY=***"),
        ("A=1,HF_TOKEN=abc,B=2", "A=1,HF_TOKEN=***,B=2"),
        ("checkpoint.mirror.options.key=abc", "checkpoint.mirror.options.key=***"),
        ("data.url=https://u:p@host/x", "data.url=https://u:***@host/x"),
        ("data.key=image", "data.key=image"),
        ("model.pad_token=<pad>", "model.pad_token=<pad>"),
        ("--max-tokens=5", "--max-tokens=5"),
        ("checkpoint.mirror.options.password=abc", "checkpoint.mirror.options.password=***"),
        ("--env=WANDB_API_KEY=abc", "--env=WANDB_API_KEY=***"),
        ("--password=$PASSWORD", "--password=$PASSWORD"),
        ("--key=image", "--key=image"),
        (
            "export DB_PASS=hunter2; run --password hunter2",
            "export DB_PASS=***; run --password ***",
        ),
        ("task.use=mine.secrets:Task", "task.use=mine.secrets:Task"),
        ("optim.lr=3e-4", "optim.lr=3e-4"),
    ],
)
def test_words_of_a_command_line(word, left):
    assert redact_command(["python", "x.py", word, "y"]) == ["python", "x.py", left, "y"]


def test_the_word_after_an_option_with_a_secret_name():
    words = ["x", "--password", "abc", "--token", "--key-file", "k.pem", "-v", "z"]
    assert redact_command(words) == [
        "x", "--password", "***", "--token", "--key-file", "k.pem", "-v", "z",
    ]  # fmt: skip
    for word in ("$$PASSWORD", "${PASSWORD}", "/run/secrets/password"):
        assert redact_command(["--password", word]) == ["--password", word]
    assert redact_command(["--key", "image", "--tokens", "5"]) == [
        "--key",
        "image",
        "--tokens",
        "5",
    ]


def test_nested_values():
    values = {"a": [{"password": "abc", "token": 5}, "u://x:y@z"], "password_file": "f", "n": None}
    assert redact_values(values) == {
        "a": [{"password": "***", "token": 5}, "u://x:***@z"], "password_file": "f", "n": None,
    }  # fmt: skip


def test_nested_values_below_and_in_names():
    values = {
        "api_key": ["abc"], "password": 12345678, "auth": {"secret": {"a": ["x", 1, None, True]}},
        "words": ("--password", "abc"), "mixed": ["--password", 5, {"x": 1}], "gh" + f"p_{LONG}": 1,
        "wandb_key": LONG, "key": "image",
    }  # fmt: skip
    assert redact_values(values) == {
        "api_key": ["***"], "password": "***", "auth": {"secret": {"a": ["***", "***", None, True]}},
        "words": ["--password", "***"], "mixed": ["--password", "***", {"x": 1}], "***": 1,
        "wandb_key": "***", "key": "image",
    }  # fmt: skip


def test_options_of_a_library_with_lists():
    assert secret_option({"a": {"api_key": ["abc"]}}) == "a.api_key"
    assert secret_option({"a": [{"b": 1}], "keys_file": ["x"]}) is None


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("password: hunter2", "password: ***"),
        ("run --password hunter2 now", "run --password *** now"),
        ("['--password', 'hunter2', 'x']", "['--password', '***', 'x']"),
        ("PASSWORD = hunter2", "PASSWORD = ***"),
        ("X-Api-Key: hunter2", "X-Api-Key: ***"),
        ("curl -H 'Authorization: token hunter2' u", "curl -H 'Authorization: ***' u"),
        ("Cookie: a=hunter2; b=hunter2", "Cookie: ***"),
        ('password="hunter2 and more', 'password="***'),
        ("password='hun'ter2' x", "password='***' x"),
        ("PASSWORD=hun'ter2 x", "PASSWORD=*** x"),
        ('{"password":"hun\\"ter2","b":1}', '{"password":"***","b":1}'),
        ('{\\"password\\": \\"hunter2\\"}', '{\\"password\\": \\"***\\"}'),
        ('{"api_key": ["hunter2"]}', '{"api_key": ["***"]}'),
        ('os.environ["HF_TOKEN"] = "hunter2"', 'os.environ["HF_TOKEN"] = "***"'),
        ("PASSWORD=${X:-hunter2}", "PASSWORD=***"),
        ("x=PASSWORD=hunter2", "x=PASSWORD=***"),
        (f"PASSWORD={'x' * 9000} y", "PASSWORD=*** y"),
        (f"cache_key={'a1B2c3D4' * 4}", "cache_key=***"),
    ],
)
def test_a_secret_after_its_name(text, left):
    assert redact(text) == left
    assert redact(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "password == None", "if token: x", "password: str = None",
        "tests/test_x.py::test_secret", "--password $PASSWORD", "PASSWORD=${PASSWORD}",
        "key: image", "mount secret:/run/x", "use --key image", "PASSWORD=",
    ],
)  # fmt: skip
def test_a_text_after_a_name_that_is_no_secret(text):
    assert redact(text) == text


def test_a_private_key_without_its_begin_leaves_the_lines_before_it():
    body = "MIIEpAIBAAKCAQEA0123456789abcdef\n" * 30
    text = f"an error\n{body}ab==\n-----END " + "PRIVATE KEY-----\nthe end"
    assert redact(text) == "an error\n***\nthe end"


@pytest.mark.parametrize(
    "part",
    thinned(
        ["eyJaaaaaaaa-", "eyJaaaaaaaa.eyJaaaaaaaa-", "-----BEGIN ", "a://b:", "sk-", "a.", 'a:"', "a",
         "cookie: a;", "https://a.", "password = \\", "MIIEpAIBAAKCAQEA\n"],
        kept=["eyJaaaaaaaa-", "a://b:", 'a:"', "password = \\"],
    ),
)  # fmt: skip
def test_the_time_for_a_long_text_does_not_grow_with_its_square(part):
    """With a quadratic pattern a text of this size takes many minutes: the test's time limit."""
    redact(part * (1_000_000 // len(part)))
