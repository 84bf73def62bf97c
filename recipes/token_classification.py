"""Tags words, such as with their parts of speech: the paper's token-level task, by BitFit or what it is compared with.

The paper tags the Penn Treebank, which is not freely available; the default here is the English Web Treebank of
Universal Dependencies (EWT) with its 17 universal tags, or with Penn tags by `--tag_column xpos`. The first subword of
a word carries its label. Accuracy is over all words: one that no token stands for, since a sentence was cut at
`max_length`, counts as wrong, and `run.json` says how many those are. The test split is scored once, at the end.

    accelerate launch recipes/token_classification.py --config recipes/configs/pos_ewt.yaml
    accelerate launch recipes/token_classification.py --config recipes/configs/pos_ewt.yaml --tag_column xpos \\
        --method full --learning_rate 3e-5
    accelerate launch recipes/token_classification.py --config recipes/configs/pos_ewt_minilm_cpu.yaml \\
        --data_dir path/to/data
    accelerate launch recipes/token_classification.py --train_file train.conllu --validation_file dev.conllu \\
        --token_column 2 --tag_column 4
    accelerate launch recipes/token_classification.py --dataset eriktks/conll2003 --dataset_config conll2003 \\
        --tag_column pos_tags
    accelerate launch --config_file recipes/accelerate/cpu_2_processes.yaml \\
        recipes/token_classification.py --use_cpu --config recipes/configs/pos_ewt_minilm_cpu.yaml \\
        --data_dir path/to/data

Data is from the Hub (any data set with a list of words and a list of tags per row), from local files
`<data_dir>/ud_ewt/{train,dev,test}.jsonl.gz` in such columns, or from CoNLL-like files, whose columns are counted from
1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.arguments import StudyArguments
from common.data import by_length, evaluation_parts, load_splits, subset
from common.metrics import word_accuracy
from common.models import locate, new_model
from common.record import RunRecord
from common.tagging import on_subwords, read_conll, tag_names, tagged
from common.training import Split, TaskData, chosen_method, run_recipe, train
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
)

UD_NAME, UD_CONFIG = "universal-dependencies/universal_dependencies", "en_ewt"
# Their byte-level tokenizers take a word for the rest of another one where no space stands before it.
NEED_SPACE = {"bloom", "deberta", "gpt2", "longformer", "roberta"}


@dataclass
class TokenClassificationArguments(StudyArguments):
    dataset: str = field(default=UD_NAME, metadata={"help": "A data set on the Hub."})
    dataset_config: str | None = field(
        default=None, metadata={"help": f"Which part of it; of the default data set {UD_CONFIG}."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Of it; a branch, a tag or a commit."})
    train_file: str | None = field(default=None, metadata={"help": "CoNLL-like file, instead of `dataset`."})
    validation_file: str | None = field(default=None, metadata={"help": "To evaluate on after each epoch."})
    test_file: str | None = field(default=None, metadata={"help": "To evaluate on once."})
    token_column: str = field(default="tokens", metadata={"help": "Of the words: its name, in CoNLL its number."})
    tag_column: str = field(default="upos", metadata={"help": "Of the tags: its name, in CoNLL its number."})
    skip_tag: str = field(default="_", metadata={"help": "Words with this tag are left out."})
    max_length: int = field(default=512, metadata={"help": "In subwords; longer sentences are cut."})
    output_dir: str = field(default="outputs/tagging", metadata={"help": "Gets run.json and what the method saves."})


def load(args: TokenClassificationArguments) -> tuple[dict[str, Dataset], str]:
    """The splits, in the columns `tokens` and `tags`, and where they are from."""
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    if any(files.values()):
        if not (args.train_file and args.validation_file):
            raise SystemExit("--train_file and --validation_file go together.")
        if not (args.token_column.isdigit() and args.tag_column.isdigit()):
            raise SystemExit(
                f"--token_column {args.token_column} --tag_column {args.tag_column}: columns of CoNLL-like files are "
                "given by their number, from 1; in CoNLL-U words are 2, UPOS tags 4 and XPOS tags 5."
            )
        columns = int(args.token_column), int(args.tag_column)
        splits = {split: read_conll(path, *columns) for split, path in files.items() if path}
        names = "tokens", "tags"
    else:
        config = args.dataset_config or (UD_CONFIG if args.dataset == UD_NAME else None)
        splits = load_splits(
            args.dataset,
            config,
            data_dir=args.data_dir,
            folders=("ud_ewt", "") if config == UD_CONFIG else ("",),
            revision=args.dataset_revision,
        )
        splits = {split: splits[split] for split in files if split in splits}
        names = args.token_column, args.tag_column
    if "validation" not in splits:
        raise SystemExit(f"The data has no validation (or dev) split, only {', '.join(splits)}.")
    source = "local files" if args.data_dir or args.train_file else args.dataset
    return {split: tagged(rows, *names, skip_tag=args.skip_tag) for split, rows in splits.items()}, source


def run(args: TokenClassificationArguments) -> RunRecord:
    """One run; see [`common.training.train`] for the files that it leaves."""
    method = chosen_method(args)
    splits, source = load(args)
    names = tag_names(splits)
    base = locate(args.model_name_or_path)
    space = {"add_prefix_space": True} if AutoConfig.from_pretrained(base).model_type in NEED_SPACE else {}
    tokenizer = AutoTokenizer.from_pretrained(base, **space)

    splits["train"] = subset(splits["train"], args.train_size, args.seed)
    splits["validation"] = subset(splits["validation"], args.eval_size)
    parts = evaluation_parts({"validation": splits["validation"]}, args.dev_halves)
    inputs: dict[str, Dataset] = {}
    lost: dict[str, int] = {}
    for split, rows in (splits | parts).items():
        inputs[split], lost[split] = on_subwords(rows, tokenizer, names, args.max_length)
    sample = None
    if args.train_metrics:
        some, cut = on_subwords(subset(splits["train"], args.train_metrics), tokenizer, names, args.max_length)
        sample = Split(by_length(some), word_accuracy(cut))
    data = TaskData(
        name=args.tag_column if args.train_file is None else f"column {args.tag_column}",
        train=inputs["train"],
        evaluation={name: Split(by_length(inputs[name]), word_accuracy(lost[name])) for name in parts},
        metric="accuracy",
        collator=DataCollatorForTokenClassification(tokenizer),
        tokenizer=tokenizer,
        source=source,
        train_sample=sample,
        shrink=lambda logits, labels: logits.argmax(-1),
        notes={
            "tags": len(names),
            "words": {split: sum(map(len, rows["tags"])) for split, rows in (splits | parts).items()},
            "words_without_token": lost,
        },
    )

    def test(trainer: Trainer) -> dict[str, Any]:
        if "test" not in inputs:
            return {}
        trainer.compute_metrics = word_accuracy(lost["test"])
        found = trainer.evaluate(by_length(inputs["test"]), metric_key_prefix="test")
        return {"test": {"accuracy": found["test_accuracy"], "loss": found["test_loss"]}}

    model = new_model(
        AutoModelForTokenClassification, args.model_name_or_path, args.seed, id2label=dict(enumerate(names))
    )
    return train(method, model, data, args, recipe="token_classification", after=test)


def main(argv: list[str] | None = None) -> RunRecord:
    return run_recipe(run, TokenClassificationArguments, argv, __doc__)


if __name__ == "__main__":
    main()
