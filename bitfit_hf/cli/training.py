"""`bitfit train` and `bitfit eval`: from a table of labelled texts to a delta, and how good a delta is on a table."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Command, OnMismatch, emit
from .options import Json, Quiet, Token
from .train import settings as recommended


class TaskKind(str, Enum):
    """The kinds of tasks."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    MULTI_LABEL = "multi-label"
    TOKENS = "token-classification"


class Rates(str, Enum):
    """How fast each bias term learns."""

    DEFAULT = "default"
    UNIFORM = "uniform"


class Precision(str, Enum):
    """What the model computes in; the deltas are float32 always."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


MODEL, TABLE, TRAINING = "Model", "Table", "Training"

Data = Annotated[
    str, typer.Argument(metavar="DATA", help="A CSV, TSV, JSON lines or Parquet file, or a data set on the Hub.")
]
Text = Annotated[str | None, _option("--text", panel=TABLE, metavar="COLUMN", help="The texts.")]
Text2 = Annotated[
    str | None, _option("--text2", panel=TABLE, metavar="COLUMN", help="The second text, if they are pairs.")
]
Labels = Annotated[
    list[str],
    _option("--label", panel=TABLE, metavar="COLUMN", help="The labels. Repeat it for several columns of 0 and 1."),
]
LabelSeparator = Annotated[
    str | None,
    _option("--label-separator", metavar="SIGN", panel=TABLE, help="Between several labels in one cell, such as ';'."),
]
SkipIncomplete = Annotated[
    bool, _option("--skip-incomplete", panel=TABLE, help="Leave out rows without a text or a label.")
]
DataConfig = Annotated[
    str | None, _option("--config", metavar="NAME", panel=TABLE, help="Which part of a data set on the Hub.")
]
DataRevision = Annotated[
    str | None, _option("--data-revision", metavar="REV", panel=TABLE, help="Branch, tag or commit of the data set.")
]
Encoding = Annotated[
    str | None,
    _option("--encoding", metavar="NAME", panel=TABLE, help="Of a text file, such as latin-1. [default: utf-8]"),
]
Separator = Annotated[
    str | None,
    _option(
        "--separator", metavar="SIGN", panel=TABLE, help="Between values of a CSV file; by default its header says."
    ),
]


def train(
    data: Data,
    base: Annotated[
        str, _option("--base", "-b", panel=MODEL, metavar="BASE", help="Folder or Hub repo of the base: an encoder.")
    ],
    output: Annotated[Path, _option("--output", "-o", panel=MODEL, metavar="DIR", help="The folder for the delta.")],
    text: Text = None,
    text2: Text2 = None,
    label: Labels = [],  # noqa: B006  # typer makes a list of its own
    task: Annotated[
        TaskKind | None, _option("--task", panel=TABLE, help="The kind of task; by default the labels say.")
    ] = None,
    label_separator: LabelSeparator = None,
    eval_data: Annotated[
        str | None,
        _option(
            "--eval-data", panel=TABLE, metavar="DATA", help="Rows to evaluate on; by default some are set apart."
        ),
    ] = None,
    eval_share: Annotated[
        float,
        _option("--eval-share", metavar="SHARE", panel=TABLE, min=0.01, max=0.9, help="Of the rows, to set apart."),
    ] = recommended.EVAL_SHARE,
    split: Annotated[
        str, _option("--split", metavar="NAME", panel=TABLE, help="To train on, of a folder or a data set.")
    ] = "train",
    eval_split: Annotated[
        str | None,
        _option("--eval-split", metavar="NAME", panel=TABLE, help="To evaluate on. [default: validation, or test]"),
    ] = None,
    limit: Annotated[
        int | None, _option("--limit", metavar="N", panel=TABLE, min=4, help="Take the first rows only.")
    ] = None,
    skip_incomplete: SkipIncomplete = False,
    config: DataConfig = None,
    data_revision: DataRevision = None,
    encoding: Encoding = None,
    separator: Separator = None,
    learning_rate: Annotated[
        float | None,
        _option(
            "--learning-rate",
            "--lr",
            metavar="RATE",
            panel=TRAINING,
            help="Of the biases. [default: 1e-3, to 2e-3 for a base narrower than 768]",
        ),
    ] = None,
    head_learning_rate: Annotated[
        float | None,
        _option("--head-learning-rate", metavar="RATE", panel=TRAINING, help="Of the head; else by --rates."),
    ] = None,
    rates: Annotated[
        Rates, _option("--rates", panel=TRAINING, help="By bias term and head: our scale, or the paper's one rate.")
    ] = Rates.DEFAULT,
    dropout: Annotated[
        bool, _option("--dropout", panel=TRAINING, help="Train with the base's own dropout; else without any.")
    ] = False,
    terms: Annotated[
        list[str],
        _option("--terms", metavar="TERM", panel=TRAINING, help="Bias terms to tune; all by default. Repeatable."),
    ] = [],  # noqa: B006
    epochs: Annotated[
        float | None,
        _option(
            "--epochs",
            metavar="N",
            panel=TRAINING,
            min=0.01,
            help=f"At most; else enough for {recommended.UPDATES} updates.",
        ),
    ] = None,
    batch_size: Annotated[
        int, _option("--batch-size", metavar="N", panel=TRAINING, min=1, help="Rows in an update, over all processes.")
    ] = recommended.BATCH_SIZE,
    max_length: Annotated[
        int | None,
        _option(
            "--max-length", metavar="N", panel=TRAINING, min=4, help="Tokens of a text; else what the base takes."
        ),
    ] = None,
    patience: Annotated[
        int,
        _option(
            "--patience",
            metavar="N",
            panel=TRAINING,
            min=0,
            help="Evaluations without a better one until it ends; 0: all.",
        ),
    ] = recommended.PATIENCE,
    seed: Annotated[
        int, _option("--seed", metavar="N", panel=TRAINING, help="Of the split, the head and the order of the rows.")
    ] = recommended.SEED,
    precision: Annotated[
        Precision | None, _option("--precision", panel=TRAINING, help="By default bf16 on a GPU that has it.")
    ] = None,
    add_missing_biases: Annotated[
        bool, _option("--add-missing-biases", panel=TRAINING, help="For a base without biases, such as Llama.")
    ] = False,
    baseline: Annotated[
        bool, _option("--baseline/--no-baseline", panel=TRAINING, help="Compare with a head on a frozen body.")
    ] = True,
    license: Annotated[
        str | None,
        _option("--license", metavar="NAME", panel=MODEL, help="Of the delta, for its card, such as apache-2.0."),
    ] = None,
    language: Annotated[
        list[str],
        _option("--language", metavar="CODE", panel=MODEL, help="Of the texts, for the card, such as en. Repeatable."),
    ] = [],  # noqa: B006
    force: Annotated[bool, _option("--force", panel=MODEL, help="Replace the delta that is in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the table, say what would happen, and end.")
    ] = False,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", metavar="REV", help="Of the base's repo.")
    ] = None,
    token: Token = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train on a table of labelled texts, and write a delta.

    The result is a classifier of texts or words, or a regression. The kind of task, the columns and the names of the
    labels are found in the table, and rows to evaluate on are set apart where there are none; the first lines say what
    was found. Training tunes the biases and a new head, and keeps the epoch that is best on those rows. The result is
    compared with always giving the same answer and with a head on a frozen body.

    \b
    Examples:
      bitfit train reviews.csv --base bert-base-uncased -o my-task
      bitfit train reviews.csv --base bert-base-uncased -o my-task --dry-run
      bitfit train pairs.tsv --base roberta-base --text s1 --text2 s2 -o pairs
      bitfit train nyu-mll/glue --config rte --base bert-base-uncased -o rte
      accelerate launch -m bitfit_hf.cli train big.csv --base roberta-large -o big
    """
    from ..tables.problem import Kind
    from ..tables.reading import Source
    from .train.data import Wanted
    from .train.perform import Output, perform, show

    source = Source(data, config, data_revision, token, encoding, separator)
    wanted = Wanted(
        source,
        split=split,
        evaluation=None if eval_data is None else Source(eval_data, None, None, token, encoding, separator),
        eval_split=eval_split,
        text=text,
        text2=text2,
        labels=tuple(label),
        kind=None if task is None else Kind(task.value),
        label_separator=label_separator,
        skip_incomplete=skip_incomplete,
        limit=limit,
    )
    settings = recommended.Settings(
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        lr_scale=rates.value,
        dropout=dropout,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        patience=patience,
        eval_share=eval_share,
        seed=seed,
        terms=tuple(terms),
        add_missing_biases=add_missing_biases,
        baseline=baseline,
        precision=None if precision is None else precision.value,
    )
    languages = list(language) if len(language) != 1 else language[0]
    card = {"license": license, "language": languages or None}
    where = Output(output, force=force, dry_run=dry_run, quiet=quiet, card=card)
    values = perform(wanted, base, settings, where, revision=base_revision, token=token)
    if values is not None:  # the first process
        emit(values, as_json, show, brief=str(output) if quiet else None)


def evaluate(
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="Folder or Hub repo of a delta.")],
    data: Data,
    text: Text = None,
    text2: Text2 = None,
    label: Labels = [],  # noqa: B006
    label_separator: LabelSeparator = None,
    split: Annotated[
        str | None,
        _option(
            "--split", metavar="NAME", panel=TABLE, help="Of a folder or a data set. [default: validation, or test]"
        ),
    ] = None,
    skip_incomplete: SkipIncomplete = False,
    config: DataConfig = None,
    data_revision: DataRevision = None,
    encoding: Encoding = None,
    separator: Separator = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", metavar="N", min=4, help="Tokens of a text; else as in training.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", metavar="CSV", help="Write texts, labels and predictions to it.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Folder or Hub repo of the base; else the one the delta names.")
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", metavar="REV", help="Of the base's repo.")
    ] = None,
    delta_revision: Annotated[
        str | None, typer.Option("--delta-revision", metavar="REV", help="Of the delta's repo.")
    ] = None,
    on_base_mismatch: Annotated[
        OnMismatch, typer.Option("--on-base-mismatch", help="If the delta was trained on another checkpoint.")
    ] = OnMismatch.RAISE,
    token: Token = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Evaluate a delta on a table of labelled texts.

    The columns are those that it was trained with, where the table has them. Labels may be names or ids. The figures
    stand beside those of always giving the most frequent answer of the table.

    \b
    Examples:
      bitfit eval ./my-task more.csv
      bitfit eval ./my-task more.csv --predictions out.csv
      bitfit eval user/bert-base-rte-bitfit nyu-mll/glue --config rte --split validation --json
    """
    from ..tables.reading import Source
    from .train.evaluate import EvalWanted, show
    from .train.evaluate import evaluate as measure

    wanted = EvalWanted(
        Source(data, config, data_revision, token, encoding, separator),
        split=split,
        text=text,
        text2=text2,
        labels=tuple(label),
        label_separator=label_separator,
        skip_incomplete=skip_incomplete,
        max_length=max_length,
        base=base,
        base_revision=base_revision,
        delta_revision=delta_revision,
        on_base_mismatch=on_base_mismatch.value,
        predictions=predictions,
    )
    values = measure(delta, wanted, token=token, quiet=quiet)
    if values is not None:  # the first process
        score = values["systems"]["bitfit"][values["metric"]]
        emit(values, as_json, show, brief=f"{values['metric']} {score:.4f}" if quiet else None)


def add_to(app: typer.Typer) -> None:
    """Makes them commands of `app`."""
    app.command(cls=Command)(train)
    app.command(name="eval", cls=Command)(evaluate)
