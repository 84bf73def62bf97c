"""Typed arguments from the command line and from YAML files, and those that every study recipe has."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser


@dataclass
class StudyArguments:
    """Options of every study recipe; what they mean is the same everywhere."""

    model_name_or_path: str = field(default="bert-base-cased", metadata={"help": "A model on the Hub, or a folder."})
    method: str = field(
        default="bitfit", metadata={"help": "How to adapt the model: bitfit, bitfit:query+intermediate, full, ..."}
    )
    method_options: list[str] = field(
        default_factory=list, metadata={"help": "Options of the method, as name=value; in YAML a mapping."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of local data. Default: the Hub."})
    output_dir: str = field(default="outputs/study", metadata={"help": "Gets run.json and what the method saves."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest value of the schedule."})
    batch_size: int = field(default=16, metadata={"help": "Examples in a step, over all processes."})
    eval_batch_size: int = field(default=64, metadata={"help": "Examples in an evaluation step, per process."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows."})
    max_steps: int | None = field(default=None, metadata={"help": "Steps; wins over `epochs`."})
    train_size: int | None = field(default=None, metadata={"help": "Train on so many rows, drawn with `seed`."})
    eval_size: int | None = field(
        default=None, metadata={"help": "Evaluate on so many rows, the same for every seed."}
    )
    train_metrics: int = field(
        default=0, metadata={"help": "Evaluate on so many training rows too: the generalization gap."}
    )
    eval_every: int = field(default=1, metadata={"help": "Epochs from one evaluation to the next."})
    max_length: int = field(default=128, metadata={"help": "In tokens; longer inputs are cut."})
    lr_scheduler: Literal["linear", "constant", "constant_with_warmup", "cosine"] = field(
        default="linear", metadata={"help": "Course of the learning rate."}
    )
    warmup: float = field(default=0.06, metadata={"help": "Steps of warm-up; below 1 a share of all steps."})
    weight_decay: float = field(default=0.0, metadata={"help": "Never applied to a BitFit delta."})
    group_by_length: bool = field(default=True, metadata={"help": "Batches of inputs of like length."})
    precision: Literal["fp32", "bf16", "fp16", "auto"] = field(
        default="fp32", metadata={"help": "Autocast of the model; auto is bf16 where the hardware computes in it."}
    )
    dev_halves: bool = field(
        default=False, metadata={"help": "Choose the epoch on one half of the dev set and report the other."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone that is there."})
    seed: int = field(default=0, metadata={"help": "Of the head, the subset, the order and dropout."})

    def options_of_method(self) -> dict[str, Any]:
        """`method_options` as keyword arguments; values are read as JSON where they are, so `0.005` is a number.

        Raises:
            `ValueError`: An entry is not of the form `name=value`.
        """
        options: dict[str, Any] = {}
        for entry in self.method_options:
            name, equals, value = entry.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"--method_options {entry}: not of the form name=value, for example r=16.")
            try:
                options[name] = json.loads(value)
            except json.JSONDecodeError:
                options[name] = value
        return options


class _Parser(HfArgumentParser):
    """Says where a wrong value stands, in one line: the list of all options is long."""

    where = ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {self.where}{message} (--help lists the options)\n")


def parse(dataclasses: Any, argv: list[str] | None = None, description: str | None = None) -> Any:
    """
    Reads dataclasses from the command line and, with `--config FILE`, from a YAML file.

    The file gives defaults and the command line wins. What it may hold and how values are read is the same in both:
    a value is converted and checked as if it had been typed.

    Args:
        dataclasses (`type` or `tuple[type, ...]`): One dataclass or several.
        argv (`list[str]`, *optional*): Arguments; those of the process by default.
        description (`str`, *optional*): Shown by `--help`.

    Returns:
        An instance of the dataclass, or a tuple of instances for several.

    Raises:
        `SystemExit`: An unknown key or option, a value of the wrong type, or a file that cannot be read. The message
            says which and where.
    """
    kinds = dataclasses if isinstance(dataclasses, tuple) else (dataclasses,)
    parser = _Parser(kinds, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with other defaults for these options.")
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    defaults: list[str] = []
    if known.config is not None:
        parser.where = f"{known.config}: "
        defaults = _read(parser, Path(known.config), {item.name: item for kind in kinds for item in fields(kind)})
        parser.parse_args(defaults)
        parser.where = ""
    *parsed, unknown = parser.parse_args_into_dataclasses(
        [*defaults, *rest], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed[: len(kinds)]) if isinstance(dataclasses, tuple) else parsed[0]


def _read(parser: _Parser, path: Path, known: dict[str, Field[Any]]) -> list[str]:
    """The entries of a YAML file, as they would be typed."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"cannot be read ({error.strerror})")
    except yaml.YAMLError as error:
        parser.error(f"not a YAML file: {error}")
    if entries is None:
        return []
    if not isinstance(entries, dict):
        parser.error(f"must hold a mapping of option names to values, holds a {type(entries).__name__}")
    unknown = [str(name) for name in entries if name not in known]
    if unknown:
        parser.error(f"unknown option {', '.join(unknown)}; there are {', '.join(known)}")
    typed: list[str] = []
    for name, value in entries.items():
        if value is None:
            if known[name].default is not None:
                parser.error(f"{name} must have a value")
        elif isinstance(value, dict) and name == "method_options":
            typed += [f"--{name}", *(f"{key}={json.dumps(item)}" for key, item in value.items())]
        elif isinstance(value, dict):
            parser.error(f"{name} must be a value, is a mapping")
        elif isinstance(value, list):
            typed += [f"--{name}", *map(str, value)]
        else:
            # As one word, or a value like -1e-3 would be taken for an option.
            typed.append(f"--{name}={value}")
    return typed
