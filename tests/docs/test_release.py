"""What a release consists of: workflows, metadata and citation agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import bitfit_hf

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def steps(path: Path) -> list[dict]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def test_there_are_three_workflows():
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "tests"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_there_is(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    called = [found for step in steps(path) for found in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))]
    assert called
    assert set(called) <= targets
    files = [found for step in steps(path) for found in re.findall(r"-c (\S+\.txt)", step.get("run", ""))]
    assert all((ROOT / name).is_file() for name in files)
    pinned = [step["uses"] for step in steps(path) if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", name) for name in pinned)


def test_the_matrix_is_what_the_package_says():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    tested = jobs["newest"]["strategy"]["matrix"]["python-version"]
    assert tested == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert f'requires-python = ">={tested[0]}"' in PYPROJECT


def test_the_lowest_versions_are_the_lower_bounds():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(line.split("==") for line in lines if "==" in line)
    section = PYPROJECT[PYPROJECT.index("dependencies = [") : PYPROJECT.index("[project.scripts]")]
    bounds = {
        requirement.name.replace("_", "-"): str(requirement.specifier).removeprefix(">=")
        for requirement in map(Requirement, re.findall(r'^    "(.+)",$', section, re.M))
    }
    assert len(lowest) == 6
    for name, version in lowest.items():
        assert version == bounds[name] or version.startswith(f"{bounds[name]}."), name


def test_changelog_and_citation_speak_of_the_version_to_come():
    version = bitfit_hf.__version__.removesuffix(".dev0")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (version, "Apache-2.0")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *releases = re.findall(r"^## \[(.+?)\]", changelog, re.M)
    assert first == "Unreleased"
    if bitfit_hf.__version__ == version:
        assert releases[0] == version
        assert re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M)
    kinds = re.findall(r"^### (.+)$", changelog, re.M)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
