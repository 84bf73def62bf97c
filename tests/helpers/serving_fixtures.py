"""Fixtures of the server's tests, made once for all of them: what they read is never changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serving_tester import Expected


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base and its tasks."""
    from serving_tester import save_world

    return save_world(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="session")
def expected(world: Path) -> Expected:
    """What the bank itself answers."""
    from serving_tester import Expected

    return Expected(world)
