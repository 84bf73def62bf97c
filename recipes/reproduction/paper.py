"""The figures of the BitFit paper (Ben Zaken, Ravfogel, Goldberg; ACL 2022), each with where it comes from.

Two kinds are kept apart, and must stay so wherever they are shown. `CHECKED` figures were taken from a document that
quotes the paper. `RECALLED` ones were written down from memory and never compared with the PDF: they carry `MARK` in
every table and picture, and the note that explains it.
"""

from __future__ import annotations

from dataclasses import dataclass

MARK = "†"
NOTE = f"{MARK} The paper's figure as recalled, not checked against the PDF."
CHECKED, RECALLED = "checked", "recalled, not checked against the PDF"


@dataclass(frozen=True)
class PaperFigure:
    """
    One figure of the paper.

    Args:
        value (`float`): In per cent.
        source (`str`): `CHECKED` or `RECALLED`.
    """

    value: float
    source: str

    def __str__(self) -> str:
        return f"{self.value:.1f}" + (MARK if self.source == RECALLED else "")


# The columns of Tables 1 to 3, in the paper's order. One figure each: Matthews correlation (CoLA), F1 (MRPC, QQP),
# Spearman correlation (STS-B), accuracy otherwise, times 100. That F1 and Spearman are meant is recalled, too.
COLUMNS = ("QNLI", "SST-2", "MNLI-m", "MNLI-mm", "CoLA", "MRPC", "STS-B", "RTE", "QQP")

# By split, model and method; nine columns and the paper's own average. The average of the frozen row lies 2.1 points
# above the mean of its figures, and those of the test set up to 0.5: one more reason not to rely on recalled ones.
_GLUE = {
    "dev": {
        "BERT-large": {
            "full": "91.7 93.4 85.5 85.7 62.2 90.7 90.0 71.9 87.6 84.1",
            "diff_pruning": "93.4 94.2 86.4 86.9 63.5 91.3 89.5 71.5 86.6 84.6",
            "bitfit": "91.4 93.2 84.4 84.8 63.6 91.7 90.3 73.2 85.4 84.2",
        },
        "BERT-base": {
            "full": "90.7 92.0 83.5 83.7 56.4 89.0 88.9 70.5 87.1 82.3",
            "bitfit": "90.2 92.1 81.4 82.2 58.8 90.4 89.2 72.3 84.0 82.4",
            "bitfit:query+intermediate": "89.4 91.2 80.4 81.5 57.4 89.0 88.4 68.6 83.7 81.1",
            "bitfit:intermediate": "88.9 91.1 79.9 80.7 54.9 87.9 88.2 66.8 82.1 80.0",
            "bitfit:query": "86.8 89.6 74.4 75.7 49.1 84.4 85.6 61.4 80.6 76.6",
            "frozen": "68.7 81.7 42.4 43.8 31.9 81.1 71.4 56.9 62.4 62.1",
            "rand_uniform": "87.8 90.5 78.3 78.8 54.1 84.3 87.2 62.9 82.4 78.5",
            "rand_row_col": "88.4 91.0 79.4 80.1 53.4 88.0 87.9 65.1 82.3 79.5",
        },
        "RoBERTa-base": {
            "full": "92.3 94.2 86.4 86.9 61.1 92.5 90.6 77.4 88.0 85.3",
            "bitfit": "91.3 93.7 84.8 85.2 61.8 92.0 90.8 77.8 84.5 84.6",
        },
    },
    "test": {
        "BERT-large": {
            "full": "93.4 94.1 86.7 86.0 59.6 88.9 86.6 71.2 71.7 81.5",
            "adapter": "90.7 94.0 84.9 85.1 59.5 89.5 86.9 71.5 71.8 81.1",
            "diff_pruning": "93.3 94.1 86.4 86.0 61.1 89.7 86.0 70.6 71.1 81.5",
            "bitfit": "92.0 94.2 84.5 84.8 59.7 88.9 85.5 72.0 70.5 80.9",
        },
    },
}

_POS = {  # accuracy on the Penn Treebank
    "BERT-base": {"full": 97.2, "bitfit": 97.2},
    "BERT-large": {"full": 97.4, "bitfit": 97.4},
    "RoBERTa-base": {"full": 97.2, "bitfit": 97.1},
}

# Share of the body's parameters that is trained, in per cent, as the paper gives it: without the head.
_PERCENT = {
    ("BERT-base", "bitfit"): PaperFigure(0.09, CHECKED),
    ("BERT-large", "bitfit"): PaperFigure(0.08, CHECKED),
    ("BERT-base", "bitfit:query+intermediate"): PaperFigure(0.04, CHECKED),
    ("BERT-base", "bitfit:intermediate"): PaperFigure(0.03, RECALLED),
    ("BERT-base", "bitfit:query"): PaperFigure(0.01, RECALLED),
    ("BERT-large", "adapter"): PaperFigure(3.6, RECALLED),
    ("BERT-large", "diff_pruning"): PaperFigure(0.5, RECALLED),
}

# What the rows are called. Methods that the paper does not have are named as their own papers do.
METHOD_NAMES = {
    "full": "Full-FT",
    "bitfit": "BitFit",
    "bitfit_default": "BitFit by default",
    "bitfit:query+intermediate": "b_m2, b_q",
    "bitfit:intermediate": "b_m2",
    "bitfit:query": "b_q",
    "frozen": "Frozen",
    "rand_uniform": "rand uniform",
    "rand_row_col": "rand row/col",
    "diff_pruning": "Diff-Pruning",
    "adapter": "Adapters",
    "lora": "LoRA",
}


def method_name(method: str) -> str:
    """What a method's row is called: the paper's name where it has one."""
    return METHOD_NAMES.get(method, method)


def glue(model: str, method: str, column: str, split: str = "dev") -> PaperFigure | None:
    """A figure of Tables 1 to 3.

    Args:
        model (`str`): `"BERT-base"`, `"BERT-large"` or `"RoBERTa-base"`.
        method (`str`): By our names, `"bitfit:query"`.
        column (`str`): One of `COLUMNS`, or `"avg"`.
        split (`str`, *optional*, defaults to `"dev"`): Or `"test"`, which the paper has for BERT-large only.

    Returns:
        [`PaperFigure`], *optional*: `None` where the paper has none.
    """
    line = _GLUE.get(split, {}).get(model, {}).get(method)
    if line is None or column not in (*COLUMNS, "avg"):
        return None
    return PaperFigure(float(line.split()[(*COLUMNS, "avg").index(column)]), RECALLED)


def pos(model: str, method: str) -> PaperFigure | None:
    """Accuracy of POS tagging on the Penn Treebank; `None` where the paper has none."""
    value = _POS.get(model, {}).get(method)
    return None if value is None else PaperFigure(value, CHECKED)


def percent_trained(model: str, method: str) -> PaperFigure | None:
    """The share of the parameters that the paper says is trained, heads left out; `None` where it says none."""
    return _PERCENT.get((model, method))


# How each figure and study of the paper is described in the documents at hand: no numbers of the curves were found.
FIGURE_1 = (
    "In the paper's Figure 1 (BERT-base, RTE) the key bias b_k is unmoved and the query bias b_q and the "
    "intermediate bias b_m2 change most (which of the terms comes first: recalled, not checked against the PDF)."
)
FIGURE_2 = (
    "In the paper's Figure 2 (BERT-base, SQuAD exact match) BitFit is ahead on small training sets and Full-FT on "
    "large ones (checked; the curves' values are not at hand)."
)
GENERALIZATION_GAP = "The paper: the gap between training and test error is smaller for BitFit (checked; no figures)."
POS = "The paper's figures are of the Penn Treebank (checked); other treebanks and tag sets are not comparable."
