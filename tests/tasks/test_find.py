"""Tasks are found by name or dotted path, without heavy imports, and errors name the fault."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.exits import UsageError
from train.tasks.base import Task
from train.tasks.registry import BUILT_IN, find_task, unused_methods


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory for user modules, which are unloaded after the test."""
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("mine_"):
            del sys.modules[name]


def test_built_in_tasks_are_found() -> None:
    for name in BUILT_IN:
        found = find_task(name, "default")
        assert issubclass(found, Task)
        assert found.__module__.startswith(f"train.tasks.{name}.")


def test_a_task_in_the_working_directory_is_found(project: Path) -> None:
    (project / "mine_good.py").write_text(
        "from train.tasks.base import Task\n"
        "class MyTask(Task):\n"
        "    build_model = train_dataset = loss = lambda *arguments: None\n"
    )
    assert find_task("mine_good:MyTask", "the command line").__name__ == "MyTask"


@pytest.mark.parametrize(
    ("source", "reference", "parts"),
    [
        (None, "digit", ["'digit'", "did you mean digits?", "a.yaml:3"]),
        (None, "mine_nowhere:Task", ["'mine_nowhere'", "neither installed", "a.yaml:3"]),
        ("import mine_absent", "mine_module:T", ["imports 'mine_absent'", "not installed"]),
        ("from json import no_such", "mine_module:T", ["import", "'no_such'", "json"]),
        ("class MyTask: pass", "mine_module:MyTusk", ["'MyTusk'", "did you mean MyTask?"]),
        ("class MyTask: pass", "mine_module:MyTask", ["not a subclass", "train.tasks.base.Task"]),
        ("MyTask = 3", "mine_module:MyTask", ["not a subclass", "train.tasks.base.Task"]),
        (
            "import train\nclass MyTask(train.Task):\n    def build_model(self): pass",
            "mine_module:MyTask",
            ["does not implement train_dataset(), loss();", "a.yaml:3"],
        ),
        (
            "import train\nclass MyTask(train.Task):\n"
            "    build_model = loss = lambda *arguments: None\n    def trian_dataset(self): pass",
            "mine_module:MyTask",
            ["does not implement train_dataset() (it has trian_dataset());"],
        ),
        (
            "import train\nclass MyTask(train.Task):\n    class Model: pass\n"
            "    build_model = train_dataset = loss = lambda *arguments: None",
            "mine_module:MyTask",
            ["whose Model is not a config section", "class Model(train.Section)"],
        ),
        (
            "import train\nclass MyTask(train.Task):\n    def configure_optimizers(self): pass\n"
            "    build_model = train_dataset = loss = lambda *arguments: None",
            "mine_module:MyTask",
            ["which has configure_optimizers(), but a run has one optimiser", "a.yaml:3"],
        ),
    ],
)
def test_errors_name_the_fault(
    project: Path, source: str | None, reference: str, parts: list[str]
) -> None:
    if source is not None:
        (project / "mine_module.py").write_text(source)
    with pytest.raises(UsageError) as caught:
        find_task(reference, "a.yaml:3")
    for part in parts:
        assert part in str(caught.value)


def test_methods_that_are_almost_those_of_a_task_are_named() -> None:
    class Misspelt(Task):
        def eval_datset(self) -> None: ...
        def mesure(self) -> None: ...
        def _measure(self) -> None: ...
        def my_metrics_of_a_batch(self) -> None: ...
        def losses(self) -> None: ...  # loss() is there
        def loss(self) -> None: ...  # type: ignore[override]

    class Inherits(Misspelt):
        def measure(self) -> None: ...  # type: ignore[override]

    first, second = unused_methods(Misspelt)
    assert "eval_datset()" in first
    assert "eval_dataset()" in first
    assert "mesure()" in second
    assert "measure()" in second
    assert unused_methods(Inherits) == [first]
    assert [unused_methods(find_task(name, "default")) for name in BUILT_IN] == [[]] * len(BUILT_IN)


def test_finding_the_built_in_tasks_imports_nothing_heavy() -> None:
    code = (
        "import sys; from train.tasks.registry import find_task\n"
        "find_task('text', '').Model(); find_task('digits', '').Model()\n"
        "print([m for m in ('torch', 'sklearn', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
