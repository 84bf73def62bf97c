"""Fine-tunes a causal language model on any text with BitFit, or with another method, and reports the perplexity.

The paper tunes encoders; here the same biases of a decoder are tuned. Texts are packed into blocks of tokens
(`study/packing.py`). There is no new head, so nothing but the biases is trained and saved.

    accelerate launch recipes/causal_lm.py --config recipes/configs/causal_lm_gpt2_wikitext.yaml
    accelerate launch recipes/causal_lm.py --config recipes/configs/causal_lm_smollm_added_biases.yaml \\
        --train_file path/to/notes.txt --method bitfit:query+intermediate+lm_head
    accelerate launch recipes/causal_lm.py --data_dir path/to/data --method full --learning_rate 2e-5
    accelerate launch --config_file recipes/accelerate/cpu_2_processes.yaml \\
        recipes/causal_lm.py --use_cpu --train_file path/to/train.jsonl --eval_file path/to/eval.jsonl

Models without biases (Llama and others) get them with `--add_missing_biases`: each projection one at exactly zero, and
the LM head only where it is named, as in the second command. Texts are a data set on the Hub (`--dataset`), or local
files: `<data_dir>/{train,validation}.jsonl.gz`, or any as `--train_file` and `--eval_file`, which are JSON lines with
a text in each row, or plain text, which is one text as a whole. Without evaluation texts, the last blocks of the
training texts are held out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.arguments import StudyArguments
from common.data import load_splits, subset
from common.models import locate, new_model
from common.packing import block_losses, collate, held_out, pack, perplexity
from common.record import RunRecord
from common.training import Split, TaskData, chosen_method, run_recipe, train
from datasets import Dataset
from reproduction.baselines import Method
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bitfit_hf.errors import BitFitError


@dataclass
class CausalLMArguments(StudyArguments):
    model_name_or_path: str = field(
        default="openai-community/gpt2", metadata={"help": "A causal LM on the Hub, or a folder."}
    )
    dataset: str = field(default="Salesforce/wikitext", metadata={"help": "A data set on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Which part of `dataset`."})
    train_split: str = field(default="train", metadata={"help": "Of `dataset`."})
    eval_split: str = field(default="validation", metadata={"help": "Of `dataset`; without it, blocks are held out."})
    train_file: str | None = field(default=None, metadata={"help": "Text or JSON lines, instead of `dataset`."})
    eval_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Of the data set or the JSON lines."})
    separate_texts: bool = field(default=True, metadata={"help": "Put the end-of-text token after each text."})
    held_out_share: float = field(default=0.05, metadata={"help": "Of the blocks, where there are no others."})
    add_missing_biases: bool = field(default=False, metadata={"help": "Give projections without a bias one."})
    max_length: int = field(default=512, metadata={"help": "Of a block, in tokens; sizes of subsets are in blocks."})
    batch_size: int = field(default=8, metadata={"help": "Blocks in a step, over all processes."})
    eval_batch_size: int = field(default=8, metadata={"help": "Blocks in an evaluation step, per process."})
    output_dir: str = field(default="outputs/causal_lm", metadata={"help": "Gets run.json and what is saved."})


def read_texts(path: str, column: str) -> Dataset:
    """Texts of a local file, by what its name ends in: JSON lines, or one plain text."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: there is no such file.")
    if Path(path).name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return Dataset.from_json(path)
    return Dataset.from_dict({column: [Path(path).read_text(encoding="utf-8")]})


def load_texts(args: CausalLMArguments) -> tuple[Dataset, Dataset | None, str]:
    """Texts to train on, texts to evaluate on where there are any, and where they are from."""
    if args.train_file is not None:
        evaluation = read_texts(args.eval_file, args.text_column) if args.eval_file is not None else None
        return read_texts(args.train_file, args.text_column), evaluation, "local files"
    if args.eval_file is not None:
        raise SystemExit("--eval_file goes with --train_file; a data set on the Hub has --eval_split.")
    splits = load_splits(args.dataset, args.dataset_config, data_dir=args.data_dir, needed=args.train_split)
    source = "local files" if args.data_dir else args.dataset
    return splits[args.train_split], splits.get(args.eval_split), source


def blocks_of(texts: Dataset, args: CausalLMArguments, tokenizer: Any) -> Dataset:
    if args.text_column not in texts.column_names:
        raise SystemExit(
            f"--text_column {args.text_column}: there is no such column, only {', '.join(texts.column_names)}."
        )
    return pack(texts, args.text_column, tokenizer, args.max_length, separate=args.separate_texts)


def method_for(args: CausalLMArguments, model: PreTrainedModel) -> Method:
    """The method, if it is one for a model without a new head."""
    kind = args.method.partition(":")[0]
    if kind == "frozen":
        raise SystemExit(
            f"--method frozen trains nothing but a new head, and {type(model).__name__} has none: its LM head is "
            "pre-trained. Take the untuned model for the comparison (--max_steps 1 --learning_rate 0)."
        )
    if args.add_missing_biases:
        if kind != "bitfit":
            raise SystemExit(f"--add_missing_biases goes with --method bitfit, not {args.method}.")
        args = replace(args, method_options=[*args.method_options, "add_missing_biases=true"])
    return chosen_method(args)


def run(args: CausalLMArguments) -> RunRecord:
    """One run; see [`common.training.train`] for the files that it leaves."""
    tokenizer = AutoTokenizer.from_pretrained(locate(args.model_name_or_path))
    model = new_model(AutoModelForCausalLM, args.model_name_or_path, args.seed)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and args.max_length > longest:
        raise SystemExit(f"--max_length {args.max_length}: {args.model_name_or_path} takes {longest} tokens at most.")
    train_texts, eval_texts, source = load_texts(args)
    try:
        method = method_for(args, model)
        train_blocks = blocks_of(train_texts, args, tokenizer)
        if eval_texts is None:
            train_blocks, eval_blocks = held_out(train_blocks, args.held_out_share)
        else:
            eval_blocks = blocks_of(eval_texts, args, tokenizer)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    train_blocks = subset(train_blocks, args.train_size, args.seed)
    data = TaskData(
        name="causal_lm",
        train=train_blocks,
        evaluation={"validation": Split(subset(eval_blocks, args.eval_size), perplexity)},
        metric="perplexity",
        collator=collate,
        tokenizer=tokenizer,
        source=source,
        train_sample=Split(subset(train_blocks, args.train_metrics), perplexity) if args.train_metrics else None,
        greater_is_better=False,
        shrink=block_losses,
    )
    try:
        return train(method, model, data, args, recipe="causal_lm")
    except BitFitError as error:
        raise SystemExit(f"{args.model_name_or_path}: {error}") from None


def main(argv: list[str] | None = None) -> RunRecord:
    return run_recipe(run, CausalLMArguments, argv, __doc__)


if __name__ == "__main__":
    main()
