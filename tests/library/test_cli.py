"""The command line, run in this process with its real output streams, and once as the console script."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from architectures import ARCHITECTURES, build, output_tensors, randomize_
from command_line import Result, Run
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import are_progress_bars_disabled
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, PreTrainedModel
from transformers.utils import logging as transformers_logging
from tuner_tester import fill_

import bitfit_hf
from bitfit_hf import BiasDelta, BitFitConfig, DeltaNotFoundError, bias_change, load_delta
from bitfit_hf.analysis import term_counts
from bitfit_hf.cli import app, checkpoints
from bitfit_hf.terms import find_biases
from bitfit_hf.training_run import TrainingRun

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["train", "eval", "inspect", "diff", "merge", "extract", "export", "push", "plot", "serve"]
LABELS = {0: "no", 1: "perhaps", 2: "yes", 3: "certainly"}
BERT = ARCHITECTURES["bert-sequence"]
TOKENIZER = {"vocab.txt": b"[PAD]\n", "tokenizer_config.json": b'{"do_lower_case": true}'}


@dataclass(frozen=True)
class Files:
    """Folders with a base, two deltas on it, and a sibling of the base that differs in one weight."""

    base: Path
    delta: Path
    other: Path
    sibling: Path


def make_delta(base: Path, folder: Path, *, seed: int = 1, **values: Any) -> BiasDelta:
    """A delta with a head of four named labels, random as if it had been trained."""
    model = AutoModelForSequenceClassification.from_pretrained(base)
    config = BitFitConfig(**{"num_labels": 4, "id2label": LABELS, **values})
    delta = BiasDelta.from_model(fill_(get_peft_model(model, config), seed=seed))
    delta.save_pretrained(folder)
    return delta


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("cli")
    files = Files(root / "base", root / "delta", root / "other", root / "sibling")
    model = randomize_(BERT.build())
    model.save_pretrained(files.base)
    for name, data in TOKENIZER.items():
        (files.base / name).write_bytes(data)
    make_delta(files.base, files.delta)
    make_delta(files.base, files.other, seed=2, bias_terms=["query", "pooler"])
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight += 0.01
    model.save_pretrained(files.sibling)
    return files


@pytest.fixture
def files(made: Files, tmp_path: Path) -> Files:
    """A copy of the files for one test; the deltas still name the folder of the original base."""
    return Files(*(Path(shutil.copytree(path, tmp_path / path.name)) for path in vars(made).values()))


@torch.no_grad()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    (logits,) = output_tensors(model.eval()(**BERT.inputs()))
    return logits


def plain(text: str) -> str:
    """`text` without colours, which typer gives its help on some CI machines."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- help, version, the script ---------------------------------------------------------------------------------------


def test_help_lists_the_commands(run: Run) -> None:
    for args in ([], ["--help"], ["-h"]):
        result = run(*args)
        assert (result.code, result.err) == (0, "")
        assert all(re.search(rf"\b{command} ", plain(result.out)) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_examples_with_its_own_options(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    text = plain(result.out)
    examples = re.findall(rf"bitfit {command} .*", text.partition("Examples:")[2])
    assert len(examples) >= 2
    options = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", text.partition("Arguments:")[2]))
    used = {option for line in examples for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", line)}
    assert used <= options
    assert ("--json" in options) == (command != "serve"), "a server prints no result"


def test_version(run: Run) -> None:
    assert run("--version").out == f"bitfit {bitfit_hf.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["inspect", "--help"], 0), (["--version"], 0), (["inspect", "--bogus"], 2), (["inspct"], 2)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str], code: int) -> None:
    """They are answered at once, while torch takes seconds to import."""
    program = f"""
import importlib._bootstrap, sys
if {arguments == ["--version"]}:  # as it is called where nothing has imported importlib yet, in a fresh environment
    importlib._bootstrap.__name__ = "_frozen_importlib"
from bitfit_hf.cli import app
try:
    app({arguments!r}, prog_name="bitfit")
except SystemExit as end:
    assert end.code == {code}, end.code
heavy = [name for name in ("torch", "transformers", "peft", "huggingface_hub", "safetensors") if name in sys.modules]
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_completion_imports_nothing_heavy() -> None:
    program = """
import sys
from bitfit_hf.cli import app
try:
    app(prog_name="bitfit")
except SystemExit:
    pass
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    environment = {
        **os.environ,
        "_BITFIT_COMPLETE": "complete_bash",
        "COMP_WORDS": "bitfit tr",
        "COMP_CWORD": "1",
    }
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["train"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_at_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """No option's name is cut, and no line is longer than the terminal but examples, which are copied."""
    monkeypatch.setenv("COLUMNS", "80")
    text = run(command, "--help").out
    assert not re.search(r"--?[\w,-]+…", text)
    assert max(len(line) for line in text.partition("Arguments:")[2].splitlines()) <= 80


def test_the_command_line_first_and_then_the_library() -> None:
    program = """
import bitfit_hf.cli
import bitfit_hf
from peft import mapping
assert bitfit_hf.TaskBank.__module__ == "bitfit_hf.bank.bank"
assert "BITFIT" in mapping.PEFT_TYPE_TO_CONFIG_MAPPING
assert all(hasattr(bitfit_hf, name) for name in bitfit_hf.__all__)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_python_m_runs_commands_that_need_the_library(made: Files) -> None:
    command = [sys.executable, "-m", "bitfit_hf.cli", "inspect", str(made.delta), "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kind"] == "delta"


def test_console_script(made: Files, tmp_path: Path) -> None:
    entry = re.search(r'^bitfit = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert entry is not None
    script = tmp_path / "bitfit"  # as installers write it
    # Where these are installed, peft imports them, and they tell stderr which of their kernels they cannot load.
    quiet = 'sys.modules |= dict.fromkeys(["bitsandbytes", "torchao"])'
    script.write_text(f"import sys\n{quiet}\nfrom {entry[1]} import {entry[2]}\nsys.exit({entry[2]}())\n")

    def start(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), *map(str, args)]
        return subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)

    # A base as most on the Hub, a masked LM: transformers has much to say about the head that it does not have.
    randomize_(BertForMaskedLM(BertConfig.from_pretrained(made.base))).save_pretrained(tmp_path / "mlm")
    make_delta(tmp_path / "mlm", tmp_path / "delta", bias_terms="query")
    good = start("merge", tmp_path / "mlm", tmp_path / "delta", "-o", tmp_path / "merged", "--json")
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["model_class"] == "BertForSequenceClassification"
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    head = BiasDelta.from_pretrained(tmp_path / "delta").head
    assert torch.equal(merged.classifier.weight, head["classifier.weight"])

    bad = start("merge", made.sibling, made.delta, "-o", tmp_path / "out")
    Result(bad.returncode, bad.stdout, bad.stderr).assert_mistake("was trained on", str(made.sibling))


def _environment() -> dict[str, str]:
    """As a user has it: with the progress bars that the other tests go without."""
    bars = "HF_HUB_DISABLE_PROGRESS_BARS"
    return {name: value for name, value in os.environ.items() if name != bars} | {"PYTHONPATH": str(ROOT)}


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_says_what_the_library_says(run: Run, files: Files) -> None:
    delta = BiasDelta.from_pretrained(files.delta)
    values = run("inspect", files.delta, "--largest", 3, "--json").json
    counts = term_counts(delta)
    assert {row["term"]: row["parameters"] for row in values["terms"]} == counts.terms
    assert values["parameters"]["biases"] == counts.biases == delta.num_parameters()
    assert values["parameters"]["total"] == counts.total == delta.num_parameters(head=True)
    base = BERT.build()
    base_size = sum(p.numel() for name, p in base.named_parameters() if not name.startswith("classifier"))
    assert values["parameters"]["biases_percent_of_base"] == 100 * counts.biases / base_size
    assert values["largest_changes"] == [vars(row) for row in bias_change(delta).largest(3)]
    assert values["base_model"] == delta.config.base_model_name_or_path
    assert values["labels"] == list(LABELS.values())
    assert values["num_labels"] == 4
    assert values["head"] == {"classifier.weight": [4, 32], "classifier.bias": [4]}
    assert values["files"] == {name: len(data) for name, data in contents(files.delta).items()}
    assert values["bytes"] == sum(values["files"].values())
    assert values["added_biases"] == 0


def test_inspect_prints_tables(run: Run, files: Files) -> None:
    result = run("inspect", files.delta)
    assert (result.code, result.err) == (0, "")
    for text in ["query (b_q)", "592", "no, perhaps, yes, certainly", "classifier.weight [4, 32]", "Largest changes"]:
        assert text in result.out


def test_inspect_shows_the_metrics_of_the_card(run: Run, files: Files) -> None:
    results = [
        EvalResult("text-classification", "glue", "GLUE RTE", "accuracy", 0.71875, dataset_split="validation"),
        EvalResult("text-classification", "glue", "GLUE RTE", "f1", 0.5, metric_name="F1"),
    ]
    card = ModelCard(f"---\n{ModelCardData(model_name='rte', eval_results=results).to_yaml()}\n---\n# RTE\n")
    card.save(files.delta / "README.md")
    assert run("inspect", files.delta, "--json").json["metrics"] == [
        {"dataset": "GLUE RTE", "split": "validation", "metric": "accuracy", "value": 0.71875},
        {"dataset": "GLUE RTE", "split": None, "metric": "F1", "value": 0.5},
    ]
    assert "0.7188" in run("inspect", files.delta).out


@pytest.mark.parametrize("header", ["model-index: [1]", "a: [", "- a list", "model-index: {name: x}"])
def test_a_damaged_card_is_a_warning(run: Run, files: Files, header: str) -> None:
    (files.delta / "README.md").write_text(f"---\n{header}\n---\n")
    result = run("inspect", files.delta, "--json")
    assert result.json["metrics"] == []
    assert result.err.startswith("bitfit: warning: The metadata of README.md cannot be read")
    assert result.err.count("\n") == 1


def test_a_card_with_nan_leaves_stdout_json(run: Run, files: Files) -> None:
    results = [EvalResult("text-classification", "glue", "GLUE", "matthews", float("nan"))]
    card = ModelCard(f"---\n{ModelCardData(model_name='rte', eval_results=results).to_yaml()}\n---\n")
    card.save(files.delta / "README.md")
    assert run("inspect", files.delta, "--json").json["metrics"][0]["value"] is None


def test_names_from_files_are_neither_markup_nor_commands_to_the_terminal(run: Run, files: Files) -> None:
    path = files.delta / "adapter_config.json"
    values = json.loads(path.read_text())
    values["id2label"] = {"0": "[red]no[/red]", "1": "\x1b[2J", "2": "[/]", "3": "d"}
    path.write_text(json.dumps(values))
    result = run("inspect", files.delta)
    assert result.code == 0
    assert "[red]no[/red]" in result.out
    assert "\x1b" not in result.out
    values["peft_type"] = "\x1b[2JLORA\nsecond line"
    path.write_text(json.dumps(values))
    result = run("inspect", files.delta)
    result.assert_mistake("LORA")
    assert "\x1b" not in result.err


def test_inspect_shows_the_metrics_of_the_training(run: Run, files: Files) -> None:
    """They are in the delta's configuration, also where the card cannot have them since no data set is known."""
    delta = BiasDelta.from_pretrained(files.delta)
    delta.config.run = TrainingRun(metrics={"accuracy": 0.75, "loss": 0.5, "runtime": 3.0})
    delta.save_pretrained(files.delta)
    assert run("inspect", files.delta, "--json").json["metrics"] == [
        {"dataset": None, "split": None, "metric": "accuracy", "value": 0.75},
        {"dataset": None, "split": None, "metric": "loss", "value": 0.5},
    ]
    assert "accuracy" in run("inspect", files.delta).out


def test_a_base_that_is_gone(run: Run, files: Files, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    delta = BiasDelta.from_pretrained(files.delta)
    delta.config.base_model_name_or_path = gone
    delta.save_pretrained(files.delta)
    table = tmp_path / "t.csv"
    table.write_text("text,label\na,no\nb,yes\n")
    run("eval", files.delta, table).assert_mistake(gone, "no such folder any more", "base_model_name_or_path")


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal_lm", "beit-image", "llama-causal_lm"])
def test_inspect_a_base_model(run: Run, tmp_path: Path, name: str) -> None:
    model = build(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)  # no weights: none are needed
    values = run("inspect", tmp_path, "--json").json
    assert (values["kind"], values["model_class"]) == ("base", type(model).__name__)
    expected: dict[str, int] = {}
    for bias in find_biases(model):
        expected[bias.term] = expected.get(bias.term, 0) + bias.num_parameters
    assert {row["term"]: row["parameters"] for row in values["terms"]} == expected
    assert values["parameters"]["biases"] == sum(expected.values())
    assert values["unknown_vectors"] == bitfit_hf.terms.unknown_vectors(model)
    assert bool(values["unknown_vectors"]) == (name == "beit-image")
    assert bool(values["missing_biases"]) == (name in ("beit-image", "llama-causal_lm"))
    heads = {"bert-sequence": ["classifier"], "beit-image": ["classifier"]}
    assert values["head"] == heads.get(name, [])
    text = run("inspect", tmp_path)
    assert (text.code, text.err) == (0, "")
    assert type(model).__name__ in text.out


def test_inspect_counts_as_the_paper_does(run: Run, tmp_path: Path) -> None:
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    values = run("inspect", tmp_path, "--task-type", "SEQ_CLS", "--json").json
    assert values["parameters"]["biases"] == 102_912
    assert round(values["parameters"]["biases_percent_of_base"], 2) == 0.09
    stored = run("inspect", tmp_path, "--json").json
    assert stored["model_class"] == "BertForMaskedLM"
    assert "lm_head" in [row["term"] for row in stored["terms"]]


def test_inspect_a_base_whose_head_is_not_known(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnBackboneForSequenceClassification(PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.encoder = torch.nn.Linear(8, 8)
            self.scorer = torch.nn.Linear(8, 2)

    monkeypatch.setattr(
        checkpoints.transformers,
        "OwnBackboneForSequenceClassification",
        OwnBackboneForSequenceClassification,
        raising=False,
    )
    BertConfig(architectures=["OwnBackboneForSequenceClassification"]).save_pretrained(tmp_path)
    values = run("inspect", tmp_path, "--json").json
    assert values["head"] is None
    assert values["parameters"]["head"] is None
    assert values["missing_biases"] is None
    assert "not known" in run("inspect", tmp_path).out


# --- diff ------------------------------------------------------------------------------------------------------------


def test_diff_by_term_and_layer(run: Run, files: Files) -> None:
    a, b = (BiasDelta.from_pretrained(folder) for folder in (files.delta, files.other))
    values = run("diff", files.delta, files.other, "--json").json
    expected = {("query", layer): f"bert.encoder.layer.{layer}.attention.self.query.bias" for layer in (0, 1)}
    expected["pooler", None] = "bert.pooler.dense.bias"
    assert {(row["term"], row["layer"]) for row in values["rows"]} == set(expected)
    for row in values["rows"]:
        name = expected[row["term"], row["layer"]]
        assert row["distance"] == pytest.approx((a[name] - b[name]).abs().mean().item(), rel=1e-6)
        assert row["cosine"] == pytest.approx(torch.cosine_similarity(a[name], b[name], dim=0).item(), abs=1e-6)
        assert row["size"] == 32
    assert values["total"]["size"] == 96
    assert values["same_base"] is True
    assert {row["tensor"] for row in values["only_one"]} == set(a) - set(b)
    assert {row["delta"] for row in values["only_one"]} == {"a"}
    assert values["head"]["comparable"] is True
    head = torch.cat([(a.head[name] - b.head[name]).flatten() for name in a.head])
    assert values["head"]["distance"] == pytest.approx(head.abs().mean().item(), rel=1e-6)
    text = run("diff", files.delta, files.other)
    assert (text.code, text.err) == (0, "")
    assert "only in A  15 tensors" in text.out


def test_diff_of_a_delta_with_itself_and_with_its_half(run: Run, files: Files, tmp_path: Path) -> None:
    same = run("diff", files.delta, files.delta, "--json").json
    assert {row["distance"] for row in same["rows"]} == {0.0}
    assert same["head"]["distance"] == 0
    assert same["only_one"] == []
    delta = BiasDelta.from_pretrained(files.delta)
    (0.5 * delta).save_pretrained(tmp_path / "half")
    half = run("diff", files.delta, tmp_path / "half", "--json").json
    change = {(row.term, row.layer): row.value for row in bias_change(delta)}
    assert len(half["rows"]) == len(change)
    for row in half["rows"]:
        assert row["cosine"] == pytest.approx(1.0)
        assert row["distance"] == pytest.approx(change[row["term"], row["layer"]] / 2, rel=1e-6)
    (0.0 * delta).save_pretrained(tmp_path / "zero")
    zero = run("diff", files.delta, tmp_path / "zero", "--json").json
    assert {row["cosine"] for row in zero["rows"]} == {None}


def test_diff_of_slices_and_of_other_bases(run: Run, files: Files, tmp_path: Path) -> None:
    for name, terms, seed in [("q", "query", 1), ("qk", ["query", "key"], 2)]:
        model = fill_(get_peft_model(build("gpt2-causal_lm"), BitFitConfig(bias_terms=terms)), seed=seed)
        BiasDelta.from_model(model).save_pretrained(tmp_path / name)
    a, b = (BiasDelta.from_pretrained(tmp_path / name) for name in ("q", "qk"))
    values = run("diff", tmp_path / "q", tmp_path / "qk", "--json").json
    assert [(row["term"], row["layer"]) for row in values["rows"]] == [("query", 0), ("query", 1)]
    name = "transformer.h.0.attn.c_attn.bias"
    assert values["rows"][0]["distance"] == pytest.approx((a[name] - b[name][:32]).abs().mean().item(), rel=1e-6)
    assert {(row["delta"], row["term"]) for row in values["only_one"]} == {("b", "key")}

    other = run("diff", files.delta, tmp_path / "q", "--json").json
    assert other["same_base"] is False
    assert (other["rows"], other["total"]["size"]) == ([], 0)
    assert other["head"]["comparable"] is False
    assert "same base  no" in run("diff", files.delta, tmp_path / "q").out


def test_diff_of_models_of_another_size(run: Run, files: Files, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(files.base, intermediate_size=48)
    wider = type(BERT.build())(config)
    torch.nn.init.ones_(wider.bert.pooler.dense.bias)  # a trained pooler's is not zero
    wider.save_pretrained(tmp_path / "wider")
    make_delta(tmp_path / "wider", tmp_path / "on-wider")
    values = run("diff", files.delta, tmp_path / "on-wider", "--json").json
    assert values["same_base"] is False
    assert values["total"]["size"] == 592 - 80
    assert [(row["delta"], row["term"], row["size"]) for row in values["only_one"]] == [
        *[("a", "intermediate", 40)] * 2,
        *[("b", "intermediate", 48)] * 2,
    ]


# --- merge -----------------------------------------------------------------------------------------------------------


def test_merge_gives_a_stock_checkpoint(run: Run, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "new" / "merged"
    values = run("merge", files.base, files.delta, "-o", out, "--json").json
    assert values["model_class"] == "BertForSequenceClassification"
    assert values["files"] == sorted({"config.json", "model.safetensors", *TOKENIZER})
    assert {name: data for name, data in contents(out).items() if name in TOKENIZER} == TOKENIZER
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    assert merged.config.id2label == LABELS
    expected = load_delta(AutoModelForSequenceClassification.from_pretrained(files.base), files.delta)
    assert merged.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in expected.state_dict().items())
    tuned = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(files.base), files.delta)
    assert (outputs(merged) - outputs(tuned)).abs().max() <= 2e-6
    assert not list(out.parent.glob(".*"))


def test_merge_keeps_the_precision_and_prefers_the_deltas_tokenizer(run: Run, files: Files, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(files.base).bfloat16().save_pretrained(files.base)
    (files.delta / "vocab.txt").write_text("[PAD]\n[NEW]\n")
    assert run("merge", files.base, files.delta, "-o", tmp_path / "out", "--json").json["dtype"] == "bfloat16"
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]\n[NEW]\n"
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()  # never the files of two tokenizers


def test_merge_of_added_biases(run: Run, tmp_path: Path) -> None:
    for name in ("llama-causal_lm", "t5-seq2seq_lm"):
        config = BitFitConfig(add_missing_biases=True, bias_terms="query")
        base = randomize_(build(name))
        base.save_pretrained(tmp_path / name)
        tuned = fill_(get_peft_model(type(base).from_pretrained(tmp_path / name), config))
        BiasDelta.from_model(tuned).save_pretrained(tmp_path / f"{name}-delta")

    out = tmp_path / "merged"
    run("merge", tmp_path / "llama-causal_lm", tmp_path / "llama-causal_lm-delta", "-o", out)
    merged = type(build("llama-causal_lm")).from_pretrained(out)
    assert merged.config.attention_bias is True
    delta = BiasDelta.from_pretrained(tmp_path / "llama-causal_lm-delta")
    assert torch.equal(merged.model.layers[1].self_attn.q_proj.bias, delta["model.layers.1.self_attn.q_proj.bias"])
    assert not merged.model.layers[1].self_attn.k_proj.bias.any()

    refused = tmp_path / "refused"
    result = run("merge", tmp_path / "t5-seq2seq_lm", tmp_path / "t5-seq2seq_lm-delta", "-o", refused)
    result.assert_mistake("has no switch for the biases that were added")
    assert not refused.exists()


def test_merge_onto_another_checkpoint(run: Run, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = set(tmp_path.iterdir())
    result = run("merge", files.sibling, files.delta, "-o", out)
    result.assert_mistake(" 1 of ", "tensors differ: ", "query.weight differs by", " Load that base")
    assert set(tmp_path.iterdir()) == before

    result = run("merge", files.sibling, files.delta, "-o", out, "--on-base-mismatch", "warn", "--json")
    assert result.json["output"] == str(out)
    assert result.err.startswith("bitfit: warning: This delta was trained on")
    assert result.err.count("\n") == 1
    result = run("merge", files.sibling, files.delta, "-o", out, "--on-base-mismatch", "ignore", "--force", "--json")
    assert (result.json["output"], result.err) == (str(out), "")


def test_merge_replaces_only_models_and_only_by_force(run: Run, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert run("merge", files.base, files.delta, "-o", out).code == 0  # an empty folder is in nobody's way
    (out / "stale.txt").touch()
    old = contents(out)
    run("merge", files.base, files.other, "-o", out).assert_mistake(f"{out} is not empty", "--force")
    assert contents(out) == old
    assert run("merge", files.base, files.other, "-o", out, "--force").code == 0
    assert contents(out).keys() == old.keys() - {"stale.txt"}
    assert contents(out)["model.safetensors"] != old["model.safetensors"]

    own = tmp_path / "documents"
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    run("merge", files.base, files.delta, "-o", own, "--force").assert_mistake("something other than a model")
    assert contents(own) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("step", ["copy_preprocessing", "_replace"])
def test_a_merge_that_fails_leaves_what_was_there(
    run: Run, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = tmp_path / "out"
    assert run("merge", files.base, files.delta, "-o", out).code == 0
    old, before = contents(out), set(tmp_path.iterdir())

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, step, full)
    run("merge", files.base, files.other, "-o", out, "--force").assert_mistake("No space left on device")
    assert contents(out) == old
    assert set(tmp_path.iterdir()) == before


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, rename = contents(files.base), os.rename

    def broken(source: Path, target: Path) -> None:
        if str(source).endswith(".new"):
            raise OSError("cut")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(bitfit_hf.BitFitError, match="cut"), checkpoints.new_folder(files.base, force=True) as folder:
        (folder / "config.json").touch()
    assert contents(files.base) == old
    assert not list(files.base.parent.glob(".*"))


# --- extract, export, plot -------------------------------------------------------------------------------------------


def test_extract_is_the_way_back_from_merge(run: Run, files: Files, tmp_path: Path) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "extracted"
    assert run("merge", files.base, files.delta, "-o", tuned).code == 0
    values = run("extract", files.base, tuned, "-o", out, "--json").json
    model = AutoModelForSequenceClassification.from_pretrained
    library = BiasDelta.from_models(model(files.base), model(tuned))
    extracted = BiasDelta.from_pretrained(out)
    assert extracted.digest == library.digest
    assert values["largest_error"] == library.extraction_error
    assert values["biases"] == library.num_parameters() == 592
    assert values["base_model"] == extracted.config.base_model_name_or_path == str(files.base)
    assert extracted.config.id2label == LABELS
    original = BiasDelta.from_pretrained(files.delta)
    assert max((extracted[name] - original[name]).abs().max() for name in original) < 1e-6

    config = json.loads((files.base / "config.json").read_text())  # the delta says which class, whatever the base does
    (files.base / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert run("merge", files.base, out, "-o", tmp_path / "again").code == 0
    assert (outputs(model(tmp_path / "again")) - outputs(model(tuned))).abs().max() <= 2e-6

    run("extract", files.base, tuned, "-o", out).assert_mistake("is not empty", "--force")
    text = run("extract", files.base, tuned, "-o", out, "--force", "--base-model", "user/bert")
    assert re.search(r"largest error +\d", text.out)
    assert BiasDelta.from_pretrained(out).config.base_model_name_or_path == "user/bert"


def test_extract_says_that_nothing_has_changed(run: Run, files: Files, tmp_path: Path) -> None:
    """The same checkpoint twice is a slip; a head alone is told."""
    same = BERT.build()
    same.save_pretrained(tmp_path / "x")
    run("extract", tmp_path / "x", tmp_path / "x", "-o", tmp_path / "d").assert_mistake("no delta to extract")
    assert not (tmp_path / "d").exists()
    with torch.no_grad():
        same.classifier.weight += 1
    same.save_pretrained(tmp_path / "y")
    result = run("extract", tmp_path / "x", tmp_path / "y", "-o", tmp_path / "d", "-q")
    assert (result.code, result.out) == (0, f"{tmp_path / 'd'}\n")
    assert "the delta holds a head alone" in result.err


def test_extract_refuses_other_weights_and_missing_ones(run: Run, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("extract", files.base, files.sibling, "-o", out)
    result.assert_mistake("differ in more than biases and head", "query.weight differs by 1.0e-02")
    model = AutoModelForSequenceClassification.from_pretrained(files.base)
    state = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    model.save_pretrained(tmp_path / "partial", state_dict=state)
    result = run("extract", tmp_path / "partial", files.base, "-o", out)
    result.assert_mistake("has no weights for bert.pooler.dense.bias, bert.pooler.dense.weight")
    assert not out.exists()


def test_export_loads_with_stock_peft(run: Run, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    values = run("export", files.delta, "--stock", "--base", files.base, "-o", out, "--json").json
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", *TOKENIZER]
    assert values["files"] == sorted(names)
    assert contents(out)["README.md"] == contents(files.delta)["README.md"]
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"

    def load(folder: Path) -> torch.nn.Module:
        base = AutoModelForSequenceClassification.from_pretrained(
            files.base, num_labels=4, ignore_mismatched_sizes=True
        )
        return PeftModel.from_pretrained(base, folder)

    assert (outputs(load(out)) - outputs(load(files.delta))).abs().max() <= 2e-6
    # Without --stock: it is the format of a delta. Without --base: the one that the delta names.
    assert run("export", files.delta, "-o", tmp_path / "again").code == 0
    again, first = contents(tmp_path / "again"), contents(out)
    assert again["adapter_model.safetensors"] == first["adapter_model.safetensors"]


def test_plot(run: Run, files: Files, tmp_path: Path) -> None:
    values = run("plot", files.delta, "-o", tmp_path / "change.png", "--title", "RTE", "--json").json
    assert (tmp_path / "change.png").read_bytes().startswith(b"\x89PNG")
    assert values["rows"] == [vars(row) for row in bias_change(files.delta)]
    assert run("plot", files.delta, "-o", tmp_path / "change.svg").code == 0
    assert b"<svg" in (tmp_path / "change.svg").read_bytes()


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_push(run: Run, files: Files, hub: Any, hub_env: Any) -> None:
    run("push", files.delta, "alice/rte").assert_mistake("local folder", "base_model")
    assert "alice/rte" not in hub.repos
    for name, data in TOKENIZER.items():
        (files.delta / name).write_bytes(data)
    args = ["--base-model", "alice/base", "--private", "--message", "First", "--json"]
    values = run("push", files.delta, "alice/rte", *args).json
    assert hub.repos["alice/rte"].private
    assert hub.commits("alice/rte")[0].oid == values["commit"]
    assert hub.commits("alice/rte")[0].title == "First"
    assert values["repo"] == "alice/rte"
    pushed = hub.files("alice/rte")
    expected = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "bias_change.png"}
    assert pushed.keys() == expected | TOKENIZER.keys()
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    assert run("inspect", "alice/rte", "--json").json["parameters"]["biases"] == 592


def test_push_to_a_branch_and_as_a_pull_request(run: Run, files: Files, hub: Any, hub_env: Any) -> None:
    push = ["push", files.delta, "alice/rte", "--base-model", "alice/base", "--json"]
    assert run(*push, "--revision", "second").json["pull_request"] is None
    assert "adapter_config.json" in hub.files("alice/rte", "second")
    assert "adapter_config.json" not in hub.files("alice/rte")
    values = run(*push, "--create-pr").json
    assert values["pull_request"].endswith("/alice/rte/discussions/1")
    assert "adapter_config.json" in hub.files("alice/rte", "refs/pr/1")
    assert "adapter_config.json" not in hub.files("alice/rte")


def test_push_takes_the_name_of_the_base_from_the_card(run: Run, files: Files, hub: Any, hub_env: Any) -> None:
    run("push", files.delta, "alice/rte").assert_mistake("--base-model user/name", str(files.base.name))
    card = ModelCard.load(files.delta / "README.md")
    card.data.base_model = "google-bert/bert-base-uncased"
    card.save(files.delta / "README.md")
    assert run("push", files.delta, "alice/rte", "-q").out.startswith("http")
    assert BiasDelta.from_pretrained("alice/rte").config.base_model_name_or_path == "google-bert/bert-base-uncased"


def test_push_with_stock_loads_the_base(run: Run, files: Files, hub: Any, hub_env: Any) -> None:
    assert run("push", files.delta, "alice/rte", "--base-model", "alice/base", "--stock").code == 0
    assert {"stock/adapter_config.json", "stock/adapter_model.safetensors"} < hub.files("alice/rte").keys()


def test_push_that_the_hub_refuses(run: Run, files: Files, hub: Any, hub_env: Any) -> None:
    push = ["push", files.delta, "alice/rte", "--base-model", "alice/base"]
    hub_env.login(None)
    run(*push).assert_mistake("alice/rte", "token")
    hub_env.login("bob")
    run(*push).assert_mistake("alice/rte", "403")
    assert run(*push, "--token", "hf_alice").code == 0
    run("push", files.delta / "none", "alice/rte").assert_mistake("There is no folder")
    run("push", files.base, "alice/rte").assert_mistake("adapter_config.json")
    run("push", files.delta, "a/b/c", "--base-model", "alice/base").assert_mistake("'a/b/c'", "repo id")


def test_deltas_and_bases_on_the_hub(run: Run, files: Files, tmp_path: Path, hub: Any, hub_env: Any) -> None:
    """Everything at the commits that were asked for, and the base at the one that the delta pins."""
    commit = hub.put("alice/base", contents(files.base))
    make_delta("alice/base", files.delta)  # type: ignore[arg-type]
    results = [EvalResult("text-classification", "glue", "GLUE RTE", "accuracy", 0.75)]
    card = f"---\n{ModelCardData(model_name='rte', eval_results=results).to_yaml()}\n---\n".encode()
    first = hub.put("alice/rte", {**contents(files.delta), "README.md": card})
    hub.put("alice/base", {"model.safetensors": contents(files.sibling)["model.safetensors"]})
    hub.put("alice/rte", contents(files.other))

    values = run("inspect", "alice/rte", "--revision", first, "--json").json
    assert (values["base_model"], values["revision"]) == ("alice/base", commit)
    assert [metric["value"] for metric in values["metrics"]] == [0.75]
    assert values["parameters"]["biases"] == 592
    assert run("inspect", "alice/rte", "--json").json["parameters"]["biases"] == 96
    base = run("inspect", "alice/base", "--json").json
    assert (base["kind"], base["model_class"]) == ("base", "BertForSequenceClassification")

    diff = run("diff", "alice/rte", "alice/rte", "--a-revision", first, "--json").json
    assert (diff["a"]["biases"], diff["b"]["biases"]) == (592, 96)

    out = tmp_path / "out"
    result = run("merge", "alice/base", "alice/rte", "--delta-revision", first, "-o", out, "--json")
    assert {*TOKENIZER, "model.safetensors"} < set(result.json["files"])
    expected = load_delta(AutoModelForSequenceClassification.from_pretrained(files.base), files.delta)
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in expected.state_dict().items())
    latest = ["merge", "alice/base", "alice/rte", "--delta-revision", first, "--base-revision", "main", "-o", out]
    run(*latest, "--force").assert_mistake("was trained on alice/base")

    run("inspect", "alice/none").assert_mistake("no Hub repo 'alice/none'")
    hub_env.go_offline()
    assert run("inspect", "alice/rte", "--revision", first, "--json").json["metrics"]
    run("inspect", "alice/unseen").assert_mistake("alice/unseen", "the Hub cannot be reached")


def test_folders_never_touch_the_network(
    run: Run, made: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    asked = []

    def connect(self: socket.socket, address: object) -> None:
        asked.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: connect(None, args))  # type: ignore[arg-type]
    commands: list[list[object]] = [
        ["inspect", made.delta],
        ["inspect", made.base],
        ["diff", made.delta, made.other],
        ["merge", made.base, made.delta, "-o", tmp_path / "merged"],
        ["extract", made.base, tmp_path / "merged", "-o", tmp_path / "extracted"],
        ["export", made.delta, "--stock", "-o", tmp_path / "lora"],
        ["plot", made.delta, "-o", tmp_path / "change.png"],
        ["inspect", made.delta / "none"],
        ["merge", made.base / "none", made.delta, "-o", tmp_path / "no"],
    ]
    codes = [run(*command).code for command in commands]
    assert codes == [0] * 7 + [1] * 2
    assert asked == []


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["inspekt", "{delta}"], ["No such command 'inspekt'", "inspect", "'bitfit --help'"]),
    "unknown option": (["inspect", "{delta}", "--jsn"], ["--jsn", "'bitfit inspect --help'"]),
    "unknown global option": (["--quiet"], ["--quiet"]),
    "missing argument": (["diff", "{delta}"], ["'B'", "'bitfit diff --help'"]),
    "missing option": (["merge", "{base}", "{delta}"], ["--output", "'bitfit merge --help'"]),
    "missing value": (["plot", "{delta}", "-o"], ["-o"]),
    "wrong value": (["inspect", "{delta}", "--largest", "many"], ["'--largest'", "integer"]),
    "wrong choice": (["merge", "{base}", "{delta}", "-o", "{new}", "--on-base-mismatch", "shrug"], ["shrug"]),
    "unknown task": (["inspect", "{base}", "--task-type", "NLI"], ["NLI", "SEQ_CLS"]),
    "no such folder": (["inspect", "{delta}/none"], ["There is no folder", "none"]),
    "a file": (["inspect", "{delta}/adapter_config.json"], ["is a file"]),
    "no delta to compare with": (["diff", "{delta}", "{base}"], ["{base}", "adapter_config.json"]),
    "no repo id": (["diff", "{delta}", "a//b"], ["a//b"]),
    "an empty folder": (["inspect", "{empty}"], ["{empty}", "adapter_config.json"]),
    "damaged weights": (["inspect", "{damaged}"], ["{damaged}", "adapter_model.safetensors", "damaged"]),
    "a pair of two saves": (["diff", "{mixed}", "{delta}"], ["{mixed}", "two different saves"]),
    "another method": (["inspect", "{lora}"], ["'LORA'", "{lora}"]),
    "no base": (["merge", "{empty}", "{delta}", "-o", "{new}"], ["{empty}", "config.json"]),
    "no such base": (["merge", "{base}/none", "{delta}", "-o", "{new}"], ["There is no folder {base}/none"]),
    "a damaged base": (["merge", "{broken}", "{delta}", "-o", "{new}"], ["{broken} cannot be loaded"]),
    "a base without weights": (["merge", "{bare}", "{delta}", "-o", "{new}"], ["{bare} cannot be loaded"]),
    "a base of unknown class": (["inspect", "{foreign}"], ["{foreign}", "'NewModel'", "--task-type"]),
    "a base with code": (["inspect", "{custom}"], ["{custom} cannot be loaded", "trust_remote_code"]),
    "a base of another size": (["merge", "{small}", "{delta}", "-o", "{new}"], ["instead of"]),
    "output is a file": (["merge", "{base}", "{delta}", "-o", "{base}/config.json"], ["config.json is a file"]),
    "output below a file": (["merge", "{base}", "{delta}", "-o", "{base}/config.json/x"], ["cannot be written"]),
    "extract below a file": (["extract", "{base}", "{base}", "-o", "{base}/config.json/x"], ["cannot be written"]),
    "export below a file": (["export", "{delta}", "--stock", "-o", "{base}/config.json/x"], ["cannot be written"]),
    "output not empty": (["export", "{delta}", "--stock", "-o", "{base}"], ["{base} is not empty"]),
    "two formats": (["export", "{delta}", "--stock", "--onnx", "-o", "{new}"], ["three formats"]),
    "int8 of a delta": (["export", "{delta}", "--int8", "-o", "{new}"], ["--onnx"]),
    "a delta for a base": (["export", "{delta}", "--onnx", "-o", "{new}"], ["no config.json"]),
    "export on another base": (["export", "{delta}", "--stock", "--base", "{sibling}", "-o", "{new}"], ["differ"]),
    "no picture": (["plot", "{delta}", "-o", "{new}.txt"], [".png, .svg or .pdf"]),
    "a folder for a picture": (["plot", "{delta}", "-o", "{pictures}"], ["is a folder"]),
    "a picture below a file": (["plot", "{delta}", "-o", "{base}/config.json/a.png"], ["cannot be written"]),
    "nothing to push": (["push", "{empty}", "user/x"], ["{empty}", "adapter_config.json"]),
}


@pytest.fixture
def places(files: Files, tmp_path: Path) -> dict[str, Path]:
    """Folders with something wrong, by the names in `MISTAKES`."""
    names = ["empty", "damaged", "mixed", "lora", "broken", "bare", "foreign", "custom", "small", "pictures.png"]
    places = {name.removesuffix(".png"): tmp_path / name for name in names}
    for name in ("empty", "pictures", "lora", "foreign", "custom", "bare"):
        places[name].mkdir()
    for name in ("damaged", "mixed"):
        shutil.copytree(files.delta, places[name])
    weights = places["damaged"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    shutil.copyfile(files.other / "adapter_model.safetensors", places["mixed"] / "adapter_model.safetensors")
    shutil.copytree(files.base, places["broken"])
    (places["broken"] / "model.safetensors").write_bytes(b"nothing")
    shutil.copyfile(files.base / "config.json", places["bare"] / "config.json")
    (places["lora"] / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copyfile(files.delta / "adapter_model.safetensors", places["lora"] / "adapter_model.safetensors")
    config = json.loads((files.base / "config.json").read_text())
    (places["foreign"] / "config.json").write_text(json.dumps({**config, "architectures": ["NewModel"]}))
    code = {"model_type": "new", "auto_map": {"AutoConfig": "code.NewConfig"}}
    (places["custom"] / "config.json").write_text(json.dumps(code))
    (places["custom"] / "code.py").write_text("raise SystemExit('this was executed')\n")
    small = type(BERT.build())(BertConfig(**{**config, "hidden_size": 16}))
    small.save_pretrained(places["small"])
    return {**vars(files), **places, "new": tmp_path / "new"}


# Told before anything is imported, with click's own exit code.
IN_THE_COMMAND = {
    *("unknown command", "unknown option", "unknown global option", "missing argument", "missing option"),
    *("missing value", "wrong value", "wrong choice", "two formats", "int8 of a delta"),
}


def test_the_mistakes_in_the_command_are_among_them() -> None:
    assert set(MISTAKES) > IN_THE_COMMAND


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_an_exit_code(run: Run, places: dict[str, Path], mistake: str) -> None:
    args, fragments = MISTAKES[mistake]
    before = {path: path.read_bytes() for path in places["empty"].parent.rglob("*") if path.is_file()}
    for extra in ([], ["--json"]) if mistake not in ("unknown global option", "missing value") else ([],):
        result = run(*(arg.format(**places) for arg in args), *extra)
        code = 2 if mistake in IN_THE_COMMAND else 1
        result.assert_mistake(*(fragment.format(**places) for fragment in fragments), code=code)
    after = {path: path.read_bytes() for path in places["empty"].parent.rglob("*") if path.is_file()}
    assert after == before
    assert not places["new"].exists()


def test_debug_shows_where_it_went_wrong(made: Files) -> None:
    command = typer.main.get_command(app)
    with pytest.raises(DeltaNotFoundError, match="adapter_config"):
        command.main(["--debug", "diff", str(made.delta), str(made.base)], prog_name="bitfit")


def test_a_defect_is_not_presented_as_the_users_mistake(made: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("bitfit_hf.cli.reports.compare", broken)
    with pytest.raises(ZeroDivisionError):
        typer.main.get_command(app).main(["diff", str(made.delta), str(made.other)], prog_name="bitfit")


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(run: Run, files: Files, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    run("merge", files.base, files.delta, "-o", closed / "out").assert_mistake("cannot be written", "Permission")


# --- manners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bars", [True, False])
def test_a_command_leaves_the_libraries_settings_alone(
    run: Run, made: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bars: bool
) -> None:
    monkeypatch.setattr(transformers_logging, "_tqdm_active", bars)

    def settings() -> list[object]:
        names = ("transformers", "huggingface_hub", "peft", "accelerate")
        levels = [logging.getLogger(name).level for name in names]
        return [*levels, transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()]

    before = settings()
    good = run("merge", made.base, made.delta, "-o", tmp_path / "out")
    assert (good.code, good.err) == (0, "")
    assert settings() == before
    assert run("merge", made.sibling, made.delta, "-o", tmp_path / "no").code == 1
    assert settings() == before


def test_the_card_that_extract_and_merge_leave_has_no_metrics_of_its_own(
    run: Run, files: Files, tmp_path: Path
) -> None:
    """What was measured with other code is not known here."""
    assert run("merge", files.base, files.delta, "-o", tmp_path / "tuned").code == 0
    assert run("extract", files.base, tmp_path / "tuned", "-o", tmp_path / "out").code == 0
    header = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert "model-index" not in header
