"""Which modules of a model are the new task head: what the task added and the checkpoint did not have."""

from __future__ import annotations

import re
from collections.abc import Sequence

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

# Classes where that does not say it, most of them because they are their own backbone (`base_model` is the model
# itself): the head's roots.
_OWN_BACKBONE: dict[str, tuple[str, ...]] = {
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
            f"Pass module paths of the model, or the dotted end of some."
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
    names = [cls.__name__ for cls in type(root).__mro__ if issubclass(cls, PreTrainedModel)]
    for name in names:
        if name in _OWN_BACKBONE:
            return [leaf for top in _OWN_BACKBONE[name] if top in modules for leaf in _leaves(modules, top)]
        if _NEW_HEAD.search(name):
            backbone = stock_module(root.base_model)
            if backbone is not root:
                return [leaf for leaf in _leaves(modules, "") if not _lies_in(leaf, modules, backbone)]
            break
        if _PRE_TRAINED_HEAD.search(name) or (_BACKBONE.search(name) and stock_module(root.base_model) is root):
            return []
    if settled:
        return []
    raise UnknownHeadError(
        f"It is not known which modules of {type(root).__name__} are the new task head"
        + (" (it holds its backbone itself)" if stock_module(root.base_model) is root else "")
        + ". Name them with modules_to_save=[...], or pass modules_to_save=[] if everything in it is pre-trained. "
        f"Its direct children with parameters are: "
        f"{', '.join(path for path, module in modules.items() if '.' not in path and _has_parameters(module))}."
    )


def _lies_in(path: str, modules: dict[str, nn.Module], ancestor: nn.Module) -> bool:
    parts = path.split(".")
    return any(modules[".".join(parts[:end])] is ancestor for end in range(1, len(parts) + 1))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_leaf(module: nn.Module) -> bool:
    """Whether `module` works as one piece: its forward uses its parameters (and its children's) by itself."""
    if isinstance(module, nn.MultiheadAttention) or nn.utils.parametrize.is_parametrized(module):
        return True
    holds = any(parameter is not None for parameter in module._parameters.values())
    return holds and not any(child is not None and _has_parameters(child) for child in module._modules.values())


def _leaves(modules: dict[str, nn.Module], top: str) -> list[str]:
    """Paths of the leaf modules that hold parameters, at or below `top`."""
    leaves: list[str] = []
    for path, module in modules.items():
        if top and path != top and not path.startswith(top + "."):
            continue
        if not any(path.startswith(leaf + ".") for leaf in leaves) and _is_leaf(module):
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
