"""One verdict: a folder that one way of loading takes or refuses is taken or refused by all, with the same outcome.

Each folder is a good delta with one change, after which the two files still belong together. Most contradict
themselves, or the model; what is refused names the delta's files or the model, and leaves nothing in the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hub_deltas import INPUTS, load_base, logits, save_base, tune
from peft import AutoPeftModel, AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from tuner_tester import state

from bitfit_hf import BiasDelta, BitFitConfig, BitFitError, TaskBank, load_delta
from bitfit_hf.cli.app import app
from bitfit_hf.storage.files import digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
QUERY = "bert.encoder.layer.0.attention.self.query.bias"
WHOLE = {"term": "query", "layer": 0, "shape": [32]}
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def halves(**ranges: list[int]) -> dict[str, Any]:
    return {"layer": 0, "shape": [32], "terms": {term: [span] for term, span in ranges.items()}}


def key(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{PREFIX}{module}.bitfit_{parameter}"


def values(**new: Any) -> Change:
    """Other values in the configuration."""
    return lambda config, tensors: config.update(new)


def place(name: str, layout: Any, *, like: str = QUERY, drop: str | None = None) -> Change:
    """Another place in the layout, with a tensor for it; `drop` takes one out of both."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        value = tensors[key(like)]
        if drop is not None:
            del config["bias_layout"][drop], tensors[key(drop)]
        if layout is not None:
            config["bias_layout"][name] = layout
            tensors[key(name)] = value.clone()

    return change


def shortened(layout: Any, size: int) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["bias_layout"][QUERY] = layout
        tensors[key(QUERY)] = tensors[key(QUERY)][:size].clone()

    return change


def head(size: int | None, **new: Any) -> Change:
    """A head of another size, or none."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in ("weight", "bias"):
            value = tensors.pop(f"{PREFIX}classifier.{name}")
            if size is not None:
                tensors[f"{PREFIX}classifier.{name}"] = value[:size].clone()
        config.update(new)

    return change


def saved_whole(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["modules_to_save"].append("bert.pooler.dense")
    tensors[f"{PREFIX}bert.pooler.dense.weight"] = torch.zeros(32, 32)
    tensors[f"{PREFIX}bert.pooler.dense.bias"] = torch.zeros(32)


TAKEN: dict[str, Change] = {
    "nothing": values(),
    "targets that all fit": values(target_modules=".*"),
    "targets by kind": values(target_modules="all-linear"),
    "an exclusion of nothing": values(exclude_modules=["nowhere"]),
    "both layers": place("", None, drop="bert.embeddings.LayerNorm.bias"),
    "biases may be added": values(add_missing_biases=True),
    "another term": place(QUERY, WHOLE | {"term": "key"}),
    "half a vector": shortened(halves(query=[0, 16]), 16),
    "a vector in two halves": place(QUERY, halves(query=[0, 16], key=[16, 32])),
    "a bias less": place("", None, drop=QUERY),
    "no head": head(None, modules_to_save=None, num_labels=None, id2label=None),
    "another problem type": values(problem_type="multi_label_classification"),
    "no digest": values(weights_digest=None),
    "a leaf twice": values(modules_to_save=["classifier", "classifier"]),
    "no task": values(task_type=None),
}
REFUSED: dict[str, Change] = {
    "a term of many": values(bias_terms="query"),
    "another of the terms": values(bias_terms=["key", "value"]),
    "targets that fit some": values(target_modules=["query"]),
    "targets that fit nothing": values(target_modules=["nowhere"]),
    "a pattern that fits nothing": values(target_modules="nowhere"),
    "a pattern that is none": values(target_modules="["),
    "an exclusion that fits some": values(exclude_modules=["query"]),
    "an exclusion of everything": values(exclude_modules=".*"),
    "one layer of two": values(layers_to_transform=0),
    "layers without what lies outside": values(layers_to_transform=[0, 1]),
    "a layer that does not exist": values(layers_to_transform=[99]),
    "an added bias that exists": place(QUERY, WHOLE | {"added": True}),
    "two terms of the same values": place(QUERY, halves(query=[0, 16], key=[8, 24])),
    "two shapes of one vector": place(QUERY, "query 0 - 32 0:16; key 0 - 64 16:32"),  # of development versions
    "a weight of a norm": place("bert.embeddings.LayerNorm.weight", {"term": "embedding_layernorm", "shape": [32]}),
    "a bias of the head": place("classifier.bias", {"term": "other", "shape": [32]}),
    "a layer that is not there": place(QUERY.replace("0", "7"), WHOLE | {"layer": 7}, drop=QUERY),
    "no layout": values(bias_layout=None),
    "an empty layout": values(bias_layout={}),
    "a head of three for four labels": head(3),
    "three labels for a head of four": values(num_labels=3, id2label=None),
    "no number of labels": values(num_labels=None, id2label=None),
    "a head that is not named": values(modules_to_save=None),
    "the beginning of a name": values(modules_to_save=["class"]),
    "a bias that is saved whole too": saved_whole,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def good(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("delta")
    BiasDelta.from_model(tune(load_base(base))).save_pretrained(folder)
    return folder


def changed(good: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(good, folder)
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    change(config, tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if config["weights_digest"] is not None:
        config["weights_digest"] = digest(tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def second(model: Any, folder: Path) -> Any:
    wrapped = get_peft_model(model, BitFitConfig(task_type="SEQ_CLS"), adapter_name="first")
    wrapped.load_adapter(folder, "second")
    wrapped.set_adapter("second")
    return wrapped.eval()


def in_place(model: Any, folder: Path) -> Any:
    model.load_adapter(str(folder))
    return model.eval()


def bank(model: Any, folder: Path) -> Any:
    served = TaskBank(model)
    served.add_task("a", folder)

    def answer(**inputs: torch.Tensor) -> Any:
        return served(**inputs, tasks=["a"] * len(inputs["input_ids"]))

    return answer


def merged(model: Any, folder: Path) -> Any:
    """What `bitfit merge` writes; its error is our own when the exit code is 1."""
    out = folder / "merged"
    with pytest.raises(SystemExit) as exit_:
        typer.main.get_command(app).main(
            ["merge", model.name_or_path, str(folder), "-o", str(out)], prog_name="bitfit"
        )
    if exit_.value.code:
        assert exit_.value.code == 1
        raise BitFitError("bitfit merge")
    return AutoModelForSequenceClassification.from_pretrained(out).eval()


# Each gets a fresh base, and gives what answers for the tuned model. The first knows nothing of adapters.
ON_A_MODEL: dict[str, Callable[[Any, Path], Any]] = {
    "load_delta": load_delta,
    "PeftModel": lambda model, folder: PeftModel.from_pretrained(model, folder).eval(),
    "second adapter": second,
    "load_adapter": in_place,
    "TaskBank": bank,
    "bitfit merge": merged,
}
BY_NAME: dict[str, Callable[[Path], Any]] = {
    "AutoModel": lambda folder: AutoModelForSequenceClassification.from_pretrained(folder).eval(),
    "AutoPeftModel": lambda folder: AutoPeftModelForSequenceClassification.from_pretrained(folder).eval(),
}
assert len(TAKEN) + len(REFUSED) == 40

# An adapter that is there already has a head and labels of its own, whatever the file says of them.
OF_THE_HEAD = {
    "a head that is not named",
    "the beginning of a name",
    "three labels for a head of four",
    "no number of labels",
}
assert REFUSED.keys() > OF_THE_HEAD


@pytest.mark.parametrize("name", TAKEN)
def test_what_one_way_takes_all_take(name, base, good, tmp_path):
    folder = changed(good, tmp_path / "delta", TAKEN[name])
    ways = ON_A_MODEL | {way: lambda model, folder, load=load: load(folder) for way, load in BY_NAME.items()}
    if name == "no head":
        del ways["bitfit merge"]  # a head that starts at random is none to write down
        # PEFT's class for the task insists on a head.
        ways["AutoPeftModel"] = lambda model, folder: AutoPeftModel.from_pretrained(folder).eval()
    answers = {}
    for way, load in ways.items():
        torch.manual_seed(0)  # the head, where the delta brings none
        model = load_base(base)
        torch.manual_seed(0)
        answers[way] = torch.stack(list(load(model, folder)(**INPUTS).logits)).detach()
    reference = answers["load_delta"]
    assert reference.shape == (len(INPUTS["input_ids"]), 2 if name == "no head" else 4)
    for way, answer in answers.items():
        torch.testing.assert_close(answer, reference, atol=2e-6, rtol=0, msg=way)
    assert not torch.allclose(reference, logits(load_base(base))[:, :1].expand_as(reference), atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_way_refuses_all_refuse(name, base, good, tmp_path):
    folder = changed(good, tmp_path / "delta", REFUSED[name])
    for way, load in ON_A_MODEL.items():
        model = load_base(base)
        before = state(model)
        with pytest.raises(BitFitError):
            load(model, folder)
        if way != "second adapter":
            assert state(model) == before, way
    for load_by_name in BY_NAME.values():
        with pytest.raises(BitFitError):
            load_by_name(folder)
    existing = get_peft_model(load_base(base, num_labels=4), BitFitConfig(task_type="SEQ_CLS"))
    before = state(existing)
    if name not in OF_THE_HEAD:
        with pytest.raises(BitFitError):
            existing.load_adapter(folder, "default")
        assert state(existing) == before


def test_a_difference_of_two_tasks_has_no_head_and_loads_by_every_way(base, tmp_path):
    first, second = (BiasDelta.from_model(tune(load_base(base), seed=seed)) for seed in (1, 2))
    (first - second).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"], config["num_labels"]) == (None, None, None)
    answers = {}
    for way in ("load_delta", "PeftModel", "load_adapter", "TaskBank"):
        torch.manual_seed(0)
        model = load_base(base)
        with torch.no_grad():
            answers[way] = torch.stack(list(ON_A_MODEL[way](model, tmp_path)(**INPUTS).logits))
        torch.testing.assert_close(answers[way], answers["load_delta"], atol=2e-6, rtol=0, msg=way)
    assert (first + second).config.task_type is None
    assert (first * 0.5).config.task_type == "SEQ_CLS"
    assert (first - second + first).config.task_type == "SEQ_CLS"
