"""What to train: [`BitFitConfig`], a [`~peft.PeftConfig`]."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType

from .errors import BitFitError, ConfigError, DeltaFormatError, collect
from .storage.bias_layout import check_choice, decode_layout, plain_layout
from .storage.files import CONFIG_FILE, SavedState, encode_config, write_bytes
from .storage.fingerprint import plain_fingerprint
from .terms import SavedNames, resolve_terms
from .terms.tasks import task_type_without_head
from .training_run import TrainingRun


class BitFitPeftType(str, Enum):
    """The method's name in PEFT's mappings.

    PEFT's own `PeftType` is a closed enum. A member of another `str` enum hashes and compares like the plain string,
    so PEFT finds it in its mappings, and has the `.value` that transformers reads.
    """

    BITFIT = "BITFIT"


@dataclass
class BitFitConfig(PeftConfig):
    r"""
    Configuration of bias-only fine-tuning: [BitFit](https://huggingface.co/papers/2106.10199) (Ben Zaken, Ravfogel and
    Goldberg, ACL 2022).

    The tuned quantity is the delta `δ = b_F − b_0` of each selected bias, a float32 parameter that starts at zero, and
    the task head, which is trained whole. Everything else stays frozen.

    Args:
        task_type (`str` or [`~peft.TaskType`], *optional*):
            PEFT's name of the task. Read off the model's class when not given.
        bias_terms (`str` or `list[str]`, *optional*, defaults to `"all"`):
            Which of the paper's bias terms to tune: `"all"`, one term or a list of `query`, `key`, `value`,
            `attention_output`, `attention_layernorm`, `intermediate`, `output`, `output_layernorm`,
            `embedding_layernorm`, `pooler`, `lm_head`, `other`; the paper's symbols (`b_q`, `b_k`, `b_v`, `b_m1`,
            `b_LN1`, `b_m2`, `b_m3`, `b_LN2`) are aliases. `"query+intermediate"` is the paper's half-size subset
            (Table 3).
        target_modules (`str` or `list[str]`, *optional*):
            Narrows the terms to these modules. A list holds module paths or their last components, a string is a
            regular expression that has to match the whole path.
        exclude_modules (`str` or `list[str]`, *optional*):
            Takes these modules out again; matched like `target_modules`.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Narrows the terms to these layers, counted from 0 in each stack.
        modules_to_save (`list[str]`, *optional*):
            Modules to train and save whole beside the task head, which is found by itself. After injection this holds
            the full list of the head's parts, see [`bitfit_hf.terms.head_modules`].
        train_untrained_pooler (`bool`, *optional*, defaults to `True`):
            Whether a pooler that was never trained belongs to the head. Such a pooler (its bias is exactly zero, as in
            sentence encoders) sends every text through a random projection. `False` keeps its weight frozen.
        add_missing_biases (`bool`, *optional*, defaults to `False`):
            Gives each targeted projection that has no bias one at exactly zero (Llama, T5, …). Norms and LM heads get
            one only when their term is named.
        added_tokens (`int`, *optional*):
            How many rows at the end of the token embeddings the checkpoint does not have, where they were resized for
            the task. They are trained and saved with the delta. Found out by itself from the base's `config.json`;
            needed only where that is not at hand.
        base_vocab_size (`int`, *optional*): Number of the first of them; filled in at injection.
        num_labels (`int`, *optional*), id2label (`dict[int, str]`, *optional*), problem_type (`str`, *optional*):
            Shape and label names of the head. Taken from the model when training; restored on the model when loading.
        base_fingerprint (`dict`, *optional*):
            What identifies the checkpoint that the delta belongs to; filled in at injection.
        bias_layout (`dict[str, dict]`, *optional*):
            Which term and layer each tuned tensor is, see [`bitfit_hf.storage.bias_layout`]; filled in at injection.
        weights_digest (`str`, *optional*):
            SHA-256 over the tensors saved with this configuration; ties the two files of one save together.
        base_num_parameters (`int`, *optional*):
            How many parameters the base has without the task head; filled in at injection.
        run ([`TrainingRun`], *optional*):
            Facts of the training that the delta comes from; filled in by [`BitFitCallback`], shown in the model card.
        bitfit_version (`str`, *optional*):
            Version of `bitfit_hf` that wrote the configuration. It is there from reading the file until the tensors
            that belong to it are in a model, see [`bitfit_hf.tuner.lifecycle`].

    Attributes:
        given_base (`str`, *optional*):
            The base's name that the user gave, or that came with a delta. PEFT overwrites `base_model_name_or_path`
            with the path that the model was loaded from; the given name wins over it.
        last_state ([`SavedState`], *optional*):
            The tensors that were last taken out of the model to be saved, of which the file then names the digest.

    Raises:
        [`UnknownTermError`]: `bias_terms` names a term that does not exist.
        [`ConfigError`]: A value has the wrong type; all such values are named at once.
        [`DeltaFormatError`], [`DeltaMismatchError`]: `bias_layout` is damaged, or contradicts the other values.

    Example:

    ```python
    >>> from bitfit_hf import BitFitConfig

    >>> BitFitConfig(bias_terms=["b_q", "b_m2"]).bias_terms
    ['query', 'intermediate']
    ```
    """

    bias_terms: str | Sequence[str] = field(
        default="all", metadata={"help": "Which bias terms to tune: 'all', a preset, one term or a list of terms."}
    )
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Narrows the terms to modules with these names, or matching this regex."}
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Leaves out modules with these names, or matching this regex."}
    )
    layers_to_transform: int | list[int] | None = field(
        default=None, metadata={"help": "Narrows the terms to these layers, counted from 0."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole beside the task head, which is found by itself."}
    )
    train_untrained_pooler: bool = field(
        default=True, metadata={"help": "Trains a pooler that was never trained whole, as a part of the head."}
    )
    add_missing_biases: bool = field(
        default=False, metadata={"help": "Gives targeted projections without a bias one that starts at zero."}
    )
    added_tokens: int | None = field(
        default=None, metadata={"help": "How many of the last token embeddings the checkpoint does not have."}
    )
    base_vocab_size: int | None = field(
        default=None, metadata={"help": "How many token embeddings the checkpoint has, where there are added ones."}
    )
    num_labels: int | None = field(default=None, metadata={"help": "Number of labels of the head."})
    id2label: dict[int, str] | None = field(default=None, metadata={"help": "Label names of the head."})
    problem_type: str | None = field(default=None, metadata={"help": "transformers' problem type of the head."})
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Identifies the checkpoint that the delta belongs to."}
    )
    bias_layout: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Which term and layer each tuned tensor is."}
    )
    weights_digest: str | None = field(
        default=None, metadata={"help": "SHA-256 over the tensors that were saved with this configuration."}
    )
    base_num_parameters: int | None = field(
        default=None, metadata={"help": "How many parameters the base has without the task head."}
    )
    run: TrainingRun | None = field(default=None, metadata={"help": "Facts of the training, for the model card."})
    bitfit_version: str | None = field(default=None, metadata={"help": "Version of bitfit_hf that wrote this."})

    def __post_init__(self) -> None:
        self.peft_type = BitFitPeftType.BITFIT
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value) if isinstance(value, set) else list(value))
        if isinstance(self.layers_to_transform, (set, tuple, range)):
            self.layers_to_transform = list(self.layers_to_transform)
        problems = [problem for name, check in _CHECKS.items() if (problem := check(name, getattr(self, name)))]
        if problems:
            raise ConfigError(f"BitFitConfig (adapter_config.json) holds values of the wrong type:{collect(problems)}")
        super().__post_init__()
        if self.modules_to_save is not None:
            self.modules_to_save = SavedNames(self.modules_to_save)
        self.bias_terms = _canonical(self.bias_terms)
        if self.id2label is not None:  # JSON turns the keys into strings
            self.id2label = {int(index): label for index, label in self.id2label.items()}
            self.num_labels = len(self.id2label) if self.num_labels is None else self.num_labels
            if wrong := label_problems(self.num_labels, self.id2label, self.problem_type):
                raise ConfigError(f"{wrong[0]}.")
        if self.bitfit_version is not None and self.added_tokens and self.base_vocab_size is None:
            raise ConfigError(
                "adapter_config.json has `added_tokens` but not `base_vocab_size`; save the delta again."
            )
        if self.run is not None and not isinstance(self.run, TrainingRun):
            self.run = TrainingRun.from_dict(self.run, weights_digest=self.weights_digest)
        if self.base_fingerprint is not None:
            self.base_fingerprint = plain_fingerprint(self.base_fingerprint)
        if self.bias_layout:
            self.bias_layout = plain_layout(self.bias_layout)
            if not self.modules_to_save:
                self.task_type = task_type_without_head(self.task_type)
            check_choice(
                decode_layout(self.bias_layout),
                bias_terms=self.bias_terms,
                target_modules=self.target_modules,
                exclude_modules=self.exclude_modules,
                layers_to_transform=self.layers_to_transform,
                add_missing_biases=self.add_missing_biases,
            )
        self.given_base = self.base_model_name_or_path
        self.last_state: SavedState | None = None

    def check_layout_known(self, *, where: str) -> None:
        """Raises [`DeltaFormatError`] where a configuration of a trained delta does not say what was tuned."""
        if not self.bias_layout:
            raise DeltaFormatError(f"{where}: adapter_config.json has no `bias_layout`; save the delta again.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes `adapter_config.json`, and what belongs beside it: the model card, see [`after_save`].

        Every stock way of saving a delta comes by here, PEFT's with a card of its own in the folder already.

        Args:
            save_directory (`str`): The folder.
            kwargs: As for [`~peft.PeftConfig.save_pretrained`].
        """
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory, CONFIG_FILE)
        write_bytes(path, encode_config(json.loads(path.read_text(encoding="utf-8"))))  # PEFT's is hard to read
        if self.bias_layout:  # else nothing was trained yet
            run_after_save(save_directory, self)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to `adapter_config.json`."""
        from . import __version__

        values: dict[str, Any] = super().to_dict()
        values["bitfit_version"] = __version__
        values["run"] = None if self.run is None else self.run.to_dict()
        if self.last_state is not None:
            values["weights_digest"] = self.last_state.digest
        return values

    @classmethod
    def from_values(cls, values: Mapping[str, Any], *, where: str) -> BitFitConfig:
        """Makes a configuration of the values of an `adapter_config.json`.

        Args:
            values (`Mapping[str, Any]`): As they stand in the file.
            where (`str`): Names the delta in messages.

        Raises:
            [`DeltaFormatError`]: It is the configuration of another method.
            [`BitFitError`]: A value cannot be used.
        """
        if values.get("peft_type") != BitFitPeftType.BITFIT.value:
            raise DeltaFormatError(
                f"{where}: adapter_config.json is of the method {values.get('peft_type')!r}, not 'BITFIT'. "
                "Load it with the library that wrote it."
            )
        try:
            return cls.from_peft_type(**cls.check_kwargs(**values))
        except BitFitError as error:
            raise type(error)(f"{where}: adapter_config.json cannot be used. {error}") from error

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Hook of PEFT for values read from a file: they are untrusted, so the file's base name is a plain value."""
        name = kwargs.get("base_model_name_or_path")
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"adapter_config.json: `base_model_name_or_path` must be a string, got {name!r}.")
        return super().check_kwargs(**kwargs)


# What is called with the folder, the configuration and, where it is at hand, the delta as a value.
AfterSave = Callable[[str | os.PathLike[str], BitFitConfig, Any], None]
_after_save: list[AfterSave] = []


def after_save(hook: AfterSave) -> AfterSave:
    """Has `hook` called whenever a delta's configuration has been saved, whichever way. Usable as a decorator."""
    _after_save.append(hook)
    return hook


def run_after_save(folder: str | os.PathLike[str], config: BitFitConfig, delta: Any = None) -> None:
    """Calls the hooks of [`after_save`].

    Args:
        folder (`str` or `os.PathLike`): Where the configuration has been saved.
        config ([`BitFitConfig`]): The configuration.
        delta ([`BiasDelta`], *optional*): The delta as a value, where it is at hand.
    """
    for hook in _after_save:
        hook(folder, config, delta)


def label_problems(num_labels: int, id2label: dict[Any, Any], problem_type: str | None) -> list[str]:
    """What is wrong with the labels of a head, in words; nothing where a configuration can hold them."""
    given = {"num_labels": num_labels, "id2label": id2label, "problem_type": problem_type}
    problems = [problem for name, value in given.items() if (problem := _CHECKS[name](name, value))]
    if not problems and {int(index) for index in id2label} != set(range(num_labels)):
        problems = [
            f"`id2label` names the labels {sorted(map(int, id2label))[:8]} but `num_labels` is {num_labels}; "
            f"name each of 0 to {num_labels - 1} once"
        ]
    return problems


def _canonical(bias_terms: str | Sequence[str]) -> str | list[str]:
    """Terms with aliases resolved; `"all"` stays `"all"` so that the file says what the user said."""
    terms = resolve_terms(bias_terms)
    return "all" if bias_terms == "all" else list(terms)


def _kind(expected: str, accepts: Callable[[Any], bool]) -> Callable[[str, Any], str | None]:
    def check(name: str, value: Any) -> str | None:
        if value is None or accepts(value):
            return None
        return f"`{name}` must be {expected}, got {value!r:.80} ({type(value).__name__})"

    return check


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_label_map(value: Any) -> bool:
    return isinstance(value, dict) and all(
        (_is_int(index) or (isinstance(index, str) and index.isdecimal())) and isinstance(label, str)
        for index, label in value.items()
    )


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


_NAMES = _kind("a string (a regular expression) or a list of strings", lambda v: _is_pattern(v) or _strings(v))
_TEXT = _kind("a string", lambda v: isinstance(v, str))
_MAX_LABELS = 1_000_000  # a file must not make the model build a head that no memory holds
_MAX_TOKENS = 100_000_000
_CHECKS: dict[str, Callable[[str, Any], str | None]] = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _kind("a list of strings", _strings),
    "layers_to_transform": _kind(
        "an integer or a list of integers", lambda v: _is_int(v) or (isinstance(v, list) and all(map(_is_int, v)))
    ),
    "train_untrained_pooler": _kind("a boolean", lambda v: isinstance(v, bool)),
    "add_missing_biases": _kind("a boolean", lambda v: isinstance(v, bool)),
    "inference_mode": _kind("a boolean", lambda v: isinstance(v, bool)),
    "task_type": _kind(f"one of {', '.join(member.value for member in TaskType)}", lambda v: v in list(TaskType)),
    "auto_mapping": _kind("a mapping", lambda v: isinstance(v, dict)),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "added_tokens": _kind(f"an integer from 0 to {_MAX_LABELS:,}", lambda v: _is_int(v) and 0 <= v <= _MAX_LABELS),
    "base_vocab_size": _kind(f"an integer from 1 to {_MAX_TOKENS:,}", lambda v: _is_int(v) and 0 < v <= _MAX_TOKENS),
    "num_labels": _kind(f"an integer from 1 to {_MAX_LABELS:,}", lambda v: _is_int(v) and 0 < v <= _MAX_LABELS),
    "id2label": _kind("a mapping of label numbers to names", _is_label_map),
    "problem_type": _kind(
        "one of regression, single_label_classification, multi_label_classification",
        lambda v: v in ("regression", "single_label_classification", "multi_label_classification"),
    ),
    "base_num_parameters": _kind("a positive integer", lambda v: _is_int(v) and v > 0),
    "run": _kind("a mapping", lambda v: isinstance(v, (dict, TrainingRun))),
    "base_fingerprint": _kind("a mapping", lambda v: isinstance(v, dict)),
    "bias_layout": _kind(
        "a mapping of tensor names to places",
        lambda v: isinstance(v, dict) and all(isinstance(place, (str, dict)) for place in v.values()),
    ),
    "weights_digest": _TEXT,
    "bitfit_version": _TEXT,
}
