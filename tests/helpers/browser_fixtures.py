"""A real browser: a Chromium that is there (`chromium`, `google-chrome`, … on the path, or what `playwright install
chromium` brings). Where none is found, tests of pages are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), own if os.path.exists(own) else None)
        if path is None:
            pytest.skip(f"no {' or '.join(NAMES)} here, which no package brings: `playwright install chromium`")
        # No sandbox: in a container, where tests often run as root, Chromium does not start with it.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
