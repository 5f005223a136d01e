"""The page: what it says about runs, and that nothing from a run acts in it."""

import json
import re
from base64 import b64encode
from html.parser import HTMLParser

import pytest

from tests.support.report_files import START, write_run, write_samples
from tests.support.run_files import write, write_lines
from train.code.changes import Changes, FileChange
from train.code.changes import write as write_changes
from train.files import NotRegularError
from train.report.data import Goodput, GoodputPart, read_run
from train.report.page import render
from train.track.samples import png

ATTACK = """</script><script>evil()</script><img src=x onerror=evil()>"'`&lt;{{data}}\u202e"""
VOID = {"img", "meta", "input", "br"}


class Page(HTMLParser):
    """The elements and the texts of a page, with its errors."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.open, self.errors = [], [], [], []
        self.scripts = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self):
        return json.loads(self.scripts[0])


def page_of(*paths):
    html = render([read_run(path) for path in paths])
    page = Page(html)
    assert not page.errors, page.errors
    assert not page.open, page.open
    return page


def test_the_page_of_one_run_says_who_it_is_and_what_happened(tmp_path):
    write_run(tmp_path)
    write_samples(tmp_path, 50, {"name": "sample", "text": "an early text", "characters": 13})
    write_samples(tmp_path, 400, {"name": "sample", "text": "the newest text", "characters": 15})
    page = page_of(tmp_path)
    for text in (
        "shown-20260101-000000-abcdef", "finished", "400 of 400", "ddp x2", "c0ffee",
        "the newest text", "an early text", "optim.lr 0.003", "the run stopped on request",
        "Attempt 1 has no recorded end", "1 step skipped", "3287",
        "train/loss: 2.9409 at step 1",
    ):  # fmt: skip
        assert text in page.text, text
    marks = [(mark["kind"], mark["x"]) for mark in page.data["runs"][0]["marks"]]
    assert marks == [
        ("attempt", 0), ("fault", 100), ("attempt", 100), ("skipped", 180), ("stop", 260),
        ("attempt", 260), ("finish", 400),
    ]  # fmt: skip
    titles = [figure["title"] for figure in page.data["figures"]]
    assert titles == [
        "Loss", "Learning rate", "Gradient norm", "Skipped steps", "accuracy", "Throughput",
        "Memory", "Time per step",
    ]  # fmt: skip
    assert [one["metric"] for one in page.data["figures"][0]["series"]] == [
        "train/loss", "eval/loss",
    ]  # fmt: skip


def test_every_plot_has_a_name_and_its_values_as_a_table(tmp_path):
    write_run(tmp_path)
    page = page_of(tmp_path)
    plots = [attributes for tag, attributes in page.tags if attributes.get("class") == "canvas"]
    assert len(plots) == len(page.data["figures"])
    assert all("Plot of" in plot["aria-label"] and plot["tabindex"] == "0" for plot in plots)
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert all(header.get("scope") in ("row", "col") for header in headers)
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(t == "table" for t, _ in page.tags)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_runs_are_overlaid_and_their_differences_are_marked(tmp_path):
    write_run(tmp_path / "a", "same")
    write_run(tmp_path / "b", "same", lr=1e-3, extra={"only": "here"})
    write(tmp_path / "b" / "run.json", {
        "id": "same-20260101-000000-fedcba", "name": "same", "wandb_id": "w", "created": START,
    })  # fmt: skip
    page = page_of(tmp_path / "a", tmp_path / "b")
    assert [run["label"] for run in page.data["runs"]] == ["same (abcdef)", "same (fedcba)"]
    loss = page.data["figures"][0]["series"]
    assert [(one["run"], one["metric"]) for one in loss] == [
        (0, "train/loss"), (0, "eval/loss"), (1, "train/loss"), (1, "eval/loss"),
    ]  # fmt: skip
    html = render([read_run(tmp_path / name) for name in "ab"])
    assert re.findall(r"<mark>(.*?)</mark>", html) == ["optim.lr", "extra"], "as in compare"
    assert "different tasks" not in page.text
    write_run(tmp_path / "c", "other", task="digits")
    text = page_of(tmp_path / "a", tmp_path / "c").text
    assert "The runs have different tasks: digits, text." in text


def test_changes_of_the_code_are_shown(tmp_path):
    patch = "diff --git a/model.py b/model.py\n@@ -1 +1 @@\n-layers = 2\n+layers = 3\n"
    run = write_run(tmp_path / "run")
    write_changes(Changes([FileChange("model.py", patch)], ["Left out: .env (why)."]), run, 3)
    text = page_of(run).text
    assert "changes in model.py +1 -1 (" in text
    assert "-layers = 2 +layers = 3" in text
    assert "Left out: .env (why)." in text
    assert "The attempts of shown ran 2 versions of the code." in text
    (run / "code/attempt-3.diff").write_text(patch + "+x\n" * 60_000)
    assert "more characters are in" in page_of(run).text


def hostile(tmp_path):
    """A run directory whose every text is an attack."""
    write_run(tmp_path, ATTACK, task=ATTACK, **{ATTACK: {ATTACK: [ATTACK]}})
    write(tmp_path / "run.json", {
        "id": "plain", "name": ATTACK, "wandb_id": "w", "created": START,
    })  # fmt: skip
    attempt = {
        "attempt": 1, "time": START, "hosts": [ATTACK], "strategy": ATTACK, "world_size": 2,
        "device": ATTACK, "code": {ATTACK: ATTACK}, "changes": [ATTACK], ATTACK: ATTACK,
        "micro_batch_size": ATTACK, "resumed_from_step": ATTACK,
        "ended": {"time": START + 1, "code": ATTACK, "reason": ATTACK},
    }  # fmt: skip
    write_lines(tmp_path / "attempts.jsonl", [attempt, {**attempt, "ended": [ATTACK]}])
    row = {"step": 1, "attempt": 1, "time": START, f"eval/{ATTACK}": 1.0, ATTACK: 2.0}
    write_lines(tmp_path / "metrics.jsonl", [row, {**row, "step": 2}])
    write_samples(
        tmp_path, 1, {"name": ATTACK, "text": ATTACK}, {"name": "a", "image": ATTACK},
        {"name": "b", "image": b64encode(b"<svg onload=evil()>").decode()},
        {"name": "c", "image": 'x" onerror="evil()'},
    )  # fmt: skip
    write(tmp_path / "samples" / "step-000000000003.json", {"step": ATTACK, "items": [ATTACK]})
    attack = " ".join(ATTACK.split())
    patch = f"diff --git a/{attack} b/{attack}\n@@ -1 +1 @@\n+{attack}\n"
    write_changes(Changes([FileChange(attack, patch)], [attack]), tmp_path, 1)
    write_changes(Changes([FileChange(attack, patch)], [attack]), tmp_path, 2)
    (tmp_path / "failures").mkdir()
    write(tmp_path / "failures" / "x.json", {
        "time": START, "what": ATTACK, "first": {"rank": 0, "host": ATTACK, "error": ATTACK},
    })  # fmt: skip
    (tmp_path / "hangs" / "attempt-1").mkdir(parents=True)
    (tmp_path / "hangs" / "attempt-1" / "report.txt").write_text(ATTACK)
    return tmp_path


def test_nothing_from_a_run_becomes_an_element(tmp_path):
    run = hostile(tmp_path / "hostile")
    harmless = write_run(tmp_path / "harmless")
    for paths in ([run], [run, harmless]):
        page = page_of(*paths)
        assert len(page.scripts) == 3
        assert not [tag for tag, _ in page.tags if tag == "img"]
        handlers = [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
        assert not handlers
        assert not [a for _, a in page.tags if "style" in a]
        assert "evil()" in page.text, "the attack is shown as text"
        assert "\u202e" not in page.text
        assert page.data["runs"][0]["label"] == ATTACK[:60]


def test_the_policy_allows_only_the_scripts_of_the_page_and_no_network(tmp_path):
    import hashlib

    page = page_of(write_run(tmp_path))
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") is not None]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy
    for script in page.scripts[1:]:
        digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    outside = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href") if ":" in v]
    assert not outside


def test_an_image_is_shown(tmp_path):
    write_run(tmp_path)
    image = b64encode(png(bytes(range(12)), 2, 2)).decode()
    write_samples(tmp_path, 400, {"name": "drawn", "image": image, "width": 2, "height": 2})
    (shown,) = [a for tag, a in page_of(tmp_path).tags if tag == "img"]
    assert shown == {"src": f"data:image/png;base64,{image}", "alt": "drawn at step 400"}


def test_goodput_is_drawn_where_it_is_recorded(tmp_path):
    run = read_run(write_run(tmp_path))
    assert "Goodput" not in Page(render([run])).text
    run.goodput = Goodput(
        0.75, [GoodputPart("compute", 75), GoodputPart(ATTACK, 25)], "It cost 3 EUR."
    )
    page = Page(render([run]))
    assert "Goodput 75.0 % of 1:40 min. It cost 3 EUR." in page.text
    assert "compute 1:15 min 75.0 %" in page.text
    assert not page.errors


def test_a_run_without_metrics_or_attempts_has_a_page(tmp_path):
    write(tmp_path / "run.json", {"id": "new", "name": "new", "wandb_id": "w", "created": START})
    page = page_of(tmp_path)
    assert "No metrics are logged yet." in page.text
    assert "no attempt is recorded" in page.text


def test_a_long_run_stays_small(tmp_path):
    write_run(tmp_path, steps=40_000, every=8)
    assert len(render([read_run(tmp_path)])) < 2_000_000
    page = page_of(tmp_path)
    assert "the lowest and the highest value of each" in page.text


def test_a_link_in_place_of_the_samples_is_refused(tmp_path):
    from train.exits import ResumeRefusedError

    write_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((ResumeRefusedError, NotRegularError), match="samples"):
        read_run(tmp_path / "run")
