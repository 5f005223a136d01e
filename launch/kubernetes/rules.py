"""What an API server accepts in the fields that a user sets, so that errors appear before a
submission. https://kubernetes.io/docs/concepts/overview/working-with-objects/ has the rules."""

from __future__ import annotations

import re

_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*"
_PART = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
# Of the OCI distribution specification, with the host of a registry before the name.
_PATH = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_HOST = (
    r"(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|[A-Za-z0-9-]+(?=:\d)|\[[0-9a-fA-F:]+\])"
    r"(?::\d{1,5})?"
)
_TAG, _DIGEST = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}"

IMAGE = re.compile(rf"(?:{_HOST}/)?{_PATH}(?:/{_PATH})*(?::{_TAG})?(?:@(?:{_DIGEST}))?")
LABEL = re.compile(_LABEL)
"""A namespace."""
SUBDOMAIN = re.compile(_SUBDOMAIN)
"""The name of most objects, such as a claim or a PriorityClass."""
LABEL_VALUE = re.compile(rf"(?:{_PART})?")
QUALIFIED = re.compile(rf"(?:{_SUBDOMAIN.replace('$', '/')}/)?{_PART}")
"""The key of a label or an annotation, and the name of a resource."""
VARIABLE = re.compile(r"[-._A-Za-z][-._A-Za-z0-9]*")

CORES = re.compile(r"\d+(?:\.\d{1,3})?|\d+m")
BYTES = re.compile(r"\d+(?:\.\d+)?(?:k|[KMGTP]i|[MGTP])?")

MOST_PODS = 100_000
"""Of an Indexed Job."""
MOST = 2**31 - 1
"""Of other whole numbers."""
WEEK = 604_800
"""Seconds after which the template ends a Job."""
MOST_SECONDS = 10**9
"""Of a time limit: 31 years."""


def is_yaml_constant(text: str) -> bool:
    """Whether a word without quotation marks is not a text in YAML: kustomize writes the name of
    an object without them."""
    return text in ("true", "false", "null")


def is_mount_path(path: str) -> bool:
    """Whether a directory can be the place of a mount in a container."""
    return path.startswith("/") and ":" not in path


def is_host_path(path: str) -> bool:
    """Whether a directory of a host can be mounted."""
    return path.startswith("/") and ".." not in path.split("/")


INDEX = "batch.kubernetes.io/job-completion-index"
"""The annotation of a pod with its index in the Job."""
