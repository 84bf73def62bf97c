"""The folder listing reads as the architecture: imports go one way, from a room to those above it in the list."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "bitfit_hf"

# From the bottom to the top: a room imports from those before it and from itself.
ROOMS = [
    "errors",
    "notices",
    "backends",
    "terms",
    "training_run",
    "storage",
    "config",
    "tuner",
    "recompute",
    "delta",
    "analysis",
    "plot",
    "card",
    "hub",
    "bank",
    "serving",
    "trainer",
    "tables",
    "__init__",
    "cli",
]


def modules(package: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name inside; a folder's `__init__` by the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(package: Path, known: dict[str, Path], name: str) -> Iterator[tuple[int, str]]:
    """Line and target of each import of the package's own modules in a module, wherever it stands: also in functions
    and under `if TYPE_CHECKING`. The version is the one name that may be read from the top."""
    path = known[name]
    here = ["bitfit_hf", *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "bitfit_hf":
                    yield node.lineno, alias.name.removeprefix("bitfit_hf").lstrip(".") or "__init__"
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            target = [*start, *(node.module.split(".") if node.module else [])]
            if target[0] != "bitfit_hf":
                continue
            for alias in node.names:
                inside = ".".join([*target[1:], alias.name])
                module = inside if inside in known else ".".join(target[1:]) or "__init__"
                if (module, alias.name) != ("__init__", "__version__"):
                    yield node.lineno, module


def room(module: str) -> str:
    return module.partition(".")[0]


def upward(package: Path) -> list[str]:
    """The imports that go against the order."""
    known = modules(package)
    return [
        f"{name}:{line} imports {target}"
        for name in known
        for line, target in imports(package, known, name)
        if ROOMS.index(room(target)) > ROOMS.index(room(name))
    ]


def circles(package: Path) -> list[str]:
    """The modules from which imports lead back to themselves."""
    known = modules(package)
    edges = {name: {target for _, target in imports(package, known, name)} - {name} for name in known}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in edges[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    # A folder's `__init__` hands on the names of its modules; those import each other by module, never through it.
    return sorted(name for name in known if name in reached(name))


def test_every_room_is_in_the_list():
    assert {room(name) for name in modules(PACKAGE)} == set(ROOMS)
    assert len(modules(PACKAGE)) > 60


def test_no_import_goes_back_up():
    assert upward(PACKAGE) == []


def test_no_import_goes_in_a_circle():
    assert circles(PACKAGE) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..bank import TaskBank",
        "from bitfit_hf.bank import TaskBank",
        "import bitfit_hf.bank.bank",
        "def f():\n    from ..bank.bank import TaskBank",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..bank import TaskBank",
        "from .. import TaskBank",
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(tmp_path, line):
    package = tmp_path / "bitfit_hf"
    for folder in (package, package / "bank", package / "terms"):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (package / "bank" / "bank.py").write_text("class TaskBank: ...")
    (package / "terms" / "heads.py").write_text("from .. import __version__\n")
    assert upward(package) == []
    (package / "terms" / "heads.py").write_text(line + "\n")
    (found,) = upward(package)
    assert found.startswith("terms.heads:")


def test_a_circle_inside_a_room_is_found(tmp_path):
    package = tmp_path / "bitfit_hf"
    (package / "terms").mkdir(parents=True)
    for path in ("__init__.py", "terms/__init__.py"):
        (package / path).write_text("")
    (package / "terms" / "heads.py").write_text("from .selection import select\n")
    (package / "terms" / "selection.py").write_text("def select():\n    from .heads import find\n")
    assert circles(package) == ["terms.heads", "terms.selection"]


# --- what CONTRIBUTING says of the house ---

CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its two first rows."""
    text = CONTRIBUTING.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_table_of_rooms_is_the_list():
    named = [name.rstrip("/") for row in table("The rooms") for name in re.findall(r"`([\w/]+)`", row[0])]
    assert named == ROOMS


def test_the_files_that_it_names_are_there():
    text = CONTRIBUTING.read_text(encoding="utf-8")
    below = {name for row in table("Private seams") for name in re.findall(r"`([a-z_/]+\.py)`", row[2])}
    assert len(below) >= 15
    assert not [name for name in below if not (PACKAGE / name).is_file()]
    named = set(re.findall(r"`((?:tests|recipes|bitfit_hf|card|terms|tuner|trainer|storage)/[\w/]+\.\w+)`", text))
    assert not [name for name in named if not any((root / name).is_file() for root in (PACKAGE, PACKAGE.parent))]


def test_the_tests_that_it_names_are_there():
    named = {name for row in table("Private seams") for name in re.findall(r"`(test_\w+)`", row[-1])}
    assert len(named) >= 15
    assert not [name for name in named if not (PACKAGE.parent / "tests" / "library" / f"{name}.py").is_file()]
