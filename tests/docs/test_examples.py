"""The examples in docstrings: those that need no file run here, the others when the documentation is built."""

from __future__ import annotations

import re

import pytest
from docs_scripts import DOCS, examples

FOUND = {example.name: example for example in examples.examples()}


@pytest.fixture(scope="module")
def names():
    return examples.library()


def test_all_are_found_and_what_is_not_run_has_a_reason():
    assert len(FOUND) >= 23
    assert {*examples.NOT_RUN, *examples.UNTRAINED, *examples.NEEDS_NOTHING} <= {*FOUND}
    named = [re.search(r"tests/\S+\.py", why)[0] for why in examples.NOT_RUN.values()]
    assert all((DOCS.parent / name).is_file() for name in named)


@pytest.mark.parametrize("name", examples.NEEDS_NOTHING)
def test_an_example_shows_what_it_says(name, names):
    assert examples.run(FOUND[name], dict(names)) == ""


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (">>> resolve_terms('query')\n('key',)\n", "('query',)"),
        (">>> resolve_term('query')\n", "NameError"),
        ("resolve_terms('qery')\n", "qery"),
    ],
    ids=["another result", "another name", "an error"],
)
def test_a_wrong_example_is_found(code, told, names):
    assert told in examples.run(examples.Example("wrong", "wrong.py", 1, code), dict(names))
