"""[`Kind`]: what tasks with the same model class and head shape have in common."""

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
from ..delta import BiasDelta
from ..errors import BaseModelMismatchError, BitFitError, DeltaMismatchError, TaskBankError, collect
from ..fingerprint import OnMismatch, check_base
from ..terms import head_modules, part_of, part_tensors
from ..terms.structure import walk
from ..tuner.reading import install, stock_class
from .base import Base
from .batch import current
from .values import BankedValue, HeadValue

_MAPPINGS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "MULTIPLE_CHOICE": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
    "IMAGE_CLS": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "AUDIO_CLS": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}
_WITH_HEAD = tuple(_MAPPINGS)[:-2]


_SMALL_WEIGHT = 1 << 16  # values; copying that much for each example costs less than a product of its own


class BankedHead(nn.Module):
    """Stands for one leaf module of the head: runs each task's own on the rows of its examples, in float32.

    Where the leaf is a small Linear, as most heads end in, all tasks' are run in one batched product.

    Args:
        path (`str`): The leaf's path in the task's class.
        pattern (`nn.Module`): One such leaf, for code that looks at its attributes.
    """

    def __init__(self, path: str, pattern: nn.Module) -> None:
        super().__init__()
        self.path = path
        self._pattern = (pattern,)  # in a tuple: it is no child, and its tensors are no parameters of the shell
        self._small_linear = type(pattern) is nn.Linear and pattern.weight.numel() <= _SMALL_WEIGHT

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The leaf's forward, example by example."""
        batch = current()
        if batch is None:
            raise TaskBankError("A head of a TaskBank runs only inside a call of the bank.")
        args, kwargs = tuple(map(_float32, args)), {name: _float32(value) for name, value in kwargs.items()}
        tasks = [(member, member.resident.heads[self.path]) for member in batch.answering if member.resident]
        if len(batch.members) == 1:
            return tasks[0][1](*args, **kwargs)
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        rows, device = first.shape[0], first.device
        factor, rest = divmod(rows, batch.size)
        if rest or not factor:
            raise TaskBankError(
                f"The head's {self.path} gets {rows} rows for a batch of {batch.size} examples, so it is not known "
                "which belong to which. Ask for one task per call."
            )
        if self._small_linear and factor == 1 and len(args) == 1 and not kwargs and first.dim() in (2, 3):
            owners = batch.owners([member for member, _ in tasks])
            return _product_per_example([tasks[place][1] for place in owners], first)
        result = None
        for member, leaf in tasks:
            where = _rows(member.index(device), factor)
            part = leaf(
                *(_pick(value, where, rows) for value in args),
                **{name: _pick(value, where, rows) for name, value in kwargs.items()},
            )
            if result is None:
                result = part.new_zeros((rows, *part.shape[1:]))
            result.index_copy_(0, where, part)
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_pattern":
                raise
            return getattr(self._pattern[0], name)


def _product_per_example(leaves: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Each example's rows of `x`, `(examples, ..., in)`, through its own Linear."""
    weights, biases = ([leaf._parameters[name] for leaf in leaves] for name in ("weight", "bias"))
    weight = torch.stack(weights).transpose(1, 2)  # type: ignore[arg-type]
    rows = x if x.dim() == 3 else x.unsqueeze(1)
    if biases[0] is None:
        result = torch.bmm(rows, weight)
    else:
        result = torch.baddbmm(torch.stack(biases).unsqueeze(1), rows, weight)  # type: ignore[arg-type]
    return result if x.dim() == 3 else result.squeeze(1)


def _float32(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(torch.float32) if is_float else value


def _rows(examples: torch.Tensor, factor: int) -> torch.Tensor:
    if factor == 1:
        return examples
    # Choices and patches can be folded into the batch, the example outermost.
    return (examples[:, None] * factor + torch.arange(factor, device=examples.device)).flatten()


def _pick(value: Any, where: torch.Tensor, rows: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows:
        return value.index_select(0, where)
    return value


class Kind:
    """A model class around the bank's base, without weights of its own: its head's leaves are [`BankedHead`]s.

    Args:
        base ([`Base`]): The bank's base.
        shell (`PreTrainedModel`): The class, on the base's modules.
        leaves (`Mapping[str, nn.Module]`): The head's leaf modules by path, and [`HeadValue`]s for its other parts, on
            the meta device.
    """

    def __init__(self, base: Base, shell: PreTrainedModel, leaves: Mapping[str, nn.Module]) -> None:
        self.base = base
        self.shell = shell
        self.leaves = dict(leaves)
        self._verified: list[dict[str, Any]] = []

    def check_base(self, delta: BiasDelta, on_mismatch: OnMismatch | None) -> None:
        """Compares the base with the fingerprint that the delta carries.

        Raises:
            [`BaseModelMismatchError`]: The delta was trained on another checkpoint.
        """
        config = delta.config
        if config.base_fingerprint is None or config.base_fingerprint in self._verified:
            return
        try:
            check_base(
                self.shell, config.base_fingerprint, delta_base=config.base_model_name_or_path, on_mismatch="raise"
            )
        except BaseModelMismatchError:
            if on_mismatch == "raise":
                raise
            check_base(
                self.shell, config.base_fingerprint, delta_base=config.base_model_name_or_path, on_mismatch=on_mismatch
            )
        else:
            # Tasks that tune the same biases on this base carry the same fingerprint; taking it is most of the time
            # that adding a task needs.
            self._verified.append(config.base_fingerprint)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The shell's modules by path."""
        return dict(walk(self.shell))

    @property
    def one_by_one(self) -> bool:
        """Whether the head is run for one task at a time."""
        return any(isinstance(leaf, HeadValue) for leaf in self.leaves.values())

    @property
    def name(self) -> str:
        """Name of the model class."""
        return type(self.shell).__name__

    def heads(self, delta: BiasDelta) -> dict[str, nn.Module]:
        """A task's own leaves.

        Raises:
            [`DeltaMismatchError`]: The delta's head is not that of this class.
        """
        built: dict[str, nn.Module] = {}
        problems = []
        for path, pattern in self.leaves.items():
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
            built[path] = leaf.to(self.base.device).requires_grad_(False).eval()
        if problems:
            raise DeltaMismatchError(f"The delta's head is not that of a {self.name}:{collect(problems)}")
        return built


def _describe(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()) or "no tensors"


def base_kind(base: Base) -> Kind:
    """The base as it is."""
    return Kind(base, base.model, {})


def find_kind(base: Base, delta: BiasDelta, known: dict[Any, Kind], tokenizer: Any = None) -> Kind:
    """The kind of a delta's task, made if it is the first one.

    Args:
        base ([`Base`]): The bank's base.
        delta ([`BiasDelta`]): Trained on some class with that base.
        known (`dict`): The kinds so far; a new one is added.
        tokenizer (*optional*): Says what padding is, where the base's configuration does not.

    Raises:
        [`TaskBankError`]: The task's class cannot be made around this base.
        [`DeltaMismatchError`]: It is of another architecture.
    """
    config = delta.config
    classes = _classes(base, config, bool(delta.head))
    if not delta.head:
        return _headless(base, classes, config, known)
    fitting: dict[type, Kind] = {}
    reasons = []
    for cls in classes:
        key = (cls, config.num_labels)
        try:
            kind = known.get(key) or _make(base, cls, config, tokenizer)
        except BitFitError as error:
            reasons.append(str(error))
            continue
        wanted = set(config.modules_to_save or [])
        if set(kind.leaves) != wanted:
            reasons.append(f"the head of a {cls.__name__} is {sorted(kind.leaves)}, the delta's {sorted(wanted)}")
            continue
        fitting[cls] = kind
    if len(fitting) == 1:
        ((cls, kind),) = fitting.items()
        return known.setdefault((cls, config.num_labels), kind)
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


def _headless(base: Base, classes: Sequence[type], config: BitFitConfig, known: dict[Any, Kind]) -> Kind:
    for cls in classes:
        if cls is type(base.model):
            return known.setdefault(None, base_kind(base))
        if cls is type(base.backbone):
            return known.setdefault((cls, None), Kind(base, base.part(base.backbone), {}))  # type: ignore[arg-type]
    names = ", ".join(cls.__name__ for cls in classes) or f"an unknown class ({config.task_type})"
    raise TaskBankError(
        f"This delta has no head of its own: it belongs to {names}, whose output layers are pre-trained, and the "
        f"bank's base is a {type(base.model).__name__}. Make a bank on that class."
    )


def _classes(base: Base, config: BitFitConfig, has_head: bool) -> list[type[PreTrainedModel]]:
    """The model classes that a delta may have been trained in, the likeliest first."""
    mapping = config.auto_mapping or {}
    named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    task = getattr(config.task_type, "value", config.task_type)
    if isinstance(named, str):
        own = [cls for cls in (type(base.model), type(base.backbone)) if cls.__name__ == named]
        # A name from a file is looked up among transformers' own models, never imported from anywhere.
        found = own[0] if own else getattr(transformers, named, None)
        config_class = type(base.backbone.config)
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and _takes(found, config_class)):
            raise DeltaMismatchError(
                f"The delta was trained in a {named!r:.80} on {config.base_model_name_or_path!r}; that is no class of "
                f"transformers for the architecture of the bank's {type(base.model).__name__}."
            )
        return [found]
    if task == "FEATURE_EXTRACTION":
        return [type(base.backbone)]
    if not has_head and task is None:
        return [type(base.model)] if type(base.model) is type(base.backbone) else []
    found_classes = []
    if not has_head and str(type(base.model).__name__).endswith(("LMHeadModel", "ForCausalLM", "Generation", "LM")):
        found_classes.append(type(base.model))
    for name in [_MAPPINGS[task]] if task in _MAPPINGS else [_MAPPINGS[other] for other in _WITH_HEAD]:
        classes = getattr(transformers, name).get(type(base.backbone.config), ())
        found_classes.extend(classes if isinstance(classes, (tuple, list)) else (classes,))
    if has_head and base.head and (task is None or _task_of(type(base.model)) == task):
        found_classes.append(type(base.model))
    return list(dict.fromkeys(found_classes))


def _task_of(cls: type) -> str | None:
    for ending, task in (
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
    ):
        if cls.__name__.endswith(ending):
            return task
    return None


def _takes(cls: type[PreTrainedModel], config_class: type) -> bool:
    wanted = getattr(cls, "config_class", None)
    return isinstance(wanted, type) and issubclass(config_class, wanted)


def _make(base: Base, cls: type[PreTrainedModel], config: BitFitConfig, tokenizer: Any) -> Kind:
    settings: Any = copy.deepcopy(base.model.config)
    if config.num_labels is not None:
        settings.num_labels = config.num_labels
    settings.problem_type = config.problem_type
    if getattr(settings, "pad_token_id", None) is None and getattr(tokenizer, "pad_token_id", None) is not None:
        settings.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        shell: PreTrainedModel = cls(settings).eval()
    paths = head_modules(shell)
    modules = dict(walk(shell))
    tensors = part_tensors(shell, paths)
    leaves = {path: modules[path].float() if path in modules else HeadValue(tensors[path].float()) for path in paths}
    _adopt(base, shell, paths)
    for path, leaf in leaves.items():
        parent, _, name = path.rpartition(".")
        owner = shell.get_submodule(parent)
        if isinstance(leaf, HeadValue):
            owner._parameters[name] = nn.Parameter(
                torch.empty_like(leaf.value, dtype=base.model.dtype, device=base.device), requires_grad=False
            )
            install(owner, (name,), owner=BankedValue(path))
        else:
            pattern = copy.deepcopy(leaf).to_empty(device=base.device)
            setattr(owner, name, BankedHead(path, pattern))
    missing = [name for name, tensor in [*shell.named_parameters(), *shell.named_buffers()] if tensor.is_meta]
    if missing:
        raise TaskBankError(
            f"A {cls.__name__} needs more than the bank's {type(base.model).__name__} and the delta's head hold:"
            f"{collect(missing)}\nMake the bank on a model that has them, such as a {cls.__name__} loaded from the "
            "base checkpoint."
        )
    return Kind(base, shell, leaves)


def _adopt(base: Base, shell: PreTrainedModel, head: Sequence[str]) -> None:
    """Puts the base's modules into the shell, in place of those of the same name that hold no leaf of the head."""
    prefix = next(path for path, module in walk(shell) if module is shell.base_model)
    ours = dict(walk(base.backbone))

    def visit(path: str, module: nn.Module) -> None:
        name = path.removeprefix(prefix).removeprefix(".") if path == prefix or path.startswith(f"{prefix}.") else None
        if not prefix:
            name = path
        twin = None if name is None else ours.get(name)
        holds_head = any(leaf == path or leaf.startswith(f"{path}.") or not path for leaf in head)
        if twin is not None and stock_class(twin) is type(module) and not holds_head:
            parent, _, last = path.rpartition(".")
            setattr(shell.get_submodule(parent), last, base.part(twin))
            return
        for child_name, child in list(module.named_children()):
            child_path = f"{path}.{child_name}" if path else child_name
            if child_path not in head:
                visit(child_path, child)

    visit("", shell)
    outside = dict(walk(base.model))
    for path, module in list(walk(shell)):
        # Layers beside the backbone that came with the checkpoint, where the base is of the same class.
        named = [*module._parameters.items(), *module._buffers.items()]
        tensors = [tensor for name, tensor in named if f"{path}.{name}" not in head]
        if path and path not in head and any(t is not None and t.is_meta for t in tensors):
            twin = outside.get(path)
            if type(base.model) is type(shell) and twin is not None and stock_class(twin) is type(module):
                parent, _, last = path.rpartition(".")
                setattr(shell.get_submodule(parent), last, twin)
