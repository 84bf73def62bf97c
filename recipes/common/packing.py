"""Language modelling: texts packed into blocks of tokens, and the loss per token, exact to the last block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, PreTrainedTokenizerBase

IGNORED = -100  # as a label: no loss for this token


def pack(
    texts: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, block_size: int, *, separate: bool = True
) -> Dataset:
    """Joins texts and cuts them into blocks, so that no token of a batch is padding.

    Args:
        texts (`datasets.Dataset`): One text a row.
        column (`str`): Where the text is.
        tokenizer (`PreTrainedTokenizerBase`): The model's. Special tokens that it puts around a text are left out.
        block_size (`int`): Tokens of a block. Only the last block may be shorter.
        separate (`bool`, *optional*, defaults to `True`):
            Put the tokenizer's end-of-text token after every text. Without it, rows are taken as lines of one text.

    Returns:
        `datasets.Dataset`: With the column `input_ids`. A last block of a single token, which predicts nothing, is
        left out.

    Raises:
        `ValueError`: There are not two tokens to make a block of, or no end-of-text token to put between texts.
    """
    if block_size < 2:
        raise ValueError(f"block_size={block_size}: a block needs two tokens, one to predict the other from.")
    if separate and tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-text token (`eos_token`) to put between texts: pack them "
            "without one, by `--separate_texts False`."
        )
    end = [tokenizer.eos_token_id] if separate else []

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(rows[column], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [ids + end for ids in encoded["input_ids"]]}

    rows = texts.map(tokenize, batched=True, remove_columns=texts.column_names, keep_in_memory=True)
    joined = list(chain.from_iterable(rows["input_ids"]))
    blocks = [joined[start : start + block_size] for start in range(0, len(joined), block_size)]
    if blocks and len(blocks[-1]) == 1:
        blocks.pop()
    if not blocks:
        raise ValueError(f"{len(texts)} text(s) of {len(joined)} token(s) are too little to make a block of.")
    return Dataset.from_dict({"input_ids": blocks})


def collate(blocks: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """
    A batch of blocks, whose labels are their own tokens, not shifted. Short ones are filled up with token 0.

    There is no label for what is filled up, nor for a block's first token, which nothing predicts: a Trainer divides
    by the number of labels.
    """
    longest = max(len(block["input_ids"]) for block in blocks)
    batch = {
        "input_ids": torch.zeros(len(blocks), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(blocks), longest, dtype=torch.long),
        "labels": torch.full((len(blocks), longest), IGNORED),
    }
    for row, block in enumerate(blocks):
        ids = torch.as_tensor(block["input_ids"])
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, 1 : len(ids)] = ids[1:]
    return batch


def block_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """What an evaluation keeps of a batch instead of its logits; a `preprocess_logits_for_metrics`.

    Args:
        logits (`torch.Tensor` of shape `(blocks, tokens, vocabulary)`): Or a tuple that starts with them.
        labels (`torch.Tensor` of shape `(blocks, tokens)`): Not shifted.

    Returns:
        `torch.Tensor` of shape `(blocks, 2)`: The sum of the negative log-likelihoods of a block's tokens, in nats,
        and of how many it is the sum.
    """
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    targets = labels[:, 1:]
    # One by one: float32 logits over a whole vocabulary are large.
    sums = [
        cross_entropy(block[:-1].float(), wanted, ignore_index=IGNORED, reduction="sum")
        for block, wanted in zip(logits, targets)
    ]
    return torch.stack([torch.stack(sums), (targets != IGNORED).sum(-1).to(sums[0].dtype)], dim=-1)


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """The mean loss over all *tokens*, and its exponential; a `compute_metrics` for [`block_losses`].

    The Trainer's own `loss` is a mean over batches, in which each token of a short last block weighs more.
    """
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = float(sums[0] / sums[1])
    return {"token_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def held_out(blocks: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Splits blocks into those to train on and the last `share` of them, at least one each.

    Raises:
        `ValueError`: There is only one block.
    """
    if len(blocks) < 2:
        raise ValueError(
            "There is only one block, so none can be held out: give an evaluation file, or shorter blocks."
        )
    held = min(max(round(len(blocks) * share), 1), len(blocks) - 1)
    return blocks.select(range(len(blocks) - held)), blocks.select(range(len(blocks) - held, len(blocks)))
