"""The pages of the documentation, what can be checked in seconds. `make docs` builds them and runs their code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from docs_scripts import DOCS, blocks, python_of

import bitfit_hf
from bitfit_hf.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if not {*path.relative_to(DOCS).parts} & {"_build", "upstream", "outputs"}
)
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
CELL = re.compile(r"^```\{code-cell\} *\w*\n((?::.*\n)*)(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def code_of(path: Path) -> list[str]:
    """The Python of a page: blocks of a page, cells of a notebook without their shell lines."""
    text = path.read_text(encoding="utf-8")
    cells = [re.sub(r"^!.*$", "", match[2], flags=re.MULTILINE) for match in CELL.finditer(text)]
    return cells + python_of(text)


def shell_lines(path: Path) -> list[str]:
    """The commands in the shell blocks of a page, and those in its code spans that call `bitfit`."""
    found = []
    for block in blocks.blocks_of(path, ROOT):
        if block.language in blocks.SHELL:
            lines = block.code.replace("\\\n", " ").splitlines()
            found += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    return found


def test_every_python_block_is_python_and_imports_what_there_is():
    imported = 0
    problems = []
    for path in PAGES:
        for code in code_of(path):
            for node in ast.walk(ast.parse(code, str(path))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "bitfit_hf":
                    module = importlib.import_module(node.module)
                    imported += len(node.names)
                    problems += [
                        f"{path.name}: {alias.name}" for alias in node.names if not hasattr(module, alias.name)
                    ]
    assert problems == []
    assert imported > 30


def test_every_page_is_reached_from_the_start():
    linked = {
        (page.parent / name).with_suffix(".md")
        for page in PAGES
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        for entry in tree.splitlines()
        if entry and not entry.startswith(":")
        for name in ([path.name for path in page.parent.glob(f"{entry}.md")] if "*" in entry else [entry])
    }
    assert {path for path in PAGES if path != DOCS / "index.md"} - linked == set()
    assert len(PAGES) > 20


def test_the_reference_has_every_public_name():
    documented = {
        name
        for page in (DOCS / "reference").glob("*.md")
        for name in re.findall(r"^\.\. auto\w+:: bitfit_hf\.(\w+)$", page.read_text(encoding="utf-8"), re.M)
    }
    errors = set(bitfit_hf.errors.__all__)
    assert documented - {"errors"} == set(bitfit_hf.__all__) - errors
    assert ".. all-errors::" in (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")


def test_the_file_format_names_every_field():
    text = (DOCS / "reference" / "file_format.md").read_text(encoding="utf-8")
    table = text[text.index("## `adapter_config.json`") : text.index("### `bias_layout`")]
    named = {name for row in re.findall(r"^\| (.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    fields = {field.name for field in dataclasses.fields(bitfit_hf.BitFitConfig) if field.init}
    assert named == fields | {"peft_type", "auto_mapping", "peft_version"}
    row = next(line for line in table.splitlines() if line.startswith("| `run`"))
    facts = {field.name for field in dataclasses.fields(bitfit_hf.training_run.TrainingRun)}
    assert set(re.findall(r"`(\w+)`", row)) == facts | {"run"}


# --- shell ---


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no reader for it
    section = text[text.index("[project.optional-dependencies]") : text.index("[tool.setuptools.dynamic]")]
    return set(re.findall(r"^([\w-]+) = \[", section, re.M))


def check_bitfit(words: list[str]) -> None:
    """Parses a command of ours as the command line would, without running it."""
    group = typer.main.get_command(app)
    with group.make_context("bitfit", [], resilient_parsing=True) as context:
        if words and not words[0].startswith("-"):
            command = group.get_command(context, words[0])
            assert command is not None, f"there is no command {words[0]}"
            if not {"-h", "--help"} & {*words}:
                command.make_context(words[0], words[1:], parent=context)


def check_recipe(path: str, options: list[str]) -> None:
    """The options are fields of the recipe's arguments, or stand in its source."""
    assert (ROOT / path).is_file(), path
    module = importlib.import_module(path.removeprefix("recipes/").removesuffix(".py").replace("/", "."))
    known = {
        field.name
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
        for field in dataclasses.fields(value)
    }
    source = (ROOT / path).read_text(encoding="utf-8")
    for option in options:
        if option.startswith("--"):
            name = option.removeprefix("--").partition("=")[0]
            assert name in known or f'"--{name}"' in source, f"{path} has no {option}"


def check_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program = words[0] if words else ""
    if program == "bitfit":
        check_bitfit(words[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert {word for word in words[1:] if "=" not in word} <= {*targets}, line
    elif program == "pip":
        named = [name for found in re.findall(r"\[([\w,]+)\]", line) for name in found.split(",")]
        assert {*named} <= extras(), line
    elif program in ("python", "accelerate"):
        recipe = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
        if recipe is not None and words[recipe].startswith("recipes/"):
            check_recipe(words[recipe], words[recipe + 1 :])
            launcher = [word for word in words[:recipe] if word.endswith(".yaml")]
            assert all((ROOT / name).is_file() for name in launcher), line
        elif recipe is not None:
            assert (ROOT / words[recipe]).is_file(), line
    else:
        assert program in {"curl", "git", "docker", "jupyter", "serve", "export", "cd", "ray", "kubectl"}, line


@pytest.mark.parametrize("path", [*TOP, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shell_blocks_parse_and_their_options_exist(path):
    for line in shell_lines(path):
        parsed = subprocess.run(["bash", "-n"], input=line, text=True, capture_output=True)
        assert parsed.returncode == 0, f"{line}\n{parsed.stderr}"
        check_command(line)


def test_there_are_shell_blocks():
    assert sum(len(shell_lines(path)) for path in [*TOP, *PAGES]) > 20


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bitfit inspekt my-task", "no command inspekt"),
        ("bitfit inspect my-task --jsn", "No such option: --jsn"),
        ("bitfit merge BASE", "Missing argument 'DELTA'"),
        ("make tests", "make tests"),
        ('pip install "bitfit-hf[servce]"', "servce"),
        ("accelerate launch recipes/glue.py --tsk rte", "glue.py has no --tsk"),
        ("python recipes/gleu.py", "gleu.py"),
        ("accelerate launch --config_file recipes/accelerate/fsdp9.yaml recipes/glue.py", "fsdp9"),
        ("some-program --that nobody knows", "some-program"),
    ],
)
def test_a_wrong_command_is_found(line, told):
    with pytest.raises(Exception) as caught:
        check_command(line)
    assert told in getattr(caught.value, "format_message", caught.value.__str__)()


# --- what runs the code ---


def test_blocks_of_a_page_share_names_and_a_failing_one_is_told_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nx = 1\n```\n\nText.\n\n:::{note}\n\n```python\ny = x + 1\nz = y / 0\n```\n:::\n"
    )
    first, second = blocks.blocks_of(page, tmp_path)
    assert (first.line, second.line) == (4, 12)
    ran, _, problem = blocks._run(([first], str(tmp_path)))
    assert (ran, problem) == ("page.md", "")
    _, _, problem = blocks._run(([first, second], str(tmp_path)))
    assert "ZeroDivisionError" in problem
    assert 'page.md", line 13' in problem


@pytest.mark.slow
def test_a_broken_link_and_a_renamed_function_fail_the_build(tmp_path):
    pytest.importorskip("furo")
    for name in ("bitfit_hf", "recipes", "tests", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    ignored = shutil.ignore_patterns("_build", "outputs", "upstream", "rooms.svg")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=ignored)
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-D", "nb_execution_mode=off"]
    build += ["-D", "suppress_warnings=myst-nb.lexer", str(tmp_path / "docs"), str(tmp_path / "html")]
    for page, old, new in [
        ("guides/hub.md", "(from_the_reference_code.md)", "(from_the_old_code.md)"),
        ("questions.md", "guides/hub.md#without-bitfit_hf", "guides/hub.md#nowhere"),
        ("reference/deltas.md", "bitfit_hf.load_delta", "bitfit_hf.read_delta"),
        ("how_it_works.md", "pictures/layer.svg", "pictures/layers.svg"),
        ("how_it_works.md", "{py:obj}`~bitfit_hf.TaskBank`", "{py:obj}`~bitfit_hf.TaskBanks`"),
    ]:
        path = tmp_path / "docs" / page
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-4000:]
    for expected in ("from_the_old_code.md", "nowhere", "read_delta", "layers.svg", "TaskBanks"):
        assert re.search(rf"WARNING: .*{expected}", done.stderr), (expected, done.stderr[-4000:])
