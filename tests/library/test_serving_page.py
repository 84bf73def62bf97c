"""The pages in a real browser: what a person sees who lists the tasks and tries one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from serving_tester import KINDS, Expected, make_engine, served, text_for

pytestmark = pytest.mark.slow

MARKUP = "<img src=x onerror=document.title='hacked'>"


class Visitor:
    """A page, and what must not happen on it."""

    def __init__(self, browser: Any, address: str, path: str = "/") -> None:
        self.page = browser.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else 0)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda one: None if one.url.startswith(address) else self.elsewhere.append(one.url))
        self.page.goto(address + path)

    def ask(self, task: str, text: Any) -> None:
        first, second = (text, "") if isinstance(text, str) else text
        self.page.select_option("#task", task)
        self.page.fill("#text", first)
        self.page.fill("#second", second)
        self.page.click("#go")
        self.page.wait_for_selector("#go:not([disabled])")

    def rows(self) -> list[list[str]]:
        found = self.page.query_selector_all("#answer tr")
        return [[cell.inner_text() for cell in row.query_selector_all("td, th")] for row in found]

    def problem(self) -> str:
        return self.page.inner_text("#problem")

    def leave(self) -> None:
        assert [url for url in self.elsewhere if not url.startswith("data:")] == []
        self.page.close()


def shown(answer: Any) -> list[list[str]]:
    """An answer as the table shows it."""
    rows = answer if isinstance(answer, list) else [answer]
    cells = [[f"{v:.4f}" if isinstance(v, float) and v != int(v) else str(v) for v in row.values()] for row in rows]
    return [list(rows[0]), *cells]


def test_a_person_tries_the_tasks(browser: Any, world: Path, expected: Expected, tmp_path: Path):
    engine = make_engine(world)
    shutil.copytree(world / "tasks" / "sentiment", tmp_path / "marked")
    config = tmp_path / "marked" / "adapter_config.json"
    text = config.read_text()
    assert text.count("sequence-3:0") > 0
    config.write_text(text.replace("sequence-3:0", MARKUP))
    engine.tasks.add("marked", str(tmp_path / "marked"))
    with served(engine) as address:
        visitor = Visitor(browser, address)
        visitor.page.wait_for_selector("#task option:nth-child(8)", state="attached")
        assert visitor.page.inner_text("#about") == f"{len(KINDS) + 1} tasks on base"
        options = [option.inner_text() for option in visitor.page.query_selector_all("#task option")]
        assert options[0] == "sentiment (text-classification)"
        assert visitor.page.is_hidden("#locked")
        for name in ("sentiment", "rating", "tags", "spans"):
            visitor.ask(name, text_for(name, 3))
            assert visitor.problem() == ""
            assert visitor.rows() == shown(expected(name, text_for(name, 3))), name
        visitor.ask("marked", "a b")
        assert MARKUP in {row[1] for row in visitor.rows()}
        assert visitor.page.title() == "bitfit serve"
        assert visitor.complaints == []
        visitor.ask("sentiment", "")
        assert "cannot be empty" in visitor.problem()
        assert visitor.rows() == []
        visitor.ask("spans", "a")
        assert "question" in visitor.problem().lower()
        assert all("status of 422" in line for line in visitor.complaints)
        visitor.leave()


def test_a_key_is_asked_for_and_stays_in_the_page(browser: Any, world: Path, expected: Expected):
    with served(make_engine(world, ["sentiment"], api_key="the-key")) as address:
        visitor = Visitor(browser, address)
        visitor.page.wait_for_selector("#key", state="visible")
        assert "API key" in visitor.problem()
        visitor.page.fill("#key", "the-key")
        visitor.page.click("#go")
        visitor.page.wait_for_selector("#task option", state="attached")
        visitor.ask("sentiment", "a b")
        assert visitor.rows() == shown(expected("sentiment", "a b"))
        assert visitor.page.evaluate("JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])") == (
            '["",{},{}]'
        )
        visitor.leave()


def test_the_description_of_the_interface(browser: Any, world: Path):
    with served(make_engine(world, ["sentiment"])) as address:
        visitor = Visitor(browser, address, "/docs")
        visitor.page.wait_for_selector("h2:has-text('/tasks/{name}')")
        text = visitor.page.inner_text("body")
        assert all(path in text for path in ("/predict", "/embed", "/info", "/health", "/metrics"))
        assert visitor.complaints == []
        visitor.leave()
