"""Where tasks may come from while the server runs: every way round the operator's list ends in the same answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitfit_hf.errors import ServingError
from bitfit_hf.serving.problems import Problem
from bitfit_hf.serving.sources import AllowedSources


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`allowed/` with the task `good`, and beside it `secret/` with one that nobody may add."""
    for folder in ("allowed/good", "allowed/deep/er", "secret/task"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folders_below_an_allowed_one(place: Path):
    allowed = AllowedSources([str(place / "allowed")])
    for source, found in (("good", "good"), (str(place / "allowed" / "good"), "good"), ("deep/er", "deep/er")):
        assert allowed.check(source).place == str((place / "allowed" / found).resolve())


@pytest.mark.parametrize("pattern", ["user/*", "user/bert-?", "exact/repo"])
def test_patterns_of_repos(place: Path, pattern: str):
    allowed = AllowedSources([pattern])
    good = {"user/*": "user/any", "user/bert-?": "user/bert-1", "exact/repo": "exact/repo"}[pattern]
    assert allowed.check(good, "v1.0").place == good
    for source in ("other/any", "user/any/more", "user", "xuser/any", "exact/repo2", "exact-repo"):
        with pytest.raises(Problem, match="not among those"):
            allowed.check(source)


@pytest.mark.parametrize(
    "source",
    [
        "../secret/task",
        "good/../../secret/task",
        "..",
        ".",
        "",
        "~/task",
        "no-such-folder",
        "https://example.org/task",
        "file:///etc",
        "good\\..\\..\\secret",
        "good\x00",
        "good\n",
        "x" * 5000,
        "user/..",
        "/etc",
        "hf://user/task",
    ],
)
def test_what_leads_elsewhere_is_refused(place: Path, source: str):
    with pytest.raises(Problem) as caught:
        AllowedSources([str(place / "allowed"), "user/*"]).check(source)
    assert caught.value.status == 403
    assert str(place) not in str(caught.value)


def test_the_whole_path_of_a_place_beside_is_refused(place: Path):
    with pytest.raises(Problem):
        AllowedSources([str(place / "allowed")]).check(str(place / "secret" / "task"))


@pytest.mark.parametrize("kind", ["folder", "file", "circle"])
def test_links_that_lead_out_are_refused(place: Path, kind: str):
    if kind == "folder":
        os.symlink(place / "secret" / "task", place / "allowed" / "link")
    elif kind == "circle":
        os.symlink(place / "allowed" / "link", place / "allowed" / "link")
    else:
        (place / "allowed" / "link").mkdir()
        os.symlink(
            place / "secret" / "task" / "adapter_config.json", place / "allowed" / "link" / "adapter_config.json"
        )
    with pytest.raises(Problem):
        AllowedSources([str(place / "allowed")]).check("link")


def test_a_link_that_stays_inside_is_followed(place: Path):
    os.symlink(place / "allowed" / "good", place / "allowed" / "same")
    allowed = AllowedSources([str(place / "allowed")])
    assert allowed.check("same").place == str((place / "allowed" / "good").resolve())


def test_revisions(place: Path):
    allowed = AllowedSources([str(place / "allowed"), "user/*"])
    for revision in ("../main", "a..b", "-x", "a b", "", "x" * 200):
        with pytest.raises(Problem):
            allowed.check("user/task", revision)
    with pytest.raises(Problem):
        allowed.check("good", "main")  # a folder has none


def test_a_folder_of_a_repo_s_name_is_not_read_in_its_place(place: Path):
    (place / "user" / "task").mkdir(parents=True)
    with pytest.raises(Problem):
        AllowedSources(["user/*"]).check("user/task")


def test_nothing_is_allowed_by_default(place: Path):
    for source in ("good", "user/task", str(place / "allowed" / "good")):
        with pytest.raises(Problem):
            AllowedSources([]).check(source)


@pytest.mark.parametrize("entry", ["./nowhere", "user/{x}", "a/b/c", "http://x"])
def test_what_is_no_source_is_told_to_the_operator(place: Path, entry: str):
    with pytest.raises(ServingError):
        AllowedSources([entry])
