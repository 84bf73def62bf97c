"""Runs `bitfit` in the test's own process, with its real output streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import typer


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    def assert_mistake(self, *fragments: str, code: int = 1) -> None:
        """One line on stderr that says all of `fragments`, nothing on stdout, and the exit code."""
        assert self.code == code
        assert self.out == ""
        assert self.err.endswith("\n")
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("bitfit: error: ")
        for fragment in fragments:
            assert fragment in lines[0]


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `bitfit` with these arguments."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    from bitfit_hf.cli import app

    command = typer.main.get_command(app)

    def run(*args: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            command.main([str(arg) for arg in args], prog_name="bitfit")
        return Result(exit_.value.code or 0, *capfd.readouterr())

    return run
