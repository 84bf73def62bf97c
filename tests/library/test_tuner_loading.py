"""Loading: labels travel with the delta, another base is refused, and what cannot be loaded leaves no trace."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, randomize_
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
    BertTokenizer,
    pipeline,
)
from tuner_tester import (
    PREFIX,
    Tensors,
    distance,
    file_tensors,
    fill_,
    identical,
    outputs,
    same_tensors,
    state,
    tuned_parameters,
)

from bitfit_hf import BiasDelta, BitFitConfig, BitFitLayer, TaskBank, base_mismatch, load_delta
from bitfit_hf.delta.lora_export import export_stock
from bitfit_hf.errors import (
    AdapterNameError,
    BaseModelMismatchError,
    BitFitError,
    ConfigError,
    DeltaFormatError,
    DeltaMismatchError,
    DeltaNotFoundError,
    NoBiasesError,
    NoMatchError,
    UnknownTermError,
    UnsupportedLayerError,
)
from bitfit_hf.storage.files import digest

BERT = ARCHITECTURES["bert-sequence"]
NAMES = {0: "against", 1: "neutral", 2: "for"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "not", "the", "a", "very"]


def save_backbone(name: str, folder: Path) -> type:
    """Saves the backbone of an architecture as a checkpoint without a head; returns the class with the head."""
    model = randomize_(ARCHITECTURES[name].build())
    backbone = model.base_model
    backbone.config.num_labels = 2
    backbone.save_pretrained(folder)
    return type(model)


def save_delta(cls: type, base: Path, folder: Path, names: dict[int, str], seed: int = 1) -> nn.Module:
    """Saves a delta with a head of its own labels, as a training script would; returns the tuned model."""
    model = cls.from_pretrained(base, num_labels=len(names), id2label=names)
    tuned = fill_(get_peft_model(model, BitFitConfig()), seed=seed).eval()
    tuned.save_pretrained(folder)
    return tuned


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint of a BERT backbone with a tokenizer, whose configuration says two labels."""
    folder = tmp_path_factory.mktemp("base")
    save_backbone("bert-sequence", folder)
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizer(str(vocabulary), do_lower_case=True).save_pretrained(folder)
    vocabulary.unlink()
    return folder


@pytest.fixture(scope="module")
def delta(base, tmp_path_factory) -> Path:
    """A delta with three named labels on [`base`]."""
    folder = tmp_path_factory.mktemp("delta")
    save_delta(transformers.BertForSequenceClassification, base, folder, NAMES)
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def wanted(base, delta) -> list[torch.Tensor]:
    """The outputs of the tuned model before it was saved."""
    return outputs(save_delta(transformers.BertForSequenceClassification, base, delta, NAMES), BERT)


def bert(base: Path, **kwargs) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(base, **kwargs)


def stock(model: nn.Module) -> nn.Module:
    """The transformers model inside."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


# Labels --------------------------------------------------------------------------------------------------------------


def in_place(base: Path, delta: Path) -> nn.Module:
    model = bert(base)
    model.load_adapter(str(delta))
    return model


def second(base: Path, delta: Path) -> nn.Module:
    model = get_peft_model(bert(base), BitFitConfig(), adapter_name="first")
    model.load_adapter(delta, adapter_name="second")
    model.set_adapter("second")
    return model


def second_in_place(base: Path, delta: Path) -> nn.Module:
    model = bert(base)
    model.add_adapter(BitFitConfig(), "first")
    model.load_adapter(str(delta), adapter_name="second")
    model.set_adapter("second")
    return model


ROUTES: dict[str, Callable[[Path, Path], nn.Module]] = {
    "AutoModel": lambda base, delta: AutoModelForSequenceClassification.from_pretrained(delta),
    "AutoPeftModel": lambda base, delta: AutoPeftModelForSequenceClassification.from_pretrained(delta),
    "PeftModel": lambda base, delta: PeftModel.from_pretrained(bert(base), delta),
    "load_adapter": in_place,
    "second": second,
    "second in place": second_in_place,
    "pipeline": lambda base, delta: pipeline("text-classification", model=str(delta)).model,
}


@pytest.mark.parametrize("route", ROUTES)
def test_three_named_labels_need_no_argument(route, base, delta, wanted):
    model = ROUTES[route](base, delta).eval()
    config = stock(model).config
    assert config.id2label == NAMES
    assert config.label2id == {name: index for index, name in NAMES.items()}
    assert config.num_labels == stock(model).num_labels == 3
    assert distance(outputs(model, BERT), wanted) <= 2e-6


def test_a_pipeline_answers_with_the_names_of_the_task(base, delta):
    answers = pipeline("text-classification", model=str(delta), top_k=None)(["not a very good film"])[0]
    assert {answer["label"] for answer in answers} == set(NAMES.values())
    tuned = AutoModelForSequenceClassification.from_pretrained(delta)
    encoded = BertTokenizer.from_pretrained(base)("not a very good film", return_tensors="pt")
    with torch.no_grad():
        scores = tuned(**encoded).logits.softmax(-1)[0]
    for answer in answers:
        assert answer["score"] == pytest.approx(scores[tuned.config.label2id[answer["label"]]].item(), abs=2e-6)


HEADS = {
    "roberta-sequence": AutoModelForSequenceClassification,
    "distilbert-sequence": AutoModelForSequenceClassification,
    "gpt2-sequence": AutoModelForSequenceClassification,
    "deberta-sequence": AutoModelForSequenceClassification,
    "modernbert-sequence-biased": AutoModelForSequenceClassification,
    "bert-token": AutoModelForTokenClassification,
    "bert-question": AutoModelForQuestionAnswering,
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_every_kind_travels(name, tmp_path):
    arch = ARCHITECTURES[name]
    names = NAMES if name != "bert-question" else {0: "LABEL_0", 1: "LABEL_1"}
    cls = save_backbone(name, tmp_path / "base")
    tuned = save_delta(cls, tmp_path / "base", tmp_path / "delta", names)
    expected = outputs(tuned, arch)
    loaded = {
        "auto": HEADS[name].from_pretrained(tmp_path / "delta"),
        "peft": PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "delta"),
    }
    for route, model in loaded.items():
        assert stock(model).config.id2label == names, route
        assert same_tensors(file_tensors(model), file_tensors(tuned)), route
        assert distance(outputs(model.eval(), arch), expected) <= 2e-6, route


def test_regression_travels(base, tmp_path):
    model = get_peft_model(bert(base, num_labels=1), BitFitConfig())
    fill_(model).eval().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.num_labels == 1
    assert distance(outputs(loaded, BERT), outputs(model, BERT)) <= 2e-6
    inputs = BERT.inputs()
    loss = loaded(**inputs, labels=torch.tensor([0.5, -1.0])).loss
    assert loaded.config.problem_type == "regression"
    logits = loaded(**inputs).logits.squeeze()
    assert loss.item() == pytest.approx(((logits - torch.tensor([0.5, -1.0])) ** 2).mean().item())


def test_the_problem_type_travels(base, tmp_path):
    model = bert(base, num_labels=3, problem_type="multi_label_classification")
    fill_(get_peft_model(model, BitFitConfig())).save_pretrained(tmp_path)
    loaded = bert(base)
    loaded.load_adapter(str(tmp_path))
    assert loaded.config.problem_type == "multi_label_classification"
    loaded.disable_adapters()
    assert loaded.config.problem_type is None


@pytest.fixture(scope="module")
def two_deltas(base, tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("three", "five")}
    cls = transformers.BertForSequenceClassification
    save_delta(cls, base, folders["three"], NAMES, seed=1)
    save_delta(cls, base, folders["five"], {i: f"star{i}" for i in range(5)}, seed=2)
    return folders


OWN = {0: "LABEL_0", 1: "LABEL_1"}
FIVE = {i: f"star{i}" for i in range(5)}


@pytest.mark.parametrize("kind", ["wrapped", "in place"])
def test_labels_follow_the_active_adapter(kind, base, two_deltas):
    model = bert(base)
    if kind == "wrapped":
        tuned = PeftModel.from_pretrained(model, two_deltas["three"], adapter_name="three")
        tuned.load_adapter(two_deltas["five"], adapter_name="five")
    else:
        tuned = model
        model.load_adapter(str(two_deltas["three"]), adapter_name="three")
        model.load_adapter(str(two_deltas["five"]), adapter_name="five")
        model.set_adapter("three")
    head = model.classifier.original_module.weight.clone()

    def check(names: dict[int, str]) -> None:
        assert model.config.id2label == names
        assert model.num_labels == model.config.num_labels == len(names)
        assert outputs(tuned, BERT)[0].shape[-1] == len(names)

    check(NAMES)
    tuned.set_adapter("five")
    check(FIVE)
    if kind == "wrapped":
        with tuned.disable_adapter():
            check(OWN)
        check(FIVE)
        tuned.set_adapter("three")
        check(NAMES)
        tuned.delete_adapter("three")
        check(FIVE)
        assert tuned.unload() is model
    else:
        model.disable_adapters()
        check(OWN)
        model.enable_adapters()
        check(FIVE)
        model.set_adapter("three")
        check(NAMES)
        model.delete_adapter("three")
        model.set_adapter("five")
        check(FIVE)
        return
    check(OWN)
    assert torch.equal(model.classifier.weight, head)


def test_merging_one_of_several_adapters_keeps_its_labels(base, two_deltas, tmp_path):
    tuned = PeftModel.from_pretrained(bert(base), two_deltas["three"], adapter_name="three")
    tuned.load_adapter(two_deltas["five"], adapter_name="five")
    tuned.set_adapter("five")
    five = outputs(tuned.eval(), BERT)
    tuned.set_adapter("three")
    merged = tuned.merge_and_unload(adapter_names=["five"])
    assert merged.config.id2label == FIVE
    assert distance(outputs(merged, BERT), five) <= 1e-6
    merged.save_pretrained(tmp_path)
    again = bert(tmp_path)
    assert again.config.id2label == FIVE
    assert distance(outputs(again, BERT), five) <= 2e-6


def test_adapters_with_different_label_counts_point_to_the_task_bank(base, two_deltas):
    tuned = PeftModel.from_pretrained(bert(base), two_deltas["three"], adapter_name="three")
    tuned.load_adapter(two_deltas["five"], adapter_name="five")
    with pytest.raises(UnsupportedLayerError, match="TaskBank"):
        outputs(tuned.eval(), BERT, adapter_names=["three", "five"])
    assert outputs(tuned, BERT, adapter_names=["three", "three"])[0].shape == (2, 3)


def test_the_base_s_name_that_the_user_gave_wins(base, tmp_path):
    model = get_peft_model(bert(base), BitFitConfig(base_model_name_or_path="google/tiny", revision="abc"))
    model.save_pretrained(tmp_path / "wrapped")
    other = bert(base)
    other.add_adapter(BitFitConfig(base_model_name_or_path="google/tiny"))
    other.save_pretrained(tmp_path / "in place")
    for folder in ("wrapped", "in place"):
        assert PeftConfig.from_pretrained(tmp_path / folder).base_model_name_or_path == "google/tiny"
    assert PeftConfig.from_pretrained(tmp_path / "wrapped").revision == "abc"
    get_peft_model(bert(base), BitFitConfig()).save_pretrained(tmp_path / "local")
    assert PeftConfig.from_pretrained(tmp_path / "local").base_model_name_or_path == str(base)


def test_a_loaded_delta_can_be_trained_on_and_saved_again(base, delta, tmp_path):
    model = PeftModel.from_pretrained(bert(base), delta, is_trainable=True)
    fill_(model, seed=9).eval().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert distance(outputs(loaded, BERT), outputs(model, BERT)) <= 2e-6
    assert loaded.config.id2label == NAMES


def test_a_state_dict_in_memory_is_loaded_as_strictly(base, delta):
    config, tensors = PeftConfig.from_pretrained(delta), load_file(delta / "adapter_model.safetensors")
    model = bert(base)
    model.load_adapter(peft_config=config, adapter_state_dict=tensors)
    assert same_tensors(file_tensors(model), {k.removeprefix(PREFIX): v for k, v in tensors.items()})
    tensors.pop(next(key for key in tensors if "query" in key))
    untouched = bert(base)
    before = state(untouched)
    with pytest.raises(DeltaMismatchError, match=r"query.*missing"):
        untouched.load_adapter(peft_config=PeftConfig.from_pretrained(delta), adapter_state_dict=tensors)
    assert state(untouched) == before


def test_peft_s_functional_interface_loads_as_strictly(base, delta):
    tensors = load_file(delta / "adapter_model.safetensors")
    model = inject_adapter_in_model(PeftConfig.from_pretrained(delta), bert(base))
    set_peft_model_state_dict(model, tensors)
    assert same_tensors(file_tensors(model), {k.removeprefix(PREFIX): v for k, v in tensors.items()})
    model = inject_adapter_in_model(PeftConfig.from_pretrained(delta), bert(base))
    tensors.pop(next(key for key in tensors if "query" in key))
    with pytest.raises(DeltaMismatchError, match=r"query.*missing"):
        set_peft_model_state_dict(model, tensors)
    assert not any(isinstance(module, BitFitLayer) for module in model.modules())
    assert not hasattr(model, "peft_config")


# What cannot be loaded -----------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Changes the tensors of a delta and makes its digest fit again, so that nothing but the change is wrong."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    edit(folder, weights_digest=digest(tensors))


def edit(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config.update(values)
    file.write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def pickle_only(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")


def set_tensor(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(tensors: Tensors) -> None:
        name = next(key for key in tensors if part in key)
        tensors[name] = change(tensors[name]).contiguous()

    return lambda folder: rewrite(folder, apply)


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: [tensors.pop(k) for k in list(tensors) if part in k])


def mixture(file: str) -> Callable[[Path], None]:
    """Takes one of the two files from another save of the same task."""

    def apply(folder: Path) -> None:
        tensors = {k: v + 1 for k, v in load_file(folder / "adapter_model.safetensors").items()}
        if file == "adapter_model.safetensors":
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            edit(folder, weights_digest=digest(tensors))

    return apply


def garbage(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x00not a safetensors file" * 9)


BROKEN: dict[str, tuple[Callable[[Path], object], type[BitFitError], str]] = {
    "truncated": (truncate, DeltaFormatError, "damaged"),
    "empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), DeltaFormatError, "damaged"),
    "garbage": (garbage, DeltaFormatError, "damaged"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), DeltaNotFoundError, "incomplete"),
    "a pickle": (pickle_only, DeltaNotFoundError, "pickle"),
    "a delta missing": (without("layer.0.attention.self.query"), DeltaMismatchError, r"query\.bitfit_bias is missing"),
    "the head missing": (without("classifier"), DeltaMismatchError, r"classifier\.weight is missing"),
    "the head's bias missing": (without("classifier.bias"), DeltaMismatchError, r"classifier\.bias is missing"),
    "an extra tensor": (
        lambda f: rewrite(f, lambda t: t.update({PREFIX + "bert.extra.bitfit_bias": torch.zeros(3)})),
        DeltaMismatchError,
        "not expected",
    ),
    "base weights": (
        lambda f: rewrite(f, lambda t: t.update({PREFIX + "bert.pooler.dense.weight": torch.zeros(32, 32)})),
        DeltaMismatchError,
        "not expected",
    ),
    "NaN": (set_tensor("query", lambda t: t * float("nan")), DeltaFormatError, "NaN or Inf"),
    "Inf in the head": (set_tensor("classifier.w", lambda t: t / 0), DeltaFormatError, "NaN or Inf"),
    "a wrong shape": (set_tensor("query", lambda t: t[:-1]), DeltaMismatchError, r"has shape \[31\]"),
    "a shape that broadcasts": (set_tensor("query", lambda t: t[:1]), DeltaMismatchError, r"has shape \[1\]"),
    "a wrong head": (set_tensor("classifier.weight", lambda t: t[:2]), DeltaMismatchError, r"has shape \[2, 32\]"),
    "float16": (set_tensor("query", torch.Tensor.half), DeltaFormatError, "float16 instead of float32"),
    "integers": (set_tensor("query", torch.Tensor.long), DeltaFormatError, "int64 instead of float32"),
    "weights of another save": (mixture("adapter_model.safetensors"), DeltaFormatError, "two different saves"),
    "a configuration of another save": (mixture("adapter_config.json"), DeltaFormatError, "two different saves"),
    "an unknown term": (lambda f: edit(f, bias_terms=["querry"]), UnknownTermError, "querry"),
    "wrong JSON types": (lambda f: edit(f, id2label=[1], target_modules={"a": 1}), ConfigError, "id2label"),
    "labels that do not add up": (lambda f: edit(f, num_labels=7), ConfigError, "num_labels"),
    "a term that the file has no tensors for": (lambda f: edit(f, bias_terms="query"), DeltaMismatchError, "expected"),
    "a damaged fingerprint": (
        lambda f: edit(f, base_fingerprint={"format": 1, "tensors": {"bert.pooler.dense.bias": "float32 x"}}),
        DeltaFormatError,
        "fingerprint",
    ),
    "a later fingerprint": (lambda f: edit(f, base_fingerprint={"format": 99}), DeltaFormatError, "Upgrade"),
}


@pytest.fixture
def broken(request, delta, tmp_path) -> Iterator[tuple[Path, type[BitFitError], str]]:
    breaking, error, message = BROKEN[request.param]
    shutil.copytree(delta, tmp_path / "broken")
    breaking(tmp_path / "broken")
    return tmp_path / "broken", error, message


@pytest.mark.parametrize("broken", BROKEN, indirect=True)
def test_what_is_broken_raises_and_leaves_no_trace(broken, base):
    folder, error, message = broken
    with pytest.raises(error, match=message):
        AutoModelForSequenceClassification.from_pretrained(folder)
    for load in (
        lambda model: PeftModel.from_pretrained(model, folder),
        lambda model: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True),
        lambda model: model.load_adapter(str(folder)),
        lambda model: model.load_adapter(str(folder), adapter_name="other"),
    ):
        model = bert(base)
        before = state(model)
        with pytest.raises(error, match=message):
            load(model)
        assert state(model) == before


@pytest.mark.parametrize("broken", BROKEN, indirect=True)
def test_a_broken_second_adapter_leaves_the_first_intact(broken, base, two_deltas):
    folder, error, message = broken
    wrapped = PeftModel.from_pretrained(bert(base), two_deltas["five"], adapter_name="first", is_trainable=True)
    held = bert(base)
    held.load_adapter(str(two_deltas["five"]), adapter_name="first")
    for model in (wrapped, held):
        before, answers = state(model), outputs(model, BERT)
        with pytest.raises(error, match=message):
            model.load_adapter(str(folder), adapter_name="second")
        assert state(model) == before
        assert state(stock(model))["adapters"] == ["first"]
        assert identical(outputs(model, BERT), answers)
    wrapped.load_adapter(two_deltas["three"], adapter_name="second")
    assert sorted(wrapped.peft_config) == ["first", "second"]


def test_a_save_cut_short_loads_what_its_weights_are(base, delta, tmp_path):
    """The new configuration waits beside the old one until the weights are replaced."""
    shutil.copytree(delta, tmp_path / "delta")
    folder = tmp_path / "delta"
    old = (folder / "adapter_config.json").read_bytes()
    rewrite(folder, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
    edit(folder, id2label={"0": "x", "1": "y", "2": "z"})
    shutil.move(folder / "adapter_config.json", folder / ".adapter_config.pending.json")
    (folder / "adapter_config.json").write_bytes(old)
    wanted = load_file(folder / "adapter_model.safetensors")
    for model in (PeftModel.from_pretrained(bert(base), folder), in_place(base, folder)):
        assert same_tensors(file_tensors(model), {k.removeprefix(PREFIX): v for k, v in wanted.items()})
        assert stock(model).config.id2label == {0: "x", 1: "y", 2: "z"}
        assert not any(parameter.requires_grad for _, parameter in tuned_parameters(model))


@pytest.mark.parametrize("name", ["bert-masked_lm", "bert-backbone", "bert-choice"])
def test_a_head_that_the_model_lacks_is_an_error(name, delta):
    model = ARCHITECTURES[name].build()
    for load in (lambda: PeftModel.from_pretrained(model, delta), lambda: model.load_adapter(str(delta))):
        before = state(model)
        with pytest.raises(BitFitError, match=r"head|different|tensors differ"):
            load()
        assert state(model) == before


def test_a_backbone_says_that_the_delta_has_a_head(base, delta):
    model = BertModel.from_pretrained(base)
    with pytest.raises(DeltaMismatchError, match=r"head \(classifier.*AutoModelForSequenceClassification"):
        model.load_adapter(str(delta))


def lora(model: nn.Module) -> nn.Module:
    model.add_adapter(LoraConfig(target_modules=["query"]), "lora")
    return model


REFUSED: dict[str, tuple[str, dict, str, type[BitFitError], str]] = {
    "no biases": ("t5-sequence", {}, "default", NoBiasesError, "add_missing_biases"),
    "an unknown term": ("bert-sequence", {"bias_terms": "querry"}, "default", UnknownTermError, "query"),
    "a target that matches nothing": (
        "bert-sequence",
        {"target_modules": ["nowhere"]},
        "default",
        NoMatchError,
        "nowhere",
    ),
    "a layer that does not exist": ("bert-sequence", {"layers_to_transform": 7}, "default", NoMatchError, "0 to 1"),
    "nothing left": (
        "bert-sequence",
        {"bias_terms": "pooler", "layers_to_transform": 0},
        "default",
        NoMatchError,
        "Nothing is left",
    ),
    "a module to save that does not exist": (
        "bert-sequence",
        {"modules_to_save": ["nowhere"]},
        "default",
        NoMatchError,
        "nowhere",
    ),
    "a name that a module has": ("bert-sequence", {}, "query", AdapterNameError, "module named 'query'"),
    "a name with a dot": ("bert-sequence", {}, "v1.0", AdapterNameError, "dot"),
    "an empty name": ("bert-sequence", {}, "", AdapterNameError, "empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_is_one_clear_error_and_changes_nothing(case):
    name, values, adapter, error, message = REFUSED[case]
    model = ARCHITECTURES[name].build()
    ways = [lambda: get_peft_model(model, BitFitConfig(**values), adapter_name=adapter)]
    if adapter:  # transformers takes an empty name for none
        ways.append(lambda: model.add_adapter(BitFitConfig(**values), adapter))
    for way in ways:
        before = state(model)
        with pytest.raises(error, match=message) as caught:
            way()
        assert state(model) == before
        assert isinstance(caught.value, ValueError)


def test_a_refused_second_adapter_changes_nothing():
    tuned = fill_(get_peft_model(BERT.build(), BitFitConfig(bias_terms="query"), adapter_name="first"), "first")
    before = state(tuned)
    for values, adapter in (({"target_modules": ["nowhere"]}, "second"), ({}, "value"), ({}, "a.b")):
        with pytest.raises(BitFitError):
            tuned.add_adapter(adapter, BitFitConfig(**values))
        assert state(tuned) == before
    tuned.add_adapter("second", BitFitConfig())
    assert sorted(tuned.peft_config) == ["first", "second"]


@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
def test_another_method_on_the_model_is_refused(way):
    model = lora(BERT.build())
    before = state(model)
    ways = {
        "add_adapter": lambda: model.add_adapter(BitFitConfig(), "bitfit"),
        "get_peft_model": lambda: get_peft_model(model, BitFitConfig(), adapter_name="bitfit"),
    }
    with pytest.raises(UnsupportedLayerError, match=r"query is wrapped by another PEFT method"):
        ways[way]()
    assert state(model) == before


def test_a_single_layer_is_refused():
    layer = nn.Linear(3, 4)
    before = state(layer)
    with pytest.raises(UnsupportedLayerError, match="container"):
        get_peft_model(layer, BitFitConfig())
    assert state(layer) == before


# Another base --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def change(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith(part):
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    return model


def fine_tuned(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(**BERT.inputs(), **BERT.labels()).loss.backward()
        optimizer.step()
    return model


def other_size() -> nn.Module:
    config = BERT.build().config
    config.hidden_size, config.intermediate_size = 64, 80
    return transformers.BertForSequenceClassification(config)


SIBLINGS: dict[str, Callable[[Path], nn.Module]] = {
    "other biases": lambda base: change(bert(base), "query.bias"),
    "other weights": lambda base: change(bert(base), "query.weight"),
    "other norms": lambda base: change(bert(base), "LayerNorm.weight"),
    "a fine-tuned sibling": lambda base: fine_tuned(bert(base, num_labels=3)),
    "another seed": lambda base: randomize_(BERT.build(), seed=3),
    "another size": lambda base: other_size(),
    "another architecture": lambda base: ARCHITECTURES["roberta-sequence"].build(),
    "another class": lambda base: ARCHITECTURES["bert-token"].build(),
}


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_another_base_is_refused_before_anything_changes(sibling, base, delta):
    model = SIBLINGS[sibling](base)
    for load in (
        lambda: PeftModel.from_pretrained(model, delta),
        lambda: model.load_adapter(str(delta)),
    ):
        before = state(model)
        with pytest.raises(BaseModelMismatchError, match="tensors differ"):
            load()
        assert state(model) == before
    wrapped = get_peft_model(SIBLINGS[sibling](base), BitFitConfig(), adapter_name="first")
    before = state(wrapped)
    with pytest.raises(BaseModelMismatchError, match="tensors differ"):
        wrapped.load_adapter(delta, adapter_name="second")
    assert state(wrapped) == before
    held = SIBLINGS[sibling](base)
    held.add_adapter(BitFitConfig(), "first")
    before = state(held)
    with pytest.raises(BaseModelMismatchError, match="tensors differ"):
        held.load_adapter(str(delta), adapter_name="second")
    assert state(held) == before


def test_the_message_names_the_tensors_and_the_remedy(base, delta):
    model = bert(base)
    with torch.no_grad():
        model.bert.pooler.dense.bias.add_(0.25)
    with pytest.raises(BaseModelMismatchError) as caught:
        model.load_adapter(str(delta))
    message = str(caught.value)
    for part in ("bert.pooler.dense.bias", "2.5e-01", str(base), "1 of", "base_mismatch"):
        assert part in message


def test_a_replaced_checkpoint_is_refused_where_the_base_is_loaded_by_name(base, delta, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(delta, tmp_path / "delta")
    edit(tmp_path / "delta", base_model_name_or_path=str(tmp_path / "base"))
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")
    change(BertModel.from_pretrained(base), "query.bias").save_pretrained(tmp_path / "base")
    for load in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):
        with pytest.raises(BaseModelMismatchError):
            load.from_pretrained(tmp_path / "delta")


def test_a_mismatch_can_be_overridden(base, delta):
    wanted = {k.removeprefix(PREFIX): v for k, v in load_file(delta / "adapter_model.safetensors").items()}
    for load in (lambda model: PeftModel.from_pretrained(model, delta), lambda model: model.load_adapter(str(delta))):
        model = change(bert(base), "query.bias")
        with base_mismatch("warn"), pytest.warns(UserWarning, match="tensors differ"):
            load(model)
        assert same_tensors(file_tensors(model), wanted)
        model = change(bert(base), "query.bias")
        with base_mismatch("ignore"):
            load(model)
        assert same_tensors(file_tensors(model), wanted)
    with pytest.raises(BaseModelMismatchError):
        change(bert(base), "query.bias").load_adapter(str(delta))


UNCHECKED: dict[str, Callable[[Path, Path], object]] = {
    **{name: ROUTES[name] for name in ("AutoModel", "PeftModel", "load_adapter", "second in place")},
    "into an adapter": lambda base, delta: get_peft_model(bert(base, num_labels=3), BitFitConfig()).load_adapter(
        delta, "default"
    ),
    "load_delta": lambda base, delta: load_delta(bert(base), delta),
    "a second load_delta": lambda base, delta: load_delta(load_delta(bert(base), delta.parent / "good"), delta),
    "TaskBank": lambda base, delta: TaskBank(BertModel.from_pretrained(base)).add_task("a", delta),
    "export_stock": lambda base, delta: export_stock(
        BiasDelta.from_pretrained(delta), delta.parent / "stock", base=bert(base)
    ),
}


@pytest.mark.parametrize("route", UNCHECKED)
def test_a_file_without_a_fingerprint_loads_with_a_warning(route, base, delta, tmp_path):
    shutil.copytree(delta, tmp_path / "good")
    shutil.copytree(delta, tmp_path / "delta")
    edit(tmp_path / "delta", base_fingerprint=None)
    with pytest.warns(UserWarning, match=r"no `base_fingerprint`") as caught:
        UNCHECKED[route](base, tmp_path / "delta")
    (warning,) = [w for w in caught if "base_fingerprint" in str(w.message)]
    assert warning.filename == __file__  # and not a line of the libraries
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*base_fingerprint")
        with base_mismatch("ignore"):
            UNCHECKED["PeftModel"](base, tmp_path / "delta")
        get_peft_model(bert(base), BitFitConfig())  # a new adapter has none yet


def test_the_policy_is_never_read_from_the_file(base, delta, tmp_path):
    shutil.copytree(delta, tmp_path / "delta")
    edit(tmp_path / "delta", on_base_mismatch="ignore", base_mismatch="ignore")
    with pytest.warns(UserWarning, match="Unexpected keyword"), pytest.raises(BaseModelMismatchError):
        change(bert(base), "query.bias").load_adapter(str(tmp_path / "delta"))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("there", DTYPES, ids=str)
@pytest.mark.parametrize("here", DTYPES, ids=str)
def test_a_delta_moves_between_dtypes_of_one_checkpoint(there, here, base, tmp_path):
    tuned = fill_(get_peft_model(bert(base, dtype=there), BitFitConfig()))
    tuned.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(bert(base, dtype=here), tmp_path)
    assert same_tensors(file_tensors(model), file_tensors(tuned))
    in_place_model = bert(base, dtype=here)
    in_place_model.load_adapter(str(tmp_path))
    assert same_tensors(file_tensors(in_place_model), file_tensors(tuned))
    with pytest.raises(BaseModelMismatchError):
        PeftModel.from_pretrained(randomize_(bert(base), seed=5, std=0.02).to(here), tmp_path)


def other_base(base: Path, **kwargs) -> nn.Module:
    return change(bert(base, **kwargs), "query.bias")


RELOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "load_adapter": lambda model, folder: model.load_adapter(folder, "default"),
    "load_adapter, to train on": lambda model, folder: model.load_adapter(folder, "default", is_trainable=True),
    "load_adapter, on the meta device": lambda model, folder: model.load_adapter(
        folder, "default", low_cpu_mem_usage=True
    ),
}


@pytest.mark.parametrize("way", RELOADS)
def test_another_base_is_refused_for_an_adapter_that_is_there(way, base, delta, tmp_path):
    """The adapter belongs to the model at hand; the file's tensors belong to the base that the file names."""
    model = get_peft_model(other_base(base, num_labels=3), BitFitConfig())
    before = state(model)
    with pytest.raises(BaseModelMismatchError, match="tensors differ"):
        RELOADS[way](model, delta)
    assert state(model) == before
    with base_mismatch("warn"), pytest.warns(UserWarning, match="tensors differ"):
        RELOADS[way](model, delta)
    wanted = {k.removeprefix(PREFIX): v for k, v in load_file(delta / "adapter_model.safetensors").items()}
    assert same_tensors(file_tensors(model), wanted)

    at_home = get_peft_model(bert(base, num_labels=3), BitFitConfig())
    RELOADS[way](at_home, delta)
    assert same_tensors(file_tensors(at_home), wanted)


def test_what_is_loaded_into_an_adapter_that_is_there_is_checked_like_any_other(base, delta, tmp_path):
    shutil.copytree(delta, tmp_path / "delta")
    (tmp_path / "delta" / "adapter_config.json").write_bytes(
        json.dumps(LoraConfig(target_modules=["query"]).to_dict(), default=str).encode()
    )
    model = get_peft_model(bert(base, num_labels=3), BitFitConfig())
    before = state(model)
    with pytest.raises(DeltaFormatError, match="'LORA', not 'BITFIT'"):
        model.load_adapter(tmp_path / "delta", "default")
    shutil.copy(delta / "adapter_config.json", tmp_path / "delta")
    mixture("adapter_model.safetensors")(tmp_path / "delta")
    with pytest.raises(DeltaFormatError, match="two different saves"):
        model.load_adapter(tmp_path / "delta", "default")
    assert state(model) == before


def test_loading_while_another_adapter_is_merged_sees_the_base(base, two_deltas):
    model = PeftModel.from_pretrained(bert(base), two_deltas["five"], adapter_name="five")
    model.merge_adapter()
    model.load_adapter(two_deltas["three"], adapter_name="three")
    model.unmerge_adapter()
    model.set_adapter("three")
    alone = PeftModel.from_pretrained(bert(base), two_deltas["three"])
    assert distance(outputs(model.eval(), BERT), outputs(alone.eval(), BERT)) <= 2e-6
