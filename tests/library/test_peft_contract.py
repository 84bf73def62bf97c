"""What PEFT's own suite asks of every method, asked here of the architectures of this suite.

PEFT's `tests/test_custom_models.py` (0.21.2) passes with BitFit as a method in its tables (22 cases: MLPs, norms,
Conv1D, convolutions, `nn.MultiheadAttention`, with and without `modules_to_save`), taught `init_weights=False` to
start from random deltas. What it asks for and BitFit does otherwise, by contract:

- a card that says `library_name: peft` for a model without a configuration (`test_save_pretrained`);
- weights as pickles (`test_save_pretrained_pickle`);
- adapters in the base's dtype with `autocast_adapter_dtype=False` (`test_adapter_dtype_autocast`): deltas are float32;
- loading an adapter onto a model with other random weights (`…_requires_grad_set_correctly`): it passes inside
  `base_mismatch("ignore")`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from architectures import ARCHITECTURES, Architecture, output_tensors
from expected_heads import EXPECTED as HEADS
from launching import HELPERS, run_python, torchrun
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.modeling_outputs import QuestionAnsweringModelOutput
from tuner_tester import config_for, distance, file_tensors, fill_, identical, outputs, same_tensors, tune

from bitfit_hf import BiasDelta, BitFitConfig, TaskBank, load_delta
from bitfit_hf.cli import app
from bitfit_hf.errors import AdapterNameError, UnsupportedLayerError
from bitfit_hf.tuner import BitFitHead

BERT = ARCHITECTURES["bert-sequence"]

# FSDP1 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SHARDED = [
    *("bert-sequence", "deberta-sequence", "gpt2-sequence", "bert-masked_lm", "llama-sequence"),
    *("attention", "convnet", "whisper-audio-weighted"),
]


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp1_computes_saves_and_loads(process_group: None, name: str) -> None:
    """FSDP1 deletes the attribute of every parameter it takes over, a bias that is read as `b_0 + δ` too."""
    arch = ARCHITECTURES[name]
    model = fill_(tune(arch))
    wanted, tensors = outputs(model, arch), file_tensors(model)
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert distance(outputs(sharded, arch), wanted) <= 1e-6
    assert distance(outputs(sharded, arch), wanted) <= 1e-6  # its views are put in place anew for each forward pass
    saved = get_peft_model_state_dict(sharded)
    assert same_tensors({key.removeprefix("base_model.model."): value for key, value in saved.items()}, tensors)
    fresh = tune(arch)
    set_peft_model_state_dict(fresh, saved)
    assert distance(outputs(fresh, arch), wanted) <= 1e-6


def test_fsdp1_trains_what_one_device_trains(process_group: None) -> None:
    alone, sharded = tune(BERT), tune(BERT)
    wrapped = FullyShardedDataParallel(sharded, use_orig_params=True, device_id=torch.device("cpu"))
    for model in (alone, wrapped):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**BERT.inputs(), **BERT.labels()).loss.backward()
            optimizer.step()
    saved = get_peft_model_state_dict(wrapped)
    moved = file_tensors(alone)
    assert saved.keys() == {f"base_model.model.{name}" for name in moved}
    for name, tensor in moved.items():
        assert (saved[f"base_model.model.{name}"] - tensor).abs().max() <= 1e-6
        assert tensor.abs().max() > 0 or ".key." in name


@pytest.mark.slow
def test_fsdp1_shards_over_two_processes(tmp_path: Path) -> None:
    """There the buffers behind the parameters are given back between uses, and nobody may read them then."""
    result = run_python(*torchrun(), HELPERS / "fsdp1_run.py", tmp_path / "facts.json")
    assert result.returncode == 0, result.stderr[-4000:]
    for rank in range(2):
        facts = json.loads((tmp_path / f"facts.{rank}.json").read_text())
        assert facts["moved"] >= facts["tensors"] - 2  # all but the two key biases, whose gradient is rounding noise
        assert max(facts["output"], facts["trained"], facts["saved"]) <= 1e-6


def test_a_bias_can_be_taken_out_of_its_layer_and_put_back() -> None:
    model = fill_(tune(BERT))
    layer = model.get_base_model().bert.pooler.dense.base_layer
    stored, effective = layer._parameters["bias"], layer.bias.detach().clone()
    del layer.bias
    assert "bias" not in layer._parameters
    layer.bias = stored.detach().clone()  # a view of a buffer, in FSDP's hands
    assert torch.equal(layer.bias, effective)
    del layer.bias
    layer.bias = stored
    assert layer._parameters["bias"] is stored
    assert torch.equal(layer.bias, effective)
    with pytest.raises(AttributeError, match="bias"):
        del layer.bias, layer.bias


# Modules that are trained whole in the middle of a model -------------------------------------------------------------

IN_THE_MIDDLE = {
    "bert-sequence": ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.LayerNorm"],
    "bert-masked_lm": ["bert.embeddings.word_embeddings"],
    "t5-seq2seq_lm": ["encoder.block.0.layer.1.DenseReluDense.wi"],
    "gpt2-sequence": ["transformer.h.0.mlp.c_fc"],
    "mlp": ["first"],
    "convnet": ["conv3d"],
    "attention": ["attention"],
}


def halved(arch: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in arch.inputs().items()}


def seen_dtypes(model: nn.Module, paths: list[str], call: Callable[[], Any]) -> dict[str, torch.dtype]:
    """The dtype of what each module of a live model answers with."""
    found: dict[str, torch.dtype] = {}

    def see(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = (output[0] if isinstance(output, tuple) else output).dtype

        return hook

    handles = [model.get_submodule(path).register_forward_hook(see(path)) for path in paths]
    call()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", IN_THE_MIDDLE)
def test_a_saved_module_in_the_middle_hands_on_the_dtype_that_came_in(name: str, dtype: torch.dtype) -> None:
    """Stored in float32; the next layer of a half-precision model takes nothing else than its own dtype."""
    arch, saved = ARCHITECTURES[name], IN_THE_MIDDLE[name]
    base = arch.build().to(dtype)
    model = get_peft_model(base, config_for(arch, modules_to_save=saved), autocast_adapter_dtype=False).eval()
    inputs = halved(arch, dtype)
    stock = model.get_base_model()
    seen = seen_dtypes(stock, saved, lambda: model(**inputs))
    assert seen == dict.fromkeys(saved, dtype)
    copies = [stock.get_submodule(path).modules_to_save["default"] for path in saved]
    assert {p.dtype for copy in copies for p in copy.parameters()} == {torch.float32}
    output = model(**inputs)
    (output if isinstance(output, torch.Tensor) else output[0]).float().sum().backward()
    gradients = [p.grad for copy in copies for p in copy.parameters()]
    assert gradients
    assert {gradient.dtype for gradient in gradients if gradient is not None} == {torch.float32}


def test_a_mixed_batch_hands_on_the_dtype_too() -> None:
    arch = ARCHITECTURES["bert-backbone"]
    path = "encoder.layer.0.output.dense"
    model = get_peft_model(arch.build().to(torch.bfloat16), BitFitConfig(modules_to_save=[path]), "one").eval()
    model.add_adapter("two", BitFitConfig(modules_to_save=[path]))
    fill_(model, "one", std=0.5)
    fill_(model, "two", seed=2, std=0.5)
    alone = []
    for name in ("one", "two"):
        model.set_adapter(name)
        alone.append(outputs(model, arch, batch_size=3)[0])
    with model.disable_adapter():
        alone.append(outputs(model, arch, batch_size=3)[0])
    names = ["one", "two", "__base__"]
    mixed: list[torch.Tensor] = []
    seen = seen_dtypes(
        model.get_base_model(), [path], lambda: mixed.extend(outputs(model, arch, batch_size=3, adapter_names=names))
    )
    assert seen == {path: torch.bfloat16}
    for example, expected in enumerate(alone):
        assert (mixed[0][example] - expected[example]).abs().max() < 0.1


def test_the_head_proper_stays_float32() -> None:
    arch = ARCHITECTURES["roberta-sequence"]
    model = get_peft_model(arch.build().to(torch.bfloat16), BitFitConfig(modules_to_save=["classifier"])).eval()
    assert [tensor.dtype for tensor in outputs(model, arch)] == [torch.float32]


# The base's state dict -----------------------------------------------------------------------------------------------

STATES: dict[str, dict[str, Any]] = {
    "bert-sequence": {},
    "distilbert-sequence": {"modules_to_save": ["transformer.layer.0.ffn.lin1"]},
    "bert-masked_lm": {},  # a tied bias
    "deberta-sequence": {},  # free-standing vectors
    "llama-sequence": {"add_missing_biases": True},
    "gpt2-causal_lm": {"bias_terms": "query"},  # a slice
    "mlp": {"modules_to_save": ["last"]},
    "whisper-audio-weighted": {},  # a parameter of the head in no module
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_dict_of_the_base_has_the_stock_keys(name: str) -> None:
    arch = ARCHITECTURES[name]
    stock = arch.build().state_dict()
    model = fill_(tune(arch, **STATES[name]))
    model.add_adapter("other", config_for(arch, **STATES[name]))
    assert same_tensors(get_base_model_state_dict(model), stock)
    changed = {key: value + 1 if value.is_floating_point() else value for key, value in stock.items()}
    set_base_model_state_dict(model, changed)
    assert same_tensors(get_base_model_state_dict(model), changed)
    assert identical(
        list(file_tensors(model).values()), list(file_tensors(fill_(tune(arch, **STATES[name]))).values())
    )


# Names that PEFT appends to `modules_to_save` ------------------------------------------------------------------------

TASK_TYPES = {
    "bert-sequence": "SEQ_CLS",
    "roberta-sequence": "SEQ_CLS",  # PEFT's `classifier` is a module with parts
    "bert-token": "TOKEN_CLS",
    "t5-token": "TOKEN_CLS",
    "bert-question": "QUESTION_ANS",
    "modernbert-sequence-biased": "TOKEN_CLS",  # whose head PEFT wraps under none of its names
}


@pytest.mark.parametrize("name", TASK_TYPES)
def test_the_names_that_peft_appends_get_into_no_file(name: str, tmp_path: Path) -> None:
    arch = ARCHITECTURES[name]
    model = get_peft_model(arch.build(), config_for(arch, task_type=TASK_TYPES[name]))
    model.add_adapter("other", config_for(arch, task_type=TASK_TYPES[name]))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == HEADS[name]
        assert BiasDelta.from_pretrained(folder).config.modules_to_save == HEADS[name]
    wrappers = {type(module) for module in model.modules() if isinstance(module, ModulesToSaveWrapper)}
    assert wrappers == {BitFitHead}


class SplitForQuestionAnswering(PreTrainedModel):
    """Its `qa_outputs` is a module with parts, as in XLM and LayoutLMv3."""

    config_class = BertConfig
    base_model_prefix = "bert"
    _supports_sdpa = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Sequential(nn.Linear(config.hidden_size, 8), nn.Tanh(), nn.Linear(8, 2))
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> QuestionAnsweringModelOutput:
        start, end = self.qa_outputs(self.bert(input_ids, attention_mask).last_hidden_state).unbind(-1)
        return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)


def test_a_head_that_is_called_as_peft_expects_is_not_wrapped_twice(tmp_path: Path) -> None:
    arch = ARCHITECTURES["bert-question"]
    base = SplitForQuestionAnswering(arch.build().config).eval()
    base.save_pretrained(tmp_path / "base")
    model = fill_(get_peft_model(base, BitFitConfig(task_type="QUESTION_ANS"))).eval()
    model.save_pretrained(tmp_path / "delta")
    assert sorted(name for name in file_tensors(model) if "bitfit" not in name) == [
        *("qa_outputs.0.bias", "qa_outputs.0.weight", "qa_outputs.2.bias", "qa_outputs.2.weight")
    ]
    fresh = SplitForQuestionAnswering.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "delta").eval()
    assert distance(outputs(loaded, arch), outputs(model, arch)) <= 1e-6
    applied = load_delta(SplitForQuestionAnswering.from_pretrained(tmp_path / "base"), tmp_path / "delta")
    assert distance(outputs(applied, arch), outputs(model, arch)) <= 1e-6


EARLIER = {"bert-token": ["classifier", "classifier", "score"], "bert-question": ["qa_outputs", "qa_outputs"]}


@pytest.mark.parametrize("name", EARLIER)
def test_files_of_earlier_versions_that_have_them_are_read_by_every_way(name: str, tmp_path: Path) -> None:
    arch = ARCHITECTURES[name]
    cls = type(arch.build())
    arch.build().save_pretrained(tmp_path / "base")
    tuned = fill_(get_peft_model(cls.from_pretrained(tmp_path / "base"), BitFitConfig(task_type=TASK_TYPES[name])))
    delta = tmp_path / "delta"
    tuned.save_pretrained(delta)
    wanted = outputs(tuned.eval(), arch)
    file = delta / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": EARLIER[name]}))

    def base() -> nn.Module:
        return cls.from_pretrained(tmp_path / "base").eval()

    in_place = base()
    in_place.load_adapter(str(delta))
    ways = [
        PeftModel.from_pretrained(base(), delta),
        in_place,
        cls.from_pretrained(delta),
        load_delta(base(), delta),
        BiasDelta.from_pretrained(delta).apply_(base()),
    ]
    for model in ways:
        assert distance(outputs(model.eval(), arch), wanted) <= 2e-6
    bank = TaskBank(base())
    bank.add_task("task", delta)
    answer = bank(**arch.inputs(), tasks=["task", "task"])
    assert distance([tensor[None] for tensor in output_tensors(answer[0])], [tensor[:1] for tensor in wanted]) <= 1e-5
    command = typer.main.get_command(app)
    with pytest.raises(SystemExit) as exit_:
        command.main(["inspect", str(delta)], prog_name="bitfit")
    assert not exit_.value.code
    ways[0].save_pretrained(tmp_path / "again")
    BiasDelta.from_pretrained(delta).save_pretrained(delta)
    for folder in (delta, tmp_path / "again"):
        assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == HEADS[name]


# What a layer shows --------------------------------------------------------------------------------------------------

FEATURES = {
    "bert-sequence": {("bert.embeddings.LayerNorm", None, None), ("bert.pooler.dense", 32, 32)},
    "gpt2-causal_lm": {("transformer.h.0.mlp.c_fc", 32, 40)},
    "attention": {("attention", 32, 96)},
    "whisper-seq2seq_lm": {("model.encoder.conv1", 8, 32)},
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_tuned_layer_says_how_large_its_input_and_output_are(name: str) -> None:
    """PEFT's tools read these two attributes of every adapter's layer; `None` where a kind of layer has none."""
    model = tune(ARCHITECTURES[name])
    layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert all(hasattr(layer, "in_features") and hasattr(layer, "out_features") for layer in layers.values())
    for path, inputs, answers in FEATURES[name]:
        layer = layers[f"base_model.model.{path}"]
        assert (layer.in_features, layer.out_features) == (inputs, answers)


# Messages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two() -> PeftModel:
    model = tune(BERT, "one")
    model.add_adapter("two", BitFitConfig())
    return model.eval()


NAMES = {
    "Length of `adapter_names` should be the same as the number of inputs, but got 3 and 2": ["one"] * 3,
    "Trying to infer with non-existing adapter(s): three": ["one", "three"],
    "Trying to infer with non-existing adapter(s): four, nine": ["nine", "four"],
}


@pytest.mark.parametrize("words", NAMES)
def test_a_message_about_names_begins_with_peft_s_words(two: PeftModel, words: str) -> None:
    """Who looks a message up finds what is known about it."""
    with pytest.raises(AdapterNameError) as caught:
        outputs(two, BERT, adapter_names=NAMES[words])
    assert str(caught.value).startswith(words)
    assert isinstance(caught.value, ValueError)


def test_messages_about_the_state_of_the_model_begin_with_peft_s_words(two: PeftModel) -> None:
    with pytest.raises(UnsupportedLayerError) as caught:
        outputs(two.train(), BERT, adapter_names=["one", "two"])
    assert str(caught.value).startswith("Cannot pass `adapter_names` when the model is in training mode.")
    assert isinstance(caught.value, ValueError)
    two.eval().merge_adapter(["one"])
    with pytest.raises(UnsupportedLayerError) as caught:
        outputs(two, BERT, adapter_names=["one", "two"])
    words = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
    assert str(caught.value).startswith(words)
    assert isinstance(caught.value, ValueError)
    two.unmerge_adapter()
    with pytest.raises(AdapterNameError) as caught:
        two.base_model.set_adapter(["one", "two"])
    assert str(caught.value).startswith("Only one adapter can be set at a time for ModulesToSaveWrapper")
