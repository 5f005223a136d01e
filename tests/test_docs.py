"""The documentation matches the code: commands run, and names, links and tables are correct.

The ``sh`` blocks of a page are run from top to bottom in one new directory, which links to
``configs`` and ``k8s``. A block of another kind is first written to a file if its first line is a
comment with a file name. A line that is indented, or that follows a line ending in a backslash,
continues the command above it. ``# exit 64`` at the end of a command is its expected exit code.
"""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.support.forked import quick_python
from tests.support.kubectl import path as path_with_kubectl
from tests.support.runs import ROOT, environment
from train.config.keys import known_keys
from train.config.schema import Config, config_class
from train.exits import ADVICE, Exit
from train.tasks.registry import BUILT_IN, find_task

TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {str(path.relative_to(ROOT)): path for path in (*(ROOT / name for name in TOP), *DOCS)}

# Commands that cannot run here, exactly as written in the page, each with the reason.
NOT_RUN = {
    "python -m tensorboard.main --logdir runs": "it serves until it is stopped",
    "isorun sync runs/tracked": "it needs an account and the network",
    "wandb login": "it needs an account and the network",
}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w-]+\.(?:py|yaml|txt))\n")


def commands(text):
    """The commands of a page's ``sh`` blocks, in order, each with its expected exit code."""
    found = []
    for kind, block in BLOCK.findall(text):
        if kind != "sh":
            continue
        for line in block.splitlines():
            goes_on = found and (found[-1].endswith("\\") or line.startswith(" "))
            if goes_on:
                found[-1] += "\n" + line
            elif line.strip() and not line.startswith("#"):
                found.append(line)
            else:
                found.append("")  # ends the command above
    pairs = []
    for command in filter(None, found):
        code = re.search(r"# exit (\d+)$", command)
        pairs.append((command, int(code[1]) if code else 0))
    return pairs


def without_comment(command):
    return re.sub(r"\s+#.*$", "", command)


class Shell:
    """Runs commands one after another and keeps the working directory, like an interactive shell.
    If ``quick``, programs are forked after the slow imports."""

    def __init__(self, directory, quick=True, **variables):
        self.home = self.here = directory
        self.environment = environment() | {"HOME": str(directory)}  # no user credentials
        for name in list(self.environment):
            if name.startswith(("WANDB_", "ISORUN_")):
                del self.environment[name]
        self.environment |= variables
        path = [str(Path(sys.executable).parent), variables.get("PATH", os.environ["PATH"])]
        if quick:
            python, more = quick_python()
            self.environment |= more
            path.insert(0, str(Path(python).parent))
        self.environment["PATH"] = os.pathsep.join(path)

    def run(self, command, expected):
        script = f"{command}\ncode=$?\npwd > {shlex.quote(str(self.home / '.here'))}\nexit $code"
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.here, env=self.environment, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        said = f"$ {command}\n{done.stdout}"
        assert done.returncode == expected, f"exit {done.returncode}, not {expected}\n{said}"
        self.here = Path((self.home / ".here").read_text().strip())
        return said


def run_page(path, directory, quick=True):
    """Runs all commands of a page; returns their output."""
    text = path.read_text()
    for _, block in BLOCK.findall(text):
        if name := NAMED.match(block):
            (directory / name[1]).write_text(block)
    for name in ("configs", "k8s"):
        (directory / name).symlink_to(ROOT / name)
    # W&B adds a second to each run: it is enabled only for pages that describe its files.
    variables = {} if "wandb" in text else {"WANDB_MODE": "disabled"}
    if "kubectl" in text:
        variables["PATH"] = path_with_kubectl()
    shell = Shell(directory, quick, **variables)
    return "".join(
        shell.run(command, code)
        for command, code in commands(text)
        if without_comment(command) not in NOT_RUN
    )


@pytest.fixture(scope="session")
def directory_of(tmp_path_factory):
    """Returns a function that runs a page once and returns the directory with the files it left."""
    made = {}

    def of(page):
        if page not in made:
            directory = tmp_path_factory.mktemp(PAGES[page].stem)
            run_page(PAGES[page], directory)
            made[page] = directory
        return made[page]

    return of


# Later tests examine the files of these pages, so one process runs them.
LOOKED_AT = ["docs/run-directory.md", "docs/tasks.md", "docs/tracking.md"]


def pages():
    """The pages with commands, as parameters: ``make test`` runs some, ``make test-all`` all. The
    README has a test of its own."""
    for page, path in PAGES.items():
        if page != "README.md" and commands(path.read_text()):
            group = "looked-at" if page in LOOKED_AT else page
            marks = [pytest.mark.xdist_group(f"docs {group}")]
            yield pytest.param(page, marks=marks + [pytest.mark.slow] * (page not in LOOKED_AT))


@pytest.mark.parametrize("page", list(pages()))
def test_every_command_of_a_page_works(directory_of, page):
    directory_of(page)


@pytest.mark.slow
def test_the_commands_of_the_readme_work_without_the_fork_server(tmp_path):
    """Runs them with the programs of the environment, each in a new interpreter."""
    run_page(PAGES["README.md"], tmp_path, quick=False)


def test_commands_that_are_not_run_are_still_in_the_docs():
    there = {without_comment(c) for path in PAGES.values() for c, _ in commands(path.read_text())}
    assert set(NOT_RUN) <= there


def prose(path):
    """The text of a page without its code blocks."""
    return BLOCK.sub("", path.read_text())


@functools.cache
def keys():
    """Every config key, with each of the built-in tasks."""
    return {key for name in BUILT_IN for key in known_keys(config_class(find_task(name, "test")))}


@pytest.mark.parametrize("page", PAGES)
def test_every_config_field_in_the_text_exists(page):
    known, sections = keys(), "|".join(Config.model_fields)
    files = r"(?:json|jsonl|md|py|yaml|bin|safetensors|pt2)"
    pattern = rf"`((?:{sections})(?:\.[a-z_]+)+)(?:=[^`]*)?`"
    named = re.findall(pattern, prose(PAGES[page]))
    wrong = [n for n in named if n not in known and not re.search(rf"\.{files}$", n)]
    assert wrong == []


def test_the_config_page_shows_every_section():
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["docs/config.md"].read_text(), re.MULTILINE)
    assert rows == list(Config.model_fields)


def test_the_table_of_exit_codes_matches_the_code():
    row = r"^\| (\d+) \| `([A-Z_]+)` \| .* \| (.*) \|$"
    rows = re.findall(row, PAGES["docs/running.md"].read_text().replace("`logs/`", "logs/"), re.M)
    told = [
        (int(code), name, advice.replace("`optim.lr`", "optim.lr")) for code, name, advice in rows
    ]
    assert told == [(e.value, e.name, ADVICE[e]) for e in Exit]


@pytest.mark.parametrize("page", PAGES)
def test_exit_codes_in_the_text_exist(page):
    named = re.findall(r"\bexit (?:code )?(\d+)\b", PAGES[page].read_text())
    assert {int(code) for code in named} <= set(Exit)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_has_a_target(page):
    path = PAGES[page]
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, heading = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in [slug(text) for text in headings], link


def slug(heading):
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_in_the_index():
    index = PAGES["docs/README.md"].read_text()
    assert [p.name for p in DOCS if p.name != "README.md" and f"({p.name})" not in index] == []


def named_files():
    """The file names in the first column of the page's tables."""
    rows = re.findall(r"^\| (`.+?`) \|", PAGES["docs/run-directory.md"].read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_scripts_of_the_python_page_pass_on_that_a_run_was_stopped(monkeypatch):
    stopped = train.Result(Exit.PREEMPTED, ROOT, 3, {})
    monkeypatch.setattr(train, "fit", lambda *config: stopped)
    blocks = [block for kind, block in BLOCK.findall(PAGES["docs/python.md"].read_text())]
    scripts = [block for block in blocks if 'train.fit("config.yaml"' in block]
    assert len(scripts) == 2
    for script in scripts:
        with pytest.raises(SystemExit) as caught:
            exec(script, {"train": train, "sys": sys})
        assert caught.value.code == 143


@pytest.mark.xdist_group("docs looked-at")
def test_every_file_of_a_run_directory_is_in_the_docs(directory_of):
    directory = directory_of("docs/run-directory.md")
    run = directory / "runs" / "shown"
    # The run of this page succeeds; some files exist only after a fault.
    with (max((run / "checkpoints").glob("step-*")) / "__0_0.distcp").open("ab") as file:
        file.write(b"x")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("no row\n")
    page = commands(PAGES["docs/run-directory.md"].read_text())
    fit = next(command for command, _ in page if "train fit" in command)
    Shell(directory).run(f"{fit} length.epochs=1.2 --allow-changes", 0)

    missing = [name for name in named_files() if not any(run.glob(name))]
    assert missing == []
    tops = {path.relative_to(run).parts[0] for name in named_files() for path in run.glob(name)}
    assert {path.name for path in run.iterdir()} == tops, "files are missing from the page"


@pytest.mark.xdist_group("docs looked-at")
def test_every_metric_is_in_the_docs(directory_of):
    rows = re.findall(r"^\| (`.+?`) \|", PAGES["docs/tracking.md"].read_text(), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    measured = set()
    for page in ("docs/tracking.md", "docs/tasks.md"):
        for path in directory_of(page).rglob("metrics.jsonl"):
            measured |= {name for line in path.open() for name in json.loads(line)}
    assert "eval/perplexity" in measured, "no run used the text task"
    assert measured - told == {"eval/f1"}, (
        "only eval/f1, which a page's task defines, may be missing from the table"
    )
    assert told - measured == {"speed/mfu", "memory/device_peak_gib", "train/spikes"}, (
        "only metrics of a GPU and of optim.spike may be missing from these runs"
    )
