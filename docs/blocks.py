"""Finds the code blocks of a page and runs the Python ones.

The blocks of a page share one namespace and run in the order they stand in, in an empty folder. Each page has a
process of its own, made from one that has already imported the library: the import takes longer than most pages.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

PYTHON = ("python", "py", "python3")
SHELL = ("bash", "sh", "shell", "console")
SKIPPED = ("_build", "_ext", "upstream", "outputs")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        page (`str`): The file, relative to the folder that was searched.
        line (`int`): Of its first line of code, from 1.
        language (`str`): What stands behind the fence.
        code (`str`): What stands inside.
    """

    page: str
    line: int
    language: str
    code: str


def page_files(folder: Path) -> list[Path]:
    """The pages under a folder, without notebooks: those are run by Sphinx."""
    found = sorted(path for path in folder.rglob("*.md") if not {*path.relative_to(folder).parts} & {*SKIPPED})
    return [path for path in found if "file_format: mystnb" not in path.read_text(encoding="utf-8")]


def blocks_of(path: Path, folder: Path) -> list[Block]:
    """The fenced blocks of a page that name a language, in order."""
    return fenced(path.read_text(encoding="utf-8"), path.relative_to(folder).as_posix())


def fenced(text: str, page: str) -> list[Block]:
    """The fenced blocks of a text in Markdown that name a language, in order."""
    return [
        Block(page, token.map[0] + 2, token.info.split()[0], token.content)
        for token in MarkdownIt("commonmark").parse(text)
        if token.type == "fence" and token.map and token.info.split()
    ]


def _run(job: tuple[list[Block], str]) -> tuple[str, float, str]:
    """Runs the blocks of one page. Returns its name, the seconds, and what went wrong."""
    blocks, folder = job
    page = blocks[0].page
    started = time.monotonic()
    shown = io.StringIO()
    names: dict[str, object] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory(prefix="bitfit-docs-page-") as place:
        os.chdir(place)
        try:
            with redirect_stdout(shown), redirect_stderr(shown):
                for block in blocks:
                    # The lines keep their numbers, so a traceback names the page's.
                    code = "\n" * (block.line - 1) + block.code
                    exec(compile(code, os.path.join(folder, page), "exec"), names)
        except BaseException:  # a block may also exit
            return page, time.monotonic() - started, f"{shown.getvalue()[-2000:]}\n{traceback.format_exc()}"
        finally:
            os.chdir("/")
    return page, time.monotonic() - started, ""


def run_pages(folder: Path, only: str = "") -> int:
    """Runs the Python blocks of all pages.

    Args:
        folder (`Path`): Where the pages are.
        only (`str`, *optional*): Only pages with this in their path.

    Returns:
        `int`: How many pages failed.
    """
    jobs = []
    for path in page_files(folder):
        blocks = [block for block in blocks_of(path, folder) if block.language in PYTHON]
        if blocks and only in blocks[0].page:
            jobs.append((blocks, str(folder)))
    started, failed = time.monotonic(), 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bitfit_hf", "transformers.trainer", "datasets", "rich"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for page, seconds, problem in pool.imap_unordered(_run, jobs):
            print(f"{page}: {'FAILED' if problem else 'ran'} in {seconds:.0f} s", flush=True)
            if problem:
                print(problem, file=sys.stderr, flush=True)
            failed += bool(problem)
    ran = sum(len(blocks) for blocks, _ in jobs)
    print(f"{ran} blocks of {len(jobs)} pages in {time.monotonic() - started:.0f} s, {failed} pages failed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if run_pages(Path(sys.argv[1]), *sys.argv[2:]) else 0)
