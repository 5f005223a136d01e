"""Generates the drawing in architecture.md from the imports of train/ and launch/.

`python docs/rooms.py` rewrites the drawing; a test fails if it is not current. An arrow points from
a room to one that it imports, including imports for types. Arrows that follow from others are
omitted: if A imports B and B imports C, there is no arrow from A to C.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(?<=```mermaid\n).*?(?=```\n)", re.DOTALL)

# Files directly in a package that belong neither to the base (train) nor form a room (launch).
FRONT = {"__main__", "api", "cli", "command_line", "commands", "session"}
# A file that forms a room, above the base.
ALONE = {"hooks"}


def room_of(module: str) -> str | None:
    """The room of a dotted module name; None for other packages and for a package itself."""
    package, *rest = module.split(".")
    if package not in ("train", "launch") or not rest:
        return None
    if rest[0] in FRONT:
        return f"{package}.front"
    is_room = rest[0] in ALONE or (ROOT / package / rest[0]).is_dir()
    return f"{package}.{rest[0]}" if is_room or package == "launch" else "train.base"


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                named = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = named.is_dir() or named.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def rooms() -> dict[str, set[str]]:
    """Each room, and the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for package in ("train", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "templates" in path.parts:
                continue
            room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            if room is None or path == ROOT / package / "__init__.py":
                continue
            used = {room_of(module) for module in imports(path)} - {None, room}
            found.setdefault(room, set()).update(name for name in used if name)
    return found


def beyond(room: str, graph: dict[str, set[str]], path: tuple[str, ...] = ()) -> set[str]:
    """All rooms that a room imports, directly or not. Raises ValueError if imports form a cycle."""
    if room in path:
        raise ValueError(f"rooms import each other in a cycle: {' -> '.join([*path, room])}")
    direct = graph.get(room, set())
    return direct.union(*(beyond(other, graph, (*path, room)) for other in direct))


def identifier(room: str) -> str:
    """The Mermaid identifier of a room."""
    return room.replace(".", "_")


def draw() -> str:
    """The drawing in Mermaid's syntax."""
    graph = rooms()
    lines = ["graph TD"]
    for package in ("launch", "train"):
        lines.append(f"    subgraph {package}")
        lines += [
            f"        {identifier(name)}[{name.partition('.')[2]}]"
            for name in sorted(graph)
            if name.startswith(package)
        ]
        lines.append("    end")
    for room in sorted(graph):
        direct = graph[room]
        implied = set().union(*(beyond(other, graph) for other in direct))
        lines += [
            f"    {identifier(room)} --> {identifier(other)}" for other in sorted(direct - implied)
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    drawing = draw()
    PAGE.write_text(BLOCK.sub(lambda _: drawing, PAGE.read_text("utf-8"), count=1), "utf-8")
    print(f"{PAGE.relative_to(ROOT)} is current.")
