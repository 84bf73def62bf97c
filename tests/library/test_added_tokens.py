"""Tokens that were added for a task: their rows, and no matrix, are trained, saved and loaded by every way."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, randomize_
from hub_deltas import BASE, load_base, put_base
from peft import (
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from trainer_tester import arguments, in_order, rows, trainer_for
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    pipeline,
)
from tuner_tester import (
    PREFIX,
    base_tensors,
    config_for,
    distance,
    file_tensors,
    fill_,
    identical,
    outputs,
    same_tensors,
    state,
)
from typer.testing import CliRunner

import bitfit_hf
from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig, TaskBank, base_mismatch, load_delta
from bitfit_hf.cli.app import app
from bitfit_hf.delta.lora_export import export_stock
from bitfit_hf.errors import (
    AddedTokensError,
    BaseModelMismatchError,
    ConfigError,
    DeltaFormatError,
    DeltaMismatchError,
    MergeError,
    StockExportError,
    TaskBankError,
)
from bitfit_hf.storage.files import digest
from bitfit_hf.storage.fingerprint import decode
from bitfit_hf.trainer.checkpoints import check_resumable

VOCABULARY, ADDED, WIDTH = 64, 3, 32
# By the name of the architecture: the names in a file of what belongs to the added tokens.
ARCHS = {
    "bert-sequence": ["bert.embeddings.word_embeddings.added_rows"],
    "t5-sequence": ["transformer.shared.added_rows"],
    "bart-sequence": ["model.shared.added_rows"],
    "bert-masked_lm": ["bert.embeddings.word_embeddings.added_rows", "cls.predictions.decoder.added_bias"],
    "roberta-masked_lm": ["lm_head.decoder.added_bias", "roberta.embeddings.word_embeddings.added_rows"],
    "gpt2-causal_lm": ["transformer.wte.added_rows"],
    "qwen2-causal_lm": ["lm_head.added_rows", "model.embed_tokens.added_rows"],
    "bart-seq2seq_lm": ["model.shared.added_rows"],
}
MERGEABLE = [name for name in ARCHS if not ARCHITECTURES[name].bias_free]
LANGUAGE_MODELS = [name for name in ARCHS if name.endswith("lm")]


class Resized(Architecture):
    """An architecture whose inputs hold every added token."""

    def inputs(self, batch_size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
        inputs = super().inputs(batch_size, seed)
        for name in ("input_ids", "decoder_input_ids"):
            if name in inputs:
                inputs[name][:, 1 : 1 + ADDED] = torch.arange(VOCABULARY, VOCABULARY + ADDED)
        return inputs


def resized(name: str) -> Resized:
    return Resized(**vars(ARCHITECTURES[name]))


BERT = resized("bert-sequence")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[str], Path]:
    """Checkpoints by architecture, without the new head of a classifier."""
    folder = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        if not (folder / name).exists():
            model = randomize_(ARCHITECTURES[name].build())
            has_head = name.endswith("-sequence") and name.split("-")[0] not in ("t5", "bart")
            (model.base_model if has_head else model).save_pretrained(folder / name)
        return folder / name

    return base


def load(name: str, base: Path) -> nn.Module:
    """The stock model, as a user loads it."""
    cls = type(ARCHITECTURES[name].build())
    labels = {"num_labels": 3} if name.endswith("-sequence") else {}
    return cls.from_pretrained(base, **labels).eval()


def enlarged(name: str, base: Path, count: int = ADDED) -> nn.Module:
    """The stock model after the user has added tokens."""
    model = load(name, base)
    model.resize_token_embeddings(VOCABULARY + count)
    return model.eval()


def tuned(name: str, base: Path, *, seed: int = 1, count: int = ADDED, **config: Any) -> PeftModel:
    """A tuned model with added tokens, as if it had been trained."""
    model = get_peft_model(enlarged(name, base, count), config_for(ARCHITECTURES[name], **config))
    return fill_(model, seed=seed).eval()


def by_hand(name: str, base: Path, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A stock model that computes what the tuned one should; knows nothing of the library but its files."""
    model = enlarged(name, base)
    with torch.no_grad():
        for key, value in tensors.items():
            path, _, last = key.rpartition(".")
            module = model.get_submodule(path)
            if last == "added_rows":
                module.weight[VOCABULARY:] = value
            elif last == "added_bias":
                module.bias[VOCABULARY:] = value
            elif last.startswith("bitfit_") and getattr(module, last.removeprefix("bitfit_"), None) is None:
                module.register_parameter(last.removeprefix("bitfit_"), nn.Parameter(value.clone()))
            elif last.startswith("bitfit_"):
                getattr(module, last.removeprefix("bitfit_"))[: len(value)] += value
            else:
                getattr(module, last).copy_(value)
    return model


class Saved:
    """What a tuned model with added tokens has left behind: its files, and what it answered."""

    def __init__(self, name: str, base: Path, folder: Path) -> None:
        model = tuned(name, base)
        self.folder = folder
        self.wanted = outputs(model, resized(name))
        self.tensors = file_tensors(model)
        model.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory) -> Callable[[str], Saved]:
    """One per architecture, made once; tests do not change it."""
    folder = tmp_path_factory.mktemp("deltas")
    made: dict[str, Saved] = {}

    def delta(name: str) -> Saved:
        if name not in made:
            made[name] = Saved(name, bases(name), folder / name)
        return made[name]

    return delta


# Training and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHS)
def test_the_new_rows_and_only_they_are_in_the_file(saved, name):
    tensors = load_file(saved(name).folder / "adapter_model.safetensors")
    config = json.loads((saved(name).folder / "adapter_config.json").read_text())
    added = sorted(key for key in tensors if "added_" in key)
    assert added == [PREFIX + key for key in ARCHS[name]]
    for key in added:
        assert tensors[key].dtype == torch.float32
        assert tensors[key].shape == ((ADDED, WIDTH) if key.endswith("rows") else (ADDED,))
    assert not any(VOCABULARY + ADDED in tensor.shape for tensor in tensors.values()), "an embedding matrix"
    assert config["weights_digest"] == digest(tensors)
    assert (config["added_tokens"], config["base_vocab_size"]) == (ADDED, VOCABULARY)


@pytest.mark.parametrize("name", ARCHS)
def test_every_way_of_saving_gives_the_same_tensors(bases, saved, tmp_path, name):
    model = tuned(name, bases(name))
    BiasDelta.from_model(model).save_pretrained(tmp_path / "delta")
    placed = enlarged(name, bases(name))
    placed.add_adapter(config_for(ARCHITECTURES[name]))
    fill_(placed).save_pretrained(tmp_path / "in place")
    folders = (tmp_path / "delta", tmp_path / "in place")
    ways = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    ways.append(get_peft_model_state_dict(model, save_embedding_layers=True))
    wanted = dict(sorted(load_file(saved(name).folder / "adapter_model.safetensors").items()))
    assert len(wanted) > len(ARCHS[name])
    assert all(same_tensors(dict(sorted(found.items())), wanted) for found in ways)


@pytest.mark.parametrize("name", ARCHS)
def test_at_step_0_nothing_has_changed(bases, name):
    arch = resized(name)
    model = enlarged(name, bases(name))
    before = outputs(model, arch)
    model = get_peft_model(model, config_for(ARCHITECTURES[name])).eval()
    after = outputs(model, arch)
    if name in LANGUAGE_MODELS:  # the scores of the added tokens are a smaller matrix product, which rounds otherwise
        assert distance(before, after) < 2e-6
        first = [[tensor[..., :VOCABULARY] for tensor in tensors] for tensors in (before, after)]
        assert identical(*first)
    else:
        assert identical(before, after)


@pytest.mark.parametrize("name", ARCHS)
def test_a_tuned_model_computes_what_its_file_says(bases, saved, name):
    stock = by_hand(name, bases(name), saved(name).tensors)
    assert distance(saved(name).wanted, outputs(stock, resized(name))) < 2e-6


@pytest.mark.parametrize("name", ARCHS)
def test_a_step_of_training_changes_the_new_rows_and_leaves_the_others(bases, name):
    arch = resized(name)
    model = get_peft_model(enlarged(name, bases(name)), config_for(arch)).train()
    before = base_tensors(model)
    added = {key: tensor for key, tensor in model.named_parameters() if "added_" in key}
    assert len(added) == len(ARCHS[name])
    assert all(tensor.requires_grad for tensor in added.values())
    start = {key: tensor.detach().clone() for key, tensor in added.items()}
    optimizer = torch.optim.SGD(bitfit_hf.optimizer_groups(model, 0.1))
    model(**arch.inputs(), **arch.labels()).loss.backward()
    optimizer.step()
    assert same_tensors(before, base_tensors(model))
    assert all((tensor != start[key]).any() for key, tensor in added.items())


@pytest.mark.parametrize("name", ARCHS)
def test_the_gradient_is_that_of_the_rows_in_the_stock_model(bases, name):
    """Of a matrix that is tied to the output layer, from both of its uses."""
    arch = resized(name)
    stock = enlarged(name, bases(name))
    model = get_peft_model(copy.deepcopy(stock), config_for(arch)).eval()
    for each in (stock, model):
        each(**arch.inputs(), **arch.labels()).loss.backward()
    parameters = dict(stock.named_parameters(remove_duplicate=False))
    found = {key: tensor.grad for key, tensor in model.named_parameters() if "added_" in key}
    assert len(found) == len(ARCHS[name])
    for key, gradient in found.items():
        own = key.removeprefix(PREFIX).replace("modules_to_save.default.added_rows", "weight")
        wanted = parameters[own.replace("modules_to_save.default.added_bias", "bias")].grad[VOCABULARY:]
        assert wanted.abs().max() > 1e-5
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rows_stay_float32_on_a_half_precision_base(bases, dtype):
    name = "gpt2-causal_lm"
    arch = resized(name)
    model = enlarged(name, bases(name)).to(dtype)
    before = outputs(model, arch)
    model = get_peft_model(model, BitFitConfig()).eval()
    rows = model.get_parameter(f"{PREFIX}transformer.wte.modules_to_save.default.added_rows")
    assert rows.dtype == torch.float32
    after = outputs(model, arch)
    assert after[0].dtype == dtype
    assert identical(*[[tensor[..., :VOCABULARY] for tensor in tensors] for tensors in (before, after)])
    assert distance(before, after) < 1e-2
    model.to(torch.float64)
    assert rows.dtype == torch.float32


def test_code_that_takes_the_matrix_reads_the_adapters_rows(bases):
    model = tuned("gpt2-causal_lm", bases("gpt2-causal_lm"))
    rows = file_tensors(model)["transformer.wte.added_rows"]
    for layer in (model.get_input_embeddings(), model.get_base_model().get_output_embeddings()):
        assert layer.weight.shape == (VOCABULARY + ADDED, WIDTH)
        assert torch.equal(layer.weight[VOCABULARY:], rows)
    with model.disable_adapter():
        assert not torch.equal(model.get_input_embeddings().weight[VOCABULARY:], rows)


def test_the_base_that_is_recorded_is_the_one_without_the_new_rows(bases):
    """Fingerprint, places of the biases and number of parameters are those of a delta without added tokens."""
    name = "bert-masked_lm"
    plain = get_peft_model(load(name, bases(name)), BitFitConfig()).peft_config["default"]
    config = tuned(name, bases(name)).peft_config["default"]
    assert config.base_fingerprint == plain.base_fingerprint
    assert any(VOCABULARY in entry.shape for entry in decode(config.base_fingerprint).values())
    assert config.bias_layout == plain.bias_layout
    assert config.base_num_parameters == plain.base_num_parameters
    assert config.modules_to_save is None


@pytest.mark.parametrize("terms", ["query", "all"])
def test_the_entries_of_an_output_bias_are_kept_whatever_is_tuned(bases, tmp_path, terms):
    name = "roberta-masked_lm"
    model = tuned(name, bases(name), bias_terms=terms)
    tensors = file_tensors(model)
    assert tensors["lm_head.decoder.added_bias"].shape == (ADDED,)
    assert ("lm_head.decoder.bitfit_bias" in tensors) == (terms == "all")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(name, bases(name)), tmp_path).eval()
    assert distance(outputs(loaded, resized(name)), outputs(model, resized(name))) < 2e-6


# Loading -------------------------------------------------------------------------------------------------------------


def auto(name: str, base: Path, delta: Path) -> nn.Module:
    return type(ARCHITECTURES[name].build()).from_pretrained(delta)


def in_place(name: str, base: Path, delta: Path) -> nn.Module:
    model = load(name, base)
    model.load_adapter(str(delta))
    return model


def second(name: str, base: Path, delta: Path) -> nn.Module:
    model = PeftModel.from_pretrained(load(name, base), delta, adapter_name="first")
    fill_(model, "first", seed=9)
    model.load_adapter(delta, adapter_name="second")
    model.set_adapter("second")
    return model


def onto_enlarged(name: str, base: Path, delta: Path) -> nn.Module:
    return PeftModel.from_pretrained(enlarged(name, base), delta)


LOADING = {
    "PeftModel": lambda name, base, delta: PeftModel.from_pretrained(load(name, base), delta),
    "PeftModel, low memory": lambda name, base, delta: PeftModel.from_pretrained(
        load(name, base), delta, low_cpu_mem_usage=True
    ),
    "AutoModel": auto,
    "load_adapter": in_place,
    "second adapter": second,
    "resized by the user": onto_enlarged,
    "load_delta": lambda name, base, delta: load_delta(load(name, base), delta),
    "load_delta, resized by the user": lambda name, base, delta: load_delta(enlarged(name, base), delta),
    "merged": lambda name, base, delta: PeftModel.from_pretrained(load(name, base), delta).merge_and_unload(),
}


@pytest.mark.parametrize("way", LOADING)
@pytest.mark.parametrize("name", ARCHS)
def test_every_way_of_loading_resizes_the_base_and_gives_the_same_outputs(bases, saved, name, way):
    if way == "merged" and name not in MERGEABLE:
        way = "PeftModel"
    delta = saved(name)
    loaded = LOADING[way](name, bases(name), delta.folder).eval()
    assert distance(outputs(loaded, resized(name)), delta.wanted) < 2e-6
    assert loaded.config.vocab_size == VOCABULARY + ADDED
    assert loaded.get_input_embeddings().weight.shape[0] == VOCABULARY + ADDED


def test_resizing_draws_no_random_numbers(bases, saved):
    base, folder = load("gpt2-causal_lm", bases("gpt2-causal_lm")), saved("gpt2-causal_lm").folder
    before = torch.random.get_rng_state()
    load_delta(base, folder)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter"])
@pytest.mark.parametrize("name", ARCHS)
def test_a_loaded_model_saves_the_same_delta_again(bases, saved, tmp_path, name, way):
    LOADING[way](name, bases(name), saved(name).folder).save_pretrained(tmp_path)
    again = BiasDelta.from_pretrained(tmp_path)
    assert again.digest == BiasDelta.from_pretrained(saved(name).folder).digest
    assert again.config.added_tokens == ADDED


@pytest.mark.parametrize("name", ["bert-sequence", "bert-masked_lm"])
def test_a_file_is_loaded_into_an_adapter_that_is_there(bases, saved, name):
    """As a Trainer resumes and loads its best model: the base is compared without the rows of added tokens."""
    model = tuned(name, bases(name), seed=7)
    check_resumable(model, "default", saved(name).folder)
    model.load_adapter(saved(name).folder, "default")
    assert same_tensors(file_tensors(model), saved(name).tensors)


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_merged_model_is_a_stock_checkpoint(bases, saved, tmp_path, name):
    tuned(name, bases(name)).merge_and_unload().save_pretrained(tmp_path)
    again = type(ARCHITECTURES[name].build()).from_pretrained(tmp_path).eval()
    assert distance(outputs(again, resized(name)), saved(name).wanted) < 2e-6


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("own", [False, True], ids=["resized here", "resized by the user"])
def test_unloading_and_removing_give_the_base_back(bases, saved, name, own):
    base = (enlarged if own else load)(name, bases(name))
    before, attributes = base_tensors(base), set(vars(base))
    back = PeftModel.from_pretrained(base, saved(name).folder).unload()
    assert same_tensors(before, base_tensors(back))
    assert back.config.vocab_size == len(back.get_input_embeddings().weight)
    assert set(vars(back)) == attributes
    delta = BiasDelta.from_pretrained(saved(name).folder)
    delta.apply_(base)
    assert not same_tensors(before, base_tensors(base))
    delta.remove_(base)
    assert same_tensors(before, base_tensors(base))
    assert base.config.vocab_size == len(base.get_input_embeddings().weight)


def test_the_other_rows_of_a_larger_base_are_left_alone(bases, saved):
    """A base whose user has added more tokens than the delta has: its own rows come after."""
    name = "bert-sequence"
    delta = saved(name)
    base = enlarged(name, bases(name), ADDED + 2)
    last = base.get_input_embeddings().weight[-2:].clone()
    for loaded in (PeftModel.from_pretrained(copy.deepcopy(base), delta.folder), load_delta(base, delta.folder)):
        assert distance(outputs(loaded.eval(), BERT), delta.wanted) < 2e-6
        assert torch.equal(loaded.get_input_embeddings().weight[-2:], last)


GIVEN_A_BASE = {
    "PeftModel": PeftModel.from_pretrained,
    "load_adapter": lambda base, folder: base.load_adapter(str(folder)),
    "load_delta": load_delta,
}


@pytest.mark.parametrize("name", ["bert-sequence", "bert-masked_lm"])
def test_another_base_is_refused_and_left_as_it_is(bases, saved, name):
    other = randomize_(load(name, bases(name)), seed=5)
    before = state(other)
    with pytest.raises(BaseModelMismatchError):
        PeftModel.from_pretrained(other, saved(name).folder)
    with pytest.raises(BaseModelMismatchError):
        load_delta(other, saved(name).folder)
    assert state(other) == before
    with base_mismatch("ignore"):
        assert PeftModel.from_pretrained(other, saved(name).folder).config.vocab_size == VOCABULARY + ADDED


@pytest.mark.parametrize("way", GIVEN_A_BASE)
def test_a_smaller_base_is_refused(bases, saved, way):
    small = load("bert-sequence", bases("bert-sequence"))
    small.resize_token_embeddings(VOCABULARY - 2)
    with pytest.raises(AddedTokensError, match="has only 62"):
        GIVEN_A_BASE[way](small, saved("bert-sequence").folder)


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


BROKEN = {
    "another count": ({"added_tokens": 5}, None, (DeltaMismatchError, DeltaFormatError)),
    "no count": ({"added_tokens": None}, None, (DeltaMismatchError, DeltaFormatError)),
    "no start": ({"base_vocab_size": None}, None, ConfigError),
    "another start": ({"base_vocab_size": VOCABULARY + 5}, None, (AddedTokensError, BaseModelMismatchError)),
    "a huge count": ({"added_tokens": 10**9}, None, ConfigError),
    "a count of another type": ({"added_tokens": "3"}, None, ConfigError),
    "no rows": (
        {},
        lambda t: {k: v for k, v in t.items() if "added" not in k},
        (DeltaMismatchError, DeltaFormatError),
    ),
    "a matrix": (
        {},
        lambda t: {**t, f"{PREFIX}bert.embeddings.word_embeddings.weight": torch.zeros(VOCABULARY + ADDED, WIDTH)},
        (DeltaMismatchError, DeltaFormatError),
    ),
    "rows of another width": (
        {},
        lambda t: {k: v[:, :-1] if "added" in k else v for k, v in t.items()},
        (DeltaMismatchError, DeltaFormatError),
    ),
    "not finite": ({}, lambda t: {k: v * float("nan") if "added" in k else v for k, v in t.items()}, DeltaFormatError),
}


@pytest.mark.parametrize("way", GIVEN_A_BASE)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_and_leaves_the_base_as_it_is(bases, saved, tmp_path, case, way):
    values, change, error = BROKEN[case]
    name = "bert-sequence"
    shutil.copytree(saved(name).folder, tmp_path, dirs_exist_ok=True)
    if change is not None:
        file = tmp_path / "adapter_model.safetensors"
        tensors = {key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}
        save_file(tensors, file)
        values = {**values, "weights_digest": digest(tensors)}
    edit_config(tmp_path, **values)
    base = load(name, bases(name))
    before = state(base)
    with pytest.raises(error):
        GIVEN_A_BASE[way](base, tmp_path)
    assert state(base) == before


# Tokenizer and pipeline ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    """A base with a tokenizer of its size, and a delta with the tokenizer that has two words more."""
    base, delta = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("delta")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(VOCABULARY - 5))]
    (base / "words.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(base / "words.txt"), do_lower_case=True)
    (base / "words.txt").unlink()
    tokenizer.save_pretrained(base)
    randomize_(ARCHITECTURES["bert-sequence"].build()).base_model.save_pretrained(base)
    assert tokenizer.add_tokens(["bitfit", "peft"]) == 2
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2, id2label={0: "no", 1: "yes"})
    model.resize_token_embeddings(len(tokenizer))
    fill_(get_peft_model(model, BitFitConfig(task_type="SEQ_CLS")), std=0.5).save_pretrained(delta)
    tokenizer.save_pretrained(delta)
    return base, delta


def test_a_pipeline_and_auto_peft_know_the_new_words(texts):
    base, delta = texts
    sentence = "bitfit word3 peft"
    tokenizer = AutoTokenizer.from_pretrained(delta)
    encoded = tokenizer(sentence, return_tensors="pt")
    assert {VOCABULARY, VOCABULARY + 1} <= set(encoded["input_ids"][0].tolist())
    stock = AutoModelForSequenceClassification.from_pretrained(base)
    wanted = PeftModel.from_pretrained(stock, delta).eval()(**encoded).logits
    auto_peft = AutoPeftModelForSequenceClassification.from_pretrained(delta).eval()
    assert (auto_peft(**encoded).logits - wanted).abs().max() < 2e-6
    # transformers' pipeline takes the base's tokenizer unless told otherwise.
    answer = pipeline("text-classification", model=str(delta), tokenizer=str(delta))(sentence)[0]
    assert answer["label"] == ("no", "yes")[int(wanted.argmax())]
    assert answer["score"] == pytest.approx(wanted.softmax(-1).max().item(), abs=1e-5)


def test_the_command_line_merges_it(texts, tmp_path):
    base, delta = texts
    result = CliRunner().invoke(app, ["merge", str(base), str(delta), "-o", str(tmp_path / "merged"), "--json"])
    assert result.exit_code == 0, result.output
    encoded = AutoTokenizer.from_pretrained(tmp_path / "merged")("bitfit word3 peft", return_tensors="pt")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    wanted = AutoModelForSequenceClassification.from_pretrained(delta).eval()
    assert len(merged.get_input_embeddings().weight) == VOCABULARY + 2
    assert (merged(**encoded).logits - wanted(**encoded).logits).abs().max() < 2e-6


# Several adapters ----------------------------------------------------------------------------------------------------


def test_two_classifiers_with_vocabularies_of_their_own_share_a_base(bases, tmp_path):
    name = "bert-sequence"
    sizes = {"three": ADDED, "five": 5, "none": 0}
    wanted = {}
    for seed, (adapter, count) in enumerate(sizes.items(), start=1):
        model = tuned(name, bases(name), seed=seed, count=count)
        wanted[adapter] = outputs(model, BERT if count else ARCHITECTURES[name])
        model.save_pretrained(tmp_path / adapter)
    for order in (["three", "five", "none"], ["none", "three", "five"], ["five", "none", "three"]):
        model = PeftModel.from_pretrained(load(name, bases(name)), tmp_path / order[0], adapter_name=order[0])
        for adapter in order[1:]:
            model.load_adapter(tmp_path / adapter, adapter_name=adapter)
        model.eval()
        for adapter in [*order, *order]:
            model.set_adapter(adapter)
            found = outputs(model, BERT if sizes[adapter] else ARCHITECTURES[name])
            assert distance(found, wanted[adapter]) < 2e-6, (order, adapter)
            saved = {key for key in get_peft_model_state_dict(model, adapter_name=adapter) if "added" in key}
            assert len(saved) == (1 if sizes[adapter] else 0)


def test_two_adapters_in_place_are_switched_by_transformers(bases, tmp_path):
    name = "bert-sequence"
    for seed, (adapter, count) in enumerate({"three": ADDED, "none": 0}.items(), start=1):
        tuned(name, bases(name), seed=seed, count=count).save_pretrained(tmp_path / adapter)
    model = load(name, bases(name))
    model.load_adapter(str(tmp_path / "three"), "three")
    with_rows = outputs(model.eval(), BERT)
    model.load_adapter(str(tmp_path / "none"), "none")
    model.set_adapter("none")
    without = outputs(model, BERT)
    assert distance(with_rows, without) > 1e-3
    model.set_adapter("three")
    assert identical(outputs(model, BERT), with_rows)
    model.disable_adapters()
    assert distance(outputs(model, BERT), with_rows) > 1e-3
    model.enable_adapters()
    assert identical(outputs(model, BERT), with_rows)
    model.delete_adapter("three")
    assert identical(outputs(model, BERT), without)


def test_a_batch_may_mix_adapters_with_and_without_added_tokens(bases, tmp_path):
    for name in ("bert-sequence", "bart-sequence"):
        arch = resized(name)
        model = get_peft_model(enlarged(name, bases(name)), BitFitConfig(), adapter_name="a").eval()
        model.add_adapter("b", BitFitConfig())
        fill_(fill_(model, "a", seed=1), "b", seed=2)
        names = ["a", "b", "__base__", "b"]
        mixed = outputs(model, arch, batch_size=4, adapter_names=names)[0]
        for i, adapter in enumerate(names):
            if adapter == "__base__":
                with model.disable_adapter():
                    alone = outputs(model, arch, batch_size=4)[0]
            else:
                model.set_adapter(adapter)
                alone = outputs(model, arch, batch_size=4)[0]
            assert (mixed[i] - alone[i]).abs().max() < 2e-6


def test_a_mixed_batch_of_a_language_model(bases):
    name = "gpt2-causal_lm"
    model = get_peft_model(enlarged(name, bases(name)), BitFitConfig(), adapter_name="a").eval()
    model.add_adapter("b", BitFitConfig())
    fill_(fill_(model, "a", seed=1), "b", seed=2)
    mixed = outputs(model, resized(name), batch_size=2, adapter_names=["b", "a"])[0]
    for i, adapter in enumerate(["b", "a"]):
        model.set_adapter(adapter)
        assert (mixed[i] - outputs(model, resized(name), batch_size=2)[0][i]).abs().max() < 2e-6


@pytest.mark.parametrize("name", ["gpt2-causal_lm", "bert-masked_lm"])
def test_a_language_model_has_one_vocabulary(bases, tmp_path, name):
    for count in (0, 2, ADDED):
        tuned(name, bases(name), count=count).save_pretrained(tmp_path / str(count))
    first = PeftModel.from_pretrained(load(name, bases(name)), tmp_path / str(ADDED), adapter_name="first")
    before = state(first)
    for other in ("0", "2"):
        with pytest.raises(AddedTokensError, match="one vocabulary"):
            first.load_adapter(tmp_path / other, adapter_name="second")
    assert state(first) == before
    plain = PeftModel.from_pretrained(load(name, bases(name)), tmp_path / "0", adapter_name="first")
    with pytest.raises(AddedTokensError, match="one vocabulary"):
        plain.load_adapter(tmp_path / "2", adapter_name="second")
    first.load_adapter(tmp_path / str(ADDED), adapter_name="second")


def test_adapters_with_rows_of_their_own_are_active_one_at_a_time(bases):
    model = get_peft_model(enlarged("bert-masked_lm", bases("bert-masked_lm")), BitFitConfig(), adapter_name="a")
    model.add_adapter("b", BitFitConfig())
    with pytest.raises(bitfit_hf.AdapterNameError, match="added tokens"):
        model.base_model.set_adapter(["a", "b"])


def test_a_weighted_adapter_keeps_the_first_ones_rows(bases):
    model = get_peft_model(enlarged("bert-sequence", bases("bert-sequence")), BitFitConfig(), adapter_name="a")
    model.add_adapter("b", BitFitConfig())
    fill_(fill_(model, "a", seed=1), "b", seed=2)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    key = ARCHS["bert-sequence"][0]
    assert torch.equal(file_tensors(model, "c")[key], file_tensors(model, "a")[key])


def test_a_weighted_adapter_loses_no_rows(bases, saved, tmp_path):
    name = "bert-sequence"
    tuned(name, bases(name), count=0).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(name, bases(name)), tmp_path, adapter_name="plain")
    model.load_adapter(saved(name).folder, adapter_name="tokens")
    with pytest.raises(DeltaMismatchError, match="name that one first"):
        model.add_weighted_adapter(["plain", "tokens"], [0.5, 0.5], "both")
    model.add_weighted_adapter(["tokens", "plain"], [0.5, 0.5], "both")
    assert torch.equal(file_tensors(model, "both")[ARCHS[name][0]], saved(name).tensors[ARCHS[name][0]])
    tuned(name, bases(name), count=5).save_pretrained(tmp_path / "five")
    model.load_adapter(tmp_path / "five", adapter_name="five")
    model.add_weighted_adapter(["tokens", "five"], [0.5, 0.5], "three")
    assert torch.equal(file_tensors(model, "three")[ARCHS[name][0]], saved(name).tensors[ARCHS[name][0]])


# The value -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-sequence", "roberta-masked_lm"])
def test_arithmetic_keeps_the_rows_like_a_head(bases, name):
    with_rows = BiasDelta.from_model(tuned(name, bases(name)))
    plain = BiasDelta.from_model(tuned(name, bases(name), count=0, seed=2))
    other = BiasDelta.from_model(tuned(name, bases(name), seed=3))
    size = WIDTH * ADDED + (ADDED if name in LANGUAGE_MODELS else 0)
    assert sorted(with_rows.added) == ARCHS[name]
    assert with_rows.num_parameters() == plain.num_parameters()
    assert with_rows.num_parameters(head=True) == plain.num_parameters(head=True) + size
    for result in (with_rows * 0.5, with_rows + plain, plain - with_rows):
        assert same_tensors(result.added, with_rows.added)
        assert result.config.added_tokens == ADDED
        assert result.apply_(load(name, bases(name))).config.vocab_size == VOCABULARY + ADDED
    assert not (plain * 2).added
    with pytest.raises(DeltaMismatchError, match="added tokens"):
        with_rows + other


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_delta_is_extracted_from_two_checkpoints(bases, name):
    delta = BiasDelta.from_model(tuned(name, bases(name)))
    merged = tuned(name, bases(name)).merge_and_unload()
    found = BiasDelta.from_models(load(name, bases(name)), merged)
    assert sorted(found.added) == ARCHS[name]
    assert all(torch.equal(found.added[key], delta.added[key]) for key in found.added)
    assert found.config.added_tokens == ADDED
    again = found.apply_(load(name, bases(name)))
    assert distance(outputs(again, resized(name)), outputs(merged, resized(name))) < 2e-6
    with torch.no_grad():
        merged.get_input_embeddings().weight[0] += 1
    with pytest.raises(DeltaMismatchError):
        BiasDelta.from_models(load(name, bases(name)), merged)


def test_several_deltas_on_one_model(bases):
    name = "bert-sequence"
    base = load(name, bases(name))
    before = base_tensors(base)
    deltas = [
        BiasDelta.from_model(tuned(name, bases(name), seed=seed, count=count))
        for seed, count in enumerate((ADDED, 0, 5), start=1)
    ]
    for delta in deltas:
        delta.apply_(base)
    rows = base.get_input_embeddings().weight
    assert len(rows) == VOCABULARY + 5
    assert torch.equal(rows[VOCABULARY:], deltas[2].added[ARCHS[name][0]])
    deltas[2].remove_(base)
    assert torch.equal(rows[VOCABULARY : VOCABULARY + ADDED], deltas[0].added[ARCHS[name][0]])
    deltas[0].remove_(base)
    assert len(rows) == VOCABULARY
    deltas[1].remove_(base)
    assert same_tensors(base_tensors(base), before)


def test_deltas_with_and_without_added_tokens_on_one_language_model(bases):
    """Of an output bias with entries for added tokens, `b_0` is the part that the checkpoint has."""
    name = "bert-masked_lm"
    first, plain, last = (
        BiasDelta.from_model(tuned(name, bases(name), seed=seed, count=count))
        for seed, count in enumerate((ADDED, 0, ADDED), start=1)
    )
    base = load(name, bases(name))
    before = base_tensors(base)
    b_0 = before["cls.predictions.bias"]
    for deltas in ((first, plain, last), (plain, first, last)):
        for delta in deltas:
            delta.apply_(base)
        bias = base.cls.predictions.decoder.bias
        total = b_0
        for delta in deltas:
            total = total + delta["cls.predictions.decoder.bias"]
        assert torch.equal(bias[:VOCABULARY], total)
        assert torch.equal(bias[VOCABULARY:], last.added["cls.predictions.decoder.added_bias"])
        last.remove_(base)
        assert torch.equal(bias[VOCABULARY:], first.added["cls.predictions.decoder.added_bias"])
        first.remove_(base)
        assert len(bias) == base.config.vocab_size == VOCABULARY
        plain.remove_(base)
        assert same_tensors(base_tensors(base), before)


def test_deltas_on_one_language_model_have_one_vocabulary(bases):
    name = "bert-masked_lm"
    three, five = (BiasDelta.from_model(tuned(name, bases(name), count=count)) for count in (ADDED, 5))
    for first, second in ((three, five), (five, three)):
        base = first.apply_(load(name, bases(name)))
        before = state(base)
        with pytest.raises(AddedTokensError, match="one vocabulary"):
            second.apply_(base)
        assert state(base) == before
        first.remove_(base)
        assert base.config.vocab_size == VOCABULARY


def test_deltas_of_bases_with_other_vocabularies_are_not_applied_together(bases):
    name = "bert-sequence"
    delta = BiasDelta.from_model(tuned(name, bases(name)))
    other = copy.deepcopy(delta)
    other.config.base_vocab_size = VOCABULARY + 1
    base = delta.apply_(load(name, bases(name)))
    with pytest.raises(AddedTokensError, match=r"base of 65.*one of 64"):
        other.apply_(base)


def test_a_state_dict_of_the_base_between_two_deltas(bases):
    """The rows in it are the user's; those that it leaves alone are taken out with the delta that is gone."""
    name = "bert-masked_lm"
    base = enlarged(name, bases(name))
    own = copy.deepcopy(base.state_dict())
    first, second = (BiasDelta.from_model(tuned(name, bases(name), seed=seed)) for seed in (1, 2))
    first.apply_(base)
    base.load_state_dict(own)
    second.apply_(base)
    assert torch.equal(base.get_input_embeddings().weight[VOCABULARY:], second.added[ARCHS[name][0]])
    second.remove_(base)
    assert same_tensors(base.state_dict(), own)
    first.apply_(base)
    biases = {key: tensor for key, tensor in own.items() if key.endswith("bias")}
    base.load_state_dict(biases, strict=False)
    second.apply_(base)
    assert torch.equal(base.get_input_embeddings().weight[VOCABULARY:], second.added[ARCHS[name][0]])
    second.remove_(base)
    assert same_tensors(base.state_dict(), own)


def test_room_for_tokens_in_embeddings_that_are_offloaded_is_refused(bases, saved):
    base = load("bert-sequence", bases("bert-sequence"))
    embeddings = base.get_input_embeddings()
    embeddings.weight = nn.Parameter(torch.empty_like(embeddings.weight, device="meta"))
    with pytest.raises(AddedTokensError, match="offloaded"):
        load_delta(base, saved("bert-sequence").folder)
    with pytest.raises(DeltaMismatchError, match="not applied"):
        BiasDelta.from_pretrained(saved("bert-sequence").folder).remove_(base)


def test_a_bank_refuses_it_and_says_why(texts):
    base, delta = texts
    bank = TaskBank(BertModel.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    with pytest.raises(TaskBankError, match="2 added tokens"):
        bank.add_task("task", delta)
    assert bank.tasks == []


# The Hub, and stock libraries ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*(target_modules|fan_in_fan_out|tie_word_embeddings|tied)")
def test_a_pushed_delta_brings_its_tokens_along(hub, hub_env):
    commit = put_base(hub)
    model = load_base()
    model.resize_token_embeddings(VOCABULARY + ADDED)
    model = fill_(get_peft_model(model, BitFitConfig())).eval()
    wanted = outputs(model, BERT)
    bitfit_hf.push_to_hub(model, "alice/ours", stock=True)
    model.push_to_hub("alice/stock-way")
    for repo in ("alice/ours", "alice/stock-way"):
        files = hub.files(repo)
        assert len(files["adapter_model.safetensors"]) < VOCABULARY * WIDTH * 4
        loaded = AutoModelForSequenceClassification.from_pretrained(repo).eval()
        assert distance(outputs(loaded, BERT), wanted) < 2e-6
        assert distance(outputs(load_delta(load_base(), repo).eval(), BERT), wanted) < 2e-6
    assert BiasDelta.from_pretrained("alice/ours").config.revision == commit
    card = hub.files("alice/ours")["README.md"].decode()
    assert f"the embeddings of {ADDED} added tokens" in card
    assert f"| rows of {ADDED} added tokens | | {ADDED * WIDTH} |" in card
    stock = AutoModelForSequenceClassification.from_pretrained(BASE)
    stock.resize_token_embeddings(VOCABULARY + ADDED)
    stock = PeftModel.from_pretrained(stock, "alice/ours", subfolder="stock").eval()
    assert stock.peft_config["default"].peft_type == "LORA"
    assert distance(outputs(stock, BERT), wanted) < 2e-6


def test_a_language_model_with_added_tokens_has_no_stock_export(bases, tmp_path):
    for name in LANGUAGE_MODELS:
        with pytest.raises(StockExportError, match="more than one layer"):
            export_stock(tuned(name, bases(name)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_bitfit_inspect_counts_them(saved):
    result = CliRunner().invoke(app, ["inspect", str(saved("bert-masked_lm").folder), "--json"])
    values = json.loads(result.output)
    assert values["added_tokens"] == ADDED
    assert values["parameters"]["tokens"] == ADDED * (WIDTH + 1)
    assert (values["parameters"]["head"], values["head"]) == (0, {})
    assert values["parameters"]["total"] == values["parameters"]["biases"] + ADDED * (WIDTH + 1)
    assert "added tokens" in CliRunner().invoke(app, ["inspect", str(saved("bert-masked_lm").folder)]).output


# With the Trainer ----------------------------------------------------------------------------------------------------


def examples(count: int = 16) -> list[dict[str, torch.Tensor]]:
    batch = rows(count)
    for i, example in enumerate(batch):
        example["input_ids"][1] = VOCABULARY + i % ADDED
    return batch


@pytest.mark.parametrize("wrapped", [False, True], ids=["in place", "wrapped"])
def test_a_trainer_trains_saves_and_resumes(bases, tmp_path, wrapped):
    name = "bert-sequence"

    def trainer(folder: str, **values: Any) -> Any:
        torch.manual_seed(0)
        model = enlarged(name, bases(name))
        with torch.no_grad():  # the resize is random
            model.get_input_embeddings().weight[VOCABULARY:] = 0.1
        if wrapped:
            model = get_peft_model(model, BitFitConfig())
        args = arguments(tmp_path / folder, **in_order(), **values)
        return trainer_for(model, tmp_path / folder, BitFitCallback(), train=examples(), args=args)

    whole = trainer("whole", max_steps=4, save_steps=2)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    sizes = {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}
    assert len(sizes) == (1 if wrapped else 2)
    assert max(sizes.values()) < VOCABULARY * WIDTH * 4
    resumed = trainer("whole", max_steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    tensors = file_tensors(whole.model)
    assert same_tensors(tensors, file_tensors(resumed.model))
    assert (tensors[ARCHS[name][0]] != 0.1).all()
    whole.save_model(str(tmp_path / "saved"))
    wanted = outputs(whole.model.eval(), BERT)
    for folder in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-4"):
        loaded = load_delta(load(name, bases(name)), folder).eval()
        assert distance(outputs(loaded, BERT), wanted) < 2e-6
        assert distance(outputs(auto(name, bases(name), folder).eval(), BERT), wanted) < 2e-6


def test_a_resize_that_comes_too_late_is_noticed(bases, tmp_path):
    name = "bert-sequence"
    model = load(name, bases(name))
    trainer = trainer_for(model, tmp_path, BitFitCallback(), train=rows())
    model.resize_token_embeddings(VOCABULARY + ADDED)
    with pytest.raises(AddedTokensError, match="before"):
        trainer.train()
    with pytest.raises(AddedTokensError, match="before"):
        trainer.save_model(str(tmp_path / "saved"))
    with pytest.raises(AddedTokensError, match="before"):
        BiasDelta.from_model(model)


class NeedsMore(BertForSequenceClassification):
    """A class of a user's own that takes more than a configuration, and has an attribute like the one of a resize."""

    def __init__(self, config: Any, more: int) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size


def test_a_class_that_takes_more_than_a_configuration(bases):
    model = NeedsMore(BERT.build().config, 1)
    assert get_peft_model(model, BitFitConfig()).peft_config["default"].added_tokens is None
    model = NeedsMore.from_pretrained(bases("bert-sequence"), more=1)
    model.resize_token_embeddings(VOCABULARY + ADDED)
    with pytest.raises(AddedTokensError, match="from its configuration alone"):
        get_peft_model(model, BitFitConfig())


def test_broken_rows_are_not_merged(bases):
    model = tuned("bert-sequence", bases("bert-sequence"))
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].added_rows[0, 0] = float("nan")
    before = state(model.get_base_model())
    with pytest.raises(MergeError, match="added tokens"):
        model.merge_and_unload(safe_merge=True)
    assert repr(state(model.get_base_model())) == repr(before)


# What cannot be ------------------------------------------------------------------------------------------------------


def test_a_base_that_was_cut_is_refused(bases):
    model = load("bert-sequence", bases("bert-sequence"))
    model.resize_token_embeddings(VOCABULARY - 4)
    before = state(model)
    with pytest.raises(AddedTokensError, match="cut from 64"):
        get_peft_model(model, BitFitConfig())
    assert state(model) == before


def test_embeddings_made_anew_are_refused(bases):
    model = BertForSequenceClassification.from_pretrained(
        bases("bert-sequence"), num_labels=3, vocab_size=70, ignore_mismatched_sizes=True
    )
    with pytest.raises(AddedTokensError, match="made anew"):
        get_peft_model(model, BitFitConfig())


def test_a_layer_that_is_not_known_to_take_rows_is_refused(tmp_path):
    """MobileBERT's output layer is partly a matrix with one *column* per token."""
    config = transformers.MobileBertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, embedding_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=40, true_hidden_size=16, intra_bottleneck_size=16, max_position_embeddings=16,
    )  # fmt: skip
    transformers.MobileBertForMaskedLM(config).save_pretrained(tmp_path)
    model = transformers.MobileBertForMaskedLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(VOCABULARY + ADDED)
    with pytest.raises(AddedTokensError, match=r"cls\.predictions\.dense\.weight"):
        get_peft_model(model, BitFitConfig())


def test_without_a_checkpoint_the_user_says_how_many_are_new():
    def model() -> nn.Module:
        made = BERT.build()
        made.resize_token_embeddings(VOCABULARY + ADDED)
        return made.eval()

    with pytest.raises(AddedTokensError, match=r"BitFitConfig\(added_tokens"):
        get_peft_model(model(), BitFitConfig())
    with_rows = fill_(get_peft_model(model(), BitFitConfig(added_tokens=ADDED))).eval()
    assert [key for key in file_tensors(with_rows) if "added" in key] == ARCHS["bert-sequence"]
    without = get_peft_model(model(), BitFitConfig(added_tokens=0))
    assert not [key for key in file_tensors(without) if "word_embeddings" in key]
    loaded = BiasDelta.from_model(with_rows).apply_(BERT.build())
    assert distance(outputs(loaded, BERT), outputs(with_rows, BERT)) < 2e-6


def test_the_config_of_another_model_in_the_same_place_says_nothing(bases, tmp_path):
    """A model from a subfolder is known by the name of the whole repository."""
    name = "bert-sequence"
    load(name, bases(name)).save_pretrained(tmp_path / "inside")
    transformers.BertConfig(vocab_size=7, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path, subfolder="inside")
    assert get_peft_model(model, BitFitConfig()).peft_config["default"].added_tokens is None


def test_a_bias_added_to_a_resized_output_layer_is_refused(bases):
    model = enlarged("gpt2-causal_lm", bases("gpt2-causal_lm"))
    config = BitFitConfig(bias_terms=["query", "lm_head"], add_missing_biases=True)
    with pytest.raises(AddedTokensError, match="lm_head"):
        get_peft_model(model, config)


def test_an_inner_model_remembers_how_many_there_were(bases, tmp_path):
    """Llama's and Qwen's classes keep the number, so it is known also when the checkpoint's folder is gone."""
    name = "qwen2-causal_lm"
    shutil.copytree(bases(name), tmp_path / "base")
    model = load(name, tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    model.resize_token_embeddings(VOCABULARY + ADDED)
    assert get_peft_model(model, BitFitConfig()).peft_config["default"].added_tokens == ADDED


@pytest.mark.parametrize("given", [0, 1])
def test_the_users_word_must_agree_with_the_checkpoint(bases, given):
    with pytest.raises(AddedTokensError, match=f"`added_tokens` is {given}.*3 are new"):
        get_peft_model(enlarged("bert-sequence", bases("bert-sequence")), BitFitConfig(added_tokens=given))
    with pytest.raises(ConfigError, match="added_tokens"):
        BitFitConfig(added_tokens=-1)


def test_a_model_without_a_vocabulary_has_no_added_tokens():
    with pytest.raises(AddedTokensError, match="no vocabulary"):
        get_peft_model(ARCHITECTURES["vit-image"].build(), BitFitConfig(added_tokens=1))


def test_a_padded_vocabulary_is_no_added_token(bases):
    """More rows than the tokenizer has words is how many checkpoints come."""
    model = load("bert-sequence", bases("bert-sequence"))
    model.resize_token_embeddings(VOCABULARY)  # nothing to do
    config = get_peft_model(model, BitFitConfig()).peft_config["default"]
    assert (config.added_tokens, config.base_vocab_size) == (None, None)


def test_rows_for_padding_to_a_multiple_are_new_too(bases, tmp_path):
    name = "gpt2-causal_lm"
    model = load(name, bases(name))
    model.resize_token_embeddings(VOCABULARY + ADDED, pad_to_multiple_of=16)
    tuned_model = fill_(get_peft_model(model, BitFitConfig())).eval()
    tuned_model.save_pretrained(tmp_path)
    assert file_tensors(tuned_model)["transformer.wte.added_rows"].shape == (16, WIDTH)
    loaded = auto(name, bases(name), tmp_path).eval()
    assert distance(outputs(loaded, resized(name)), outputs(tuned_model, resized(name))) < 2e-6


def test_an_output_layer_that_is_named_brings_no_matrix_along(tmp_path):
    """PEFT saves whole layers that `target_modules` names `lm_head`."""
    config = transformers.PhiConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = get_peft_model(transformers.PhiForCausalLM(config), BitFitConfig(target_modules=["lm_head"]))
    model.save_pretrained(tmp_path)
    assert {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        f"{PREFIX}lm_head.bitfit_bias": [VOCABULARY]
    }
