"""Docstrings in the Hugging Face format, made into reStructuredText for autodoc.

That format is Google's sections with Markdown inside: `code`, [`Name`] for a reference, [text](url), fenced examples.
Sections become lists, as in Hugging Face's own documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import bitfit_hf

PUBLIC = frozenset(bitfit_hf.__all__)

_LISTS = {"Args": "Parameters", "Attributes": "Attributes", "Raises": "Raises"}
_TEXTS = ("Returns", "Yields", "Example", "Examples")
_SECTION = re.compile(rf"^({'|'.join([*_LISTS, *_TEXTS])}):\s*$")
_FENCE = re.compile(r"^\s*```(\w*)\s*$")
_ITEM = re.compile(r"^([-*]|\d+\.) ")
_INLINE = re.compile(
    r"\[`(?P<short>[~!]?)(?P<reference>[\w.]+)`\]"
    r"|\[(?P<text>[^\]`]+)\]\((?P<url>https?://[^)]+)\)"
    r"|`(?P<code>[^`]+)`"
)


def reference(name: str, short: bool) -> str:
    """A link where the name is public, plain code where it is another library's or internal."""
    name = name.removeprefix("bitfit_hf.")
    shown = name.rpartition(".")[2] if short else name
    if name.partition(".")[0] in PUBLIC:
        return f":py:obj:`{shown} <bitfit_hf.{name}>`"
    return f"``{shown}``"


def inline(text: str) -> str:
    """The markup inside a paragraph."""

    def converted(match: re.Match[str]) -> str:
        if match["reference"]:
            result = reference(match["reference"], match["short"] == "~")
        elif match["url"]:
            result = f"`{match['text']} <{match['url']}>`__"
        else:
            result = f"``{match['code']}``"
        after = text[match.end() : match.end() + 1]
        return result + "\\ " * after.isalnum()  # reST wants something between markup and a letter

    return _INLINE.sub(converted, text)


def paragraphs(lines: list[str]) -> Iterator[str]:
    """Lines of reST for text: each paragraph and each item on one line, with its indentation; examples as they are."""
    waiting: list[str] = []
    indent = ""
    code: str | None = None  # the indentation of the example that is open

    def flush() -> Iterator[str]:
        if waiting:
            yield indent + inline(" ".join(waiting))
            waiting.clear()

    for line in lines:
        words = line.strip()
        before = line[: len(line) - len(line.lstrip())]
        if match := _FENCE.match(line):
            if code is None:
                yield from flush()
                code = before
                yield from ("", f"{before}.. code-block:: {match[1] or 'text'}", "")
            else:
                code = None
                yield ""
        elif code is not None:
            yield f"    {line}" if words else ""
        elif not words:
            yield from flush()
            yield ""
        elif _ITEM.match(words):
            inside = bool(waiting) and bool(_ITEM.match(waiting[0]))
            yield from flush()
            if not inside:
                yield ""
            indent = before
            waiting.append(words)
        else:
            indent = indent if waiting else before
            waiting.append(words)
    yield from flush()


def split(text: str) -> tuple[str, str]:
    """What an entry of a section is about, and what it says: at the first colon outside code and brackets."""
    depth, code = 0, False
    for place, letter in enumerate(text):
        if letter == "`":
            code = not code
        elif not code:
            depth += (letter in "([") - (letter in ")]")
            if letter == ":" and not depth:
                return text[:place], text[place + 1 :].strip()
    return text, ""


def entries(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The entries of a section: head and text. The head of an entry may go on in the next line."""
    head: str | None = None
    body: list[str] = []
    complete = False
    for line in lines:
        if line and not line[0].isspace() and (head is None or complete):
            if head is not None:
                yield head, body
            head, rest = split(line)
            complete = head != line
            body = [rest] if rest else []
        elif head is not None and not complete:
            joined = f"{head} {line.strip()}"
            head, rest = split(joined)
            complete = head != joined
            body = [rest] if rest else []
        else:
            body.append(line.strip() if _plain(line) else line)
    if head is not None:
        yield head, body


def _plain(line: str) -> bool:
    return not line.strip().startswith((">>>", "```"))


def section(name: str, lines: list[str]) -> Iterator[str]:
    """One section, with a line of its own in front."""
    if name not in _LISTS:
        yield from ("", f"**{name}**", "")
        yield from paragraphs(lines)
        yield ""
        return
    yield from ("", f"**{_LISTS[name]}**", "")
    for head, body in entries(lines):
        if name != "Raises":  # several names may share one explanation
            head = re.sub(
                r"(^|, )([\w.*]+)(?= \()", lambda match: f"{match[1]}**{match[2].replace('*', chr(92) + '*')}**", head
            )
        text = list(paragraphs(body))
        yield f"- {inline(head)} – {text[0].strip()}" if text and text[0].strip() else f"- {inline(head)}"
        yield from (f"  {line}" if line else "" for line in text[1:])
    yield ""


def to_rst(lines: list[str]) -> list[str]:
    """A whole docstring."""
    result: list[str] = []
    part: list[str] = []
    name = ""

    def flush() -> None:
        indents = [len(line) - len(line.lstrip()) for line in part if line.strip()]
        dedented = [line[min(indents, default=0) :] for line in part]
        result.extend(section(name, dedented) if name else paragraphs(dedented))
        part.clear()

    for line in lines:
        found = _SECTION.match(line)
        if found or (name and line and not line[0].isspace() and name not in ("Example", "Examples")):
            flush()
            name = found[1] if found else ""
            if found:
                continue
        part.append(line)
    flush()
    return result


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
