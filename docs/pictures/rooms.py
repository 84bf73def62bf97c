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
ROW, WIDTH, BOX = 54, 760, 130
SHIFT = (0, 80, 0, -80)


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


def levels(rooms: list[str], direct: dict[str, set[str]]) -> list[list[str]]:
    """The rooms by height: one lies above all that it stands on. In a row, each is near to what it stands on."""
    height: dict[str, int] = {}
    place: dict[str, float] = {}
    for room in rooms:
        height[room] = 1 + max((height[low] for low in direct[room]), default=-1)
    rows = [[room for room in rooms if height[room] == level] for level in range(max(height.values()) + 1)]
    for row in rows:
        row.sort(key=lambda room: sum(place[low] for low in direct[room]) / max(len(direct[room]), 1))
        for index, room in enumerate(row):
            place[room] = (index + 1) / (len(row) + 1)
    return rows


def picture(rooms: list[str], below: dict[str, set[str]]) -> str:
    """The rooms, the top one first, with a line from each to those it stands on."""
    direct = needed(rooms, below)
    rows = levels(rooms, direct)
    size = 50 + ROW * len(rows)
    place = {
        # Shifted row by row: else a long line would run behind the rooms between, as if it led to them.
        room: (WIDTH * (index + 1) / (len(row) + 1) + SHIFT[level % 4], size - 46 - ROW * level)
        for level, row in enumerate(rows)
        for index, room in enumerate(row)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {size}" role="img" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>The rooms of bitfit_hf, and which imports from which</title>",
        f'<rect width="{WIDTH}" height="{size}" rx="12" fill="#ffffff"/>',
        f'<text x="{WIDTH / 2:.0f}" y="20" font-size="12" text-anchor="middle" fill="#57606a">'
        "A line leads down to a room that is imported from. Imports that follow from others are left out.</text>",
    ]
    for room in rooms:
        (x, y) = place[room]
        for low in sorted(direct[room], key=rooms.index):
            (to_x, to_y) = place[low]
            middle = (y + 26 + to_y) / 2
            lines.append(
                f'<path d="M {x:.0f} {y + 26:.0f} C {x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} '
                f'{to_y:.0f}" fill="none" stroke="#8c959f" stroke-width="1.3"/>'
            )
    for room, (x, y) in place.items():
        shown = "bitfit_hf/__init__" if room == "__init__" else room + ("/" if files(room) > 1 else "")
        lines += [
            f'<rect x="{x - BOX / 2:.0f}" y="{y:.0f}" width="{BOX}" height="26" rx="5" fill="#ddf4ff" '
            'stroke="#0969da"/>',
            f'<text x="{x:.0f}" y="{y + 17:.0f}" font-size="13" text-anchor="middle" fill="#1f2328">'
            f"{escape(shown)}</text>",
        ]
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Writes the picture, if it is another one than the file holds."""
    text = picture(*edges())
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
