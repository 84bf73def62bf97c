"""How fast each bias term, and the head, learns: multiples of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn
from transformers import PretrainedConfig

from ..errors import ConfigError, UnknownTermError, collect
from ..terms import SYMBOLS, TERMS, resolve_terms

# Two kinds of biases stand a different step of Adam. Those that are added to the residual stream (the LayerNorms',
# b_m1 and b_m3, the poolers') shift what every later layer reads, of all tokens at once; they set the limit for the
# rate. Those that are added inside a block (b_q, b_k, b_v before the attention, b_m2 before the activation) stand
# more.
#
# Evidence, all of it in `recipes/reproduction/results/rates_by_term.jsonl` (loops by hand, bf16 autocast): learning
# rate 1e-3, linear schedule, batches of 16, an untrained pooler in the head; scores of the development sets after the
# last epoch, with every term at the rate (uniform) and with this scale. One run each: too few to be the last word.
#
#   chosen on            rows   epochs  seed   uniform   scale
#   MiniLM   SST-2       2,000     3      1     0.802    0.814   accuracy
#   MiniLM   POS (EWT)   1,500     1      0     0.769    0.835   accuracy
#   MPNet    SST-2       2,000     2      1     0.922    0.917   accuracy
#   MiniLM   MRPC        1,000     6      0     0.789    0.805   F1 (full fine-tuning at 1e-4 0.825)
#   MPNet    MRPC        1,000     2      0     0.845    0.856   F1
#   not looked at before
#   MiniLM   STS-B       2,000     3      0     0.802    0.821   Spearman
#
# Three, not more: with 5 and 10 in its place MPNet fell to 0.836 and 0.817 on MRPC and to 0.917 and 0.892 on SST-2
# (seed 0, uniform 0.914), and with 5 for all biases but the LayerNorms' to 0.903.
#
# The key biases of a model without rotary positions have a zero gradient, and Adam moves them by rounding noise alone.
# They keep their place among the three of the attention, so that fused projections have one rate.
#
# The head starts at random and has further to go than a bias that was pre-trained, so its rate is larger too: this
# scale with the head at the learning rate and at three times it, after the first and the last epoch.
#
#   chosen on            rows   epochs  seed   head × 1       head × 3
#   MiniLM   SST-2       2,000     3      1     0.766 0.814    0.763 0.826   accuracy
#   MiniLM   POS (EWT)   1,500     2      0     0.858 0.887    0.898 0.918   accuracy
#   MPNet    SST-2       2,000     2      1     0.905 0.917    0.921 0.906   accuracy
#   MPNet    MRPC        1,000     2      0     0.820 0.856    0.830 0.845   F1
#
# MiniLM gains more than MPNet loses, whose losses are of the size of the noise.
#
# All of that was with the dropout of the checkpoints, 0.1. Without it (`BitFitCallback(dropout=False)`) the same scale
# learns in fewer steps and stands a higher rate; with dropout MPNet fell from 0.917 to 0.895 on SST-2 at 2e-3. Scores
# are of 2,000 rows (CoLA 3,000, POS 600) of the training sets that were not trained on, with seed 0, after the stroke
# with seed 1; development sets were not looked at.
#
#   chosen on            rows  epochs  1e-3, dropout  1e-3           2e-3
#   MiniLM   SST-2       2,000     3    0.830          0.828 / 0.837  0.846 / 0.841  accuracy (2e-3 with dropout 0.837)
#   MiniLM   CoLA        5,000     3    0.086          0.201 / 0.184  0.167 / 0.173  Matthews (2e-3 with dropout 0.0)
#   MiniLM   POS (EWT)   1,500     2    0.922          0.926          0.937          accuracy
#   MiniLM   MRPC        1,000     3    -              0.658          0.675          accuracy
#   MPNet    SST-2       2,000     2    0.915          0.919          0.919          accuracy
#   MPNet    POS (EWT)   1,500     2    -              0.940          0.952          accuracy
#   MPNet    MRPC        1,000     2    -              0.776          0.725          accuracy
#
# So MiniLM (hidden size 384) has twice the rate of MPNet (768), and `recommended_learning_rate` goes by the width in
# between. Beyond these two nothing was measured, and it stays at the nearer of them.
HEAD = "head"
DEFAULT_SCALE: dict[str, float] = {"query": 3.0, "key": 3.0, "value": 3.0, "intermediate": 3.0, HEAD: 3.0}

LEARNING_RATE = 1e-3
_WIDTH, _MOST = 768, 2.0  # of the model that this rate is for, and the largest multiple for a narrower one

_ONES = dict.fromkeys((*TERMS, HEAD), 1.0)

LrScale = str | Mapping[str, float]


def recommended_learning_rate(model: nn.Module | PretrainedConfig) -> float:
    """
    The learning rate to give a `Trainer` with [`BitFitCallback`], if nothing else is known of the task.

    1e-3, the upper end of the paper's grid, for models of base size and larger ones; narrower ones stand more, up to
    2e-3 from a hidden size of 384 downwards. It goes with the default `lr_scale` and without dropout.

    Args:
        model (`nn.Module` or [`~transformers.PretrainedConfig`]): A model of transformers, or its configuration.

    Returns:
        `float`: The rate; 1e-3 where no hidden size is known.

    Example:

    ```python
    args = TrainingArguments("my-task", learning_rate=recommended_learning_rate(model))
    ```
    """
    config = model if isinstance(model, PretrainedConfig) else getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        config = config.get_text_config()
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int) or width <= 0:
        return LEARNING_RATE
    return LEARNING_RATE * min(max(_WIDTH / width, 1.0), _MOST)


def term_scale(lr_scale: LrScale) -> dict[str, float]:
    """Spells out an `lr_scale`.

    Args:
        lr_scale (`str` or `Mapping[str, float]`):
            `"default"`, `"uniform"`, or multiples of the learning rate by term or symbol, or of `"head"`; what is not
            named has 1.0.

    Returns:
        `dict[str, float]`: The multiple of every term, and of the head.

    Raises:
        [`UnknownTermError`]: A key is no term.
        [`ConfigError`]: A value is no positive number, or a term is named twice.
    """
    if isinstance(lr_scale, str):
        if lr_scale not in ("default", "uniform"):
            raise ConfigError(
                f"`lr_scale` must be 'default', 'uniform' or a mapping of terms to numbers, got {lr_scale!r}."
            )
        return _ONES | (DEFAULT_SCALE if lr_scale == "default" else {})
    if not isinstance(lr_scale, Mapping):
        raise ConfigError(
            "`lr_scale` must be 'default', 'uniform' or a mapping of terms to numbers, got "
            f"{lr_scale!r:.80} ({type(lr_scale).__name__})."
        )
    scale: dict[str, float] = {}
    problems = []
    for name, value in lr_scale.items():
        try:
            terms = (HEAD,) if name == HEAD else resolve_terms(name)
        except UnknownTermError as error:
            raise UnknownTermError(f"`lr_scale`: {error}") from error
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            problems.append(f"{name!r} is {value!r}, not a positive number; to leave a term out there is `bias_terms`")
            continue
        problems += [f"{term!r} is named twice, again by {name!r}" for term in terms if term in scale]
        scale |= dict.fromkeys(terms, float(value))
    if problems:
        raise ConfigError(f"`lr_scale` cannot be used:{collect(problems)}")
    return _ONES | scale


def describe_scale(lr_scale: LrScale, *, with_head: bool = True) -> str:
    """An `lr_scale` in one line, as cards and logs show it: `"uniform"`, or `"b_q, b_k, b_v, b_m2, head × 3"`.

    Args:
        lr_scale (`str` or `Mapping[str, float]`): What [`term_scale`] takes.
        with_head (`bool`, *optional*, defaults to `True`): `False` where the head has a rate of its own.
    """
    scale = term_scale(lr_scale)
    shown = {SYMBOLS[term]: scale[term] for term in TERMS} | ({HEAD: scale[HEAD]} if with_head else {})
    parts = [
        f"{', '.join(name for name, factor in shown.items() if factor == value)} × {value:g}"
        for value in sorted(set(shown.values()) - {1.0})
    ]
    return "; ".join(parts) or "uniform"
