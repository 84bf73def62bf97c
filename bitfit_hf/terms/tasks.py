"""Which task is which: model class, PEFT's name, the Hub's tag. One table for whoever has to know.

A task is known by how the names of transformers' classes end (`BertForSequenceClassification`), by PEFT's `TaskType`
(`SEQ_CLS`), and by the tag of its pipeline on the Hub (`text-classification`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import transformers
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Task:
    """
    A task by all its names.

    Args:
        endings (`tuple[str, ...]`): How the names of its model classes end.
        auto_class (`str`): transformers' class that loads a checkpoint for it.
        peft (`str`, *optional*): PEFT's name, where it has one.
        tag (`str`, *optional*): The Hub's `pipeline_tag`.
        words (`str`, *optional*): The task in words, for a sentence.
        pipeline (`bool`): Whether transformers has a pipeline for it.
        mapping (`str`, *optional*): transformers' table of the model classes by architecture.
        new_head (`bool`): Whether the classes have a head that the checkpoint does not have.
    """

    endings: tuple[str, ...]
    auto_class: str
    peft: str | None = None
    tag: str | None = None
    words: str | None = None
    pipeline: bool = False
    mapping: str | None = None
    new_head: bool = False

    def classes(self, config: transformers.PretrainedConfig) -> tuple[type[PreTrainedModel], ...]:
        """The model classes of an architecture for this task."""
        found = getattr(transformers, self.mapping).get(type(config), ()) if self.mapping else ()
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)


SEQUENCE_CLASSIFICATION = Task(
    ("ForSequenceClassification",),
    "AutoModelForSequenceClassification",
    peft="SEQ_CLS",
    tag="text-classification",
    words="text classification",
    pipeline=True,
    mapping="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    new_head=True,
)
TOKEN_CLASSIFICATION = Task(
    ("ForTokenClassification",),
    "AutoModelForTokenClassification",
    peft="TOKEN_CLS",
    tag="token-classification",
    words="token classification",
    pipeline=True,
    mapping="MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    new_head=True,
)
QUESTION_ANSWERING = Task(
    ("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
    "AutoModelForQuestionAnswering",
    peft="QUESTION_ANS",
    tag="question-answering",
    words="question answering",
    mapping="MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    new_head=True,
)
MULTIPLE_CHOICE = Task(
    ("ForMultipleChoice",),
    "AutoModelForMultipleChoice",
    words="multiple choice",
    mapping="MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
    new_head=True,
)
IMAGE_CLASSIFICATION = Task(
    ("ForImageClassification",),
    "AutoModelForImageClassification",
    tag="image-classification",
    words="image classification",
    pipeline=True,
    mapping="MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    new_head=True,
)
AUDIO_CLASSIFICATION = Task(
    ("ForAudioClassification",),
    "AutoModelForAudioClassification",
    tag="audio-classification",
    words="audio classification",
    pipeline=True,
    mapping="MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    new_head=True,
)
CAUSAL_LM = Task(
    ("ForCausalLM", "LMHeadModel"),
    "AutoModelForCausalLM",
    peft="CAUSAL_LM",
    tag="text-generation",
    words="text generation",
    pipeline=True,
    mapping="MODEL_FOR_CAUSAL_LM_MAPPING",
)
MASKED_LM = Task(
    ("ForMaskedLM",), "AutoModelForMaskedLM", tag="fill-mask", words="masked language modelling", pipeline=True
)
# Whisper's class ends like those of text models below, so it stands before them.
SPEECH_SEQ2SEQ = Task(
    ("WhisperForConditionalGeneration",),
    "AutoModelForSpeechSeq2Seq",
    tag="automatic-speech-recognition",
    words="speech recognition",
    pipeline=True,
)
CTC = Task(
    ("ForCTC",), "AutoModelForCTC", tag="automatic-speech-recognition", words="speech recognition", pipeline=True
)
SEQ2SEQ_LM = Task(
    ("ForSeq2SeqLM",),
    "AutoModelForSeq2SeqLM",
    peft="SEQ_2_SEQ_LM",
    words="text to text generation",
    mapping="MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
)
FEATURE_EXTRACTION = Task(
    ("ForFeatureExtraction",),
    "AutoModel",
    peft="FEATURE_EXTRACTION",
    tag="feature-extraction",
    words="feature extraction",
)

TASKS = (
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    QUESTION_ANSWERING,
    MULTIPLE_CHOICE,
    IMAGE_CLASSIFICATION,
    AUDIO_CLASSIFICATION,
    CAUSAL_LM,
    MASKED_LM,
    SPEECH_SEQ2SEQ,
    CTC,
    SEQ2SEQ_LM,
    FEATURE_EXTRACTION,
)
BY_PEFT_NAME = {task.peft: task for task in TASKS if task.peft is not None}

# Backbones for speech, whose classifier of recordings is called `…ForSequenceClassification` too.
_SPEECH = ("wav2vec2", "hubert", "wavlm", "unispeech", "sew", "data2vec_audio")


def task_of_class(name: str) -> Task | None:
    """The task of a model class, by its name."""
    return next((task for task in TASKS if name.endswith(task.endings)), None)


def task_named(peft_name: object, class_name: str = "", modules: Iterable[str] = ()) -> Task | None:
    """The task that a configuration speaks of.

    Args:
        peft_name (`str` or [`~peft.TaskType`], *optional*): PEFT's name of the task.
        class_name (`str`, *optional*): Name of the model class; read where PEFT has no name for the task.
        modules (`Iterable[str]`, *optional*): Paths of the model's modules, which tell sound from text.

    Returns:
        [`Task`] or `None`.
    """
    task = BY_PEFT_NAME.get(str(getattr(peft_name, "value", peft_name)))
    if task is SEQUENCE_CLASSIFICATION and any(path.startswith(_SPEECH) for path in modules):
        return AUDIO_CLASSIFICATION
    return task or task_of_class(class_name)


def task_type_without_head(peft_name: str | None) -> str | None:
    """PEFT's name of the task of a delta that has no head: `None` where the task's classes have a new one.

    The difference of two deltas is such a delta. PEFT's wrapper for the task would train and save the model's own
    head with it.
    """
    task = task_named(peft_name)
    return None if task is not None and task.new_head else peft_name


def peft_task_type(model: PreTrainedModel) -> str | None:
    """PEFT's name of the task that a model's class is for; `None` where PEFT has none that fits."""
    name = type(model).__name__
    accepted = set(inspect.signature(type(model).forward).parameters)
    # PEFT's wrappers for the task types hand these on to any model, also to one that knows nothing of them (Wav2Vec2,
    # CLIP, Tapas). Its plain wrapper hands on what it gets.
    if not {"input_ids", "inputs_embeds"} <= accepted:
        return None
    task = task_of_class(name)
    if task is QUESTION_ANSWERING and "start_positions" not in accepted:
        return None
    if task is not None and task.peft in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM"):
        return task.peft
    if name.endswith("ForConditionalGeneration") and getattr(model.config, "is_encoder_decoder", False):
        return SEQ2SEQ_LM.peft
    return FEATURE_EXTRACTION.peft if name.endswith("Model") else None


def library_class(cls: type) -> type:
    """The class of transformers that `cls` is or derives from; `cls` itself where it is none of transformers'.

    What transformers only gives classes to derive from, such as `BertPreTrainedModel`, has no forward and is no model.
    """
    own = (base for base in cls.__mro__ if base.__module__.partition(".")[0] == "transformers")
    found: type[PreTrainedModel] | None = next(own, None)
    return cls if found is None or found.forward is PreTrainedModel.forward else found


def class_record(model: PreTrainedModel) -> dict[str, str]:
    """The class that a model was trained in, as PEFT's `auto_mapping` in `adapter_config.json` names it."""
    cls = library_class(type(model))
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def other_task(trained_in: object, model: nn.Module) -> str | None:
    """Says that a model is for another task than the one that a delta was trained in; `None` where it is not.

    Args:
        trained_in (`str`): Name of the class that the delta was trained in.
        model (`nn.Module`): What it is to be used on.
    """
    here = type(model).__name__
    trained, task = task_of_class(str(trained_in)), task_of_class(here)
    if trained is None or task is None or trained is task:
        return None
    return (
        f"This delta was trained in a {trained_in} ({trained.words}), and this model is a {here} ({task.words}). Load "
        f"the base with {trained.auto_class}."
    )
