"""The model card of a delta: from facts that are known, and nothing else.

[`BitFitCardData`] holds the facts, `model_card_template.md` says how they read, and [`write_card`] puts the card into
a delta's folder. Every way of saving a delta calls it, stock ones included.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..analysis import ParameterCount, term_counts
from ..config import BitFitConfig
from ..delta.value import BiasDelta
from ..storage.bias_layout import decode_layout
from ..storage.files import CARD_FILE, LORA_FOLDER, PICTURE_FILE, write_bytes
from ..terms import SYMBOLS, TERMS
from ..terms.tasks import Task, task_named
from ..training_run import TrainingRun
from .update import UnreadableCardError, hub_name, merge_cards, read_card, record_of

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["bitfit", "peft"]

_MANY_LABELS = 20

# Names of hyper-parameters in words; others are shown by the name that `TrainingArguments` has.
_WORDS = {
    "learning_rate": "learning rate of the biases",
    "head_learning_rate": "learning rate of the head",
    "lr_scale": "multiples of the learning rate",
    "train_batch_size": "examples per update",
    "num_train_epochs": "epochs planned",
    "max_steps": "updates planned",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up updates",
    "weight_decay": "weight decay (not of the biases)",
    "max_grad_norm": "gradient clipping",
    "optim": "optimizer",
    "mixed_precision": "mixed precision",
}
# Facts that people give, and the key in the header where each is shown.
_KEYS = {"language": "language", "license": "license", "dataset": "datasets", "base_model": "base_model"}
# What a Trainer counts among the metrics but says nothing about the model.
_NO_METRICS = ("runtime", "model_preparation_time", "jit_compilation_time", "epoch")


@dataclass
class BitFitCardData:
    """
    The facts that a card shows. What is not known stays out of it.

    Args:
        count ([`ParameterCount`]): What was trained, by term.
        selection (`list[str]`, *optional*): How the terms were narrowed, one line each.
        base_model (`str`, *optional*): The base's name on the Hub, never a local path.
        base_revision (`str`, *optional*): Its commit.
        base_num_parameters (`int`, *optional*): Its size without a task head.
        base_digest (`str`, *optional*), base_tensors (`int`, *optional*): Its fingerprint, and over how many tensors.
        task_of (`Task`, *optional*): The task.
        num_labels (`int`, *optional*), labels (`list[str]`, *optional*), problem_type (`str`, *optional*):
            Of the head.
        procedure (`dict[str, str]`, *optional*): How it was trained: what is said of it, in words.
        privacy (`dict[str, Any]`, *optional*): What a private run has spent.
        versions (`dict[str, str]`, *optional*): Of the packages at work.
        metrics (`dict[str, float]`, *optional*): Of the last evaluation.
        dataset (`str`, *optional*), dataset_config (`str`, *optional*): The training data, and which part of it.
        eval_dataset (`str`, *optional*), eval_config (`str`, *optional*), eval_split (`str`, *optional*):
            What the metrics are about; where nothing is known of that, the training data set.
        language (`str` or `list[str]`, *optional*), license (`str`, *optional*): Metadata that only people know.
        repo_id (`str`, *optional*): Where the delta lives on the Hub.
        digest (`str`, *optional*): Of delta and head.
        num_bytes (`int`, *optional*): Size of the tensors.
        added (`int`, *optional*): Biases that the base does not have.
        added_tokens (`int`, *optional*): Tokens that the base does not have.
        picture (`str`, *optional*): File name of the picture of the bias change.
        stock (`bool`, *optional*): Whether there is an export for stock libraries.
    """

    count: ParameterCount
    selection: list[str] = field(default_factory=list)
    base_model: str | None = None
    base_revision: str | None = None
    base_num_parameters: int | None = None
    base_digest: str | None = None
    base_tensors: int | None = None
    task_of: Task | None = None
    num_labels: int | None = None
    labels: list[str] = field(default_factory=list)
    problem_type: str | None = None
    procedure: dict[str, str] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    dataset: str | None = None
    dataset_config: str | None = None
    eval_dataset: str | None = None
    eval_config: str | None = None
    eval_split: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    repo_id: str | None = None
    digest: str | None = None
    num_bytes: int | None = None
    added: int = 0
    added_tokens: int = 0
    picture: str | None = None
    stock: bool = False

    @classmethod
    def from_config(
        cls,
        config: BitFitConfig,
        *,
        run: TrainingRun | None = None,
        delta: BiasDelta | None = None,
        folder: Path | None = None,
        **facts: Any,
    ) -> BitFitCardData:
        """Collects the facts.

        Args:
            config ([`BitFitConfig`]): Of the delta.
            run ([`TrainingRun`], *optional*): The training; by default what the configuration says of it.
            delta ([`BiasDelta`], *optional*): The delta itself, where it is at hand.
            folder (`Path`, *optional*): The delta's folder, which may hold a picture and an export.
            facts: Fields of this class; what is given wins over what is found.
        """
        run = run or config.run
        count = term_counts(config)
        saved = config.last_state
        if delta is not None:
            count = term_counts(delta)
        elif saved is not None:
            tokens = saved.num_token_parameters
            count = ParameterCount(count.terms, head=saved.num_parameters - count.biases - tokens, tokens=tokens)
        total = None if delta is None and saved is None else count.total
        prints = config.base_fingerprint
        labels = list((config.id2label or {}).values())
        named = any(label != f"LABEL_{index}" for index, label in enumerate(labels))
        found = cls(
            count=count,
            selection=_selection(config),
            base_model=hub_name(config.base_model_name_or_path),
            base_revision=_commit(config.revision),
            base_num_parameters=config.base_num_parameters,
            base_digest=None if prints is None else _short_digest(prints),
            base_tensors=None if prints is None else len(prints.get("tensors", ())),
            task_of=_task(config),
            # Start and end of an answer are no labels.
            num_labels=config.num_labels if config.task_type != "QUESTION_ANS" else None,
            labels=labels if named and len(labels) <= _MANY_LABELS else [],
            problem_type="regression" if config.num_labels == 1 else config.problem_type,
            digest=config.to_dict().get("weights_digest") if delta is None else delta.digest,
            num_bytes=None if total is None else 4 * total,
            added_tokens=config.added_tokens or 0,
            added=sum(b.num_parameters for b in decode_layout(config.bias_layout or {}) if not b.exists),
            picture=PICTURE_FILE if folder is not None and (folder / PICTURE_FILE).is_file() else None,
            stock=folder is not None and (folder / LORA_FOLDER).is_dir(),
        )
        if found.problem_type == "regression":
            found.labels = []
        if run is not None:
            found.procedure = _procedure(run)
            found.privacy = dict(run.privacy)
            found.versions = dict(sorted(run.versions.items()))
            metrics = sorted(run.metrics.items(), key=lambda item: (item[0].endswith("loss"), item[0]))
            found.metrics = {name: value for name, value in metrics if _is_metric(name, value)}
            for name in ("dataset", "dataset_config", "eval_dataset", "eval_config", "eval_split"):
                setattr(found, name, getattr(run, name))
        if facts.get("dataset") is not None and not found.eval_dataset:
            found.eval_dataset = None  # who names the data knows more than the Trainer
        for name, value in facts.items():
            if value is not None:
                setattr(found, name, value)
        return found

    # --- what follows from the facts ---

    @property
    def task(self) -> str | None:
        """The task in words."""
        if (
            self.task_of is not None
            and self.task_of.tag == "text-classification"
            and self.problem_type == "regression"
        ):
            return "text regression"
        return None if self.task_of is None else self.task_of.words

    @property
    def pipeline_tag(self) -> str | None:
        """The Hub's name of the task."""
        return None if self.task_of is None else self.task_of.tag

    @property
    def pipeline(self) -> bool:
        """Whether transformers has a pipeline for it."""
        return self.task_of is not None and self.task_of.pipeline

    @property
    def auto_class(self) -> str | None:
        """The class of transformers that loads such a model."""
        return None if self.task_of is None else self.task_of.auto_class

    @property
    def title(self) -> str:
        """Heading of the card."""
        if self.repo_id:
            return self.repo_id.rpartition("/")[2]
        base = f" of {self.base_model.rpartition('/')[2]}" if self.base_model else ""
        return f"BitFit delta{base}" + (f" for {self.task}" if self.task else "")

    @property
    def dataset_title(self) -> str | None:
        """The training data with the name of its part."""
        return _titled(self.dataset, self.dataset_config)

    @property
    def evaluated_on(self) -> tuple[str, str | None, str | None] | None:
        """Data set, part and split that the metrics are about."""
        if self.eval_dataset is not None:
            return (self.eval_dataset, self.eval_config, self.eval_split) if self.eval_dataset else None
        return (self.dataset, self.dataset_config, None) if self.dataset else None

    @property
    def evaluation_title(self) -> str | None:
        """The same in words, where it is known for certain."""
        title = _titled(self.eval_dataset, self.eval_config)
        return f"{title}, split {self.eval_split}" if title and self.eval_split else title or None

    def metadata(self) -> ModelCardData:
        """The card's header. Results are in it where the Hub's rules can be met: the data set must have a name."""
        transformers = ["transformers"] if self.task_of is not None else []
        results = []
        if self.evaluated_on is not None and self.pipeline_tag:
            name, part, split = self.evaluated_on
            results = [
                EvalResult(
                    task_type=self.pipeline_tag,
                    dataset_type=name,
                    dataset_name=_titled(name, part) or name,
                    dataset_config=part,
                    dataset_split=split,
                    metric_type=metric,
                    metric_value=value,
                    metric_name=metric.replace("_", " "),
                )
                for metric, value in self.metrics.items()
                if metric != "loss" or len(self.metrics) == 1
            ]
        return ModelCardData(
            base_model=self.base_model,
            base_model_relation="adapter" if self.base_model else None,
            library_name="peft",
            pipeline_tag=self.pipeline_tag,
            tags=[*TAGS, *transformers],
            datasets=[self.dataset] if self.dataset and hub_name(self.dataset) else None,
            language=self.language,
            license=self.license,
            eval_results=results or None,
            model_name=self.title if results else None,
        )

    def percent(self, count: int) -> str:
        """`count` as a share of the base's size."""
        return f"{100 * count / (self.base_num_parameters or math.inf):.3g} %"


def make_card(data: BitFitCardData, *, told: Collection[str] = ()) -> ModelCard:
    """Renders a card.

    Args:
        data ([`BitFitCardData`]): The facts.
        told (`Collection[str]`, *optional*): Keys of the header that a person has given, which later saves then keep.

    Returns:
        [`~huggingface_hub.ModelCard`].
    """
    metadata = data.metadata()
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        card=data,
        symbols=SYMBOLS,
        percent=data.percent,
        number=_number,
        size=_size,
        md=_plain,
        code=_code,
        generated=record_of(metadata.to_dict(), told=set(told)),
    )


def write_card(
    folder: str | os.PathLike[str],
    config: BitFitConfig | None = None,
    *,
    run: TrainingRun | None = None,
    delta: BiasDelta | None = None,
    previous: str | None = None,
    **facts: Any,
) -> Path:
    """Writes or renews the model card in a delta's folder.

    Text that is not between the card's own marks is kept, and so is metadata that somebody else has set. A card that
    PEFT or the Trainer has generated is replaced; one that a person has written, without our marks, keeps its text and
    is only given the metadata that it lacks.

    Args:
        folder (`str` or `os.PathLike`): The delta's folder.
        config ([`BitFitConfig`], *optional*): Of the delta; by default the delta is read from the folder.
        run ([`TrainingRun`], *optional*): The training; by default what the configuration says of it.
        delta ([`BiasDelta`], *optional*): The delta itself, where it is at hand.
        previous (`str`, *optional*): Text of the card before somebody else wrote over it.
        facts: Fields of [`BitFitCardData`] that nobody but the caller knows: `repo_id`, `dataset`, `dataset_config`,
            `eval_split`, `language`, `license`, `base_model` (its name on the Hub).

    Returns:
        `Path`: The card.

    Raises:
        [`DeltaIOError`]: The card cannot be written.

    Example:

    ```python
    write_card("rte-bitfit", dataset="nyu-mll/glue", dataset_config="rte", language="en", license="apache-2.0")
    ```
    """
    folder = Path(folder)
    if delta is None and config is None:
        delta = BiasDelta.from_folder(folder)
    if config is None:
        assert delta is not None
        config = delta.config
    path = folder / CARD_FILE
    try:
        old = read_card(path, previous)
    except UnreadableCardError as error:
        logger.warning("%s has not been renewed: %s. Mend or remove it, and save again.", CARD_FILE, error)
        return path
    known = run or config.run
    if old is not None and facts.get("dataset") is None and (known is None or known.dataset is None):
        facts["dataset"] = old.only_dataset()
    data = BitFitCardData.from_config(config, run=run, delta=delta, folder=folder, **facts)
    told = {key for name, key in _KEYS.items() if facts.get(name) is not None}
    if old is not None:
        for key in told:
            old.metadata.pop(key, None)
    write_bytes(path, merge_cards(old, make_card(data, told=told)).encode())
    return path


def _task(config: BitFitConfig) -> Task | None:
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    name, library = (str(mapping.get(key, "")) for key in ("base_model_class", "parent_library"))
    task = task_named(config.task_type, name, [key.partition(".")[0] for key in config.bias_layout or {}])
    if task is None and name.isidentifier() and library.partition(".")[0] == "transformers":
        return Task((), auto_class=name)
    return task


def card_after_save(folder: str | os.PathLike[str], config: BitFitConfig, delta: BiasDelta | None) -> None:
    """What [`~bitfit_hf.config.after_save`] calls: every way of saving a delta writes its card by this."""
    write_card(folder, config, delta=delta)


# --- facts ---


def _selection(config: BitFitConfig) -> list[str]:
    lines = []
    if config.bias_terms != "all":
        terms = [config.bias_terms] if isinstance(config.bias_terms, str) else config.bias_terms
        named = [f"`{term}`" for term in TERMS if term in terms]
        lines.append(f"Selected terms: {', '.join(named)}.")
    layers = config.layers_to_transform
    if layers is not None:
        numbers = [layers] if isinstance(layers, int) else layers
        lines.append(f"Only in the layers {', '.join(map(str, numbers))} (counted from 0).")
    for words, modules in (("Only in", config.target_modules), ("Not in", config.exclude_modules)):
        if modules:
            given = f"those that match `{_code(modules)}`" if isinstance(modules, str) else _names(modules)
            lines.append(f"{words} the modules {given}.")
    pooler = [name for name in config.modules_to_save or () if "pooler" in name.split(".")]
    if pooler:
        lines.append(f"The pooler ({_names(pooler)}) was never trained before: it is a part of the task head.")
    return lines


def _names(modules: list[str]) -> str:
    shown = ", ".join(f"`{_code(name)}`" for name in modules[:_MANY_LABELS])
    return shown + (f" and {len(modules) - _MANY_LABELS} more" if len(modules) > _MANY_LABELS else "")


def _procedure(run: TrainingRun) -> dict[str, str]:
    given = run.hyperparameters
    names = [name for name in _WORDS if name in given] + sorted(name for name in given if name not in _WORDS)
    lines = {_words(name, given[name]): _value(given[name]) for name in names if _is_known(given[name])}
    if _is_known(run.steps):
        lines["updates"] = _value(run.steps)
    if _is_known(run.epochs):
        lines["epochs"] = _value(run.epochs)
    if _is_known(run.num_examples):
        lines["training examples"] = _value(run.num_examples)
    if _is_known(run.train_loss):
        lines["mean training loss"] = _number(run.train_loss or 0.0)
    if _is_known(run.seconds):
        lines["time"] = f"{run.seconds:.0f} s"
    return lines


def _words(name: str, value: Any) -> str:
    if name == "warmup_steps" and isinstance(value, float) and 0 < value < 1:
        return "warm-up, share of the updates"  # as the Trainer reads a number below one
    return _WORDS.get(name, name)


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _is_metric(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and _is_known(value) and not name.endswith((*_NO_METRICS, "_per_second"))


def _commit(revision: str | None) -> str | None:
    """`revision` if it can stand in a line of code; it comes from a file."""
    return revision if revision is not None and re.fullmatch(r"[\w./-]{1,128}", revision) else None


def _short_digest(prints: dict[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:16]


# --- how they read ---


def _titled(name: str | None, part: str | None) -> str | None:
    return f"{name} ({part})" if name and part else name


def _value(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"


def _plain(text: Any) -> str:
    """Text of whatever origin as one line of Markdown that says just that, also in a table."""
    line = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(str(text).split()))
    return line.replace("<", "&lt;")


def _code(text: Any) -> str:
    """The same for between backticks, where nothing can be escaped."""
    return " ".join(str(text).split()).replace("`", "'").replace("<!--", "< !--")
