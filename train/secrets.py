"""Which names and values are secret, and the removal of secrets from what is recorded or shown.

Names are compared word by word: ``HF_TOKEN``, ``hfToken`` and ``options.hf-token`` have the word
``token``, ``TOKENIZERS_PARALLELISM`` has not. Values are recognised by their form, whatever their
name: URLs with a password, tokens of known services, private keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

HIDDEN = "***"
"""Stands for a secret that was removed."""

# Words that name a secret in any context.
_CREDENTIALS = {
    "password", "passwords", "passwd", "passphrase", "passphrases", "secret", "secrets",
    "credential", "credentials", "creds", "apikey", "apikeys", "accesskey", "secretkey",
    "privatekey", "authkey", "signingkey", "encryptionkey", "accountkey", "sharedkey",
    "licensekey", "sshkey", "authtoken", "accesstoken", "apitoken", "jwt", "dsn", "sshpass",
}  # fmt: skip
# Words that also name columns, tokens of a vocabulary and the like.
_AMBIGUOUS = {"key", "keys", "token", "tokens", "pass", "pat", "auth", "pwd", "bearer"}
# Pairs of words.
_PAIRS = {
    ("connection", "string"), ("conn", "string"), ("conn", "str"), ("api", "key"),
    ("api", "keys"), ("access", "key"), ("private", "key"), ("account", "key"),
    ("signing", "key"), ("encryption", "key"), ("license", "key"),
    ("access", "token"), ("auth", "token"),
    ("api", "token"), ("session", "token"), ("security", "token"), ("bearer", "token"),
    ("refresh", "token"),
}  # fmt: skip
# Parts of a word, such as PGPASSWORD.
_PARTS = ("password", "passwd", "passphrase", "credential", "apikey", "connectionstring")
_ENDINGS = ("secret", "authtoken", "accesstoken", "apitoken", "hftoken", "ghtoken", "githubtoken",
            "gitlabtoken", "sessiontoken", "refreshtoken", "securitytoken", "bearertoken",
            "usertoken", "bottoken")  # fmt: skip

# What the last word says that the value is instead of the secret. A file is protected by its own
# mode, so its path is not secret.
_ABOUT = {
    "file", "files", "filename", "path", "paths", "dir", "directory", "folder", "sock", "socket",
    "url", "uri", "endpoint", "host", "port", "type", "kind", "method", "methods", "mode", "name",
    "names", "size", "length", "len", "dim", "dims", "heads", "limit", "count", "ttl", "timeout",
    "expiry", "expiration", "lifetime", "version", "algorithm", "format", "enabled", "disabled",
    "required", "provider", "prefix", "suffix", "column", "columns", "field", "fields", "index",
    "rate", "ratio", "scope", "scopes", "id", "ids", "mask", "policy", "bits", "helper", "through",
    "env", "envvar", "var", "variable",
}  # fmt: skip
# Words beside an ambiguous one that make it a number, a token of a vocabulary, or public.
_PLAIN = {
    "num", "n", "max", "min", "total", "per", "batch", "budget", "seq", "pad", "eos", "bos", "unk",
    "sep", "cls", "mask", "special", "stop", "public", "sort", "cache", "partition", "foreign",
}  # fmt: skip
_HARMLESS_PREFIXES = ("NCCL_", "TORCH_", "TORCHINDUCTOR_", "TOKENIZERS_", "OMP_", "CUDA_", "XLA_")
_HARMLESS = {
    "PWD", "OLDPWD", "GPG_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_AUTH_CREDENTIAL_FILE",
    "KEYRING_BACKEND", "PYTHON_KEYRING_BACKEND",
}  # fmt: skip
_SIGNATURES = {"sig", "signature", "x-amz-signature", "x-goog-signature", "awsaccesskeyid"}

_URL = r"\b[A-Za-z][A-Za-z0-9+.-]{0,20}://"
_URL_PASSWORD = re.compile(rf"({_URL}[^\s/:@'\"]*:)([^\s/'\"]+)(?=@(?!sha256:))")
# A token in place of a user; other schemes have accounts and containers there.
_URL_USER = re.compile(
    r"(\b(?:git\+)?https?://)(?=[^@\s]{0,200}\d)([A-Za-z0-9_\-.~%]{20,200})(?=@)"
)
_URL_QUERY = re.compile(r"([?&])([\w.\-]+)=([^&\s'\"#]+)")
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(.*?-----END [A-Z0-9 ]*PRIVATE KEY-----|.*\Z)", re.DOTALL
)
# With a capital letter and a digit, unlike words.
_MIXED = r"(?=[\w+/.~-]{0,200}[A-Z])(?=[\w+/.~-]{0,200}[0-9])"
_BEARER = re.compile(rf"\b([Bb]earer|[Bb]asic)(\s+){_MIXED}[A-Za-z0-9+/._~-]{{16,}}=*")
# Prefixes that services give their tokens in order that they be found.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"
    rf"|hf_{_MIXED}[A-Za-z0-9]{{20,}}"
    r"|api_org_[A-Za-z0-9]{20,}|wandb_v1_[A-Za-z0-9_]{20,}"
    rf"|sk-{_MIXED}[A-Za-z0-9_-]{{20,}}|gsk_{_MIXED}[A-Za-z0-9]{{20,}}"
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|nvapi-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}"
    r"|ya29\.[A-Za-z0-9_-]{20,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"
    r"|npm_[A-Za-z0-9]{30,}|pypi-Ag[A-Za-z0-9_-]{30,}|dckr_pat_[A-Za-z0-9_-]{20,}"
    r"|hvs\.[A-Za-z0-9_-]{20,}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"
    r"|dop_v1_[a-f0-9]{32,}|r8_[A-Za-z0-9]{30,}|tskey-[A-Za-z0-9-]{16,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    r")"
)
_WEBHOOK = re.compile(
    r"(https://(?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks)/)([\w/-]+)"
)
# What something else resolves, such as ${PASSWORD}, $(PASSWORD) or <password>, is no secret.
_REFERENCE = re.compile(r"\$\{[^}]*\}|\$\([^)]*\)|\{\{.*\}\}|\$\w+|<[^>]*>|\*+|\{\w*\}|%s|VALUE")
# Numbers, switches and short words, beside a name that need not be that of a secret.
_PLAIN_VALUE = re.compile(r"[+-]?[\d_.,eE+-]+|(?i:true|false|yes|no|on|off|none|null)|.{0,7}")
# name=value, also "name": "value" as in JSON and in a repr.
_ASSIGNED = re.compile(
    r"""(?<![\w.\-])(?P<name>[A-Za-z_][\w.\-]*)(?P<is>=|(?:["']\s*:\s*))"""
    r"""(?P<value>"(?:[^"\\]|\\.){0,4096}"|'(?:[^'\\]|\\.){0,4096}'|[^\s,;&'"\[\](){}]+)"""
)
_OPTIONS = {"storage", "mirror", "env", "environ"}


def is_secret_name(name: str) -> bool:
    """Whether an environment variable, or an option of a library, with this name holds a secret."""
    if name.upper() in _HARMLESS or name.upper().startswith(_HARMLESS_PREFIXES):
        return False
    words = _words(name)
    if not words or _is_about(words):
        return False
    if _names_credential(words):
        return True
    return bool(_AMBIGUOUS.intersection(words)) and not _PLAIN.intersection(words)


def is_secret_variable(name: str, value: str) -> bool:
    """Whether an environment variable with this name and value holds a secret: ``USE_AUTH=0``,
    ``TRAIN_TOKENS=300000000`` and ``IMAGE_KEY=jpg`` do not."""
    if not value or not is_secret_name(name):
        return False
    words = _words(name)
    is_sure = len(words) == 1 or _names_credential(words)
    return is_sure or not _PLAIN_VALUE.fullmatch(value.strip())


def is_credential_name(name: str) -> bool:
    """Whether a name means a secret in any context, also in a config: not ``key`` or ``token``,
    which name columns and tokens of a vocabulary there."""
    words = _words(name)
    return bool(words) and not _is_about(words) and _names_credential(words)


def is_secret_value(value: str) -> bool:
    """Whether a text contains a secret that its form shows."""
    return _without_known_forms(value) != value


def secret_option(options: Any, prefix: str = "") -> str | None:
    """The first key in nested options of a library whose name is that of a secret; None without."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            if is_secret_name(str(name)) and not isinstance(value, Mapping | list):
                return f"{prefix}{name}"
            if found := secret_option(value, f"{prefix}{name}."):
                return found
    if isinstance(options, list):
        for value in options:
            if found := secret_option(value, prefix):
                return found
    return None


def redact(text: str) -> str:
    """A text with ``***`` in place of the secrets that their form or their name shows."""
    text = _without_known_forms(text)
    return _ASSIGNED.sub(_redacted_assignment, text)


def redact_command(words: Sequence[str]) -> list[str]:
    """The words of a command line with ``***`` in place of secrets: values of options, overrides
    and variables with secret names, and what ``redact`` finds."""
    found: list[str] = []
    hides_next = False
    for word in words:
        if hides_next and not word.startswith("-"):
            found.append(HIDDEN)
            hides_next = False
            continue
        name, equals, _ = word.partition("=")
        is_option = word.startswith("-")
        hides_next = is_option and not equals and is_secret_name(name.lstrip("-"))
        if equals and re.fullmatch(r"[\w.\-]+", name) and _is_assigned_secret(name):
            found.append(f"{name}={HIDDEN}")
        else:
            found.append(redact(word))
    return found


def redact_values(values: Any) -> Any:
    """Nested lists and mappings, with ``***`` in place of secrets in their texts and below names of
    secrets."""
    if isinstance(values, str):
        return redact(values)
    if isinstance(values, Mapping):
        return {
            key: HIDDEN
            if isinstance(value, str) and value and is_credential_name(str(key))
            else redact_values(value)
            for key, value in values.items()
        }
    if isinstance(values, list | tuple):
        return [redact_values(value) for value in values]
    return values


def _words(name: str) -> list[str]:
    """The lower-case words of a name, without numbers at the end."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", spaced) if word]
    while words and words[-1].isdigit():
        words.pop()
    if words:
        words[-1] = words[-1].rstrip("0123456789") or words[-1]
    return words


def _is_about(words: Sequence[str]) -> bool:
    """Whether the last word makes it a property of the secret, such as the path of its file."""
    if words[-1] == "id" and {"access", "secret"}.intersection(words):
        return False  # AWS_ACCESS_KEY_ID is half of a credential
    return len(words) > 1 and words[-1] in _ABOUT


def _names_credential(words: Sequence[str]) -> bool:
    return (
        bool(_CREDENTIALS.intersection(words))
        or any(pair in _PAIRS for pair in pairwise(words))
        or any(part in word for word in words for part in _PARTS)
        or any(word.endswith(_ENDINGS) and word != "secret" for word in words)
    )


def _without_known_forms(text: str) -> str:
    text = _PEM.sub(HIDDEN, text)
    text = _URL_PASSWORD.sub(_redacted_password, text)
    text = _URL_USER.sub(rf"\1{HIDDEN}", text)
    if "://" in text:
        text = _URL_QUERY.sub(_redacted_parameter, text)
        text = _WEBHOOK.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1\2{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def _redacted_password(match: re.Match[str]) -> str:
    return match[0] if _REFERENCE.fullmatch(match[2]) else match[1] + HIDDEN


def _redacted_parameter(match: re.Match[str]) -> str:
    named = is_secret_variable(match[2], match[3]) or match[2].lower() in _SIGNATURES
    secret = named and not _REFERENCE.fullmatch(match[3])
    return f"{match[1]}{match[2]}={HIDDEN}" if secret else match[0]


def _redacted_assignment(match: re.Match[str]) -> str:
    value = match["value"]
    quote = value[0] if value[0] in "\"'" else ""
    inner = value.strip("\"'")
    if not inner or _REFERENCE.fullmatch(inner) or not _is_assigned_secret(match["name"]):
        return match[0]
    return f"{match['name']}{match['is']}{quote}{HIDDEN}{quote}"


def _is_assigned_secret(name: str) -> bool:
    """Whether ``name=...`` in a text or a command line assigns a secret.

    Lower-case names may be those of a config or of Python: there ``key``, ``token`` and the like
    count only below ``options`` and other arguments of libraries.
    """
    *above, last = name.lstrip("-").split(".")
    if (
        name.isupper()
        or name.startswith("-")
        or any(_OPTIONS.intersection(_words(part)) for part in above)
    ):
        return is_secret_name(last)
    return is_credential_name(last)
