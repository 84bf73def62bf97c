"""Which modules of a model are the new task head: what the task added and the checkpoint did not have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from peft import TaskType
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, NoMatchError, UnknownHeadError, collect
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
# model itself): the roots of their head.
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
    "WhisperForAudioClassification": ("projector", "classifier"),
}

# PEFT adds these to `modules_to_save` by itself, whether the model has them or not.
_AUTOMATIC = frozenset({"classifier", "score", "qa_outputs"})

_TASKS_WITH_HEAD = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})


def head_modules(
    model: nn.Module, task_type: str | None = None, modules_to_save: Sequence[str] | None = None
) -> list[str]:
    """Finds the new task head, the part that is trained and stored whole.

    For sequence, token, image, video and audio classification, question answering and multiple choice the head is
    every module outside the backbone. Language models, and backbones themselves, have none.

    Args:
        model (`torch.nn.Module`): A model, stock or with adapters injected, or a `PeftModel`.
        task_type (`str` or `peft.TaskType`, *optional*):
            Overrules the model's class where it says that there is no new head (`"CAUSAL_LM"`, `"SEQ_2_SEQ_LM"`,
            `"FEATURE_EXTRACTION"`).
        modules_to_save (`Sequence[str]`, *optional*):
            More modules to train whole, as path or dotted end of one. Given, even if empty, it also says what the
            head is for a class that has no rule.

    Returns:
        `list[str]`: Stock paths of the modules that hold the head's parameters, in definition order.

    Raises:
        UnknownHeadError: If the class has no rule and `modules_to_save` is not given.
        NoMatchError: If an entry of `modules_to_save` matches no module with parameters.
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
    modules = {path: module for path, module in walk(root) if path}

    added: set[str] = set()
    unmatched = []
    for entry in entries or ():
        below = [path for path in modules if path == entry or path.endswith("." + entry)]
        leaves = [leaf for path in below for leaf in _leaves(modules, path)]
        if not leaves and entry not in _AUTOMATIC:
            unmatched.append(f"{entry!r}" + (" holds no parameters" if below else " is the name of no module"))
        added.update(leaves)
    if unmatched:
        raise NoMatchError(
            f"modules_to_save does not fit {type(root).__name__}:{collect(unmatched)}\n"
            "Pass module paths of the model, or the dotted end of some."
        )
    # PEFT's automatic names alone say nothing about a class that has no rule and none of these modules.
    settled = entries is not None and (bool(added) or not set(entries) or not set(entries) <= _AUTOMATIC)
    chosen = added | set(_class_head(root, modules, task, settled=settled))
    return [path for path in modules if path in chosen]


def _class_head(root: nn.Module, modules: dict[str, nn.Module], task: str | None, *, settled: bool) -> list[str]:
    if task is not None and task not in _TASKS_WITH_HEAD:
        return []
    if not isinstance(root, PreTrainedModel):
        return []
    backbone = stock_module(root.base_model)
    for name in _class_names(root):
        if name in _NAMED_HEADS:
            return [leaf for top in _NAMED_HEADS[name] for leaf in _leaves(modules, top)]
        if _NEW_HEAD.search(name):
            leaves = [] if backbone is root else _leaves_outside(modules, backbone)
            if leaves or (backbone is not root and not _holds_parameters(root)):
                return leaves
            break
        if _PRE_TRAINED_HEAD.search(name) or (_BACKBONE.search(name) and backbone is root):
            return []
    if settled:
        return []
    children = [path for path, module in modules.items() if "." not in path and _has_parameters(module)]
    raise UnknownHeadError(
        f"It is not known which modules of {type(root).__name__} are the new task head. Name them with "
        "modules_to_save=[...], or pass modules_to_save=[] if everything in it is pre-trained. "
        f"Its parts with parameters are: {', '.join(children)}."
    )


def _class_names(model: PreTrainedModel) -> Iterator[str]:
    """The name of the model's class and of those that it derives from, down to the architecture's own base class."""
    for cls in type(model).__mro__:
        if cls.__name__.endswith("PreTrainedModel"):
            return
        if issubclass(cls, PreTrainedModel):
            yield cls.__name__


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _holds_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _is_leaf(module: nn.Module) -> bool:
    """Whether `module` is called as one piece: either it has no parts, or its forward reads their weights itself."""
    if isinstance(module, nn.MultiheadAttention) or nn.utils.parametrize.is_parametrized(module):
        return True
    if type(module).__name__ == "TDNNLayer":  # of the x-vector heads
        return True
    return _holds_parameters(module) and not any(map(_has_parameters, module.children()))


def _leaves(modules: Mapping[str, nn.Module], top: str) -> list[str]:
    """Paths of the leaf modules that hold parameters, at or below `top`."""
    return _leaves_of({path: module for path, module in modules.items() if f"{path}.".startswith(f"{top}.")})


def _leaves_outside(modules: Mapping[str, nn.Module], backbone: nn.Module) -> list[str]:
    """Paths of the leaf modules that hold parameters and do not lie in `backbone`."""
    starts = tuple(f"{path}." for path, module in modules.items() if module is backbone)
    return _leaves_of({path: module for path, module in modules.items() if not f"{path}.".startswith(starts)})


def _leaves_of(modules: Mapping[str, nn.Module]) -> list[str]:
    leaves: list[str] = []
    for path, module in modules.items():  # a module's parts follow right after it
        if not (leaves and path.startswith(f"{leaves[-1]}.")) and _is_leaf(module):
            leaves.append(path)
    return leaves


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
