"""Data sets from the Hub or from local files, and what there is to know about the tasks of GLUE."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from bitfit_hf.tables.hub_data import load_from_hub

GLUE_NAME = "nyu-mll/glue"


REPORT = "report"  # in front of the name of what is reported and never chosen on


class GlueTask(NamedTuple):
    """
    One task of GLUE (Wang et al., ICLR 2019), in the columns of `nyu-mll/glue`.

    Args:
        columns (`tuple[str, ...]`): The one or two columns of text.
        labels (`tuple[str, ...]`): Their names, by label id; none for a regression.
        metric (`str`): The one that the paper reports.
        files (`dict[str, str]`): Official names of the prediction files, by what follows `test` or `validation` in the
            name of the split.
        names_in_files (`bool`): Whether predictions are label names there, and not label ids.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    files: dict[str, str]
    names_in_files: bool = False

    def splits(self, kind: str) -> tuple[str, ...]:
        """The splits of one kind, `"validation"` or `"test"`: two for MNLI."""
        return tuple(f"{kind}{suffix}" for suffix in self.files)


_ENTAILMENT = ("entailment", "not_entailment")
# By size of the training set. WNLI is left out, as in the paper: its development set contradicts its training set.
GLUE: dict[str, GlueTask] = {
    "rte": GlueTask(("sentence1", "sentence2"), _ENTAILMENT, "accuracy", {"": "RTE.tsv"}, names_in_files=True),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1", {"": "MRPC.tsv"}),
    "stsb": GlueTask(("sentence1", "sentence2"), (), "spearmanr", {"": "STS-B.tsv"}),
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), "matthews_correlation", {"": "CoLA.tsv"}),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), "accuracy", {"": "SST-2.tsv"}),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT, "accuracy", {"": "QNLI.tsv"}, names_in_files=True),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), "f1", {"": "QQP.tsv"}),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        {"_matched": "MNLI-m.tsv", "_mismatched": "MNLI-mm.tsv"},
        names_in_files=True,
    ),
}
# The nine columns of the paper's tables, in its order: (name of the column, task, what follows `validation`).
GLUE_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("QNLI", "qnli", ""),
    ("SST-2", "sst2", ""),
    ("MNLI-m", "mnli", "_matched"),
    ("MNLI-mm", "mnli", "_mismatched"),
    ("CoLA", "cola", ""),
    ("MRPC", "mrpc", ""),
    ("STS-B", "stsb", ""),
    ("RTE", "rte", ""),
    ("QQP", "qqp", ""),
)


def load_glue(task: str, data_dir: str | None = None) -> dict[str, Dataset]:
    """All splits of a GLUE task, from the Hub or from `<data_dir>/glue/<task>/<split>.jsonl.gz`."""
    return load_splits(GLUE_NAME, task, data_dir=data_dir, folders=(f"glue/{task}", task, ""))


def load_splits(
    name: str,
    config: str | None = None,
    *,
    data_dir: str | None = None,
    folders: tuple[str, ...] = ("",),
    revision: str | None = None,
    needed: str = "train",
) -> dict[str, Dataset]:
    """
    Loads a data set, from the Hub or from local files in the same columns.

    Args:
        name (`str`): Of the data set on the Hub.
        config (`str`, *optional*): Which part of it.
        data_dir (`str`, *optional*): Folder of local files; the Hub is not asked then.
        folders (`tuple[str, ...]`, *optional*): Where in `data_dir` the files may be; the first folder that holds
            `<needed>.jsonl.gz` or `<needed>.jsonl` is taken. Every such file is a split of its name; `dev` is
            `validation`.
        revision (`str`, *optional*): Of the data set on the Hub. Without it, where the data set is a script, which
            `datasets` no longer runs, the Hub's own conversion of it is taken.
        needed (`str`, *optional*, defaults to `"train"`): A split that has to be there.

    Returns:
        `dict[str, Dataset]`: By the name of the split.

    Raises:
        `SystemExit`: No such folder.
    """
    if data_dir is None:
        return load_from_hub(name, config, revision=revision)
    tried = [Path(data_dir) / folder for folder in folders]
    for folder in tried:
        files = sorted([*folder.glob("*.jsonl.gz"), *folder.glob("*.jsonl")])
        splits = {"validation" if (stem := file.name.split(".")[0]) == "dev" else stem: file for file in files}
        if needed in splits:
            # One by one: a test split may lack the labels, and the columns of one call must agree.
            return {split: Dataset.from_json(str(file), split=split) for split, file in splits.items()}
    raise SystemExit(
        f"--data_dir {data_dir}: no {needed}.jsonl.gz or {needed}.jsonl in {' or '.join(map(str, tried))}. Give the "
        f"folder that holds it, or leave --data_dir out to load {name} from the Hub."
    )


def subset(rows: Dataset, size: int | None, seed: int = 0) -> Dataset:
    """
    `size` rows drawn by `seed`; all of them, in their own order, for `None` or where there are no more.

    Smaller draws by one seed are part of larger ones, as a study of the training set's size needs.
    """
    if size is None or size >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(size))


def halves(rows: Dataset) -> tuple[Dataset, Dataset]:
    """
    Two halves of a dev set, one to choose on and one to report, the same for every seed and every model.

    Args:
        rows (`Dataset`): All of it. An odd row goes to the first half.
    """
    mixed = rows.shuffle(seed=0)
    middle = (len(mixed) + 1) // 2
    return mixed.select(range(middle)), mixed.select(range(middle, len(mixed)))


def evaluation_parts(splits: dict[str, Dataset], dev_halves: bool) -> dict[str, Dataset]:
    """
    What a model is evaluated on, by name: the dev sets themselves, or the halves of each.

    The second half of a dev set has `report` in front of its name, and so do its metrics: of `{"validation": rows}`
    are made `{"validation": …, "report": …}`, and `accuracy` is of the first, `report_accuracy` of the second.

    Args:
        splits (`dict[str, Dataset]`): Dev sets by name; the first is what the best epoch is chosen on.
        dev_halves (`bool`): Whether to split them.
    """
    if not dev_halves:
        return splits
    parts = {}
    for index, (name, rows) in enumerate(splits.items()):
        chosen, reported = halves(rows)
        parts |= {name: chosen, f"{REPORT}_{name}" if index else REPORT: reported}
    return parts


def by_length(rows: Dataset) -> Dataset:
    """Tokenized rows, the longest first: batches of them need little padding. For metrics that no order changes."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lengths.__getitem__, reverse=True))
