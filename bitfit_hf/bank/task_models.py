"""[`TaskModel`]: the model that tasks of one class run through, made around the bank's base."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..config import BitFitConfig
from ..delta.value import BiasDelta
from ..errors import BaseModelMismatchError, BitFitError, DeltaMismatchError, TaskBankError, collect
from ..storage.fingerprint import OnMismatch, check_base
from ..terms import head_modules, part_of, part_tensors, pooler_modules
from ..terms.structure import walk
from ..terms.tasks import BY_PEFT_NAME, FEATURE_EXTRACTION, TASKS, library_class, task_of_class
from ..tuner.reading import stock_class
from .base import Base
from .engine import run_with_own_pooler
from .heads import HeadParameter, read_parameter_of_the_task, run_head_of_each_task
from .padding import Padding
from .sites import Site


class TaskModel:
    """A model class on the modules of the bank's base, whose head runs each task's own leaves.

    Args:
        base ([`Base`]): The bank's base.
        model (`PreTrainedModel`): The class, on the base's modules.
        head (`Mapping[str, nn.Module]`): The head's parts by path, on the meta device.
    """

    def __init__(self, base: Base, model: PreTrainedModel, head: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.head = dict(head)
        self.name = type(model).__name__
        self.task = task_of_class(self.name)
        self.padding: Padding | None = None  # known once texts have been asked about
        self._base = base
        self._verified: list[dict[str, Any]] = []

    @property
    def one_by_one(self) -> bool:
        """Whether its head can be run for one task at a time only."""
        return any(isinstance(part, HeadParameter) for part in self.head.values())

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by path."""
        return dict(walk(self.model))

    def check_base(self, delta: BiasDelta, on_mismatch: OnMismatch | None) -> None:
        """Compares the base with the fingerprint that the delta carries.

        Raises:
            [`BaseModelMismatchError`]: The delta was trained on another checkpoint.
        """
        fingerprint, trained_on = delta.config.base_fingerprint, delta.config.base_model_name_or_path
        # Tasks that tune the same biases on this base carry the same fingerprint; taking it is most of the time that
        # adding a task needs. So what has passed the strict check is not checked again.
        if fingerprint in self._verified:
            return
        if fingerprint:
            try:
                check_base(self.model, fingerprint, delta_base=trained_on, on_mismatch="raise")
            except BaseModelMismatchError:
                if on_mismatch == "raise":
                    raise
            else:
                self._verified.append(fingerprint)
                return
        check_base(self.model, fingerprint, delta_base=trained_on, on_mismatch=on_mismatch)

    def sites_of(self, delta: BiasDelta) -> dict[str, Site]:
        """The site of each of a delta's biases.

        Raises:
            [`DeltaMismatchError`]: The base has no such bias, or cannot mix it.
        """
        sites, problems = {}, []
        for name, (bias, *_) in delta.biases.items():
            site = self._base.site_of(self.modules.get(bias.module), bias.parameter)
            if site is None:
                problems.append(f"{name} has no place in the bank's {type(self._base.model).__name__}")
            elif site.shape != bias.shape:
                problems.append(f"{name} has shape {list(bias.shape)}, the base's {list(site.shape)}")
            elif site.exists != bias.exists:
                problems.append(f"{name} {'was added to a base without it' if site.exists else 'is not in the base'}")
            elif site in self._base.unsupported:
                problems.append(f"{name} {self._base.why_unsupported}")
            else:
                sites[name] = site
        if problems:
            raise DeltaMismatchError(
                f"The delta, trained on {delta.config.base_model_name_or_path!r}, does not fit the bank's base:"
                f"{collect(problems)}"
            )
        return sites

    def head_of(self, delta: BiasDelta) -> dict[str, nn.Module]:
        """A task's own parts of the head.

        Raises:
            [`DeltaMismatchError`]: The delta's head is not that of this class.
        """
        built: dict[str, nn.Module] = {}
        problems = []
        for path, pattern in self.head.items():
            tensors = {
                name[len(path) + 1 :] or "value": tensor.detach().clone()
                for name, tensor in delta.head.items()
                if part_of(name, [path])
            }
            own = pattern.state_dict()
            if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in tensors.items()}:
                problems.append(f"{path} has {_describe(tensors)} instead of {_describe(own)}")
                continue
            leaf = copy.deepcopy(pattern)
            leaf.load_state_dict(tensors, assign=True)
            built[path] = leaf.to(self._base.device).requires_grad_(False).eval()
        if problems:
            raise DeltaMismatchError(f"The delta's head is not that of a {self.name}:{collect(problems)}")
        return built


def _describe(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()) or "no tensors"


class TaskModels:
    """The task models of a bank, one for each class and size of its head, made when the first task needs it.

    Args:
        base ([`Base`]): The bank's base.

    Attributes:
        of_base ([`TaskModel`]): The base as it is.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self.of_base = TaskModel(base, base.model, {})
        self._known: dict[tuple[type, int | None, frozenset[str]], TaskModel] = {}

    def find(self, delta: BiasDelta, tokenizer: Any = None) -> TaskModel:
        """The model of a delta's task.

        Args:
            delta ([`BiasDelta`]): Trained on some class with that base.
            tokenizer (*optional*): Says what padding is, where the base's configuration does not.

        Raises:
            [`TaskBankError`]: The task's class cannot be made around this base.
            [`DeltaMismatchError`]: It is of another architecture.
        """
        config, base = delta.config, self._base
        classes = _classes(base, config, bool(delta.head))
        if not delta.head:
            return self._without_head(classes, config)
        fitting: dict[type, TaskModel] = {}
        reasons = []
        wanted = frozenset(config.modules_to_save or [])
        for cls in classes:
            try:
                found = self._known.get((cls, config.num_labels, wanted)) or _make(base, cls, config, tokenizer)
            except BitFitError as error:
                reasons.append(str(error))
                continue
            if set(found.head) == wanted:
                fitting[cls] = found
            else:
                reasons.append(f"the head of a {cls.__name__} is {sorted(found.head)}, the delta's {sorted(wanted)}")
        if len(fitting) == 1:
            ((cls, found),) = fitting.items()
            return self._known.setdefault((cls, config.num_labels, wanted), found)
        origin = f"a delta trained on {config.base_model_name_or_path!r}"
        if fitting:
            raise TaskBankError(
                f"Nothing says which model class {origin} belongs to, and its head fits "
                f'{", ".join(sorted(cls.__name__ for cls in fitting))}. Set `delta.config.task_type` ("SEQ_CLS", '
                '"TOKEN_CLS", ...) and add the delta.'
            )
        raise DeltaMismatchError(
            f"The head of {origin} fits no class on the bank's {type(base.backbone).__name__}:"
            f"{collect(reasons or ['no class of this task is known for this architecture'])}"
        )

    def _without_head(self, classes: Sequence[type], config: BitFitConfig) -> TaskModel:
        base = self._base
        own, backbone = type(base.model), type(base.backbone)
        if own in classes:
            return self.of_base
        if backbone in classes:
            key = (backbone, None, frozenset[str]())
            if key not in self._known:
                self._known[key] = TaskModel(base, base.run_once(base.backbone), {})  # type: ignore[arg-type]
            return self._known[key]
        names = ", ".join(cls.__name__ for cls in classes) or f"an unknown class ({config.task_type})"
        raise TaskBankError(
            f"This delta has no head of its own: it belongs to {names}, whose output layers are pre-trained, and the "
            f"bank's base is a {own.__name__}. Make a bank on that class."
        )


def _classes(base: Base, config: BitFitConfig, has_head: bool) -> Sequence[type[PreTrainedModel]]:
    """The model classes that a delta may have been trained in."""
    mapping = config.auto_mapping or {}
    named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    own, backbone = type(base.model), type(base.backbone)
    if isinstance(named, str):
        return [_class_named(named, base, config)]
    # Files of before the class was recorded: the task is known at most.
    task = BY_PEFT_NAME.get(str(getattr(config.task_type, "value", config.task_type)))
    if task is FEATURE_EXTRACTION:
        return [backbone]
    if not has_head and task is None:
        return [own] if own is backbone else []
    possible = [task] if task is not None else [other for other in TASKS if other.new_head]
    classes = [cls for one in possible for cls in one.classes(base.backbone.config)]
    if has_head and own is not backbone and (task is None or task_of_class(own.__name__) is task):
        classes.append(own)
    return list(dict.fromkeys(classes))


def _class_named(name: str, base: Base, config: BitFitConfig) -> type[PreTrainedModel]:
    for cls in (type(base.model), type(base.backbone)):
        if name in (cls.__name__, library_class(cls).__name__):
            return cls
    # A name from a file is looked up among transformers' own models, never imported from anywhere.
    found: Any = getattr(transformers, name, None)
    wanted = getattr(found, "config_class", None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not (is_model and isinstance(wanted, type) and isinstance(base.backbone.config, wanted)):
        raise DeltaMismatchError(
            f"The delta was trained in a {name!r:.80} on {config.base_model_name_or_path!r}, which fits no class of "
            f"transformers for the architecture of the bank's {type(base.model).__name__}."
        )
    return found


def _make(base: Base, cls: type[PreTrainedModel], config: BitFitConfig, tokenizer: Any) -> TaskModel:
    settings: Any = copy.deepcopy(base.model.config)
    if config.num_labels is not None:
        settings.num_labels = config.num_labels
    settings.problem_type = config.problem_type
    if getattr(settings, "pad_token_id", None) is None and getattr(tokenizer, "pad_token_id", None) is not None:
        settings.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        model: PreTrainedModel = cls(settings).eval()
    modules = dict(walk(model))
    own_pooler = [path for path in pooler_modules(model) if path in (config.modules_to_save or ())]
    paths = head_modules(model, modules_to_save=own_pooler)
    tensors = part_tensors(model, paths)
    head = {path: modules[path].float() if path in modules else HeadParameter(tensors[path].float()) for path in paths}
    _adopt(base, model, head)
    for path, part in head.items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(part, HeadParameter):
            empty = torch.empty_like(part.value, dtype=base.model.dtype, device=base.device)
            owner._parameters[name] = nn.Parameter(empty, requires_grad=False)
            read_parameter_of_the_task(path, owner)
            continue
        own = copy.deepcopy(part).to_empty(device=base.device)  # for code that looks at its dtype or its device
        run_head_of_each_task(path, own)
        setattr(owner, name, own)
    missing = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if missing:
        raise TaskBankError(
            f"A {cls.__name__} needs more than the bank's {type(base.model).__name__} and the delta's head hold:"
            f"{collect(missing)}\nMake the bank on a model that has them, such as a {cls.__name__} loaded from the "
            "base checkpoint."
        )
    return TaskModel(base, model, head)


def _check_only_pooler(backbone: str, head: Mapping[str, nn.Module], name: str) -> None:
    others = [leaf for leaf in head if leaf.startswith(f"{backbone}.") and ".pooler." not in leaf]
    if others:
        raise TaskBankError(
            f"The head of this {name} has parts inside the backbone, which this bank's engine computes as a whole:"
            f'{collect(others)}\nServe it with a bank of `engine="torch"`.'
        )


def _adopt(base: Base, model: PreTrainedModel, head: Mapping[str, nn.Module]) -> None:
    """Puts the base's modules into a task model, in place of those of the same name that hold no leaf of the head."""
    prefix = next(path for path, module in walk(model) if module is model.base_model)
    ours = {".".join(filter(None, (prefix, path))): module for path, module in walk(base.backbone)}
    if type(base.model) is type(model):  # then those beside the backbone came with the checkpoint
        ours |= dict(walk(base.model))

    def visit(parent: nn.Module, at: str) -> None:
        for name, child in list(parent.named_children()):
            path = f"{at}.{name}" if at else name
            twin = ours.get(path)
            if path in head:
                continue
            holds_head = any(leaf.startswith(f"{path}.") for leaf in head)
            if twin is not None and stock_class(twin) is type(child) and not holds_head:
                setattr(parent, name, base.run_once(twin))
            else:
                visit(child, path)
                if path == prefix and base.engine is not None:
                    _check_only_pooler(path, head, type(model).__name__)
                    run_with_own_pooler(child, base.run_once(base.backbone))

    visit(model, "")
