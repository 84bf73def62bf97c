"""Builds the documentation and runs what is in it: `make docs`.

    python docs/build.py                 # all code is run, the pages are in docs/_build/html
    python docs/build.py --no-run        # only the pages, in seconds: for writing
    python docs/build.py --only guides   # the pages, and the code blocks of those whose path has this in it

It needs no network. A Hub of its own on this machine (the tests' double) holds the base model under its real name, so
the code on the pages is what a reader copies. Any other address is out of reach, and a warning of Sphinx is an error:
a link that leads nowhere, a function that is not there any more, a cell or a block that fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BUILT = DOCS / "_build"
BASE = "sentence-transformers/all-MiniLM-L6-v2"
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "recipes")]


def base_files() -> dict[str, bytes]:
    """The base model's files, from the package that carries them."""
    from quickstart import demo_model

    folder = Path(demo_model())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".gitattributes"  # which the Hub makes itself
    }


@contextmanager
def scene() -> Iterator[dict[str, str]]:
    """The environment in which code of the documentation runs: a Hub with the base, and a user who is logged in."""
    from hub_server import LoopbackHub

    with tempfile.TemporaryDirectory(prefix="bitfit-docs-") as home, LoopbackHub() as hub:
        user = hub.create_user("user")
        hub.put(BASE, base_files())
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "BITFIT_"))
        }
        yield {
            **environment,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # for `bitfit`
            "HF_HOME": home,
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": user.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HTTP_PROXY": "http://127.0.0.1:9",  # nobody listens there: no other address can be reached
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "ALL_PROXY": "",
            "all_proxy": "",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_MODE": "disabled",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }


def pages(environment: dict[str, str], run: bool) -> int:
    """Has Sphinx write the pages; the tutorials are run with it."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", "2"]
    command += [] if run else ["-D", "nb_execution_mode=off", "-D", "suppress_warnings=myst-nb.lexer"]
    # Notebooks are not always found to be out of date: what they import changes, not they.
    shutil.rmtree(BUILT / "doctrees", ignore_errors=True)
    command += ["-d", str(BUILT / "doctrees"), str(DOCS), str(BUILT / "html")]
    try:
        return subprocess.run(command, env=environment).returncode
    finally:
        shutil.rmtree(DOCS / "tutorials" / "outputs", ignore_errors=True)  # what the tutorials have saved


def code(environment: dict[str, str], only: str) -> int:
    """Runs the blocks of the pages and then the examples of the docstrings."""
    failed = subprocess.run([sys.executable, str(DOCS / "blocks.py"), str(DOCS), only], env=environment).returncode
    if not only:
        failed |= subprocess.run([sys.executable, str(DOCS / "examples.py")], env=environment).returncode
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-run", action="store_true", help="run no code of the documentation")
    parser.add_argument("--only", default="", metavar="TEXT", help="run the blocks of pages with this in their path")
    args = parser.parse_args(argv)

    with scene() as environment:
        started = time.monotonic()
        # Beside Sphinx, which runs the tutorials.
        with ThreadPoolExecutor(1) as pool:
            running = None if args.no_run else pool.submit(code, environment, args.only)
            failed = pages(environment, run=running is not None and not args.only)
            print(f"Pages: {'failed' if failed else 'written'} in {time.monotonic() - started:.0f} s", flush=True)
            failed |= 0 if running is None else running.result()
    if not failed:
        print(f"Open {(BUILT / 'html' / 'index.html').relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
