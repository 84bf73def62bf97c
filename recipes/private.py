"""Fine-tunes with differential privacy: sentences of GLUE, or words of a treebank, with BitFit and `PrivateTrainer`.

One run is one task, one budget, one learning rate and one seed. It is evaluated once, at the end: who picks the best
of several epochs, rates or seeds by private rows spends privacy that no ε here accounts for. `run.json` has the
figures and, in its notes, what was spent; the folder holds the delta, whose `adapter_config.json` says the same. With
neither `--target_epsilon` nor `--noise_multiplier` the same task is trained without privacy, by a stock Trainer, to
hold the private run against.

    accelerate launch recipes/private.py --config recipes/configs/private_minilm_cpu.yaml --target_epsilon 3 \\
        --data_dir path/to/data
    accelerate launch recipes/private.py --config recipes/configs/private_minilm_cpu.yaml --task pos --head_scale 1 \\
        --clip 1 --learning_rate 4e-3 --batch_size 128 --target_epsilon 8 --data_dir path/to/data
    accelerate launch recipes/private.py --task sst2 --noise_multiplier 0.8 --target_delta 1e-6 --secure_mode
    accelerate launch recipes/private.py --task sst2 --batch_size 32 --accumulation 1 --epochs 2
    accelerate launch --config_file recipes/accelerate/cpu_2_processes.yaml \\
        recipes/private.py --use_cpu --config recipes/configs/private_minilm_cpu.yaml --target_epsilon 8 \\
        --data_dir path/to/data

What helps a private run: all the rows there are, since the noise is shared by them; large batches (`--batch_size` is
the expected number of examples of an update, of which `--accumulation` parts are computed one after the other, by
length); a clip of the size of the gradients, not far below it; a larger output layer to begin with (`--head_scale`);
and no dropout. docs/guides/private_training.md says why. Limits: the unit of privacy is a row, a sentence here, and
not a person; rows are neither filtered nor weighted by their labels. Data is read as in `glue.py` and
`token_classification.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from common.arguments import StudyArguments
from common.data import GLUE, GLUE_NAME, by_length, load_glue, subset
from common.metrics import glue_metrics, word_accuracy
from common.models import locate, new_model
from common.record import RunRecord
from common.tagging import on_subwords, tag_names
from common.training import Split, TaskData, run_recipe, train
from glue import tokenized
from reproduction.baselines import BitFit
from token_classification import UD_NAME, TokenClassificationArguments, load
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from bitfit_hf import BitFitCallback, PrivacyConfig, PrivateTrainer

POS = "pos"


@dataclass
class PrivateArguments(StudyArguments):
    task: str = field(default="sst2", metadata={"help": f"One of {', '.join([*GLUE, POS])}."})
    target_epsilon: float | None = field(default=None, metadata={"help": "ε of the whole run."})
    noise_multiplier: float | None = field(default=None, metadata={"help": "Instead of an ε."})
    target_delta: float | None = field(default=None, metadata={"help": "δ; 1 / (10 n) by default."})
    clip: float = field(default=1.0, metadata={"help": "Norm that each example's gradient is clipped to."})
    accountant: str = field(default="prv", metadata={"help": "prv or rdp."})
    secure_mode: bool = field(default=False, metadata={"help": "Randomness from the operating system's generator."})
    batch_size: int = field(default=512, metadata={"help": "Examples in an update, on average, over all processes."})
    accumulation: int = field(default=8, metadata={"help": "Parts of an update that are computed one by one."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Of the head; `learning_rate` else."})
    dropout: float | None = field(default=None, metadata={"help": "Of the whole model; its own by default."})
    attention: str | None = field(
        default=None, metadata={"help": "eager or sdpa; on a CPU, without dropout and in bf16, eager is the faster."}
    )
    head_scale: float = field(default=1.0, metadata={"help": "What the fresh output layer's weight is multiplied by."})
    eval_every: int = field(default=1000, metadata={"help": "Epochs from one evaluation to the next."})
    output_dir: str = field(default="outputs/private", metadata={"help": "Gets run.json and the delta."})

    @property
    def privacy(self) -> PrivacyConfig | None:
        """What is asked for, if anything."""
        if self.target_epsilon is None and self.noise_multiplier is None:
            return None
        return PrivacyConfig(
            target_epsilon=self.target_epsilon,
            noise_multiplier=self.noise_multiplier,
            target_delta=self.target_delta,
            max_grad_norm=self.clip,
            accountant=self.accountant,
            secure_mode=self.secure_mode,
        )


def _changes(args: PrivateArguments) -> dict[str, Any]:
    """What the arguments change in the configuration of a model of BERT's kind."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    changes: dict[str, Any] = {} if args.dropout is None else dict.fromkeys(names, args.dropout)
    return changes if args.attention is None else changes | {"attn_implementation": args.attention}


def _larger_head(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """The model with another output layer to begin with.

    A fresh one is so small that next to no gradient goes through it, and what an example is clipped to is spent on the
    output layer alone.
    """
    outputs = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    with torch.no_grad():
        outputs[-1].weight.mul_(factor)
    return model


class Tuned(BitFit):
    """All biases and the head as the library's callback trains them by default, with privacy or without."""

    def __init__(self, args: PrivateArguments) -> None:
        super().__init__(seed=args.seed)
        self._args = args

    def callbacks(self) -> list[TrainerCallback]:
        args = self._args
        return [
            BitFitCallback(head_learning_rate=args.head_learning_rate, dropout=args.dropout != 0, privacy=args.privacy)
        ]


def sentences(args: PrivateArguments) -> tuple[PreTrainedModel, TaskData]:
    """A task of GLUE."""
    spec, splits = GLUE[args.task], load_glue(args.task, args.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(locate(args.model_name_or_path))
    metrics = glue_metrics(args.task)

    def prepare(rows: Any) -> Any:
        return tokenized(rows, spec.columns, tokenizer, args.max_length)

    data = TaskData(
        name=args.task,
        train=prepare(subset(splits["train"], args.train_size, args.seed)),
        evaluation={
            name.removeprefix("validation_"): Split(by_length(prepare(subset(splits[name], args.eval_size))), metrics)
            for name in spec.splits("validation")
        },
        metric=spec.metric,
        collator=DataCollatorWithPadding(tokenizer),
        tokenizer=tokenizer,
        source="local files" if args.data_dir else GLUE_NAME,
    )
    names: dict[str, Any] = {"id2label": dict(enumerate(spec.labels))} if spec.labels else {"num_labels": 1}
    names |= _changes(args)
    model = new_model(AutoModelForSequenceClassification, args.model_name_or_path, args.seed, **names)
    return _larger_head(model, args.head_scale), data


def words(args: PrivateArguments) -> tuple[PreTrainedModel, TaskData]:
    """Parts of speech: each sentence of the treebank is an example, whose loss is the mean over its words."""
    splits, _ = load(TokenClassificationArguments(data_dir=args.data_dir))
    names = tag_names(splits)
    tokenizer = AutoTokenizer.from_pretrained(locate(args.model_name_or_path))
    rows, _ = on_subwords(subset(splits["train"], args.train_size, args.seed), tokenizer, names, args.max_length)
    held_out, lost = on_subwords(subset(splits["validation"], args.eval_size), tokenizer, names, args.max_length)
    data = TaskData(
        name=POS,
        train=rows,
        evaluation={"validation": Split(by_length(held_out), word_accuracy(lost))},
        metric="accuracy",
        collator=DataCollatorForTokenClassification(tokenizer),
        tokenizer=tokenizer,
        source="local files" if args.data_dir else UD_NAME,
        shrink=lambda logits, labels: logits.argmax(-1),
    )
    labels = {"id2label": dict(enumerate(names))} | _changes(args)
    model = new_model(AutoModelForTokenClassification, args.model_name_or_path, args.seed, **labels)
    return _larger_head(model, args.head_scale), data


def run(args: PrivateArguments) -> RunRecord:
    """One run; see [`common.training.train`] for the files that it leaves."""
    if args.task not in (*GLUE, POS):
        raise SystemExit(f"--task {args.task}: choose from {', '.join([*GLUE, POS])}.")
    if args.method != "bitfit":
        raise SystemExit(f"--method {args.method}: only bitfit has a private way here.")
    model, data = words(args) if args.task == POS else sentences(args)

    def spent(trainer: Trainer) -> dict[str, Any]:
        return {"privacy": trainer.ledger.facts()} if isinstance(trainer, PrivateTrainer) else {}

    return train(
        Tuned(args),
        model,
        data,
        args,
        recipe="private",
        after=spent,
        trainer_class=Trainer if args.privacy is None else PrivateTrainer,
        accumulation=args.accumulation,
    )


def main(argv: list[str] | None = None) -> RunRecord:
    return run_recipe(run, PrivateArguments, argv, __doc__)


if __name__ == "__main__":
    main()
