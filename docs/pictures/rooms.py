"""Draws the rooms of the library and which stands on which, from the imports in its source.

The order of the rooms and the walk through the imports are those of the test that guards them, so the picture cannot
say something else than the code: it is drawn anew whenever the documentation is built.

    python docs/pictures/rooms.py docs/pictures/rooms.svg
"""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
ROW, WIDTH, BOX, LEFT = 38, 760, 150, 40


def guard() -> ModuleType:
    """The test that walks through the imports."""
    path = ROOT / "tests" / "library" / "test_rooms.py"
    spec = importlib.util.spec_from_file_location("rooms_guard", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edges() -> tuple[list[str], dict[str, set[str]]]:
    """The rooms from the bottom up, and for each the rooms that it imports from."""
    test = guard()
    known = test.modules(test.PACKAGE)
    below: dict[str, set[str]] = defaultdict(set)
    for name in known:
        for _, target in test.imports(test.PACKAGE, known, name):
            if test.room(target) != test.room(name):
                below[test.room(name)].add(test.room(target))
    return list(test.ROOMS), below


def needed(rooms: list[str], below: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the imports that follow from others: what a room reaches through another one is not drawn."""
    reached: dict[str, set[str]] = {}
    for room in rooms:  # from the bottom: what lies below is known
        reached[room] = set(below[room]).union(*(reached[other] for other in below[room]))
    return {
        room: {low for low in below[room] if not any(low in reached[other] for other in below[room] - {low})}
        for room in rooms
    }


def files(room: str) -> int:
    folder = ROOT / "bitfit_hf" / room
    return len(list(folder.rglob("*.py"))) if folder.is_dir() else 1


def picture(rooms: list[str], below: dict[str, set[str]]) -> str:
    """The rooms as a column, the top one first, with a line from each to those it stands on."""
    direct = needed(rooms, below)
    height = ROW * len(rooms) + 60
    y = {room: 40 + ROW * (len(rooms) - 1 - index) for index, room in enumerate(rooms)}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>The rooms of bitfit_hf, and which imports from which</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="12" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="13" fill="#57606a">A room imports from rooms further down only. Drawn: '
        "imports that do not follow from others.</text>",
    ]
    lane = {room: LEFT + BOX + 28 + 26 * index for index, room in enumerate(rooms)}
    for room in rooms:
        for low in sorted(direct[room], key=rooms.index):
            start, end, x = y[room] + 13, y[low] + 13, lane[low]
            lines.append(
                f'<path d="M {LEFT + BOX} {start} H {x - 8} Q {x} {start} {x} {start + 8} V {end - 8} '
                f'Q {x} {end} {x - 8} {end} H {LEFT + BOX + 6}" fill="none" stroke="#8c959f" stroke-width="1.2"/>'
            )
    for room in rooms:
        count = files(room)
        shown = "bitfit_hf/__init__" if room == "__init__" else room + ("/" if count > 1 else "")
        lines += [
            f'<rect x="{LEFT}" y="{y[room]}" width="{BOX}" height="26" rx="5" fill="#ddf4ff" stroke="#0969da"/>',
            f'<text x="{LEFT + 10}" y="{y[room] + 17}" font-size="13" fill="#1f2328">{escape(shown)}</text>',
        ]
        if direct[room]:
            lines.append(f'<circle cx="{LEFT + BOX}" cy="{y[room] + 13}" r="2.5" fill="#0969da"/>')
        lines.append(
            f'<path d="M {LEFT + BOX + 7} {y[room] + 9} l -7 4 l 7 4 z" fill="#8c959f"/>'
            if any(room in lows for lows in direct.values())
            else ""
        )
    lines.append("</svg>")
    return "\n".join(line for line in lines if line) + "\n"


def draw(path: Path) -> None:
    """Writes the picture, if it is another one than the file holds."""
    text = picture(*edges())
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
