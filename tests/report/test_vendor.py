"""uPlot is the released file, with its licence."""

import hashlib
import json

from tests.support.runs import ROOT

VENDOR = ROOT / "train" / "report" / "vendor"


def test_each_vendored_file_has_the_recorded_hash():
    found = [path for path in VENDOR.rglob("*") if path.is_file()]
    recorded = set()
    for record in VENDOR.glob("*/vendor.json"):
        values = json.loads(record.read_text())
        assert values["version"]
        for name, digest in values["sha256"].items():
            path = record.parent / name
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, name
            recorded.add(path)
        recorded.add(record)
    assert set(found) == recorded
    assert [path.name for path in recorded].count("LICENSE") == 1
