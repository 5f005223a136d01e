"""The drawing in docs/architecture.md matches the imports."""

import runpy

from tests.support.runs import ROOT


def test_the_drawing_is_current():
    rooms = runpy.run_path(str(ROOT / "docs" / "rooms.py"))
    drawn = rooms["BLOCK"].search((ROOT / "docs" / "architecture.md").read_text())
    assert drawn, "docs/architecture.md has no drawing"
    assert drawn[0] == rooms["draw"](), "run `python docs/rooms.py`"


def test_train_does_not_import_launch():
    rooms = runpy.run_path(str(ROOT / "docs" / "rooms.py"))["rooms"]()
    assert "train.loop" in rooms
    used = {
        other for room, others in rooms.items() if room.startswith("train.") for other in others
    }
    assert not [room for room in used if room.startswith("launch")]
