"""The base model with a fresh head for a task, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...card.update import hub_name
from ...errors import CheckpointError
from ...tables.problem import Kind, Problem
from ...terms import head_modules
from ...terms.tasks import SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION
from ..checkpoints import build_on_meta, is_local, read_model_config, reading

PROBLEM_TYPES: dict[Kind, Any] = {
    Kind.CLASSIFICATION: "single_label_classification",
    Kind.REGRESSION: "regression",
    Kind.MULTI_LABEL: "multi_label_classification",
}


@dataclass
class Base:
    """
    A base model.

    Args:
        name (`str`): As the user says: a folder or a repo.
        config ([`~transformers.PretrainedConfig`]): With the task's labels.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        kind ([`Kind`]): The kind of task, which decides the model class.
        revision (`str`, *optional*), token (`str`, *optional*): As in transformers.
    """

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    revision: str | None = None
    token: str | None = None

    @property
    def public_name(self) -> str:
        """Its name for people elsewhere: the repo, or the folder without the path to it."""
        return self.name if hub_name(self.name) else Path(self.name).resolve().name

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads it with a head for the task."""
        task = TOKEN_CLASSIFICATION if self.kind is Kind.TOKENS else SEQUENCE_CLASSIFICATION
        return getattr(transformers, task.auto_class)

    @property
    def pipeline_tag(self) -> str:
        """The Hub's name of the task."""
        tag = (TOKEN_CLASSIFICATION if self.kind is Kind.TOKENS else SEQUENCE_CLASSIFICATION).tag
        assert tag is not None
        return tag

    def without_weights(self) -> PreTrainedModel:
        """The architecture, to count what is in it."""
        return build_on_meta(self.config, self.auto_class, self.name)

    def model(self, seed: int) -> PreTrainedModel:
        """The model with a fresh head, the same for the same seed.

        Raises:
            [`CheckpointError`]: It cannot be loaded.
        """
        set_seed(seed)
        with reading(self.name):
            model: PreTrainedModel = self.auto_class.from_pretrained(
                self.name,
                config=self.config,
                revision=self.revision or "main",
                token=self.token,
                local_files_only=is_local(self.name),
                trust_remote_code=False,
            )
        return model


def read_base(name: str, problem: Problem, *, revision: str | None = None, token: str | None = None) -> Base:
    """Reads configuration and tokenizer of a base; its weights are left for later.

    Args:
        name (`str`): A folder or a repo on the Hub.
        problem ([`Problem`]): The task.
        revision (`str`, *optional*), token (`str`, *optional*): As in transformers.

    Raises:
        [`CheckpointError`]: It is no model that can have a head for the task, or has no tokenizer.
    """
    config = read_model_config(name, revision=revision, token=token)
    if problem.labels:
        config.id2label = dict(enumerate(problem.labels))
        config.label2id = {label: index for index, label in config.id2label.items()}
    else:
        config.num_labels = 1
    config.problem_type = PROBLEM_TYPES.get(problem.kind)
    tokenizer = load_tokenizer(name, revision=revision, token=token)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    base = Base(name, config, tokenizer, problem.kind, revision, token)
    task = TOKEN_CLASSIFICATION if problem.kind is Kind.TOKENS else SEQUENCE_CLASSIFICATION
    if not any(task.classes(config)):
        raise CheckpointError(
            f"{name} is a {config.model_type}, for which transformers has no {task.words} model. Take an encoder such "
            "as bert-base-uncased."
        )
    return base


def load_tokenizer(path_or_repo: str, *, revision: str | None, token: str | None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, which gets a padding token where it has none.

    Raises:
        [`CheckpointError`]: It cannot be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path_or_repo,
            revision=revision or "main",
            token=token,
            local_files_only=is_local(path_or_repo),
            trust_remote_code=False,
        )
    except Exception as error:  # whatever is wrong with a user's files
        raise CheckpointError(f"The tokenizer of {path_or_repo} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:  # decoders have none: texts of one length are all that they have been trained on
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def output_layer(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The last layer of the head, whose outputs are the logits; with its path.

    Raises:
        [`CheckpointError`]: It is not a linear one.
    """
    heads = head_modules(model)
    wide = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and any(f"{path}.".startswith(f"{head}.") for head in heads)
    ]
    if not wide:
        raise CheckpointError(f"The head of {type(model).__name__} does not end in a linear layer.")
    return wide[-1]
