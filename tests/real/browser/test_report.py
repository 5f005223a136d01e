"""Reports in a real browser."""

import threading

import pytest

from tests.report.test_page import hostile
from tests.support.report_files import START, write_run, write_samples
from tests.support.run_files import write, write_lines
from train.report.data import read_run
from train.report.page import render
from train.report.serve import open_server

# Pixels of a plot that are not transparent: its axes, grid, curves and marks.
PIXELS = """
const canvas = document.querySelector(`#${arguments[0]} canvas`);
if (!canvas) return 0;
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let count = 0;
for (let i = 3; i < data.length; i += 4) count += data[i] > 0;
return count;
"""
# Pixels whose colour is near that of a CSS variable.
COLOURED = """
const canvas = document.querySelector(`#${arguments[0]} canvas`);
const wanted = getComputedStyle(document.documentElement).getPropertyValue(arguments[1]).trim();
const [r, g, b] = [1, 3, 5].map((at) => parseInt(wanted.slice(at, at + 2), 16));
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let count = 0;
for (let i = 0; i < data.length; i += 4) {
  const far = Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b);
  count += data[i + 3] > 200 && far < 40;
}
return count;
"""
FIGURES = "return [...document.querySelectorAll('.plot')].map((plot) => plot.id);"
OVERFLOW = "return document.documentElement.scrollWidth - innerWidth;"
CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (colour) => colour.slice(0, 3).map((part) => part / 255)
  .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
  .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !element.checkVisibility() || element.closest("svg, script, .skip")) continue;
  let behind = element;
  while (behind && (rgb(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) {
    behind = behind.parentElement;
  }
  const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
  const [a, b] = pair.map(rgb).map(light).sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) found.push(`${element.tagName}.${element.className}: ${ratio.toFixed(2)}`);
}
return [...new Set(found)];
"""


@pytest.fixture
def page(tmp_path, visit):
    """Writes the report of runs and opens it."""

    def open_page(*runs, **look):
        path = tmp_path / "report.html"
        path.write_text(render([read_run(run) for run in runs]))
        return visit.open(path.as_uri(), **look)

    return open_page


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    write_samples(tmp_path / "run", 400, {"name": "sample", "text": "a text " * 200})
    return tmp_path / "run"


def test_every_plot_is_drawn_without_errors_or_network(page, run):
    opened = page(run)
    figures = opened.run(FIGURES)
    assert len(figures) == 8
    for figure in figures:
        assert opened.soon(PIXELS, figure) > 1000, figure
    assert opened.soon(COLOURED, figures[0], "--run-0") > 100, "train/loss"
    assert opened.run(COLOURED, figures[0], "--run-1") > 50, "eval/loss"
    assert opened.run(COLOURED, figures[0], "--bad") > 5, "the mark of the fault"
    assert opened.errors() == []
    requests = [address for address in opened.requests() if not address.startswith("data:")]
    assert [address[:5] for address in requests] == ["file:"], requests


def test_a_legend_switches_a_curve_off_and_on(page, run):
    opened = page(run)
    figure = opened.run(FIGURES)[0]
    before = opened.soon(COLOURED, figure, "--run-1")
    press = f"document.querySelectorAll('#{figure} .legend button')[1].click();"
    pressed = f"return document.querySelectorAll('#{figure} .legend button')[1].ariaPressed;"
    opened.run(press)
    assert opened.run(pressed) == "false"
    assert opened.soon(COLOURED.replace("return count;", "return count < 10;"), figure, "--run-1")
    opened.run(press)
    assert opened.run(pressed) == "true"
    assert opened.soon(
        f"return (() => {{{COLOURED}}})(...arguments) === {before}", figure, "--run-1"
    ) or (opened.run(COLOURED, figure, "--run-1") > 50)
    assert opened.errors() == []


def test_marks_axis_and_scale_can_be_chosen(page, run):
    opened = page(run)
    figure = opened.run(FIGURES)[0]
    assert opened.soon(COLOURED, figure, "--bad") > 5
    opened.run("document.querySelector('[name=marks][value=fault]').click();")
    assert opened.soon(COLOURED.replace("return count;", "return count === 0;"), figure, "--bad")
    opened.run("document.querySelector('[name=axis][value=t]').click();")
    opened.run(f"document.querySelector('#{figure} .log').click();")
    assert opened.soon(COLOURED, figure, "--run-0") > 100
    opened.run("document.querySelector('[name=axis][value=x]').click();")
    assert opened.soon(COLOURED, figure, "--run-0") > 100
    assert opened.errors() == []


def test_a_plot_is_read_with_the_arrow_keys(page, run):
    from selenium.webdriver.common.keys import Keys

    opened = page(run)
    figure = opened.run(FIGURES)[0]
    assert opened.soon(PIXELS, figure) > 1000
    canvas = opened.chromium.find_element("css selector", f"#{figure} .canvas")
    canvas.send_keys(Keys.END)
    said = f"const text = document.querySelector('#{figure} .readout').textContent; return text"
    assert opened.soon(f"{said}.includes('step 400') && text;").startswith("step 400")
    assert "train/loss" in opened.run(f"{said};")
    canvas.send_keys(Keys.ARROW_LEFT)
    assert opened.soon(f"{said}.includes('step 396');"), opened.run(f"{said};")
    assert opened.run(f"return document.querySelector('#{figure} .readout').ariaLive") == "polite"


def test_several_runs_are_overlaid(page, run, tmp_path):
    write_run(tmp_path / "other", "other", lr=5e-4)
    opened = page(run, tmp_path / "other")
    figure = opened.run(FIGURES)[0]
    for colour in ("--run-0", "--run-1"):
        assert opened.soon(COLOURED, figure, colour) > 100
    legend = opened.run(
        f"return [...document.querySelectorAll('#{figure} .legend button')]"
        ".map((button) => button.textContent);"
    )
    assert legend == [
        "shown · train/loss", "shown · eval/loss", "other · train/loss", "other · eval/loss",
    ]  # fmt: skip
    move = (
        f"const over = document.querySelector('#{figure} .u-over');"
        "const box = over.getBoundingClientRect();"
        "over.dispatchEvent(new MouseEvent('mousemove', {bubbles: true, clientY: box.top + 9,"
        "clientX: box.left + box.width * 259 / 399}));"
        f"return document.querySelector('#{figure} .readout').textContent.includes("
        "'other: Attempt 3 resumes from step 260');"
    )
    assert opened.soon(move), "a mark does not say which run it belongs to"
    assert opened.errors() == []


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_have_contrast_and_the_button_changes_them(page, run, tmp_path, dark):
    write_run(tmp_path / "other", "other", lr=5e-4)
    opened = page(run, tmp_path / "other", dark=dark)
    background = "return getComputedStyle(document.body).backgroundColor;"
    opened.run("for (const each of document.querySelectorAll('details')) each.open = true;")
    assert opened.run(CONTRAST) == []
    first = opened.run(background)
    press = (
        "document.getElementById('theme').click(); return document.documentElement.dataset.theme;"
    )
    assert [opened.run(press), opened.run(press)] == ["light", "dark"]
    assert (opened.run(background) == first) == dark
    assert opened.soon(PIXELS, opened.run(FIGURES)[0]) > 1000


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_needs_no_horizontal_scrolling(page, run, tmp_path, width):
    write_run(tmp_path / "other", "a-name-without-any-place-to-break-it-" * 4, lr=5e-4)
    for runs in ([run], [run, tmp_path / "other"]):
        opened = page(*runs, width=width)
        opened.run("for (const each of document.querySelectorAll('details')) each.open = true;")
        assert opened.run(OVERFLOW) <= 0
        assert opened.soon(PIXELS, opened.run(FIGURES)[0]) > 1000
        wide = "return Math.max(...[...document.querySelectorAll('canvas')].map((c) => c.clientWidth));"
        assert opened.run(wide) <= width


def test_nothing_from_a_run_acts(page, run, tmp_path):
    bad = hostile(tmp_path / "bad")
    for runs in ([bad], [run, bad]):
        opened = page(*runs)
        assert opened.soon(PIXELS, opened.run(FIGURES)[0]) > 1000
        assert opened.run("return document.images.length + document.scripts.length;") == 3
        assert opened.errors() == []


def test_the_policy_stops_scripts_and_requests(page, run):
    opened = page(run)
    opened.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.evil = 1\">');"
        "const script = document.createElement('script'); script.textContent = 'window.evil = 2';"
        "document.body.append(script);"
    )
    answer = opened.chromium.execute_async_script(
        "const done = arguments[0];"
        "fetch('http://127.0.0.1:9/').then(() => done('sent'), (error) => done(String(error)));"
    )
    assert "TypeError" in answer
    assert opened.run("return window.evil;") is None
    assert any("Content Security Policy" in text for text in opened.errors())


def test_a_watched_page_follows_the_run(visit, run, monkeypatch):
    from train.report import serve as serving

    monkeypatch.setattr(serving, "READ_EVERY", 0.0)
    (run / "finished.json").unlink()
    write_lines(run / "attempts.jsonl", [{"attempt": 1, "time": START, "world_size": 1}])
    (run / "heartbeats").mkdir()
    write(run / "heartbeats" / "rank-0.json", {})
    (run / "lock").write_text("process 1 on another-host since 2026-01-01 00:00:00")
    server = open_server([str(run)], 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        opened = visit.open(f"http://127.0.0.1:{server.server_port}/")
        assert opened.soon(PIXELS, opened.run(FIGURES)[0]) > 1000
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 450, "attempt": 1, "time": 1767226600.0, "train/loss": 0.5}\n')
        shown = "return document.getElementById('overview').textContent.includes('450');"
        assert opened.soon(shown), opened.errors()
        write(run / "finished.json", {"step": 450})
        assert opened.soon("return document.getElementById('live').textContent.includes('ended');")
        assert [text for text in opened.errors() if "favicon" not in text] == []
    finally:
        server.shutdown()
        server.server_close()
