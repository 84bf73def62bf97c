"""[`BitFitCardData`]: the facts that a card shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..analysis import ParameterCount, term_counts
from ..config import BitFitConfig
from ..delta.value import BiasDelta
from ..storage.bias_layout import decode_layout
from ..storage.files import LORA_FOLDER, PICTURE_FILE
from ..terms.tasks import Task
from ..training_run import TrainingRun
from .facts import MANY_LABELS, commit_name, is_metric, procedure_lines, selection_lines, short_digest, trained_task
from .text import titled
from .update import hub_name

TAGS = ["bitfit", "peft"]


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
        widget (`list[dict[str, Any]]`, *optional*): Examples for the Hub's page, such as `[{"text": "A fine film."}]`.
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
    widget: list[dict[str, Any]] | None = None
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
            selection=selection_lines(config),
            base_model=hub_name(config.base_model_name_or_path),
            base_revision=commit_name(config.revision),
            base_num_parameters=config.base_num_parameters,
            base_digest=None if prints is None else short_digest(prints),
            base_tensors=None if prints is None else len(prints.get("tensors", ())),
            task_of=trained_task(config),
            # Start and end of an answer are no labels.
            num_labels=config.num_labels if config.task_type != "QUESTION_ANS" else None,
            labels=labels if named and len(labels) <= MANY_LABELS else [],
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
            found.procedure = procedure_lines(run)
            found.privacy = dict(run.privacy)
            found.versions = dict(sorted(run.versions.items()))
            metrics = sorted(run.metrics.items(), key=lambda item: (item[0].endswith("loss"), item[0]))
            found.metrics = {name: value for name, value in metrics if is_metric(name, value)}
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
        return titled(self.dataset, self.dataset_config)

    @property
    def evaluated_on(self) -> tuple[str, str | None, str | None] | None:
        """Data set, part and split that the metrics are about."""
        if self.eval_dataset is not None:
            return (self.eval_dataset, self.eval_config, self.eval_split) if self.eval_dataset else None
        return (self.dataset, self.dataset_config, None) if self.dataset else None

    @property
    def evaluation_title(self) -> str | None:
        """The same in words, where it is known for certain."""
        title = titled(self.eval_dataset, self.eval_config)
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
                    dataset_name=titled(name, part) or name,
                    dataset_config=part,
                    dataset_split=split,
                    metric_type=metric,
                    metric_value=value,
                    metric_name=metric_words(metric),
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
            widget=self.widget,
            eval_results=results or None,
            model_name=self.title if results else None,
        )

    def percent(self, count: int) -> str:
        """`count` as a share of the base's size."""
        return f"{100 * count / (self.base_num_parameters or math.inf):.3g} %"


def metric_words(name: str) -> str:
    """A metric's name as cards show it."""
    return name.replace("_", " ")
