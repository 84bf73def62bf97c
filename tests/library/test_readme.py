"""The README's Python runs as it stands, but for whose the repos are, against the loopback Hub and a tiny base, and so
does every way of loading in the guide. Its figures are those of the recorded results."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import figures
from docs_scripts import python_of
from markdown_it import MarkdownIt
from peft import get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from bitfit_hf import BitFitConfig, push_to_hub

ROOT = Path(__file__).parents[2]


def code_of(name: str) -> list[str]:
    """The Python blocks of a page, with the Hub's names replaced by those of a user who exists here."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace('"bert-base-uncased"', '"alice/bert-base-uncased"').replace('"user/', '"alice/')
    return python_of(text)


TRAIN, USE = code_of("README.md")
(LOAD,) = (code for code in code_of("docs/guides/hub.md") if "AutoPeftModel" in code)
BASE = "alice/bert-base-uncased"


@pytest.fixture
def workplace(study_base: str, hub_env: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and the base on the Hub."""
    AutoModel.from_pretrained(study_base).push_to_hub(BASE)
    AutoTokenizer.from_pretrained(study_base).push_to_hub(BASE)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def rows() -> list[dict[str, Any]]:
    ids = torch.randint(1000, 2000, (8, 5), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids[i], "labels": i % 3} for i in range(8)]


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "README.md", "exec"), names)  # our own file
    return names


def test_training_every_way_of_loading_and_a_bank(workplace: Path) -> None:
    trained = run(TRAIN, rows=rows(), more=rows())
    model = trained["model"]
    assert {path.name for path in (workplace / "my-task").glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    ids = torch.stack([row["input_ids"] for row in rows()])
    expected = model.eval()(ids).logits

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    push_to_hub(model, "alice/mood", tokenizer=tokenizer)
    push_to_hub(model, "alice/bert-base-rte-bitfit")
    used = run(USE, **trained)
    texts = ["Not bad at all.", ("It rains.", "It is wet.")]
    assert [answer["label"] for answer in used["answers"]] == [
        model.config.id2label[int(model(**tokenizer(*text, return_tensors="pt")).logits.argmax())]
        for text in ((texts[0],), texts[1])
    ]
    assert torch.allclose(used["classify"].model.eval()(ids).logits, expected, atol=1e-6)


def test_every_way_of_loading_in_the_guide_gives_the_tuned_model(workplace: Path) -> None:
    tuned = get_peft_model(AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2), BitFitConfig())
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.stack([row["input_ids"] for row in rows()])
    expected = tuned.eval()(ids).logits
    push_to_hub(tuned, "alice/minilm-mood", tokenizer=AutoTokenizer.from_pretrained(BASE))

    names: dict[str, Any] = {"AutoModelForSequenceClassification": AutoModelForSequenceClassification, "base": BASE}
    ways = 0
    for statement in ast.parse(LOAD).body:
        code = ast.unparse(statement)
        if not isinstance(statement, ast.Expr):
            exec(code, names)  # our own file
            loaded = names["several"] if code.startswith("several") else names.get("plain")
            if not code.startswith("plain"):
                continue
        elif code.startswith("several."):
            eval(code, names)
            loaded = names["several"]
        elif code.startswith("pipeline"):
            loaded = eval(code.removesuffix("('not bad')"), names).model
        else:
            loaded = eval(code, names)
        ways += 1
        assert torch.allclose(loaded.eval()(ids).logits, expected, atol=1e-6), code
    assert ways == 6


def test_the_readme_has_the_figures_of_the_recorded_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(figures.BLOCKS) == {match[2] for match in figures.BLOCK.finditer(text)}
    assert figures.filled(text) == text, "run recipes/benchmarks/figures.py"


# About as GitHub shows it: 16 px, 830 px wide in a window of 1280, of which a screen is 1024 px high.
STYLE = """
article { width: 830px; font: 16px/1.5 "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif }
p, ul, table, pre { margin: 0 0 16px }
h1, h2 { margin: 24px 0 16px; padding-bottom: .3em; border-bottom: 1px solid; line-height: 1.25 }
h1 { margin-top: 0; font-size: 2em } h2 { font-size: 1.5em } img { max-width: 100% }
table { border-collapse: collapse; display: block; max-width: 100%; overflow: auto }
th, td { padding: 6px 13px; border: 1px solid }
code { padding: .2em .4em; font: 85% ui-monospace, monospace }
pre { padding: 16px; font-size: 85%; line-height: 1.45; overflow: auto } pre code { padding: 0; font-size: 100% }
sub { font-size: 75%; line-height: 0 }
"""


@pytest.mark.slow
def test_the_readme_fits_on_two_screens(browser: Any, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    body = MarkdownIt().enable("table").render(text)
    page = browser.new_page(viewport={"width": 1280, "height": 1024})
    (tmp_path / "readme.html").write_text(
        f"<!doctype html><base href='{ROOT.as_uri()}/'><style>{STYLE}</style><article>{body}</article>",
        encoding="utf-8",
    )
    page.goto((tmp_path / "readme.html").as_uri())
    assert page.evaluate("document.images[0].naturalWidth") > 0
    assert page.evaluate("document.querySelector('article').scrollHeight") <= 2 * 1024
    scrolled = page.evaluate(
        "[...document.querySelectorAll('pre, table')].filter(e => e.scrollWidth > e.clientWidth).length"
    )
    assert scrolled == 0, "a block of code or a table is wider than the page"
    page.close()


def test_every_figure_of_the_readme_names_its_file() -> None:
    """A paragraph or table with a measured figure links to what holds it, itself or in the line below."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).split("\n\n")
    measured = [index for index, part in enumerate(parts) if re.search(r"[01]\.\d\d|\d (points|MB|%)", part)]
    assert len(measured) >= 3
    for index in measured:
        assert re.search(r"/results/|#what-it-costs", parts[index] + parts[index + 1]), parts[index]
