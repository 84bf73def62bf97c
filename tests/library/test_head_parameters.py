"""Parameters of a head that lie in no module: trained, saved, loaded by every way, and served."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, HEADS, HIDDEN, INTERMEDIATE, VOCAB, Architecture, randomize_
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForAudioClassification, BertConfig, BertModel, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput
from tuner_tester import (
    PREFIX,
    add_by_hand,
    base_tensors,
    distance,
    file_tensors,
    fill_,
    identical,
    outputs,
    same_tensors,
    state,
)

from bitfit_hf import BiasDelta, BitFitConfig, TaskBank, load_delta, optimizer_groups
from bitfit_hf.delta.lora_export import export_stock
from bitfit_hf.errors import BitFitError, DeltaMismatchError, StockExportError, UnsupportedLayerError

# Models with such parameters -----------------------------------------------------------------------------------------


_AUDIO = {
    "conv_dim": (8, 8),
    "conv_kernel": (5, 3),
    "conv_stride": (5, 2),
    "classifier_proj_size": 16,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "use_weighted_layer_sum": True,
    "num_labels": 3,
}


def hubert() -> nn.Module:
    return transformers.HubertForSequenceClassification(transformers.HubertConfig(**_AUDIO))


def wav2vec2() -> nn.Module:
    return transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**_AUDIO))


def tapas() -> nn.Module:
    config = transformers.TapasConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=16,
        type_vocab_sizes=[3, 8, 8, 2, 2, 8, 8],
        select_one_column=True,
        init_cell_selection_weights_to_zero=False,
    )
    return transformers.TapasForQuestionAnswering(config)


class CrfForTokenClassification(PreTrainedModel):
    """Adds to each token's scores those of the tags that it may follow, by a matrix that the model itself holds."""

    config_class = BertConfig
    base_model_prefix = "bert"
    _supports_sdpa = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.transitions = nn.Parameter(torch.zeros(config.num_labels, config.num_labels))
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, inputs_embeds: None = None, **kwargs: Any
    ) -> TokenClassifierOutput:
        scores = self.classifier(self.bert(input_ids, attention_mask).last_hidden_state)
        return TokenClassifierOutput(logits=scores + torch.logsumexp(scores[..., None] + self.transitions, dim=-2))


def crf() -> nn.Module:
    return CrfForTokenClassification(ARCHITECTURES["bert-token"].build().config)


def audio(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 200, generator=generator)}


def table(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two tokens of a question and a table of two columns and three rows; two of its cells are the answer."""
    ids = torch.randint(4, VOCAB - 1, (batch, 8), generator=generator)
    kinds = torch.zeros(batch, 8, 7, dtype=torch.long)
    kinds[:, 2:, 0] = 1
    kinds[:, 2:, 1] = torch.tensor([1, 2, 1, 2, 1, 2])
    kinds[:, 2:, 2] = torch.tensor([1, 1, 2, 2, 3, 3])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds}


def cells(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    chosen = torch.zeros(batch, 8, dtype=torch.long)
    chosen[:, [2, 6]] = 1
    return {"labels": chosen}


def classes(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"labels": torch.randint(0, 3, (batch,), generator=generator)}


ARCHES = {
    "hubert": Architecture("hubert", "hubert", "audio", hubert, audio, classes),
    "wav2vec2": Architecture("wav2vec2", "wav2vec2", "audio", wav2vec2, audio, classes),
    "tapas": Architecture("tapas", "tapas", "table", tapas, table, cells),
    "crf": Architecture("crf", "bert", "token", crf, ARCHITECTURES["bert-token"].make_inputs),
}
PARAMETERS = {
    "hubert": {"layer_weights": (3,)},
    "wav2vec2": {"layer_weights": (3,)},
    "tapas": {"output_weights": (32,), "column_output_weights": (32,), "output_bias": (), "column_output_bias": ()},
    "crf": {"transitions": (3, 3)},
}
MODULES = {
    "hubert": ["projector", "classifier"],
    "wav2vec2": ["projector", "classifier"],
    "tapas": [],
    "crf": ["classifier"],
}
# It shifts the logits of all columns, and a softmax follows: its gradient is rounding noise, or none at all.
DEAD = {"column_output_bias"}
EVERY = pytest.mark.parametrize("name", ARCHES)


def tuned(name: str, *, seed: int = 1, in_place: bool = False) -> nn.Module:
    """A model with a trained adapter."""
    arch = ARCHES[name]
    model = arch.build().eval()
    if in_place:
        model.add_adapter(BitFitConfig())
    else:
        model = get_peft_model(model, BitFitConfig())
    return fill_(model.eval(), seed=seed, std=0.5)


# Training and files --------------------------------------------------------------------------------------------------


@EVERY
def test_they_are_trained_and_the_model_s_own_stay(name: str) -> None:
    arch = ARCHES[name]
    stock = randomize_(arch.build())
    before = outputs(stock.requires_grad_(False), arch)
    model = get_peft_model(stock, BitFitConfig())
    assert identical(outputs(model, arch), before)
    base = base_tensors(model)
    start = file_tensors(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(**arch.inputs(), **arch.labels())
        (output.loss if arch.trainable else (output.logits**2).mean()).backward()
        optimizer.step()
    after = file_tensors(model)
    alive = [parameter for parameter in PARAMETERS[name] if parameter not in DEAD]
    assert all(not torch.equal(after[parameter], start[parameter]) for parameter in alive)
    assert same_tensors(base_tensors(model), base)
    root = model.get_base_model()
    assert all(not root._parameters[parameter].requires_grad for parameter in PARAMETERS[name])


@EVERY
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_they_are_saved_under_their_stock_names(name: str, in_place: bool, tmp_path: Path) -> None:
    model = tuned(name, in_place=in_place)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    heads = {key: tensor for key, tensor in found.items() if "bitfit" not in key}
    modules = {f"{PREFIX}{path}.{kind}" for path in MODULES[name] for kind in ("weight", "bias")}
    assert heads.keys() == {PREFIX + parameter for parameter in PARAMETERS[name]} | modules
    for parameter, shape in PARAMETERS[name].items():
        assert heads[PREFIX + parameter].shape == shape
        assert heads[PREFIX + parameter].dtype == torch.float32
    delta = BiasDelta.from_pretrained(tmp_path)
    assert delta.config.modules_to_save == [*PARAMETERS[name], *MODULES[name]]
    assert same_tensors(delta.tensors(), BiasDelta.from_model(model).tensors())
    if name != "crf":
        assert delta.config.task_type is None  # PEFT's wrappers for texts would hand on what these do not take
        assert delta.config.auto_mapping["base_model_class"] == type(ARCHES[name].build()).__name__


@EVERY
def test_outputs_equal_those_of_a_stock_model_with_these_values(name: str) -> None:
    arch = ARCHES[name]
    model = tuned(name)
    by_hand = add_by_hand(arch.build(), file_tensors(model))
    assert distance(outputs(model, arch), outputs(by_hand, arch)) <= 1e-5
    without = add_by_hand(
        arch.build(), {key: t for key, t in file_tensors(model).items() if key not in PARAMETERS[name]}
    )
    assert distance(outputs(model, arch), outputs(without, arch)) > 1e-2


@EVERY
def test_the_optimizer_trains_them_and_decays_all_but_biases(name: str) -> None:
    model = get_peft_model(ARCHES[name].build(), BitFitConfig())
    groups = optimizer_groups(model, 1e-3, head_learning_rate=1e-2, weight_decay=0.1)
    held = {id(p): group for group in groups for p in group["params"]}
    live = dict(model.named_parameters())
    for parameter in PARAMETERS[name]:
        group = held[id(live[f"{PREFIX}bitfit_head_{parameter}.modules_to_save.default.bitfit_value"])]
        assert group["lr"] == 1e-2
        assert group["weight_decay"] == (0.0 if "bias" in parameter else 0.1)
    assert held.keys() == {id(p) for p in live.values() if p.requires_grad}


# Loading -------------------------------------------------------------------------------------------------------------


def in_place(base: nn.Module, delta: Path) -> nn.Module:
    base.load_adapter(str(delta))
    return base


def second(base: nn.Module, delta: Path) -> nn.Module:
    model = fill_(get_peft_model(base, BitFitConfig(), adapter_name="first"), "first", seed=8)
    model.load_adapter(delta, adapter_name="second")
    model.set_adapter("second")
    return model


def applied(base: nn.Module, delta: Path) -> nn.Module:
    return load_delta(base, delta)


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "PeftModel": lambda base, delta: PeftModel.from_pretrained(base, delta),
    "low memory": lambda base, delta: PeftModel.from_pretrained(base, delta, low_cpu_mem_usage=True),
    "in place": in_place,
    "second": second,
    "load_delta": applied,
    "AutoPeftModel": lambda base, delta: AutoPeftModel.from_pretrained(delta),
    "from_pretrained": lambda base, delta: type(base).from_pretrained(delta),
    "AutoModel": lambda base, delta: AutoModelForAudioClassification.from_pretrained(delta),
}
# transformers' Wav2Vec2 has a `load_adapter` of its own, for languages, in place of the one for PEFT's adapters, so no
# method's adapters load by it. A user's class is none that can be looked up.
ONLY_FOR = {
    "in place": ("hubert", "tapas", "crf"),
    "from_pretrained": ("hubert", "tapas", "crf"),
    "AutoPeftModel": ("hubert", "wav2vec2", "tapas"),
    "AutoModel": ("hubert",),
}
CASES = [(way, name) for way in WAYS for name in ARCHES if name in ONLY_FOR.get(way, ARCHES)]


@pytest.fixture
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A delta in a folder whose base is a checkpoint in another."""
    name = request.getfixturevalue("name")
    randomize_(ARCHES[name].build()).save_pretrained(tmp_path / "base")
    base = type(ARCHES[name].build()).from_pretrained(tmp_path / "base")
    fill_(get_peft_model(base, BitFitConfig()), std=0.5).save_pretrained(tmp_path / "delta")
    return tmp_path


def base_of(name: str, folder: Path) -> nn.Module:
    return type(ARCHES[name].build()).from_pretrained(folder / "base").eval()


def test_the_number_of_ways() -> None:
    assert len(CASES) == 26


@pytest.mark.parametrize(("way", "name"), CASES)
def test_every_way_of_loading(way: str, name: str, saved: Path) -> None:
    arch = ARCHES[name]
    delta = load_file(saved / "delta" / "adapter_model.safetensors")
    wanted = outputs(
        add_by_hand(base_of(name, saved), {key.removeprefix(PREFIX): t for key, t in delta.items()}), arch
    )
    model = WAYS[way](base_of(name, saved), saved / "delta").eval()
    assert distance(outputs(model, arch), wanted) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["hubert"])
def test_a_delta_without_them_is_refused(way: str, name: str, saved: Path) -> None:
    """As any delta that lacks a part of its head."""
    file = saved / "delta" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[PREFIX + "layer_weights"]
    save_file(tensors, file)
    with pytest.raises(BitFitError):
        WAYS[way](base_of(name, saved), saved / "delta")


@EVERY
def test_a_wrong_shape_is_refused_and_leaves_no_trace(name: str, saved: Path) -> None:
    delta = BiasDelta.from_pretrained(saved / "delta")
    parameter = next(iter(PARAMETERS[name]))
    delta.head[parameter] = torch.zeros(7)
    delta.save_pretrained(saved / "wrong")
    model = base_of(name, saved)
    before = state(model)
    for way in ("in place", "load_delta") if name != "wav2vec2" else ("load_delta",):
        with pytest.raises(DeltaMismatchError, match=parameter):
            WAYS[way](model, saved / "wrong")
        assert state(model) == before


# Using ---------------------------------------------------------------------------------------------------------------


@EVERY
def test_switching_disabling_merging_and_unloading(name: str) -> None:
    arch = ARCHES[name]
    base = outputs(arch.build(), arch)
    model = tuned(name)
    one = outputs(model, arch)
    model.add_adapter("other", BitFitConfig())
    fill_(model, "other", seed=5, std=0.5)
    model.set_adapter("other")
    other = outputs(model, arch)
    assert distance(one, other) > 1e-2
    model.set_adapter("default")
    assert identical(outputs(model, arch), one)
    with model.disable_adapter():
        assert identical(outputs(model, arch), base)
    twin = copy.deepcopy(model)
    assert identical(outputs(twin, arch), one)
    merged = model.merge_and_unload()
    assert type(merged) is type(arch.build())
    assert distance(outputs(merged, arch), one) <= 1e-5
    assert merged.state_dict().keys() == arch.build().state_dict().keys()
    twin.delete_adapter("default")
    assert identical(outputs(twin, arch), other)
    plain = twin.unload()
    assert type(plain) is type(arch.build())
    assert same_tensors(plain.state_dict(), arch.build().state_dict())
    assert not any(hasattr(module, "_bitfit_owners") for module in plain.modules())


@EVERY
def test_an_adapter_in_place_is_switched_off_and_on(name: str) -> None:
    arch = ARCHES[name]
    model = tuned(name, in_place=True)
    one = outputs(model, arch)
    model.disable_adapters()
    assert identical(outputs(model, arch), outputs(arch.build(), arch))
    model.enable_adapters()
    assert identical(outputs(model, arch), one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY
def test_on_a_half_precision_base_they_are_stored_in_float32_and_read_in_its_dtype(
    name: str, dtype: torch.dtype
) -> None:
    arch = ARCHES[name]
    model = get_peft_model(arch.build().to(dtype), BitFitConfig(), autocast_adapter_dtype=False).eval()
    fill_(model, std=0.5)
    root = model.get_base_model()
    tensors = file_tensors(model)
    for parameter in PARAMETERS[name]:
        assert tensors[parameter].dtype == torch.float32
        assert getattr(root, parameter).dtype == dtype
        assert torch.equal(getattr(root, parameter), tensors[parameter].to(dtype))
    inputs = {key: v.to(dtype) if v.is_floating_point() else v for key, v in arch.inputs().items()}
    model(**inputs)


@EVERY
def test_a_delta_is_written_into_a_stock_model_and_taken_out(name: str) -> None:
    arch = ARCHES[name]
    delta = BiasDelta.from_model(tuned(name))
    model = arch.build()
    before = copy.deepcopy(model.state_dict())
    delta.apply_(model)
    assert distance(outputs(model, arch), outputs(tuned(name), arch)) <= 1e-5
    BiasDelta.from_model(tuned(name, seed=4)).apply_(model)
    delta.remove_(model)
    delta_2 = BiasDelta.from_model(tuned(name, seed=4))
    assert torch.equal(getattr(model, next(iter(PARAMETERS[name]))), delta_2.head[next(iter(PARAMETERS[name]))])
    delta_2.remove_(model)
    assert same_tensors(model.state_dict(), before)


@EVERY
def test_a_delta_of_two_checkpoints_has_them(name: str) -> None:
    arch = ARCHES[name]
    trained = tuned(name).merge_and_unload()
    delta = BiasDelta.from_models(arch.build(), trained)
    assert delta.head.keys() >= PARAMETERS[name].keys()
    assert all(torch.equal(delta.head[key], getattr(trained, key)) for key in PARAMETERS[name])
    assert distance(outputs(delta.apply_(arch.build()), arch), outputs(trained, arch)) <= 1e-5


def test_a_stock_adapter_has_no_place_for_them(tmp_path: Path) -> None:
    with pytest.raises(StockExportError, match="layer_weights"):
        export_stock(tuned("hubert"), tmp_path)


def test_a_module_s_biases_are_tuned_or_trained_whole() -> None:
    arch = ARCHITECTURES["deberta-sequence"]
    model = arch.build()
    before = state(model)
    with pytest.raises(UnsupportedLayerError, match=r"attention\.self\.q_bias cannot be trained whole"):
        get_peft_model(model, BitFitConfig(modules_to_save=["q_bias"]))
    assert state(model) == before
    whole = get_peft_model(arch.build(), BitFitConfig(modules_to_save=["q_bias", "v_bias"]))
    saved = file_tensors(whole)
    assert sum(name.endswith((".q_bias", ".v_bias")) for name in saved) == 4
    assert not any(name.endswith("bitfit_q_bias") for name in saved)


# Serving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hubert", "wav2vec2", "tapas"])
def test_a_bank_serves_them_per_example(name: str) -> None:
    arch = ARCHES[name]
    bank = TaskBank(arch.build(), example_inputs=arch.inputs(3) if name == "tapas" else None)
    alone = {}
    for task, seed in (("one", 1), ("two", 2)):
        model = tuned(name, seed=seed)
        bank.add_task(task, BiasDelta.from_model(model))
        alone[task] = model(**arch.inputs(4)).logits
    alone[None] = arch.build()(**arch.inputs(4)).logits
    tasks = ["one", None, "two", "one"]
    answer = bank(**arch.inputs(4), tasks=tasks)
    for example, task in enumerate(tasks):
        assert (answer.logits[example] - alone[task][example]).abs().max() <= 1e-4
    for task in ("one", "two"):
        whole = bank(**arch.inputs(4), tasks=[task] * 4)
        for example in range(4):
            assert (whole.logits[example] - alone[task][example]).abs().max() <= 1e-4
    assert (alone["one"] - alone["two"]).abs().max() > 1e-2
