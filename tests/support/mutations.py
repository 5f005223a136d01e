"""Seeded mutations of files: bytes that are changed, and JSON that has other values than it should.

A mutation of a checkpoint corrects the hashes around it, as somebody who means harm would.
"""

import copy
import json

from train.checkpoint.layout import dumps_with_sha256
from train.checkpoint.manifest import MANIFEST, hash_file

DEEP = "[" * 20_000 + "]" * 20_000
"""JSON that is nested more deeply than Python's stack."""
VALUES = [
    None, True, False, 0, -1, 1, 2**63, -(10**30), 10**30, 0.5, float("nan"), float("inf"), "", "x",
    "../../x", "/x", "a\0b", "\ud800", "\x1b[2J", "x" * 5000, [], [None], [[]], {}, {"x": None},
]  # fmt: skip


def mutated_bytes(data, random):
    """The bytes with one part changed, removed, repeated or replaced."""
    data = bytearray(data)
    kind = random.randrange(6)
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice([1, 2, 8, 100]))
    if kind == 0:
        for place in range(at, end):
            data[place] ^= 1 << random.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = data[at:end] * random.choice([1, 50])
    elif kind == 4:
        data[at:at] = random.randbytes(random.choice([1, 4, 200]))
    else:
        data[:] = random.choice([b"", b"\0", b"[]", b"null", b"\xff\xfe", DEEP.encode(), b"{}"])
    return bytes(data)


def mutated_json(value, random):
    """The value with one part replaced, removed or added."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or not random.randrange(20):
        return random.choice(VALUES)
    parent, key = random.choice(places)
    kind = random.randrange(4)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[random.choice(["x", "..", "", "\ud800", "params"])] = random.choice(VALUES)
    elif kind == 2:
        parent[key] = copy.deepcopy(random.choice(places)[0])
    else:
        parent[key] = random.choice(VALUES)
    return value


def _places(value):
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, part in list(items):
        yield value, key
        yield from _places(part)


def mutate_file(path, random):
    """Mutates a file by its bytes or, where it is JSON, by its values."""
    data = path.read_bytes()
    if random.randrange(3) and path.suffix in (".json", ".jsonl"):
        lines = [data] if path.suffix == ".json" else data.splitlines()
        number = random.randrange(len(lines))
        changed = mutated_json(json.loads(lines[number]), random)
        lines[number] = json.dumps(changed).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(mutated_bytes(data, random))


def mutate_checkpoint(path, random):
    """Mutates a file of a checkpoint or its manifest, with hashes that fit."""
    names = [entry.name for entry in path.iterdir() if entry.name != MANIFEST]
    name = random.choice([*sorted(names), MANIFEST])
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    if name == MANIFEST:
        manifest = mutated_json(manifest, random)
        if not isinstance(manifest, dict):
            (path / MANIFEST).write_text(json.dumps(manifest))
            return
    else:
        mutate_file(path / name, random)
        manifest["files"][name] = hash_file(path / name)
    (path / MANIFEST).write_text(dumps_with_sha256(manifest))
