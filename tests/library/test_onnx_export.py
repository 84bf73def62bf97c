"""What is exported: one task for stock ONNX Runtime, and the graphs of all architectures that can be."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from architectures import randomize_
from bank_tester import bert_base, random_delta, single_model, stock_model, tokenizer
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from bitfit_hf import BiasDelta, BitFitConfig, OnnxExportError, TaskBank, export_onnx
from bitfit_hf.bank.onnx.adapter import export_onnx_adapter, write_adapter
from bitfit_hf.bank.onnx.folder import GRAPH_FILE, INFO_FILE
from bitfit_hf.cli import app

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

ATOL = 1e-4
LABELS = {0: "no", 1: "maybe", 2: "yes"}


def command(*arguments: object) -> None:
    typer.main.get_command(app).main([str(one) for one in arguments], prog_name="bitfit", standalone_mode=False)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A base with its tokenizer, a delta on it, and the delta exported by the command line."""
    root = tmp_path_factory.mktemp("export")
    found = {name: root / name for name in ("base", "delta", "out")}
    base = bert_base()
    stock = stock_model(base, "sequence-2")  # another number of labels than the task's
    stock.save_pretrained(found["base"])
    tokenizer().save_pretrained(found["base"])
    delta = random_delta(base, "sequence-3", seed=1)
    delta.config.id2label = LABELS
    delta.config.base_model_name_or_path = str(found["base"])
    delta.save_pretrained(found["delta"])
    command("export", found["delta"], "--onnx-adapter", "-o", found["out"])
    return found


def inputs(size: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (size, length), generator=torch.Generator().manual_seed(size))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def ask(session: Any, adapter: Path | None, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
    """With stock ONNX Runtime alone."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    (logits,) = session.run(None, {name: value.numpy() for name, value in encoded.items()}, options)
    return torch.from_numpy(logits)


def test_stock_onnxruntime_runs_an_exported_task(places):
    session = onnxruntime.InferenceSession(places["out"] / GRAPH_FILE, providers=["CPUExecutionProvider"])
    assert {one.name for one in session.get_inputs()} == set(inputs(1, 3))
    delta = BiasDelta.from_pretrained(places["delta"])
    model = single_model(bert_base(), delta, "sequence-3")
    for shape in ((4, 9), (2, 31), (1, 2)):
        encoded = inputs(*shape)
        with torch.no_grad():
            expected = model(**encoded).logits
        found = ask(session, places["out"] / "delta.onnx_adapter", encoded)
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
        assert not ask(session, None, encoded).any()  # a head of zeros


def test_the_adapter_holds_the_task_and_nothing_else(places):
    adapter = onnxruntime.AdapterFormat.read_adapter(str(places["out"] / "delta.onnx_adapter"))
    delta = BiasDelta.from_pretrained(places["delta"])
    values = adapter.get_parameters()
    assert set(values) == {*delta, *delta.head}
    base = bert_base().state_dict()
    for name, change in delta.items():
        stored = torch.from_numpy(values[name].numpy())
        assert torch.equal(stored, base[name.removeprefix("bert.")] + change), name


def test_another_task_fits_the_same_graph(places, tmp_path):
    """Its values are named alike, so no second graph is needed; here only the adapter is written."""
    base = bert_base()
    delta = random_delta(base, "sequence-3", seed=7)
    tuned = single_model(base, delta, "sequence-3")
    state = tuned.state_dict()
    write_adapter({name: state[name] for name in [*delta, *delta.head]}, tmp_path / "other.onnx_adapter")
    session = onnxruntime.InferenceSession(places["out"] / GRAPH_FILE, providers=["CPUExecutionProvider"])
    encoded = inputs(3, 8)
    with torch.no_grad():
        expected = tuned(**encoded).logits
    found = ask(session, tmp_path / "other.onnx_adapter", encoded)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_the_exported_folder_has_labels_tokenizer_and_card(places):
    names = {path.name for path in places["out"].iterdir()}
    assert names == {
        GRAPH_FILE, "delta.onnx_adapter", "labels.json", "README.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    labels = json.loads((places["out"] / "labels.json").read_text())
    assert labels == {str(number): label for number, label in LABELS.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../../etc/task"}, "a file's name"),
        ({"name": ""}, "a file's name"),
        ({"base": lambda base: base.bfloat16()}, "bfloat16"),
    ],
    ids=["path", "empty", "half precision"],
)
def test_what_an_adapter_cannot_be(tmp_path, change, message):
    base = bert_base()
    delta = random_delta(base, "sequence-3", seed=1)
    model = change.pop("base", lambda model: model)(stock_model(base, "sequence-3"))
    with pytest.raises(OnnxExportError, match=message):
        export_onnx_adapter(model, delta, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_cannot_be_exported_is_refused_by_name(tmp_path):
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, pad_token_id=0)
    delta = BiasDelta.from_model(get_peft_model(GPT2ForSequenceClassification(config), BitFitConfig()))
    with pytest.raises(OnnxExportError, match=r"GPT2ForSequenceClassification \(gpt2\) cannot be exported"):
        export_onnx_adapter(GPT2ForSequenceClassification(config), delta, tmp_path)


# --- slow: an export for each architecture ---

_SIZES = {
    "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
_RELATIVE = {"relative_attention": True, "position_biased_input": False, "norm_rel_ebd": "layer_norm"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**_SIZES),
    "camembert": lambda: CamembertConfig(**_SIZES, pad_token_id=1),
    "deberta-v2": lambda: DebertaV2Config(**_SIZES, pos_att_type=["p2c", "c2p"], relative_attention=True),
    "deberta-v3": lambda: DebertaV2Config(
        **_SIZES, **_RELATIVE, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True, type_vocab_size=0
    ),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=100, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=64
    ),
    "electra": lambda: ElectraConfig(**_SIZES, embedding_size=8),
    "modernbert": lambda: ModernBertConfig(
        **_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=8
    ),
    "mpnet": lambda: MPNetConfig(**_SIZES),
    "roberta": lambda: RobertaConfig(**_SIZES, type_vocab_size=1),
    "xlm-roberta": lambda: XLMRobertaConfig(**_SIZES, type_vocab_size=1),
}


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize_(AutoModel.from_config(CONFIGS[name]())).eval()


def backbone_task(name: str, seed: int) -> tuple[BiasDelta, nn.Module]:
    """A delta on a backbone, and the backbone with it added in by name."""
    added = name == "modernbert"
    config = BitFitConfig(task_type="FEATURE_EXTRACTION", add_missing_biases=added)
    tuned = get_peft_model(backbone(name), config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in tuned.named_parameters():
            if "bitfit_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    delta = BiasDelta.from_model(tuned)
    model: Any = backbone(name)
    for key, change in delta.items():
        layer = model.get_submodule(key.rpartition(".")[0])
        bias = torch.zeros(len(change)) if layer.bias is None else layer.bias.detach()
        layer.bias = nn.Parameter(bias + change)
    return delta, model


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_mixes_as_its_own_models(name, tmp_path):
    export_onnx(backbone(name), tmp_path, add_missing_biases=name == "modernbert")
    bank = TaskBank(backbone(name), engine="onnxruntime", graph=tmp_path)
    models: dict[str | None, nn.Module] = {None: backbone(name)}
    for seed in range(2):
        delta, models[f"task-{seed}"] = backbone_task(name, seed)
        assert len(delta) == len(bank._base.engine.biases)
        bank.add_task(f"task-{seed}", delta)
    for size, length in ((5, 9), (1, 1), (3, 40), (2, 3)):
        ids = torch.randint(8, 100, (size, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        if length > 1:
            mask[0, -1] = 0
        tasks = [[None, "task-0", "task-1"][example % 3] for example in range(size)]
        answers = bank(input_ids=ids, attention_mask=mask, tasks=tasks)
        for example, task in enumerate(tasks):
            with torch.no_grad():
                expected = models[task](input_ids=ids, attention_mask=mask).last_hidden_state[example]
            read = mask[example].bool()
            found = answers[example].last_hidden_state
            torch.testing.assert_close(found[read], expected[read], rtol=0, atol=ATOL)


@pytest.mark.slow
def test_the_command_line_exports_a_base_and_an_int8_one(places, tmp_path):
    command("export", places["base"], "--onnx", "--int8", "-o", tmp_path / "graph")
    names = {path.name for path in (tmp_path / "graph").iterdir()}
    assert names == {GRAPH_FILE, INFO_FILE, "tokenizer.json", "tokenizer_config.json"}
    text = (tmp_path / "graph" / INFO_FILE).read_text()
    assert json.loads(text)["weights"] == "int8"
    assert str(tmp_path) not in text
    assert str(places["base"]) not in text
    base = AutoModel.from_pretrained(places["base"])
    bank = TaskBank(base, engine="onnxruntime", graph=tmp_path / "graph")
    bank.add_task("task", BiasDelta.from_pretrained(places["delta"]))
    assert len(bank(**inputs(3, 6), tasks=["task", None, "task"])) == 3
    command("export", places["base"], "--onnx", "-o", tmp_path / "graph", "--force")
    assert json.loads((tmp_path / "graph" / INFO_FILE).read_text())["weights"] == "float32"


@pytest.mark.slow
def test_a_graph_is_made_where_none_is_given_and_two_exports_are_equal(tmp_path):
    base = bert_base()
    bank = TaskBank(base, engine="onnxruntime")
    folder = Path(bank._base.engine._where)
    export_onnx(base, tmp_path)
    digests = [hashlib.sha256((place / GRAPH_FILE).read_bytes()).hexdigest() for place in (folder, tmp_path)]
    assert digests[0] == digests[1]
    del bank
    gc.collect()  # a bank's modules refer to each other
    assert not folder.exists()
