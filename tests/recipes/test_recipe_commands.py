"""Every command in the header of a study recipe and every YAML file, executed on a tiny model and made-up data."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml
from common.record import RunRecord
from launching import run_python
from recipe_fixtures import ROWS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
# How many commands the header of each recipe has: a command that is added is executed here, or this fails.
COUNTS = {"causal_lm": 4, "glue": 5, "private": 5, "squad": 4, "token_classification": 6}
TINY = "--train_size 9 --eval_size 5 --max_steps 2 --batch_size 4 --eval_batch_size 4 --epochs 1"


@dataclass(frozen=True)
class Command:
    """`accelerate launch [launcher options] recipes/<recipe>.py [options]`"""

    recipe: str
    launcher: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def processes(self) -> int:
        return 2 if any("2_processes" in word for word in self.launcher) else 1


def study_recipes() -> list[str]:
    """The recipes that train: those that share `common.training`."""
    return sorted(path.stem for path in RECIPES.glob("*.py") if "from common.training import" in path.read_text())


def commands(recipe: str) -> list[Command]:
    header = importlib.import_module(recipe).__doc__.replace("\\\n", " ")
    found = []
    for line in re.findall(r"^    ((?:accelerate|python) .*)$", header, flags=re.MULTILINE):
        words = shlex.split(line)
        script = words.index(f"recipes/{recipe}.py")
        assert words[:2] == ["accelerate", "launch"], line
        found.append(Command(recipe, tuple(words[2:script]), tuple(words[script + 1 :])))
    return found


COMMANDS = [command for recipe in study_recipes() for command in commands(recipe)]


def ids(command: Command) -> str:
    return " ".join([command.recipe, *command.options[:4]])


@pytest.fixture
def smaller(study_base, study_decoder, study_data):
    """Options that make a command small and local, to be appended: the last one wins."""

    def options(command: Command, output: Path) -> list[str]:
        more = {
            "glue": f"--model_name_or_path {study_base} --data_dir {study_data}",
            "token_classification": f"--model_name_or_path {study_base} --data_dir {study_data}",
            "private": f"--model_name_or_path {study_base} --data_dir {study_data} --accumulation 2 --accountant rdp",
            "squad": f"--model_name_or_path {study_base} --data_dir {study_data} --max_length 48 --doc_stride 12 "
            "--max_question_length 12 --min_steps 0",
            "causal_lm": f"--model_name_or_path {study_decoder} --data_dir {study_data / 'texts'} --max_length 16",
        }[command.recipe]
        if command.recipe == "token_classification":
            files = {"train_file": study_data / "train.conllu", "validation_file": study_data / "dev.conllu"}
        else:
            texts = study_data / "texts"
            files = {"train_file": texts / "train.jsonl.gz", "eval_file": texts / "validation.jsonl.gz"}
        replaced = [f"--{name}={path}" for name, path in files.items() if f"--{name}" in command.options]
        return [*TINY.split(), *more.split(), *replaced, "--output_dir", str(output)]

    return options


def check(record: RunRecord, command: Command) -> None:
    assert record.recipe == command.recipe
    assert record.hardware["processes"] == command.processes
    assert record.history[-1]["step"] == 2
    assert 0 < record.data["rows"]["train"] <= ROWS["train"]
    assert record.bytes > 0


def test_every_recipe_and_command_is_known():
    assert {recipe: len(commands(recipe)) for recipe in study_recipes()} == COUNTS
    assert len(COMMANDS) == sum(COUNTS.values())
    assert {command.processes for command in COMMANDS} == {1, 2}


def test_every_launcher_config_is_there():
    named = [word for command in COMMANDS for word in command.launcher if word.endswith(".yaml")]
    assert len(named) == len(COUNTS)
    assert all((ROOT / name).is_file() for name in named)


def test_every_yaml_file_is_in_a_command_and_holds_only_differences():
    used: dict[str, str] = {}
    for command in COMMANDS:
        if "--config" in command.options:
            used[command.options[command.options.index("--config") + 1]] = command.recipe
    assert set(used) == {str(path.relative_to(ROOT)) for path in (RECIPES / "configs").glob("*.yaml")}
    for name, recipe in used.items():
        module = importlib.import_module(recipe)
        kind = next(
            value
            for key, value in vars(module).items()
            if key.endswith("Arguments") and getattr(value, "__module__", None) == recipe
        )
        defaults = {item.name: item.default for item in fields(kind)}
        entries = yaml.safe_load((ROOT / name).read_text())
        assert entries
        for key, value in entries.items():
            assert str(value) != str(defaults[key]), f"{name}: {key} has its default"


FIRST_AND_LAST = [command for recipe in study_recipes() for command in (commands(recipe)[0], commands(recipe)[-1])]
# What the launcher itself makes of a command does not depend on the recipe's options: one for each recipe that it runs
# in two processes, and one in a single process.
LAUNCHED = [COMMANDS[0], *(command for command in COMMANDS if command.processes > 1)]


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=() if command in FIRST_AND_LAST else pytest.mark.slow) for command in COMMANDS],
    ids=ids,
)
def test_a_command_in_this_process(command, smaller, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(command.recipe)
    record = module.main([*command.options, *smaller(command, tmp_path)])
    check(record, Command(command.recipe, (), ()))
    assert RunRecord.read(tmp_path / "run.json") == record


@pytest.mark.slow
@pytest.mark.parametrize("command", LAUNCHED, ids=ids)
def test_a_command_through_the_launcher(command, smaller, tmp_path):
    launch = ["-m", "accelerate.commands.launch", *command.launcher]
    options = [*command.options, *smaller(command, tmp_path)]
    done = run_python(*launch, f"recipes/{command.recipe}.py", *options, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    check(RunRecord.read(tmp_path / "run.json"), command)
