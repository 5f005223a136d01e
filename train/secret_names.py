"""Which names mean a secret, and what a value beside such a name must look like.

Names are compared word by word: ``HF_TOKEN``, ``hfToken`` and ``options.hf-token`` have the word
``token``, ``TOKENIZERS_PARALLELISM`` has not. Some words always mean a secret (``password``),
others only at the end of a name (``HF_TOKEN``, ``DB_PASS``) or beside a value that looks random
(``AZURE_KEY``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

# Words that name a secret in any context.
_CREDENTIALS = {
    "password", "passwords", "passwd", "passphrase", "passphrases", "secret", "secrets",
    "credential", "credentials", "creds", "apikey", "apikeys", "accesskey", "secretkey",
    "privatekey", "authkey", "signingkey", "encryptionkey", "accountkey", "sharedkey",
    "licensekey", "sshkey", "authtoken", "accesstoken", "apitoken", "jwt", "dsn", "sshpass",
    "passcode", "passcodes", "authorization", "cookie", "cookies",
}  # fmt: skip
_PASSWORDS = {"pass", "pw", "pwd"}
# Words that mean a secret at the end of a name. Elsewhere they also name other things.
_USUALLY = {"token", "auth", "bearer", *_PASSWORDS}
_AMBIGUOUS = {"key", "keys", "tokens", "pat", "sas", *_USUALLY}
# Pairs of words.
_PAIRS = {
    ("connection", "string"), ("conn", "string"), ("conn", "str"), ("api", "key"),
    ("api", "keys"), ("access", "key"), ("private", "key"), ("account", "key"),
    ("signing", "key"), ("encryption", "key"), ("license", "key"),
    ("access", "token"), ("auth", "token"), ("storage", "sas"), ("sas", "token"),
    ("api", "token"), ("session", "token"), ("security", "token"), ("bearer", "token"),
    ("refresh", "token"),
}  # fmt: skip
# Parts of a word, such as PGPASSWORD.
_PART = re.compile(r"(?:password|passwd|passphrase|credential|apikey|connectionstring)(?!less)")
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
    "env", "envvar", "var", "variable", "age", "depth", "strength", "sharing", "word", "words",
    "layer", "layers", "embedding", "embeddings", "embed", "dtype", "impl", "norm", "dropout",
    "loss", "regex", "pattern", "rules",
}  # fmt: skip
# Words beside an ambiguous one that make it a number, a token of a vocabulary, or public.
_PLAIN = {
    "num", "n", "max", "min", "total", "per", "budget", "seq", "pad", "eos", "bos", "unk", "sep",
    "cls", "mask", "special", "stop",
}  # fmt: skip
_PLAIN_KEYS = _PLAIN | {"batch", "public", "sort", "cache", "partition", "foreign"}
# A pass over data or over a network.
_PLAIN_PASSES = _PLAIN | {
    "forward", "backward", "first", "second", "third", "last", "final", "single", "double",
    "multi", "one", "two", "three", "full", "by",
}  # fmt: skip
# A secret as a task, beside such a word.
_SUBJECTS = {("text", "secret"), ("hidden", "secret")}
_HARMLESS_PREFIXES = ("NCCL_", "TORCH_", "TORCHINDUCTOR_", "TOKENIZERS_", "OMP_", "CUDA_", "XLA_")
_HARMLESS = {
    "PWD", "OLDPWD", "GPG_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_AUTH_CREDENTIAL_FILE",
    "KEYRING_BACKEND", "PYTHON_KEYRING_BACKEND",
}  # fmt: skip

_SHORTEST = 8

# What something else resolves, such as ${PASSWORD}, $(PASSWORD) or <password>, is no secret. TorchX
# doubles each $.
REFERENCE = re.compile(
    r"\${1,2}(?:[A-Z_][A-Z0-9_]*|\{[\w.:]+\}|\([^()]*\))|\{\{.*\}\}|<[A-Za-z |_-]+>|\[[A-Z_]+\]"
    r"|\*+|\{\w*\}|%s|VALUE|\.\.\."
)
_SWITCH = re.compile(r"(?i:true|false|yes|no|on|off|none|null|str|bool|int|bytes)")
_NUMBER = re.compile(r"[+-]?\d[\d_.,eE+-]{0,14}[kKMGTB]?")
# One word with a number; with a separator it is rather a path or a version.
_KEY = re.compile(r"(?=\d*[A-Za-z])[A-Za-z]*\d[A-Za-z0-9]*=*|\d{9,}")
_PATH = re.compile(r"(?:~|\.{0,2})/\S*")


def is_secret_name(name: str) -> bool:
    """Whether an environment variable, or an option of a library, with this name holds a secret."""
    words = words_of(name)
    if not _may_name_secret(name, words):
        return False
    if _names_credential(words) or _usually_secret(words):
        return True
    plain = _PLAIN_PASSES if _PASSWORDS.intersection(words) else _PLAIN_KEYS
    return not plain.intersection(words) and not name.upper().startswith(_HARMLESS_PREFIXES)


def is_secret_variable(name: str, value: str) -> bool:
    """Whether an environment variable with this name and value holds a secret: ``USE_AUTH=0``,
    ``TRAIN_TOKENS=300000000`` and ``IMAGE_KEY=jpg`` do not."""
    value = value.strip()
    words = words_of(name)
    if not value or is_plain_value(value) or not _may_name_secret(name, words):
        return False
    if _names_credential(words):
        return True
    if _usually_secret(words):
        if words[-1] == "auth" and re.fullmatch(r"[A-Za-z]{1,12}", value):
            return False  # the name of a method
        return words[-1] in _PASSWORDS or not _NUMBER.fullmatch(value)
    if words[-1] == "key" and (len(words) > 1 or name.isupper()) and is_secret_name(name):
        return looks_random(value) or bool(_KEY.fullmatch(value))
    return looks_random(value)


def secret_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that hold secrets, except short values: those may be in a text by
    chance."""
    return {
        name: value
        for name, value in environ.items()
        if len(value) >= _SHORTEST and is_secret_variable(name, value)
    }


def is_credential_name(name: str) -> bool:
    """Whether a name means a secret in any context, also in a config: not ``key`` or ``token``,
    which name columns and tokens of a vocabulary there."""
    words = words_of(name)
    return bool(words) and not _is_about(words) and _names_credential(words)


def words_of(name: str) -> list[str]:
    """The lower-case words of a name, without numbers at the end."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name[:200])
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", spaced) if word]
    while words and words[-1].isdigit():
        words.pop()
    if words:
        words[-1] = words[-1].rstrip("0123456789") or words[-1]
    return words


def is_header(name: str) -> bool:
    """Whether it is the name of a header whose value has several words."""
    return words_of(name)[-1:] in (["authorization"], ["cookie"])


def is_reference(value: str) -> bool:
    """Whether a value only refers to a secret, or stands for one: ``$NAME``, ``<password>``."""
    return bool(REFERENCE.fullmatch(value))


def is_plain_value(value: str) -> bool:
    """Whether a value is no secret, whatever its name: a reference to one, the path of a file, a
    switch."""
    is_path = _PATH.fullmatch(value) and not looks_random(value)
    return bool(is_path or _SWITCH.fullmatch(value)) or is_reference(value)


def looks_random(value: str) -> bool:
    """Whether a value looks like a generated key rather than like words, numbers and versions."""
    return any(_is_random(run) for run in re.findall(r"[A-Za-z0-9]{10,}", value[:4096])) or bool(
        re.search(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", value[:4096])
    )


def _is_random(run: str) -> bool:
    """Whether letters and digits without a separator are more mixed than words with numbers."""
    digits = sum(character.isdigit() for character in run)
    switches = sum(a.isdigit() != b.isdigit() for a, b in pairwise(run))
    if digits == len(run):
        return digits >= 24
    if digits:
        is_mixed = len(run) >= 12 and (switches >= 3 or digits >= 5)
        return is_mixed or switches >= 5 or len(run) >= 32
    humps = sum(a.islower() and b.isupper() for a, b in pairwise(run))
    return (len(run) >= 16 and humps * 4 >= len(run)) or (len(run) >= 24 and not humps)


def _may_name_secret(name: str, words: Sequence[str]) -> bool:
    return (
        bool(words)
        and name not in _HARMLESS
        and not _is_about(words)
        and (_names_credential(words) or bool(_AMBIGUOUS.intersection(words)))
    )


def _is_about(words: Sequence[str]) -> bool:
    """Whether the last word makes it a property of the secret, such as the path of its file."""
    if words[-1] == "id" and {"access", "secret"}.intersection(words):
        return False  # AWS_ACCESS_KEY_ID is half of a credential
    return len(words) > 1 and words[-1] in _ABOUT


def _names_credential(words: Sequence[str]) -> bool:
    pairs = set(pairwise(words))
    return not _SUBJECTS.intersection(pairs) and (
        bool(_CREDENTIALS.intersection(words))
        or bool(_PAIRS.intersection(pairs))
        or any(_PART.search(word) for word in words)
        or any(word.endswith(_ENDINGS) and word != "secret" for word in words)
    )


def _usually_secret(words: Sequence[str]) -> bool:
    """Whether an ambiguous word ends the name, without a word that makes it something else."""
    plain = _PLAIN_PASSES if words[-1] in _PASSWORDS else _PLAIN
    return words[-1] in _USUALLY and not plain.intersection(words)
