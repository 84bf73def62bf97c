"""The recipe for causal language models, on tiny ones built from configs, and the packing of texts."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import causal_lm
import numpy as np
import pytest
import quickstart
import torch
from common.packing import block_losses, collate, held_out, pack, perplexity
from common.record import RunRecord
from datasets import Dataset
from reproduction.baselines import make_method
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from bitfit_hf import BiasDelta

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
CONFIGS = {
    "gpt2": lambda size: GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "qwen2": lambda size: Qwen2Config(vocab_size=size, hidden_size=16, max_position_embeddings=64, **SMALL),
    "llama": lambda size: LlamaConfig(vocab_size=size, hidden_size=16, max_position_embeddings=64, **SMALL),
}
OPTIONS = {"adapter": ["bottleneck=4"], "diff_pruning": ["gated_share=0.25"]}
TEXTS = [f"The {i}th visitor paid {7 * i} coins and left by the door of day {i % 5}." for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(quickstart.demo_model())
    tokenizer.eos_token = "[SEP]"
    return tokenizer


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory) -> dict[str, str]:
    """Random models of three architectures, as local checkpoints."""
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config(len(tokenizer))).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, rows in {"train": TEXTS, "validation": TEXTS[:9]}.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in rows)
    (folder / "notes.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return folder


def argv(model: str, output: Path, *more: str) -> list[str]:
    short = ["--max_length", "32", "--epochs", "1", "--learning_rate", "1e-2"]
    return ["--model_name_or_path", model, "--output_dir", str(output), *short, *more]


def test_bitfit_lowers_the_perplexity_and_saves_biases_only(models, texts, tmp_path):
    run = argv(models["gpt2"], tmp_path, "--data_dir", str(texts), "--epochs", "6", "--batch_size", "4")
    run += ["--learning_rate", "0.1"]
    record = causal_lm.main(run)

    assert record == RunRecord.read(tmp_path / "run.json")
    biases = [name for name in load_file(Path(models["gpt2"]) / "model.safetensors") if name.endswith(".bias")]
    delta = BiasDelta.from_pretrained(tmp_path)
    assert len(biases) == 13
    assert record.trainable["head"] == 0
    assert record.trainable["body"] == delta.num_parameters() == delta.num_parameters(head=True)
    assert any(tensor.abs().max() > 0 for tensor in delta.values())
    losses = [entry["eval"]["token_loss"] for entry in record.history]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.05
    assert record.metrics["best"]["perplexity"] == pytest.approx(math.exp(min(losses)))
    assert record.metric == "perplexity"


def test_the_perplexity_is_that_of_the_loaded_model(models, texts, tmp_path):
    """Computed without the Trainer, block by block, from what was saved."""
    record = causal_lm.main(argv(models["qwen2"], tmp_path, "--data_dir", str(texts), "--method", "full"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    blocks = pack(Dataset.from_dict({"text": TEXTS[:9]}), "text", tokenizer, 32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    total = count = 0
    for block in blocks:
        ids = torch.tensor([block["input_ids"]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].log_softmax(-1)
        total -= scores[:-1].gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert len(blocks[-1]["input_ids"]) < 32, "the last block should be a short one"
    assert record.metrics["final"]["token_loss"] == pytest.approx(total / count, rel=1e-5)
    assert record.metrics["final"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_missing_biases_are_added_to_projections_and_to_the_head_where_it_is_named(models, texts, tmp_path):
    file = ["--train_file", str(texts / "notes.txt"), "--add_missing_biases"]
    causal_lm.main(argv(models["llama"], tmp_path / "all", *file))
    named = ["--method", "bitfit:query+intermediate+lm_head"]
    causal_lm.main(argv(models["llama"], tmp_path / "named", *file, *named))

    def tuned(run: str) -> set[str]:
        names = [name for name in BiasDelta.from_pretrained(tmp_path / run) if ".layers.1." not in name]
        return {name.removeprefix("model.layers.0.").removesuffix(".bias") for name in names}

    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert tuned("all") == attention | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert tuned("named") == {"self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "lm_head"}


def test_a_model_without_biases_is_an_error_that_names_the_remedy(models, texts, tmp_path):
    with pytest.raises(SystemExit, match="add_missing_biases=True"):
        causal_lm.main(argv(models["llama"], tmp_path, "--data_dir", str(texts)))


# Each method on one of the two models; the slow tests are the others.
EACH_METHOD_ONCE = {
    "lora": "gpt2",
    "rand_uniform": "qwen2",
    "rand_row_col": "gpt2",
    "diff_pruning": "qwen2",
    "adapter": "gpt2",
}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(method, name, marks=() if name == once else pytest.mark.slow)
        for method, once in EACH_METHOD_ONCE.items()
        for name in ("gpt2", "qwen2")
    ],
)
def test_other_methods(method, name, models, texts, tmp_path):
    options = ["--learning_rate", "1e-2", "--lr_scheduler", "constant"]
    options += ["--method_options", *OPTIONS[method]] if method in OPTIONS else []
    data = ["--data_dir", str(texts), "--method", method, "--max_steps", "4"]
    record = causal_lm.main(argv(models[name], tmp_path, *data, *options))
    assert record.method == method
    assert record.trainable["head"] == 0
    assert 0 < record.trainable["body"] < record.trainable["base"] / 10
    assert record.history[-1]["step"] == 4
    # What it has stored goes onto the stock base, and changes what that computes.
    base = AutoModelForCausalLM.from_pretrained(models[name]).eval()
    rows = AutoTokenizer.from_pretrained(models[name])(TEXTS[:4], return_tensors="pt", padding=True)["input_ids"]
    before = base(rows).logits
    given = dict(option.split("=") for option in OPTIONS.get(method, []))
    tuned = make_method(method, **{key: json.loads(value) for key, value in given.items()}).load(base, tmp_path)
    assert not torch.equal(tuned.eval()(rows).logits, before)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "frozen"], "trains nothing but a new head, and GPT2LMHeadModel has none"),
        (["--method", "full", "--add_missing_biases"], "--add_missing_biases goes with --method bitfit, not full"),
        (["--method", "prompt"], "There is no method 'prompt'"),
        (["--max_length", "65"], "takes 64 tokens at most"),
        (["--max_length", "1"], "a block needs two tokens"),
        (["--text_column", "body"], "--text_column body: there is no such column, only text"),
        (["--eval_file", "x.txt"], "--eval_file goes with --train_file"),
        (["--train_file", "gone.txt"], r"gone\.txt: there is no such file"),
        (["--train_split", "test"], r"no test\.jsonl\.gz or test\.jsonl in"),
    ],
)
def test_mistakes_are_one_message(more, message, models, texts, tmp_path):
    with pytest.raises(SystemExit, match=message):
        causal_lm.main(argv(models["gpt2"], tmp_path, "--data_dir", str(texts), *more))


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("block_size", [2, 7, 64, 10_000])
def test_blocks_are_the_joined_texts(tokenizer, separate, block_size):
    texts = [*TEXTS, "", "last words"]
    blocks = pack(Dataset.from_dict({"body": texts}), "body", tokenizer, block_size, separate=separate)["input_ids"]
    expected: list[int] = []
    for text in texts:
        expected += tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.sep_token_id] * separate
    joined = [token for block in blocks for token in block]
    assert joined == expected[: len(joined)]
    assert len(expected) - len(joined) == (len(expected) % block_size == 1)
    assert {len(block) for block in blocks[:-1]} <= {block_size}
    assert 2 <= len(blocks[-1]) <= block_size


def test_texts_that_make_no_block_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"1 text\(s\) of 1 token\(s\) are too little"):
        pack(Dataset.from_dict({"text": [""]}), "text", tokenizer, 8)
    plain = AutoTokenizer.from_pretrained(quickstart.demo_model())
    with pytest.raises(ValueError, match="has no end-of-text token"):
        pack(Dataset.from_dict({"text": TEXTS}), "text", plain, 8)
    assert len(pack(Dataset.from_dict({"text": TEXTS}), "text", plain, 8, separate=False)) > 40


def test_held_out_blocks_are_the_last_ones():
    blocks = Dataset.from_dict({"input_ids": [[i, i] for i in range(10)]})
    for share, count in ((0.0, 1), (0.05, 1), (0.3, 3), (1.0, 9)):
        train, evaluation = held_out(blocks, share)
        assert (len(train), len(evaluation)) == (10 - count, count)
        assert [*train["input_ids"], *evaluation["input_ids"]] == blocks["input_ids"][:]
    with pytest.raises(ValueError, match="only one block"):
        held_out(blocks.select([0]), 0.5)


def test_a_short_block_changes_neither_loss_nor_its_neighbours(models):
    model = AutoModelForCausalLM.from_pretrained(models["gpt2"]).eval()
    blocks = [{"input_ids": [5, 6, 7, 8, 9]}, {"input_ids": [11, 12, 13]}]
    with torch.no_grad():
        alone = [block_losses(model(**(batch := collate([block]))).logits, batch["labels"])[0] for block in blocks]
        batch = collate(blocks)
        together = block_losses((model(**batch).logits, "cache"), batch["labels"])
    torch.testing.assert_close(together, torch.stack(alone))
    assert together[:, 1].tolist() == [4, 2]
    metrics = perplexity(EvalPrediction(together.numpy(), None))
    assert metrics["token_loss"] == pytest.approx(together[:, 0].sum().item() / 6)


def test_a_diverged_model_has_an_infinite_perplexity():
    metrics = perplexity(EvalPrediction(np.array([[8e5, 1000.0]]), None))
    assert metrics == {"token_loss": 800.0, "perplexity": math.inf}


def test_the_trainers_loss_is_a_mean_over_blocks_and_ours_over_tokens(models, tmp_path):
    """Why there are two: with a short block they differ, and only the mean over tokens has a perplexity."""
    model = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    blocks = Dataset.from_dict({"input_ids": [[5, 6, 7, 8, 9], [11, 12]]})
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, report_to="none", use_cpu=True),
        eval_dataset=blocks,
        data_collator=collate,
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=block_losses,
    )
    found = trainer.evaluate()
    long, short = (trainer.evaluate(blocks.select([row]))["eval_token_loss"] for row in range(2))
    assert found["eval_loss"] == pytest.approx((long + short) / 2, rel=1e-5)
    assert found["eval_token_loss"] == pytest.approx((4 * long + short) / 5, rel=1e-5)
