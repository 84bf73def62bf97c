"""What the Hub and transformers call the task of a delta."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import BitFitConfig


@dataclass(frozen=True)
class Task:
    """What the Hub and transformers call a task: its tag, its words and the class that loads it."""

    auto_class: str
    tag: str | None = None
    words: str | None = None
    pipeline: bool = False


# By how the names of transformers' classes end.
_TASKS = {
    "ForSequenceClassification": Task(
        "AutoModelForSequenceClassification", "text-classification", "text classification", True
    ),
    "ForTokenClassification": Task(
        "AutoModelForTokenClassification", "token-classification", "token classification", True
    ),
    "ForQuestionAnswering": Task("AutoModelForQuestionAnswering", "question-answering", "question answering"),
    "ForCausalLM": Task("AutoModelForCausalLM", "text-generation", "text generation", True),
    "LMHeadModel": Task("AutoModelForCausalLM", "text-generation", "text generation", True),
    "ForMaskedLM": Task("AutoModelForMaskedLM", "fill-mask", "masked language modelling", True),
    "ForMultipleChoice": Task("AutoModelForMultipleChoice", None, "multiple choice"),
    "ForSeq2SeqLM": Task("AutoModelForSeq2SeqLM", None, "text to text generation"),
    "ForImageClassification": Task(
        "AutoModelForImageClassification", "image-classification", "image classification", True
    ),
    "ForAudioClassification": Task(
        "AutoModelForAudioClassification", "audio-classification", "audio classification", True
    ),
    "WhisperForConditionalGeneration": Task(
        "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition", "speech recognition", True
    ),
    "ForCTC": Task("AutoModelForCTC", "automatic-speech-recognition", "speech recognition", True),
    "ForFeatureExtraction": Task("AutoModel", "feature-extraction", "feature extraction"),
}
_BY_TASK_TYPE = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}
# Backbones for speech, whose classifier of recordings is called `…ForSequenceClassification` too.
_SPEECH = ("wav2vec2", "hubert", "wavlm", "unispeech", "sew", "data2vec_audio")


def task_of(config: BitFitConfig) -> Task | None:
    """Reads the task off a configuration.

    Args:
        config ([`BitFitConfig`]): Of a delta.

    Returns:
        [`Task`], or `None` where the model is none of transformers'.
    """
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    name, library = (str(mapping.get(key, "")) for key in ("base_model_class", "parent_library"))
    ending = _BY_TASK_TYPE.get(str(getattr(config.task_type, "value", config.task_type)))
    modules = [key.partition(".")[0] for key in config.bias_layout or {}]
    if ending == "ForSequenceClassification" and any(module.startswith(_SPEECH) for module in modules):
        ending = "ForAudioClassification"
    if ending is None:
        ending = next((known for known in _TASKS if name.endswith(known)), None)
    if ending is not None:
        return _TASKS[ending]
    known_class = name.isidentifier() and library.partition(".")[0] == "transformers"
    return Task(name) if known_class else None
