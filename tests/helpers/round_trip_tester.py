"""What `test_round_trip` is made of: ways of making a delta, of saving it, of loading it, and all their combinations.

Everything is on one loopback Hub, the bases too, so that all ways of saving write the same name of the base.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import output_tensors
from hub_server import LoopbackHub
from peft import PeftModel, get_peft_model
from round_trip_tasks import TASKS, Task, processor
from safetensors.torch import load as load_tensors
from torch import nn
from trainer_tester import trainer_for
from transformers import Trainer, pipeline
from tuner_tester import PREFIX, Tensors, file_tensors, fill_
from typer.testing import CliRunner

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig, load_delta, push_to_hub
from bitfit_hf.cli import app

Labels = tuple[int, dict[int, str], "str | None"]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


# Ways of making ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A tuned model.

    Args:
        task ([`Task`]): What it was tuned for.
        model (`nn.Module`): With adapters, or a stock model that other code has tuned.
        trainer (`Trainer`, *optional*): With which it was trained.
        adapter_name (`str`, *optional*): Its adapter.
        delta ([`BiasDelta`], *optional*): What was extracted from a model without adapters.
    """

    task: Task
    model: nn.Module
    trainer: Trainer | None = None
    adapter_name: str = "default"
    delta: BiasDelta | None = None

    @property
    def other(self) -> str | None:
        """The other adapter of the model, where there is one."""
        return next((name for name in getattr(self.model, "peft_config", ()) if name != self.adapter_name), None)

    @property
    def value(self) -> BiasDelta:
        """The delta as a value."""
        return self.delta or BiasDelta.from_model(self.model, self.adapter_name)

    @property
    def tensors(self) -> Tensors:
        """Delta and head by their name in a file."""
        if self.delta is None:
            return file_tensors(self.model, self.adapter_name)
        return {name.removeprefix(PREFIX): tensor for name, tensor in self.delta.tensors().items()}


def _callback(task: Task, folder: Path) -> Made:
    return _trained(task, task.load(), folder, BitFitCallback(BitFitConfig(**task.config)))


def _wrapped(task: Task, folder: Path) -> Made:
    return _trained(task, get_peft_model(task.load(), BitFitConfig(**task.config)), folder)


def _wrapped_with_task_type(task: Task, folder: Path) -> Made:
    config = BitFitConfig(task_type=task.task_type, **task.config)
    return _trained(task, get_peft_model(task.load(), config), folder)


def _added(task: Task, folder: Path) -> Made:
    model = task.load()
    model.add_adapter(BitFitConfig(**task.config))
    return _trained(task, model, folder)


def _beside_another(task: Task, folder: Path) -> Made:
    model = task.load()
    model.add_adapter(BitFitConfig(**task.config), "another")
    fill_(model, "another", seed=5)
    return _trained(task, model, folder, BitFitCallback(BitFitConfig(**task.config), adapter_name="own"))


def _extracted(task: Task, folder: Path) -> Made:
    model = fill_(get_peft_model(task.load(), BitFitConfig(**task.config))).merge_and_unload()
    batch = {name: torch.stack([row[name] for row in task.rows()]) for name in task.rows()[0]}
    model(**batch)  # the problem type follows from the labels
    return Made(task, model.eval(), delta=BiasDelta.from_models(task.base_model(), model))


def _trained(task: Task, model: nn.Module, folder: Path, callback: BitFitCallback | None = None) -> Made:
    """Gives the adapter random values, and trains it for one step, of which a checkpoint is kept."""
    callback = callback or BitFitCallback()
    options = {"compute_loss_func": _loss_of_features} if task.task_type == "FEATURE_EXTRACTION" else {}
    values = {"max_steps": 1, "save_steps": 1, "save_only_model": True}
    trainer = trainer_for(model, folder, callback, train=task.rows(), options=options, **values)
    fill_(model, callback.adapter_name)
    trainer.train()
    return Made(task, model.eval(), trainer, callback.adapter_name)


def _loss_of_features(outputs: Any, labels: Any, **kwargs: Any) -> torch.Tensor:
    """For a backbone, which has no loss of its own."""
    return outputs.last_hidden_state.pow(2).mean()


# Each is given the task and the Trainer's output folder.
MAKINGS: dict[str, Callable[[Task, Path], Made]] = {
    "callback": _callback,
    "get_peft_model": _wrapped,
    "get_peft_model with task_type": _wrapped_with_task_type,
    "add_adapter": _added,
    "beside another adapter": _beside_another,
    "BiasDelta.from_models": _extracted,
}


# Ways of saving ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a saved delta is.

    Args:
        files (`Mapping[str, bytes]`): The content of the files there, by path.
        source (`str`): Folder or repo id, as ways of loading take it.
    """

    files: Mapping[str, bytes]
    source: str

    @classmethod
    def folder(cls, folder: Path) -> Place:
        return cls({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, str(folder))

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self.files[CONFIG_FILE])

    @property
    def tensors(self) -> Tensors:
        return {name.removeprefix(PREFIX): t for name, t in load_tensors(self.files[WEIGHTS_FILE]).items()}


@dataclass(frozen=True)
class Saving:
    """One saving: of what, into which folder or repo, on which Hub."""

    made: Made
    folder: Path
    repo_id: str
    hub: LoopbackHub

    @property
    def on_hub(self) -> Place:
        return Place(self.hub.files(self.repo_id), self.repo_id)


def _by_trainer(saving: Saving) -> Place:
    saving.made.trainer.save_model(str(saving.folder))
    return Place.folder(saving.folder)


def _by_checkpoint(saving: Saving) -> Place:
    return Place.folder(Path(saving.made.trainer.args.output_dir) / "checkpoint-1")


def _by_trainer_s_push(saving: Saving) -> Place:
    saving.made.trainer.args.hub_model_id = saving.repo_id
    saving.made.trainer.push_to_hub()
    return saving.on_hub


def _by_model(saving: Saving) -> Place:
    saving.made.model.save_pretrained(saving.folder)
    return Place.folder(saving.folder)


def _by_model_s_push(saving: Saving) -> Place:
    saving.made.model.push_to_hub(saving.repo_id)
    return saving.on_hub


def _by_value(saving: Saving) -> Place:
    saving.made.value.save_pretrained(saving.folder)
    return Place.folder(saving.folder)


def _by_our_push(saving: Saving) -> Place:
    made = saving.made
    source = made.model if made.delta is None else made.delta
    push_to_hub(source, saving.repo_id, adapter_name=made.adapter_name, stock=made.task.has_stock_form)
    return saving.on_hub


SAVINGS: dict[str, Callable[[Saving], Place]] = {
    "trainer.save_model": _by_trainer,
    "a checkpoint": _by_checkpoint,
    "trainer.push_to_hub": _by_trainer_s_push,
    "model.save_pretrained": _by_model,
    "model.push_to_hub": _by_model_s_push,
    "BiasDelta.save_pretrained": _by_value,
    "bitfit_hf.push_to_hub": _by_our_push,
}


def save(saving: str, made: Made, folder: Path, repo_id: str, hub: LoopbackHub) -> Place:
    """Saves in one of the ways. A Trainer saves its own adapter, whichever is active; a model the one that is."""
    if made.other is not None and saving.startswith("trainer."):
        made.model.set_adapter(made.other)
    try:
        return SAVINGS[saving](Saving(made, folder, repo_id, hub))
    finally:
        if made.other is not None:
            made.model.set_adapter(made.adapter_name)


# Ways of loading -----------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """What a way of loading gave; `None` where it says nothing of it.

    Args:
        outputs (`list[torch.Tensor]`, *optional*): What the model answers to the task's inputs.
        labels (`Labels`, *optional*): Their number, names and problem type.
        tensors (`Tensors`, *optional*): Delta and head, as they would be saved again.
        weights (`Tensors`, *optional*): The stock model's own, with the delta in them.
        answers (`dict[str, float]`, *optional*): To a text, labels and scores.
        sizes (`tuple[int, int]`, *optional*): Numbers of biases and of the head's parameters.
    """

    outputs: list[torch.Tensor] | None = None
    labels: Labels | None = None
    tensors: Tensors | None = None
    weights: Tensors | None = None
    answers: dict[str, float] | None = None
    sizes: tuple[int, int] | None = None


TEXT = "w7 w9 w11"
TASKS_WITH_ANSWERS = ("text-classification", "token-classification")


def labels_of(model: Any) -> Labels:
    """Number of labels, names and problem type, as they stand in the model's configuration."""
    return model.config.num_labels, dict(model.config.id2label), model.config.problem_type


def answers_of(entries: Any) -> dict[str, float]:
    """What a pipeline gives for [`TEXT`]: the score of each label, or of each token's label."""
    entries = entries[0] if isinstance(entries[0], list) else entries
    return {str(entry.get("label") or (entry["index"], entry["entity"])): entry["score"] for entry in entries}


def ask(task: Task, pipe: Any) -> dict[str, float] | None:
    """The answers of a pipeline, where there are labels to texts."""
    if task.tag not in TASKS_WITH_ANSWERS:
        return None
    return answers_of(pipe(TEXT, top_k=None) if task.tag == "text-classification" else pipe(TEXT))


def _adapter(model: Any, task: Task) -> Loaded:
    """A model with the delta as its adapter."""
    return Loaded(task.outputs(model.eval()), labels_of(model), file_tensors(model))


def _written(model: Any, task: Task) -> Loaded:
    """A stock model with the delta in its own parameters."""
    return Loaded(task.outputs(model.eval()), labels_of(model), weights=model.state_dict())


def _auto(task: Task, source: str, folder: Path) -> Loaded:
    return _adapter(task.auto_class.from_pretrained(source), task)


def _auto_peft(task: Task, source: str, folder: Path) -> Loaded:
    return _adapter(task.auto_peft_class.from_pretrained(source), task)


def _peft(task: Task, source: str, folder: Path) -> Loaded:
    return _adapter(PeftModel.from_pretrained(task.base_model(), source), task)


def _load_adapter(task: Task, source: str, folder: Path) -> Loaded:
    model = task.base_model()
    model.load_adapter(source)
    return _adapter(model, task)


def _pipeline(task: Task, source: str, folder: Path) -> Loaded:
    # transformers looks for this processor beside the delta alone, for all others beside the base.
    audio = {"feature_extractor": processor("whisper")} if task.tag == "audio-classification" else {}
    pipe = pipeline(task.tag, model=source, **audio)
    loaded = _adapter(pipe.model, task)
    loaded.answers = ask(task, pipe)
    return loaded


def _load_delta(task: Task, source: str, folder: Path) -> Loaded:
    return _written(load_delta(task.base_model(), source), task)


def _apply(task: Task, source: str, folder: Path) -> Loaded:
    return _written(BiasDelta.from_pretrained(source).apply_(task.base_model()), task)


def _bank(task: Task, source: str, folder: Path) -> Loaded:
    bank = task.bank()
    bank.add_task("task", source)
    try:
        inputs = task.inputs()
        count = len(next(iter(inputs.values())))
        rows = [output_tensors(answer) for answer in bank(**inputs, tasks=["task"] * count)]
        loaded = Loaded([torch.stack(column) for column in zip(*rows, strict=True)])
        if task.tag in TASKS_WITH_ANSWERS:
            (answer,) = bank.predict([TEXT], ["task"])
            loaded.answers = answers_of(answer) if isinstance(answer, list) else answer["scores"]
        return loaded
    finally:
        bank.remove_task("task")


class CommandFailed(Exception):
    """A command has ended with a user's mistake."""


def _cli(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    if result.exit_code == 1:
        raise CommandFailed(result.stderr)
    return json.loads(result.stdout)


def _inspect(task: Task, source: str, folder: Path) -> Loaded:
    found = _cli("inspect", source)
    sizes = (found["parameters"]["biases"], found["parameters"]["head"])
    if found["num_labels"] is None:
        return Loaded(sizes=sizes)
    return Loaded(sizes=sizes, labels=(found["num_labels"], dict(enumerate(found["labels"])), found["problem_type"]))


def _merge(task: Task, source: str, folder: Path) -> Loaded:
    _cli("merge", task.base_name, source, "-o", str(folder))
    return _written(task.auto_class.from_pretrained(folder), task)


def _stock_auto(task: Task, source: str, folder: Path) -> Loaded:
    model = task.auto_class.from_pretrained(source, adapter_kwargs={"subfolder": "stock"}, **task.options)
    return Loaded(task.outputs(model.eval()))


def _stock_peft(task: Task, source: str, folder: Path) -> Loaded:
    return Loaded(task.outputs(PeftModel.from_pretrained(task.load(), source, subfolder="stock").eval()))


LOADINGS: dict[str, Callable[[Task, str, Path], Loaded]] = {
    "AutoModelFor….from_pretrained": _auto,
    "AutoPeftModelFor….from_pretrained": _auto_peft,
    "PeftModel.from_pretrained": _peft,
    "base.load_adapter": _load_adapter,
    "pipeline": _pipeline,
    "load_delta": _load_delta,
    "BiasDelta.from_pretrained().apply_": _apply,
    "TaskBank.add_task": _bank,
    "bitfit inspect": _inspect,
    "bitfit merge": _merge,
    "stock/ by AutoModelFor…": _stock_auto,
    "stock/ by PeftModel": _stock_peft,
}


# The matrix ----------------------------------------------------------------------------------------------------------

# What no way of loading goes by: the facts of a training, which a checkpoint has fewer of, and PEFT's note of what the
# adapter is going to be used for.
NOTES = {"run", "inference_mode"}


def makings(task: Task) -> list[str]:
    """The ways of making a delta for a task."""
    # PEFT has no names for some tasks.
    return [name for name in MAKINGS if task.task_type or name != "get_peft_model with task_type"]


def savings(making: str) -> list[str]:
    """The ways of saving what was made: a value has two of its own."""
    by_value = ("BiasDelta.save_pretrained", "bitfit_hf.push_to_hub")
    return [name for name in SAVINGS if making != "BiasDelta.from_models" or name in by_value]


def loadings(task: Task, saving: str) -> list[str]:
    """The ways of loading what was saved."""
    has_stock_form = task.has_stock_form and saving == "bitfit_hf.push_to_hub"
    left_out = {
        "pipeline": task.tag is None,
        "TaskBank.add_task": task.new_tokens > 0,  # the tasks of a bank share one table of token embeddings
        "stock/ by AutoModelFor…": not has_stock_form,
        "stock/ by PeftModel": not has_stock_form,
    }
    return [name for name in LOADINGS if not left_out.get(name)]


def cells() -> Iterator[tuple[str, str, str, str]]:
    """Every combination that exists: task, way of making, of saving, of loading."""
    for name, task in TASKS.items():
        for making in makings(task):
            for saving in savings(making):
                for loading in loadings(task, saving):
                    yield name, making, saving, loading
