"""Runs the examples in the docstrings, which the reference shows.

    python docs/examples.py             # all that can run without a network
    python docs/examples.py TaskBank    # those of names with this in them

What an example takes for granted is made here: a folder named as the base it loads, with BERT-base's shape and random
weights, so that what is counted is what is printed; deltas under the names it loads; small models for names that say
no size. Lines after `>>>` are compared, but for what only trained weights would say (`UNTRAINED`).
"""

from __future__ import annotations

import ast
import doctest
import io
import os
import re
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks import PYTHON, fenced

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = {
    "export_onnx": "exports a graph of 440 MB: tests/library/test_onnx_export.py exports small ones",
    "export_onnx_adapter": "goes on with the files that it wrote: tests/library/test_onnx_export.py runs these lines",
}
UNTRAINED = ("TaskBank", "bias_change")
NEEDS_NOTHING = ("BitFitConfig", "resolve_terms", "unknown_vectors")  # no file, and no model of full size


@dataclass(frozen=True)
class Example:
    """A fenced block of Python in a docstring.

    Args:
        name (`str`): Of the class or function.
        file (`str`): Relative to the repository.
        line (`int`): Of the class or function.
        code (`str`): What stands inside the fence.
    """

    name: str
    file: str
    line: int
    code: str


def examples(folder: Path = ROOT / "bitfit_hf") -> list[Example]:
    """All examples of the library, in the order of its files."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                file = path.relative_to(folder.parent).as_posix()
                blocks = fenced(ast.get_docstring(node) or "", file)
                code = "".join(block.code for block in blocks if block.language in PYTHON)
                if code:
                    found.append(Example(node.name, file, node.lineno, code))
    return found


def run(example: Example, names: dict[str, Any]) -> str:
    """Runs one. Returns what went wrong, or nothing."""
    shown = io.StringIO()
    try:
        with redirect_stdout(shown), redirect_stderr(shown):
            if ">>>" not in example.code:
                exec(compile(example.code, example.file, "exec"), names)
                return ""
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            test = doctest.DocTestParser().get_doctest(example.code, names, example.name, example.file, example.line)
            if example.name in UNTRAINED:
                for line in test.examples:
                    exec(compile(line.source, example.file, "single"), names)
                return ""
            doctest.DocTestRunner(optionflags=flags, verbose=False).run(test, out=shown.write, clear_globs=False)
    except BaseException:  # an example may also exit
        return f"{shown.getvalue()[-2000:]}\n{traceback.format_exc()}"
    return shown.getvalue() if "Failed example" in shown.getvalue() else ""


def library() -> dict[str, Any]:
    """What an example may use without importing it: what the library and transformers offer."""
    import peft
    import torch
    import transformers

    import bitfit_hf
    from bitfit_hf import analysis
    from bitfit_hf.card import model_card
    from bitfit_hf.terms import heads, selection, vocabulary

    names: dict[str, Any] = {"torch": torch, "PeftModel": peft.PeftModel, "get_peft_model": peft.get_peft_model}
    names |= {name: getattr(bitfit_hf, name) for name in bitfit_hf.__all__}
    for module in (analysis, model_card, heads, selection, vocabulary):
        names |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    words = {word for example in examples() for word in re.findall(r"[A-Z]\w+", example.code)} - {*names}
    return names | {word: getattr(transformers, word) for word in sorted(words) if hasattr(transformers, word)}


def scene() -> dict[str, Any]:
    """The files that examples load, in the current folder, and the objects that they go on with."""
    import torch
    from peft import get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        Trainer,
        TrainingArguments,
    )

    from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig, push_to_hub

    hub = "sentence-transformers/all-MiniLM-L6-v2"
    tokenizer = AutoTokenizer.from_pretrained(hub)
    bert = BertModel(BertConfig())
    torch.nn.init.ones_(bert.pooler.dense.bias)  # at zero it would pass for one that was never trained
    bert.save_pretrained("bert-base-uncased")
    tokenizer.save_pretrained("bert-base-uncased")

    def delta(folder: str, labels: list[str]) -> None:
        base = AutoModelForSequenceClassification.from_pretrained(
            "bert-base-uncased", num_labels=len(labels), id2label=dict(enumerate(labels))
        )
        BiasDelta.from_model(get_peft_model(base, BitFitConfig())).save_pretrained(folder)

    delta("user/bert-base-rte-bitfit", ["entailment", "not_entailment"])
    delta("cola", ["unacceptable", "acceptable"])
    delta("rte-bitfit", ["entailment", "not_entailment"])

    with_3_labels = AutoModelForSequenceClassification.from_pretrained(hub, num_labels=3)
    push_to_hub(get_peft_model(with_3_labels, BitFitConfig()), "user/delta", stock=True)

    def tiny() -> BertForSequenceClassification:
        return BertForSequenceClassification(
            BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
        )

    rows = [{"input_ids": torch.tensor([2, 5 + index, 3]), "labels": index % 2} for index in range(8)]
    args = TrainingArguments("a-run", max_steps=2, report_to="none")
    batch = {"input_ids": torch.tensor([[2, 5, 3]]), "labels": torch.tensor([0])}
    return {
        "args": args,
        "base": tiny,
        "base_with_3_labels": AutoModelForSequenceClassification.from_pretrained(hub, num_labels=3),
        "batch": batch,
        "model": tiny,
        "tokenizer": tokenizer,
        "train": rows,
        "trainer": lambda: Trainer(tiny(), args, train_dataset=rows, callbacks=[BitFitCallback]),
        "validation": rows,
        # What stands for a name in one example only.
        "base_mismatch": {"base": lambda: AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")},
        "optimizer_groups": {"model": lambda: get_peft_model(tiny(), BitFitConfig())},
        "push_to_hub": {
            "model": lambda: get_peft_model(AutoModelForSequenceClassification.from_pretrained(hub), BitFitConfig())
        },
    }


def run_all(only: str = "") -> int:
    """Runs the examples whose name has `only` in it. Returns how many failed."""
    failed = ran = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bitfit-docs-examples-") as place:
        os.chdir(place)
        try:
            known, made = library(), scene()
            for example in examples():
                if only not in example.name or example.name in NOT_RUN:
                    continue
                own = made.get(example.name, {})
                given = {name: value for name, value in made.items() if name not in known} | own
                fresh = ("base", "model", "trainer")  # made anew for each, since examples change them
                given = {name: value() if name in fresh else value for name, value in given.items()}
                problem = run(example, known | given)
                if problem:
                    print(
                        f"{example.file}:{example.line} {example.name}: FAILED\n{problem}", file=sys.stderr, flush=True
                    )
                failed, ran = failed + bool(problem), ran + 1
        finally:
            os.chdir(ROOT)
    took = time.monotonic() - started
    print(f"{ran} examples of docstrings in {took:.0f} s, {failed} failed; not run: {', '.join(NOT_RUN)}")
    return failed


if __name__ == "__main__":
    sys.exit(1 if run_all(*sys.argv[1:]) else 0)
