"""Which files hold secrets, by their names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from train.secret_names import is_credential_name

# In lower case.
_NAMES = (
    ".env", ".env.*", "*.env", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.pkcs12", "*.p8",
    "*.jks", "*.keystore", "*.kdb", "*.kdbx", "*.ppk", "*.gpg", "*.asc", "*.der", "*.crt.key",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*_rsa", "*_ed25519",
    ".netrc", "_netrc", ".pypirc", ".npmrc", ".yarnrc*", ".git-credentials", ".gitconfig",
    ".htpasswd", ".pgpass", ".my.cnf", ".s3cfg", ".boto", ".dockercfg", ".dockerconfigjson",
    "kubeconfig*", "*.kubeconfig", "credential*", "secret.*", "secrets.*", "secret", "secrets",
    "password.*", "passwords.*", "passwd*", "token", "token.*", "*.token", "*.tfvars", "*.tfstate",
    "service-account*.json", "service_account*.json", "client_secret*", "*.ovpn", "*.mobileconfig",
    "*.vault", "vault-*", "*.sops.*", "*.agekey", "terraform.rc", ".terraformrc",
)  # fmt: skip
_DIRECTORIES = {".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", "secrets", "credentials"}
# Code that reads secrets has such names as well: secrets.py, test_credentials.py. What it contains
# is searched where it matters.
_SOURCE = {
    ".py", ".pyi", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".rs", ".go", ".js",
    ".ts", ".md", ".rst",
}  # fmt: skip


def is_secret_file(path: str) -> bool:
    """Whether a file holds secrets by its name, or by that of a directory which it is in; source
    files do not. ``path`` has ``/`` as separator."""
    parts = PurePosixPath(path.lower())
    if parts.suffix in _SOURCE:
        return False
    return (
        any(fnmatchcase(parts.name, pattern) for pattern in _NAMES)
        or not _DIRECTORIES.isdisjoint(parts.parts[:-1])
        or is_credential_name(PurePosixPath(path).stem)
    )
