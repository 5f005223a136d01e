"""Removes secrets from what is recorded or shown.

Secrets are recognised by the names beside them (``train.secret_names``), or by their form, whatever
their name: URLs with a password, tokens of known services, private keys. All patterns take a time
that grows linearly with the text, since texts of others are searched too.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from train.secret_names import (
    REFERENCE,
    is_credential_name,
    is_header,
    is_plain_value,
    is_reference,
    is_secret_name,
    is_secret_variable,
    looks_random,
    words_of,
)

HIDDEN = "***"
"""Stands for a secret that was removed."""

__all__ = [
    "HIDDEN", "is_credential_name", "is_secret_name", "is_secret_value", "is_secret_variable",
    "redact", "redact_command", "redact_values", "secret_option",
]  # fmt: skip

_SIGNATURES = {"sig", "signature", "x-amz-signature", "x-goog-signature", "awsaccesskeyid"}

_URL = r"\b[A-Za-z][A-Za-z0-9+.-]{0,20}://"
# Not what follows a host and its port, which is no password: http://host:80?user=me@example.com.
_URL_PASSWORD = re.compile(rf"({_URL}[^\s/:@'\"?#]*:)(?!\d{{1,5}}[?#])([^\s/'\"]+)(?=@(?!sha256:))")
# A token in place of a user; other schemes have accounts and containers there.
_URL_USER = re.compile(
    r"(\b(?:git\+)?https?://)(?=[^@\s]{0,200}\d)([A-Za-z0-9_\-.~%]{20,200})(?=@)"
)
_URL_QUERY = re.compile(r"([?&#;])([\w.\-]+)=([^&;\s'\"#]+)")
_PEM_END = r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_PEM = re.compile(
    rf"-----BEGIN [A-Z0-9 ]{{0,40}}PRIVATE KEY(?: BLOCK)?-----(?:.*?{_PEM_END}|.*\Z)", re.DOTALL
)
_PEM_BODY = re.compile(r"[A-Za-z0-9+/=]{16,}")
_PEM_REST = re.compile(r"[A-Za-z0-9+/=]{1,76}")
_BASIC = re.compile(r"\b(basic\s{1,8})([A-Za-z0-9+/]{4,})={0,2}", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s{1,8})([A-Za-z0-9+/._~-]{16,})=*", re.IGNORECASE)
# With a capital letter and a digit, unlike words.
_MIXED = r"(?=[\w+/.~-]{0,200}[A-Z])(?=[\w+/.~-]{0,200}[0-9])"
# Prefixes that services give their tokens in order that they be found.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|hf_[A-Za-z0-9]{34,}"
    r"|api_org_[A-Za-z0-9]{20,}|wandb_v1_[A-Za-z0-9_]{20,}"
    rf"|sk-{_MIXED}[A-Za-z0-9_-]{{20,}}|gsk_{_MIXED}[A-Za-z0-9]{{20,}}"
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|nvapi-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}"
    r"|ya29\.[A-Za-z0-9_-]{20,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"
    r"|npm_[A-Za-z0-9]{30,}|pypi-Ag[A-Za-z0-9_-]{30,}|dckr_pat_[A-Za-z0-9_-]{20,}"
    r"|hvs\.[A-Za-z0-9_-]{20,}|SG\.[A-Za-z0-9_-]{16,256}\.[A-Za-z0-9_-]{16,}"
    r"|dop_v1_[a-f0-9]{32,}|r8_[A-Za-z0-9]{30,}|tskey-[A-Za-z0-9-]{16,}"
    r"|bot\d{6,12}:[A-Za-z0-9_-]{30,}|\d{8,12}:AA[A-Za-z0-9_-]{32,}"
    r"|eyJ[A-Za-z0-9_-]{8,512}\.eyJ[A-Za-z0-9_-]{8,8192}\.[A-Za-z0-9_-]{8,}"
    r")"
)
_WEBHOOK = re.compile(
    r"(https://(?:hooks\.slack\.com/(?:services|workflows|triggers)"
    r"|(?:[\w-]{1,63}\.)?discord(?:app)?\.com/api/(?:v\d{1,3}/)?webhooks"
    r"|[\w.-]{1,200}\.webhook\.office\.com/webhookb2|outlook\.office\.com/webhook)/)([\w/@.-]+)"
)

# A name and what separates it from its value: name=value, name = value, name: value, "name": value
# as in JSON and in a repr, ["name"] = value; for options also --name value and '--name', 'value'.
_NAMED = re.compile(
    r"""(?<![\w.\-])(?:"""
    r"""(?P<name>-{0,2}[A-Za-z_][\w.\-]*)"""
    r"""(?:=(?!=)|[ \t]{1,8}=(?!=)[ \t]{0,8}|:[ \t]{1,8}|\\{0,2}["']\s{0,8}:\s{0,8}"""
    r"""|["']\][ \t]{0,8}=(?!=)[ \t]{0,8})"""
    r"""|(?P<option>--?[A-Za-z][\w.\-]*)(?:["'],\s{0,8}|[ \t]{1,8})(?!["']?-)"""
    r""")"""
)
_VALUE = re.compile(
    rf"""(?P<reference>(?:{REFERENCE.pattern})(?=[\s,;&'"\])}}]|\Z))"""
    r"""|(?P<open>(?:[\[({]\s{0,8})?(?:[bru]{0,2}(?=["']))?)(?:"""
    r"""\\(?P<escaped>["'])[^"'\\\n]*\\(?P=escaped)"""
    r"""|"(?:[^"\\\n]|\\.|"(?=\w))*"|'(?:[^'\\\n]|\\.|'(?=\w))*'"""
    r"""|["'][^\n]*"""  # without an end
    r"""|(?:\$\{[^{}\s]*\}|\$[{(]|[^\s,;&'"\[\](){}]|["'](?=\w))+)"""
)
# The values of some headers have several words.
_HEADER = re.compile(
    r"(?:(?i:token|basic|bearer|digest|negotiate|apikey)[ \t]{1,8}"
    r"|(?:[^\s\"',;]{1,4096};[ \t]{1,4}){1,50})?"
)
_DECISIVE = 128
"""How many characters of a value decide whether it is a secret."""
_OPTIONS = {"storage", "mirror", "env", "environ"}


def is_secret_value(value: str) -> bool:
    """Whether a text contains a secret that its form shows."""
    return _without_known_forms(value) != value


def secret_option(options: Any, prefix: str = "") -> str | None:
    """The first key in nested options of a library whose name is that of a secret; None without."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            values = value if isinstance(value, list) else [value]
            has_value = any(not isinstance(inner, Mapping | list) for inner in values)
            if has_value and is_secret_name(str(name)):
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
    parts, start, position = [], 0, 0
    while named := _NAMED.search(text, position):
        position = named.end()
        if found := _secret_after(named["name"] or named["option"], text, position):
            shown, end = found
            parts += [text[start:position], shown]
            start = position = end
    return "".join([*parts, text[start:]])


def redact_command(words: Sequence[str]) -> list[str]:
    """The words of a command line with ``***`` in place of secrets: values of options, overrides
    and variables with secret names, and what ``redact`` finds."""
    return _redacted_items(words)


def redact_values(values: Any) -> Any:
    """Nested lists and mappings, with ``***`` in place of secrets in their texts and below names of
    secrets. Lists of texts may be command lines."""
    if isinstance(values, str):
        return redact(values)
    if isinstance(values, Mapping):
        return {
            redact(key) if isinstance(key, str) else key: _below(str(key), value)
            for key, value in values.items()
        }
    if isinstance(values, list | tuple):
        return _redacted_items(values)
    return values


def _below(name: str, value: Any) -> Any:
    """What is recorded of the value of a key in a mapping."""
    if is_credential_name(name):
        return _hidden(value)
    if isinstance(value, str) and looks_random(value) and is_secret_variable(name, value):
        return HIDDEN
    return redact_values(value)


def _hidden(value: Any) -> Any:
    """The same with ``***`` in place of all texts and numbers."""
    if isinstance(value, Mapping):
        return {
            redact(key) if isinstance(key, str) else key: _hidden(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_hidden(inner) for inner in value]
    return value if value in (None, "") or isinstance(value, bool) else HIDDEN


def _redacted_items(items: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    option = ""
    for item in items:
        is_option = isinstance(item, str) and item.startswith("-")
        if option and not is_option and _is_assigned_secret(option, str(item)):
            found.append(HIDDEN)
        else:
            found.append(_redacted_word(item) if isinstance(item, str) else redact_values(item))
        option = item if is_option and "=" not in item else ""
    return found


def _redacted_word(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and re.fullmatch(r"[\w.\-]+", name) and _is_assigned_secret(name, value):
        return f"{name}={HIDDEN}"
    return redact(word)


def _without_known_forms(text: str) -> str:
    if "PRIVATE KEY" in text:
        text = _without_keys(text)
    text = _URL_PASSWORD.sub(_redacted_password, text)
    text = _URL_USER.sub(rf"\1{HIDDEN}", text)
    if "://" in text:
        text = _URL_QUERY.sub(_redacted_parameter, text)
        text = _WEBHOOK.sub(rf"\1{HIDDEN}", text)
    text = _BASIC.sub(_redacted_basic, text)
    text = _BEARER.sub(lambda m: m[1] + HIDDEN if looks_random(m[2]) else m[0], text)
    return _TOKEN.sub(HIDDEN, text)


def _without_keys(text: str) -> str:
    """A text without private keys in PEM, also without one whose begin or end is missing."""
    parts = re.split(_PEM_END, _PEM.sub(HIDDEN, text))
    for index, part in enumerate(parts[:-1]):
        lines = part.split("\n")[:-1]
        if lines and _PEM_REST.fullmatch(_last_word(lines[-1])):
            lines.pop()
        while lines and _PEM_BODY.fullmatch(_last_word(lines[-1])):
            lines.pop()
        if len(lines) == 1 and _PEM_REST.fullmatch(lines[0]):  # the text may begin within a line
            lines.pop()
        parts[index] = "".join(f"{line}\n" for line in lines)
    return HIDDEN.join(parts)


def _last_word(line: str) -> str:
    """What a log shows of a line, without its prefix."""
    return line.rpartition(" ")[2].strip()


def _redacted_password(match: re.Match[str]) -> str:
    return match[0] if is_reference(match[2]) else match[1] + HIDDEN


def _redacted_parameter(match: re.Match[str]) -> str:
    named = is_secret_variable(match[2], match[3]) or match[2].lower() in _SIGNATURES
    secret = named and not is_reference(match[3])
    return f"{match[1]}{match[2]}={HIDDEN}" if secret else match[0]


def _redacted_basic(match: re.Match[str]) -> str:
    """``user:password`` in base64, as in HTTP."""
    try:
        decoded = b64decode(match[2] + "=" * (-len(match[2]) % 4)).decode()
    except ValueError:
        return match[0]
    return match[1] + HIDDEN if ":" in decoded and decoded.isprintable() else match[0]


def _secret_after(name: str, text: str, start: int) -> tuple[str, int] | None:
    """What to show for the value at a position, and where it ends; None if it is no secret."""
    if not _may_be_assigned(name):
        return None
    if is_header(name) and (scheme := _HEADER.match(text, start)):
        start = scheme.end()
    # Only what decides is read, since the names in a value are searched again if it is no secret.
    value = _VALUE.match(text, start, start + _DECISIVE)
    if not value or value["reference"]:
        return None
    inner = value[0][len(value["open"]) :]
    if not _is_assigned_secret(name, inner.strip("\"'\\")):
        return None
    whole = _VALUE.match(text, start) or value
    opened = whole["open"] or ""
    inner = whole[0][len(opened) :]
    quote = inner[: len(inner) - len(inner.lstrip("\\\"'"))][: 2 if inner[0] == "\\" else 1]
    end = quote if inner.endswith(quote) and len(inner) > len(quote) else ""
    return f"{opened}{quote}{HIDDEN}{end}", whole.end()


@lru_cache(maxsize=1024)
def _may_be_assigned(name: str) -> bool:
    """Whether a random value beside this name is a secret."""
    return _is_assigned_secret(name, "a1B2c3D4e5f6G7h8")


def _is_assigned_secret(name: str, value: str) -> bool:
    """Whether ``name=value`` in a text or a command line assigns a secret.

    Lower-case names may be those of a config or of Python: there ``key``, ``token`` and the like
    count only below ``options`` and other arguments of libraries, or beside a random value.
    """
    value = value.strip().strip("\"'")
    if not value or is_plain_value(value):
        return False
    *above, last = name.lstrip("-").split(".")
    if any(_OPTIONS.intersection(words_of(part)) for part in above):
        return is_secret_name(last)
    if name.isupper() or name.startswith("-") or looks_random(value):
        return is_secret_variable(last, value)
    return is_credential_name(last)
