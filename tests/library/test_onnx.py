"""One frozen ONNX graph for all tasks: every example gets what its own task's torch model gives."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from bank_tester import KINDS, bert_base, kind_of, random_delta, single_model, tokenizer
from torch import nn
from transformers import GPT2Config, GPT2Model, ModernBertConfig, ModernBertModel

from bitfit_hf import (
    BaseModelMismatchError,
    BiasDelta,
    DeltaMismatchError,
    MissingDependencyError,
    NoBiasesError,
    OnnxExportError,
    OnnxGraphError,
    TaskBank,
    TaskBankError,
    export_onnx,
)

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from bitfit_hf.bank.onnx import quantize as quantizing
from bitfit_hf.bank.onnx.folder import GRAPH_FILE, INFO_FILE, GraphInfo, sha256
from bitfit_hf.bank.onnx.quantize import example_of, quantized_copy
from bitfit_hf.bank.onnx.session import OnnxEngine
from bitfit_hf.bank.onnx.smoothing import smooth
from bitfit_hf.serving import Settings
from bitfit_hf.serving.start import load_bank
from bitfit_hf.storage.fingerprint import fingerprint
from bitfit_hf.terms import find_biases

ATOL = 1e-4
TASKS = [f"{kind}-{number}" for number in range(2) for kind in KINDS]  # 20 tasks of 10 kinds


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return bert_base()


@pytest.fixture(scope="module")
def graph(base, tmp_path_factory) -> Path:
    """The graph of `base`; the one export of the fast tests."""
    folder = tmp_path_factory.mktemp("graph")
    export_onnx(base, folder)
    return folder


@pytest.fixture(scope="module")
def deltas(base) -> dict[str, BiasDelta]:
    return {name: random_delta(base, kind_of(name), seed=i) for i, name in enumerate(TASKS)}


@pytest.fixture(scope="module")
def bank(base, graph, deltas) -> TaskBank:
    bank = TaskBank(base, tokenizer(), engine="onnxruntime", graph=graph)
    for name, delta in deltas.items():
        bank.add_task(name, delta)
    return bank


def text(size: int, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (size, length), generator=generator)
    lengths = torch.randint(min(2, length), length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def check(bank: TaskBank, models: dict[str | None, nn.Module], encoded: Any, tasks: Sequence[str | None]) -> None:
    """Each example's answer is its own model's, field by field."""
    answers = bank(**encoded, tasks=tasks)
    assert len(answers) == len(tasks)
    for example, task in enumerate(tasks):
        with torch.no_grad():
            expected = models[task](**encoded)
        fields = {name for name, value in expected.items() if isinstance(value, torch.Tensor)}
        assert set(answers[example]) == fields
        for name in fields:
            torch.testing.assert_close(answers[example][name], expected[name][example], rtol=0, atol=ATOL)


# --- answers ---


def test_every_row_of_a_mixed_batch_is_its_own_models(base, bank, deltas):
    models = {None: base, **{name: single_model(base, delta, kind_of(name)) for name, delta in deltas.items()}}
    check(bank, models, text(21), [*TASKS, None])
    check(bank, models, text(4, 31, seed=1), ["token-4-1", "sequence-7-0", None, "token-4-1"])
    check(bank, models, text(3, 1, seed=2), ["regression-0"] * 3)  # one task alone, and one token
    check(bank, models, text(1, 12, seed=3), [None])


def test_the_backbone_runs_once_whatever_the_mix(bank, monkeypatch):
    engine = bank._base.engine
    ran = []
    monkeypatch.setattr(
        engine, "run", lambda *args: ran.append(len(args[0]["input_ids"])) or type(engine).run(engine, *args)
    )
    bank(**text(20), tasks=TASKS)
    assert ran == [20]


def test_texts_get_the_answers_of_the_torch_bank(base, bank, deltas):
    torch_bank = TaskBank(base, tokenizer())
    names = ["sequence-3-0", "token-4-0", "question-1", "multi-4-0", "regression-1"]
    for name in names:
        torch_bank.add_task(name, deltas[name])
    texts = ["a b c", "d e", ("a b", "c d e f"), "h", "g f e d c b a"]
    for ours, theirs in zip(bank.predict(texts, names), torch_bank.predict(texts, names), strict=True):
        assert json.dumps(ours, default=str)[:20] == json.dumps(theirs, default=str)[:20]
        score = [one["score"] for one in ours] if isinstance(ours, list) else [ours["score"]]
        assert score == pytest.approx(
            [one["score"] for one in theirs] if isinstance(theirs, list) else [theirs["score"]], abs=ATOL
        )


def test_a_pooler_that_was_never_trained_is_the_tasks_own(graph, tmp_path):
    """It belongs to the head, so it runs behind the graph, which is the same file: biases are no part of it."""
    base = bert_base()
    with torch.no_grad():
        base.pooler.dense.bias.zero_()
    delta = random_delta(base, "sequence-3", seed=1)
    assert "bert.pooler.dense" in delta.config.modules_to_save
    folder = shutil.copytree(graph, tmp_path / "graph")
    info = GraphInfo.read(folder)
    dataclasses.replace(info, base_fingerprint=fingerprint(base, find_biases(base))).write(folder)
    bank = TaskBank(base, engine="onnxruntime", graph=folder)
    bank.add_task("own", delta)
    bank.add_task("other", random_delta(base, "token-4", seed=2))
    models = {
        None: base,
        "own": single_model(base, delta, "sequence-3"),
        "other": single_model(base, random_delta(base, "token-4", seed=2), "token-4"),
    }
    check(bank, models, text(5), ["own", "other", None, "own", "other"])


def test_threads_and_tasks_that_come_and_go(base, graph, deltas):
    bank = TaskBank(base, engine="onnxruntime", graph=graph)
    bank.add_task("stays", deltas["sequence-2-0"])
    model = single_model(base, deltas["sequence-2-0"], "sequence-2")
    encoded = text(6, seed=4)
    with torch.no_grad():
        expected = model(**encoded).logits
    problems: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(20):
                answers = torch.stack(bank(**encoded, tasks=["stays"] * 5 + [None]).logits[:5])
                torch.testing.assert_close(answers, expected[:5], rtol=0, atol=ATOL)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(40):  # more than the tables have room for at first
        bank.add_task(f"new-{number}", deltas["sequence-3-1"])
    for number in range(40):
        bank.remove_task(f"new-{number}")
    for thread in threads:
        thread.join()
    assert not problems
    assert bank.tasks == ["stays"]


def test_adding_a_task_exports_nothing_and_takes_no_time(base, graph, deltas, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", None)
    before = {path.name: sha256(path) for path in graph.iterdir()}
    bank = TaskBank(base, engine="onnxruntime", graph=graph)
    seconds = []
    for number in range(9):
        start = time.perf_counter()
        bank.add_task(f"task-{number}", deltas["sequence-2-0"])
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.05
    bank(**text(9), tasks=bank.tasks)
    assert {path.name: sha256(path) for path in graph.iterdir()} == before


def test_memory_is_that_of_the_torch_bank(base, graph, deltas):
    banks = [TaskBank(base), TaskBank(base, engine="onnxruntime", graph=graph)]
    for bank in banks:
        for name in ("sequence-2-0", "sequence-7-0"):
            bank.add_task(name, deltas[name])
    assert banks[0].memory() == banks[1].memory()


@pytest.mark.parametrize(("every", "products"), [(False, 11), (True, 13)])
def test_int8_weights_take_the_same_tasks(base, graph, deltas, bank, tmp_path, every, products):
    folder = tmp_path / "graph"
    quantized_copy(graph, folder, base, every=every)
    small = TaskBank(base, engine="onnxruntime", graph=folder)
    for name in ("sequence-3-0", "sequence-3-1"):
        small.add_task(name, deltas[name])
    tasks = ["sequence-3-0", "sequence-3-1"] * 8
    ours, exact = (torch.stack(one(**text(16), tasks=tasks).logits) for one in (small, bank))
    assert 0 < (ours - exact).norm() / exact.norm() < 0.1
    import onnx

    nodes = [node.op_type for node in onnx.load(folder / GRAPH_FILE).graph.node]
    assert nodes.count("MatMulInteger") == products  # of two layers and the pooler


def test_large_channels_do_not_spoil_int8(base, tmp_path, monkeypatch):
    """A few channels of real models are far larger than all others; a scale for all would leave these few bits."""
    base = copy.deepcopy(base)
    with torch.no_grad():
        for layer in base.encoder.layer:
            layer.output.LayerNorm.weight[3] *= 50
            layer.intermediate.dense.weight[:, 3] /= 50
    export_onnx(base, tmp_path / "exact")

    def error() -> float:
        folder = tmp_path / "int8"
        quantized_copy(tmp_path / "exact", folder, base)
        small = TaskBank(base, engine="onnxruntime", graph=folder)
        answers = small(**text(16), tasks=[None] * 16).last_hidden_state
        exact = base(**text(16)).last_hidden_state
        return float((torch.stack(answers) - exact)[..., 4:].norm() / exact[..., 4:].norm())

    with torch.no_grad():
        smoothed = error()
        monkeypatch.setattr(quantizing, "smooth", lambda *_: None)
        assert smoothed < 0.5 * error()


def test_smoothing_leaves_what_a_graph_computes(base, graph):
    import onnx
    import onnxruntime

    model = onnx.load(graph / GRAPH_FILE)
    values = json.loads((graph / INFO_FILE).read_text())
    example = example_of(base, values["biases"])
    before, after = [], []
    for answers in (before, after):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        answers += session.run(None, example)
        weights = {one.name for one in model.graph.initializer}
        products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
        smooth(model, products, example)
    assert "Mul" in {node.op_type for node in model.graph.node if node.name.endswith("_smooth")}
    for one, two in zip(before, after, strict=True):
        numpy.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def test_the_server_takes_the_engine(base, graph, tmp_path):
    base.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    bank = load_bank(Settings(base=str(tmp_path), engine="onnxruntime", graph=str(graph)))
    assert isinstance(bank._base.engine, OnnxEngine)
    encoded = text(2)
    with torch.no_grad():
        expected = base(**encoded).last_hidden_state
    answers = bank(**encoded, tasks=[None, None])
    torch.testing.assert_close(torch.stack(answers.last_hidden_state), expected, rtol=0, atol=ATOL)


# --- what is written ---


def test_the_folder_holds_a_graph_and_its_description(base, graph):
    assert {path.name for path in graph.iterdir()} == {GRAPH_FILE, INFO_FILE}
    values = json.loads((graph / INFO_FILE).read_text())
    assert set(values) == {
        "format", "model_class", "weights", "inputs", "outputs", "biases", "base_fingerprint", "sha256",
        "base_model_name_or_path", "base_revision",
    }  # fmt: skip
    assert values["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert values["outputs"] == ["last_hidden_state", "pooler_output"]
    parameters = {name: p.numel() for name, p in base.named_parameters() if name.endswith("bias")}
    assert dict(values["biases"]) == parameters
    assert values["sha256"] == {GRAPH_FILE: sha256(graph / GRAPH_FILE)}


def test_stock_onnxruntime_runs_it_from_its_description(base, graph, deltas):
    """As the documentation of the format says: tables by name, `rows` in the order of `biases`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph / GRAPH_FILE, providers=["CPUExecutionProvider"])
    values = json.loads((graph / INFO_FILE).read_text())
    delta = deltas["backbone-0"]
    state = base.state_dict()
    tables = {
        name: torch.stack([state[name], state[name] + delta[name], state[name]]).numpy()
        for name, _ in values["biases"]
    }
    encoded = text(2)
    feed = {name: value.numpy() for name, value in encoded.items()} | tables
    rows = torch.tensor([[1], [0]]).expand(2, len(tables)).contiguous().numpy()
    hidden, _ = session.run(None, {**feed, "rows": rows})
    with torch.no_grad():
        for row, model in enumerate((single_model(base, delta, "backbone"), base)):
            expected = model(**encoded).last_hidden_state[row]
            torch.testing.assert_close(torch.from_numpy(hidden[row]), expected, rtol=0, atol=ATOL)


# --- what is refused ---


def _edit(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / INFO_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def _swap_biases(folder: Path) -> None:
    values = json.loads((folder / INFO_FILE).read_text())
    _edit(biases=[*values["biases"][1:], values["biases"][0]])(folder)


def _another_graph(folder: Path) -> None:
    """Sound in itself, with other inputs."""
    import onnx

    model = onnx.load(folder / GRAPH_FILE)
    model.graph.input[0].name = "ids"
    for node in model.graph.node:
        node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]
    onnx.save(model, folder / GRAPH_FILE)
    _edit(sha256={GRAPH_FILE: sha256(folder / GRAPH_FILE)})(folder)


def _no_graph(folder: Path) -> None:
    (folder / GRAPH_FILE).write_bytes(b"not a graph")
    _edit(sha256={GRAPH_FILE: sha256(folder / GRAPH_FILE)})(folder)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no description": (lambda folder: (folder / INFO_FILE).unlink(), "does not exist"),
    "no graph": (lambda folder: (folder / GRAPH_FILE).unlink(), "cannot be read"),
    "truncated graph": (
        lambda f: (f / GRAPH_FILE).write_bytes((f / GRAPH_FILE).read_bytes()[:-100]),
        "is not the file",
    ),
    "nonsense": (_no_graph, "cannot load"),
    "other inputs": (_another_graph, "not those that its description names"),
    "no json": (lambda folder: (folder / INFO_FILE).write_text("{"), "not valid JSON"),
    "deep json": (lambda folder: (folder / INFO_FILE).write_text("[" * 100_000), "not valid JSON"),
    "a list": (lambda folder: (folder / INFO_FILE).write_text("[]"), "instead of an object"),
    "later format": (_edit(format=2), "format 2"),
    "no such weights": (_edit(weights="int4"), "`weights`"),
    "path trick": (_edit(sha256={GRAPH_FILE: "0", "../secret": "0"}), "`sha256`"),
    "a number for a name": (_edit(inputs=["input_ids", 3]), "`inputs`"),
    "huge width": (_edit(biases=[["encoder.bias", 10**12]]), "`biases`"),
    "negative width": (_edit(biases=[["encoder.bias", -1]]), "`biases`"),
    "named twice": (_edit(biases=[["rows", 4]]), "name something twice"),
    "no such bias": (_edit(biases=[["encoder.bias", 4]]), "not those that its description names"),
    "another order": (_swap_biases, "not those that its description names"),
    "no fingerprint": (_edit(base_fingerprint={"tensors": 3}), "`base_fingerprint`"),
    "no class": (_edit(model_class=None), "`model_class`"),
    "a name of another kind": (_edit(base_revision=7), "`base_revision`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_folder_is_one_clear_error(base, graph, tmp_path, case):
    damage, message = BROKEN[case]
    folder = shutil.copytree(graph, tmp_path / "graph")
    damage(folder)
    with pytest.raises(OnnxGraphError, match=message):
        TaskBank(base, engine="onnxruntime", graph=folder)


@pytest.mark.parametrize("all_of_it", [True, False], ids=["table", "rows alone"])
def test_tables_that_have_changed_places_are_noticed(base, graph, tmp_path, all_of_it):
    """Two tables of one width, in a folder that is sound by its own description."""
    import onnx

    first, second = (f"encoder.layer.0.attention.self.{name}.bias" for name in ("query", "value"))
    other = {first: second, second: first}
    folder = shutil.copytree(graph, tmp_path / "graph")
    model = onnx.load(folder / GRAPH_FILE)
    for one in model.graph.input:
        one.name = other.get(one.name, one.name)
    if all_of_it:
        for node in model.graph.node:
            node.input[:] = [other.get(name, name) for name in node.input]
    onnx.save(model, folder / GRAPH_FILE)
    values = json.loads((folder / INFO_FILE).read_text())
    _edit(
        sha256={GRAPH_FILE: sha256(folder / GRAPH_FILE)},
        biases=[[other.get(name, name), width] for name, width in values["biases"]],
    )(folder)
    with pytest.raises(OnnxGraphError, match="does not compute what the base computes"):
        TaskBank(base, engine="onnxruntime", graph=folder)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_another_base_is_refused(base, graph, tmp_path, weights):
    other = bert_base()
    with torch.no_grad():
        other.encoder.layer[1].intermediate.dense.bias[7] += 1e-3
    folder = shutil.copytree(graph, tmp_path / "graph")
    _edit(weights=weights)(folder)
    with pytest.raises(BaseModelMismatchError, match=r"intermediate\.dense\.bias"):
        TaskBank(other, engine="onnxruntime", graph=folder)
    with pytest.raises(BaseModelMismatchError, match="a GPT2Model, the graph's a BertModel"):
        TaskBank(GPT2Model(_GPT2), engine="onnxruntime", graph=folder)


def test_a_base_that_differs_where_no_bias_is_tuned_is_refused_by_its_answers(graph):
    other = bert_base()
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.mul_(1.5)
    with pytest.raises(OnnxGraphError, match="does not compute what the base computes"):
        TaskBank(other, engine="onnxruntime", graph=graph)


def test_the_same_deltas_are_refused_as_by_the_torch_bank(base, bank):
    other = bert_base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    with pytest.raises(BaseModelMismatchError):
        bank.add_task("foreign", random_delta(other, "sequence-2", seed=0))
    assert "foreign" not in bank


_GPT2 = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40)
_MODERN = ModernBertConfig(  # two layers: transformers 5.16 refuses to make one of a single layer
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=40, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: GPT2Model(_GPT2), OnnxExportError, "GPT2Model .gpt2. cannot be exported"),
        (lambda: bert_base().bfloat16(), OnnxExportError, "weights in bfloat16"),
        (lambda: ModernBertModel(_MODERN), NoBiasesError, "add_missing_biases=True"),
    ],
    ids=["architecture", "half precision", "no biases"],
)
def test_what_cannot_be_exported_is_refused_by_name(model, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(model(), tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tensorrt"}, "tensorrt"),
        ({"graph": "somewhere"}, 'engine is "torch"'),
        ({"engine": "onnxruntime", "dtype": torch.bfloat16}, "torch.float32"),
    ],
)
def test_wrong_options_are_refused(base, options, message):
    with pytest.raises(TaskBankError, match=message):
        TaskBank(base, **options)


def test_what_the_graph_does_not_take_is_refused(bank):
    encoded = text(2)
    with pytest.raises(TaskBankError, match="output_hidden_states"):
        bank(**encoded, output_hidden_states=True, tasks=[None, None])
    with pytest.raises(TaskBankError, match="inputs_embeds"):
        bank(inputs_embeds=torch.zeros(2, 9, 32), tasks=[None, None])
    with pytest.raises(TaskBankError, match=r"shape \[2, 40\]"):  # the model has 32 positions
        bank(**text(2, 40), tasks=[None, None])
    assert len(bank(input_ids=encoded["input_ids"], tasks=[None, None])) == 2  # a mask is made up as the model does


def test_a_bias_that_is_not_in_the_graph(base, graph, tmp_path):
    """As of an added bias where the graph was exported without inputs for such."""
    folder = shutil.copytree(graph, tmp_path / "graph")
    bank = TaskBank(base, engine="onnxruntime", graph=folder)
    layer = bank._base.layers[bank._base.backbone.encoder.layer[0].intermediate.dense]
    bank._base.unsupported.update(layer.sites.values())
    with pytest.raises(DeltaMismatchError, match=r"layer\.0\.intermediate\.dense\.bias is not among the biases"):
        bank.add_task("task", random_delta(base, "sequence-2", seed=0))


def test_a_missing_package_is_named(base, graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"bitfit-hf\[onnx\]"):
        TaskBank(base, engine="onnxruntime", graph=graph)
