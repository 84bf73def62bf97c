"""What of a model is the new task head: what the task added and the checkpoint did not have.

A head is trained and stored in parts. Most are modules that are called as one piece, its *leaves*. A parameter that
lies in no leaf is a part of its own: Wav2Vec2's `layer_weights`, Tapas' `output_weights`, the `transitions` of a CRF.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import TaskType
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, NoMatchError, UnknownHeadError, collect
from .pooler import untrained_pooler
from .structure import stock_module, stock_root, walk

# The class families whose head is new. Everything outside their backbone belongs to it.
_NEW_HEAD = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|QuestionAnsweringSimple|MultipleChoice"
    r"|ImageClassification|ImageClassificationWithTeacher|VideoClassification"
    r"|AudioClassification|AudioFrameClassification|XVector)$"
)

# Classes whose output layers came with the checkpoint.
_PRE_TRAINED_HEAD = re.compile(
    r"(LMHeadModel|ModelWithLMHead|ForCausalLM|ForConditionalGeneration|ForMaskedLM|MTModel|BertGenerationDecoder"
    r"|ForPreTraining|PreTraining|ForNextSentencePrediction|ForSpeechToText|ForTextToText|ModelWithProjection)$"
)

# Backbones: no output layers at all. Such a class is its own `base_model`.
_BACKBONE = re.compile(r"(Model|Encoder|Decoder|Backbone|Stack|Transformer)$")

# Classes that the two rules above do not fit, most of them because they are their own backbone (`base_model` is the
# model itself): where their head starts.
_NAMED_HEADS: dict[str, tuple[str, ...]] = {
    "BlipForQuestionAnswering": (),  # it generates the answer with its pre-trained decoder
    "CLIPForImageClassification": ("classifier",),
    "GPT2DoubleHeadsModel": ("multiple_choice_head",),
    "HGNetV2ForImageClassification": ("fc",),
    "MetaClip2ForImageClassification": ("classifier",),
    "MT5ForQuestionAnswering": ("qa_outputs",),
    "OpenAIGPTDoubleHeadsModel": ("multiple_choice_head",),
    "PerceiverForSequenceClassification": ("perceiver.decoder",),
    "PPLCNetForImageClassification": ("head",),
    "Siglip2ForImageClassification": ("classifier",),
    "SiglipForImageClassification": ("classifier",),
    "T5ForQuestionAnswering": ("qa_outputs",),
    "UMT5ForQuestionAnswering": ("qa_outputs",),
    "WhisperForAudioClassification": ("layer_weights", "projector", "classifier"),
}

# What PEFT adds to `modules_to_save` by itself, by task type, whether the model has them or not.
PEFT_NAMES = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_AUTOMATIC = frozenset(name for names in PEFT_NAMES.values() for name in names)


def head_modules(
    model: nn.Module,
    task_type: str | None = None,
    modules_to_save: Sequence[str] | None = None,
    *,
    with_untrained_pooler: bool = True,
) -> list[str]:
    """Finds the new task head, the part that is trained and stored whole.

    For sequence, token, image, video and audio classification, question answering and multiple choice the head is
    everything outside the backbone, and the backbone's pooler where it was never trained, see [`untrained_pooler`].
    Language models, and backbones themselves, have none.

    Args:
        model (`torch.nn.Module`): A model, stock or with adapters injected, or a `PeftModel`.
        task_type (`str` or `peft.TaskType`, *optional*):
            Overrules the model's class where it says that there is no new head (`"CAUSAL_LM"`, `"SEQ_2_SEQ_LM"`,
            `"FEATURE_EXTRACTION"`).
        modules_to_save (`Sequence[str]`, *optional*):
            More to train whole: modules, or parameters that lie in no leaf, as path or dotted end of one. Given, even
            if empty, it also says what the head is for a class that has no rule.
        with_untrained_pooler (`bool`, *optional*, defaults to `True`):
            Whether a pooler that was never trained is counted as part of the head.

    Returns:
        `list[str]`: The stock names of the head's parts in definition order: paths of the modules that hold its
            parameters, and the parameters that lie in none of these. [`part_tensors`] gives their tensors.

    Raises:
        UnknownHeadError: If the class has no rule and `modules_to_save` is not given.
        NoMatchError: If an entry of `modules_to_save` matches nothing that has parameters.
        ConfigError: If an argument has the wrong type.

    Example:

    ```python
    >>> head_modules(AutoModelForSequenceClassification.from_config(DistilBertConfig()))
    ['pre_classifier', 'classifier']
    ```
    """
    task = _check_task_type(task_type)
    entries = _check_modules_to_save(modules_to_save)
    root = stock_root(model)
    modules = dict(walk(root))
    free = [part for part in _parts(modules) if part not in modules]

    added: set[str] = set()
    unmatched = []
    for entry in entries or ():
        below = [path for path in modules if path and _ends_in(path, entry)]
        parts = [part for path in below for part in _parts_below(modules, path)]
        parts += [name for name in free if _ends_in(name, entry)]
        if not parts and entry not in _AUTOMATIC:
            unmatched.append(f"{entry!r}" + (" holds no parameters" if below else " is the name of no module"))
        added.update(parts)
    if unmatched:
        raise NoMatchError(
            f"modules_to_save does not fit {type(root).__name__}:{collect(unmatched)}\n"
            "Pass module paths of the model, or the dotted end of some."
        )
    # PEFT's automatic names alone say nothing about a class that has no rule and none of these modules.
    settled = entries is not None and (bool(added) or not set(entries) or not set(entries) <= _AUTOMATIC)
    own = _class_head(root, modules, task)
    if own is None and not settled:
        children = [path for path, module in modules.items() if path and "." not in path and _has_parameters(module)]
        raise UnknownHeadError(
            f"It is not known which modules of {type(root).__name__} are the new task head. Name them with "
            "modules_to_save=[...], or pass modules_to_save=[] if everything in it is pre-trained. "
            f"Its parts with parameters are: {', '.join([*_own_parameters('', root), *children])}."
        )
    chosen = added.union(own or ())
    if own and with_untrained_pooler:
        chosen.update(untrained_pooler(root))
    everything = [name for path, module in modules.items() for name in (path, *_own_parameters(path, module))]
    return [name for name in everything if name in chosen]


def class_head(model: nn.Module, task_type: str | None = None) -> list[str]:
    """The head by the model's class alone, without a pooler; empty where no rule says which it is, or that none is.

    Args:
        model (`torch.nn.Module`), task_type (`str`, *optional*): See [`head_modules`].
    """
    root = stock_root(model)
    return _class_head(root, dict(walk(root)), _check_task_type(task_type)) or []


def part_tensors(model: nn.Module, parts: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of parts of a head, parameters and buffers, live and by their stock name.

    Args:
        model (`torch.nn.Module`): A stock model.
        parts (`Iterable[str]`): From [`head_modules`].
    """
    modules = dict(walk(stock_root(model)))
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        if part in modules:
            state = modules[part].state_dict(keep_vars=True)
            found |= {f"{part}.{name}": tensor for name, tensor in state.items()}
        else:
            path, _, name = part.rpartition(".")
            found[part] = modules[path]._parameters[name]  # type: ignore[assignment]
    return found


def part_of(name: str, parts: Iterable[str]) -> str | None:
    """The one of a head's `parts` that the tensor `name` belongs to."""
    return next((part for part in parts if name == part or name.startswith(f"{part}.")), None)


class SavedNames(list[str]):
    """The `modules_to_save` of a configuration, proof against what PEFT appends to it by itself.

    For three task types PEFT appends names of its own, after the head has been found and without looking whether the
    model has them. It then wraps whatever ends in such a name, and the saved configuration names modules that do not
    exist.
    """

    def extend(self, names: Iterable[str]) -> None:
        """Appends `names`, but for PEFT's own."""
        super().extend(name for name in names if name not in _AUTOMATIC)

    def __reduce_ex__(self, protocol: Any) -> tuple[type[SavedNames], tuple[list[str]]]:
        return SavedNames, (list(self),)  # else copying and unpickling would come by `extend`

    def without_peft_names(self, tensors: Iterable[str]) -> SavedNames:
        """Without what PEFT has appended, as files of earlier versions have it.

        Args:
            tensors (`Iterable[str]`): The names of the head's tensors, which tell a part of the head from a mere name.
        """
        for appended in set(PEFT_NAMES.values()):
            known = self[: -len(appended)]
            if known and tuple(self[len(known) :]) == appended:
                others = [name for name in tensors if part_of(name, known) is None]
                held = [part for part in appended if part not in known and any(part_of(n, [part]) for n in others)]
                return SavedNames([*known, *held])
        return SavedNames(self)


def _class_head(root: nn.Module, modules: dict[str, nn.Module], task: str | None) -> list[str] | None:
    """The head by the model's class; `None` where no rule says which it is."""
    if task is not None and task not in PEFT_NAMES:
        return []
    if not isinstance(root, PreTrainedModel):
        names = PEFT_NAMES.get(task or "", ())
        tops = [path for path in modules if path and any(_ends_in(path, name) for name in names)]
        return [part for top in tops for part in _parts_below(modules, top)]
    backbone = stock_module(root.base_model)
    for name in _class_names(root):
        if name in _NAMED_HEADS:
            return [part for top in _NAMED_HEADS[name] for part in _parts_below(modules, top)]
        if _NEW_HEAD.search(name):
            return None if backbone is root else _parts_outside(modules, backbone)
        if _PRE_TRAINED_HEAD.search(name) or (_BACKBONE.search(name) and backbone is root):
            return []
    return None


def _class_names(model: PreTrainedModel) -> Iterator[str]:
    """The name of the model's class and of those that it derives from, down to the architecture's own base class."""
    for cls in type(model).__mro__:
        if cls.__name__.endswith("PreTrainedModel"):
            return
        if issubclass(cls, PreTrainedModel):
            yield cls.__name__


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _own_parameters(path: str, module: nn.Module) -> list[str]:
    """The names of the parameters that a module holds itself."""
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    return [f"{path}.{name}" if path else name for name in own]


def _is_leaf(module: nn.Module) -> bool:
    """Whether `module` is called as one piece: either it has no parts, or its forward reads their weights itself."""
    if isinstance(module, nn.MultiheadAttention) or nn.utils.parametrize.is_parametrized(module):
        return True
    if type(module).__name__ == "TDNNLayer":  # of the x-vector heads
        return True
    return bool(_own_parameters("", module)) and not any(map(_has_parameters, module.children()))


def _ends_in(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _parts_below(modules: Mapping[str, nn.Module], top: str) -> list[str]:
    """The parts at or below `top`, which is a module or a parameter; none if it does not exist."""
    path, _, name = top.rpartition(".")
    if top not in modules and path in modules:
        return [top] if modules[path]._parameters.get(name) is not None else []
    return _parts({path: module for path, module in modules.items() if f"{path}.".startswith(f"{top}.")})


def _parts_outside(modules: Mapping[str, nn.Module], backbone: nn.Module) -> list[str]:
    """The parts that do not lie in `backbone`, nor are parameters of it under another name."""
    starts = tuple(f"{path}." for path, module in modules.items() if module is backbone)
    parts = _parts({path: module for path, module in modules.items() if not f"{path}.".startswith(starts)})
    theirs = set(map(id, backbone.parameters()))

    def is_new(part: str) -> bool:
        path, _, name = part.rpartition(".")
        return part in modules or id(modules[path]._parameters[name]) not in theirs

    return list(filter(is_new, parts))


def _parts(modules: Mapping[str, nn.Module]) -> list[str]:
    """Leaf modules that hold parameters, and the parameters that lie in none of them; the model itself is no leaf."""
    parts: list[str] = []
    leaf = None
    for path, module in modules.items():  # what a module contains follows right after it
        if leaf is not None and path.startswith(f"{leaf}."):
            continue
        if path and _is_leaf(module):
            parts.append(path)
            leaf = path
        else:
            parts += _own_parameters(path, module)
    return parts


def _check_task_type(task_type: str | None) -> str | None:
    if task_type is None:
        return None
    value = task_type.value if isinstance(task_type, TaskType) else task_type
    valid = [member.value for member in TaskType]
    if not isinstance(value, str) or value not in valid:
        raise ConfigError(f"task_type is {task_type!r}, but must be None or one of {', '.join(valid)}.")
    return value


def _check_modules_to_save(modules_to_save: Sequence[str] | None) -> list[str] | None:
    if modules_to_save is None:
        return None
    if isinstance(modules_to_save, str) or not isinstance(modules_to_save, (list, tuple, set, frozenset)):
        raise ConfigError(f"modules_to_save must be a list of module names, but is {modules_to_save!r}.")
    wrong = [entry for entry in modules_to_save if not isinstance(entry, str) or not entry]
    if wrong:
        raise ConfigError(f"modules_to_save must hold names of modules only, but has {wrong[0]!r}.")
    return list(modules_to_save)
