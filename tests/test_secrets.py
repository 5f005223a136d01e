"""Which names and values are secret, and what is left of texts that hold them."""

import pytest

from train.secrets import is_secret_name, is_secret_value, redact, redact_command, redact_values

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
detokenize_keyframes PASS_RATE MIN_KEYS
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
    "-----BEGIN " + "OPENSSH PRIVATE KEY-----\nabc",
]  # fmt: skip
OTHER_VALUES = [
    "s3://bucket/folder", "https://user@host/x", "ssh://git@host/x.git", "host:29500", "a@b:c@d",
    "http://host:8080/a@b", "https://x.example/f?page=2&sort_key=name", "file:///runs/a:b@c",
    "postgres://user:${DB_PASSWORD}@db/x", "https://user:***@host", "my.module:Class", "sk-learn",
    "hf_model", "a bearer of news", "basic transformer-language-model",
    "sk-learn-classifier-baseline-v2", "ssh://git-service-account-name@host/x", "hf_internaltestingtinymodels", "-----BEGIN CERTIFICATE-----\nabc", "gpt2", "", "AKIA",
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


def test_nested_values():
    values = {"a": [{"password": "abc", "token": 5}, "u://x:y@z"], "password_file": "f", "n": None}
    assert redact_values(values) == {
        "a": [{"password": "***", "token": 5}, "u://x:***@z"], "password_file": "f", "n": None,
    }  # fmt: skip
