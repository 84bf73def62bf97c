"""What requests and answers look like, with the field names of Text Embeddings Inference."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, WithJsonSchema

from .problems import ERROR_TYPES, invalid

Text: TypeAlias = str | tuple[str, str]  # a text or a pair, as the bank takes it

_TEXT = {"type": "string"}
_PAIR = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2}
_QUESTION = {
    "type": "object",
    "properties": {"question": _TEXT, "context": _TEXT},
    "required": ["question", "context"],
}
_ONE = {"oneOf": [_TEXT, _PAIR, _QUESTION]}
_INPUTS = {
    "description": "A text, a pair `[first, second]`, a question `{question, context}`; or a batch, a list of "
    "`[text]`, pairs and questions.",
    "oneOf": [_TEXT, _PAIR, _QUESTION, {"type": "array", "items": _ONE}],
    "examples": ["What is Deep Learning?"],
}

Inputs: TypeAlias = Annotated[Any, WithJsonSchema(_INPUTS)]
TaskName: TypeAlias = Annotated[StrictStr, Field(max_length=128)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")  # clients of Text Embeddings Inference may send fields of later releases

    inputs: Inputs
    truncate: StrictBool | None = Field(None, description="Cut what is too long, instead of an error.")
    truncation_direction: Literal["Right", "right"] = Field("Right", description="The end is what is cut.")


class PredictRequest(_Request):
    """Texts for a task."""

    task: TaskName | None = Field(None, description="The task; may be left out where there is one.")
    raw_scores: StrictBool = Field(False, description="Logits in place of probabilities.")


class EmbedRequest(_Request):
    """Texts for the base model."""

    task: TaskName | None = Field(None, description="A task without a head, in place of the base model.")
    normalize: StrictBool = Field(True, description="To length 1.")
    prompt_name: None = Field(None, description="There are no prompts.")


class Prediction(BaseModel):
    """A label and its score."""

    score: float
    label: str


class Entity(BaseModel):
    """A token and its label, as transformers' pipeline gives it."""

    entity: str
    score: float
    index: int
    word: str
    start: int
    end: int


class Answer(BaseModel):
    """A part of the context, as transformers' pipeline gives it."""

    answer: str
    score: float
    start: int
    end: int


PredictResponse: TypeAlias = list[Prediction] | list[list[Prediction]] | list[Entity] | list[list[Entity]] | Answer
EmbedResponse: TypeAlias = list[list[float]]


class AddTaskRequest(BaseModel):
    """Where a task comes from."""

    model_config = ConfigDict(extra="forbid")

    source: Annotated[StrictStr, Field(min_length=1, max_length=512)] = Field(description="A folder or a Hub repo.")
    revision: Annotated[StrictStr, Field(max_length=128)] | None = Field(None, description="Of the repo.")


class TaskSummary(BaseModel):
    """A task in the list."""

    name: str
    type: str
    labels: int | None = Field(description="How many it has.")


class TaskDescription(BaseModel):
    """What clients may know of a task. It holds nothing of where the task came from.

    Args:
        name (`str`): Its name.
        type (`str`): The Hub's tag: `text-classification`, `token-classification`, `question-answering` or
            `feature-extraction`.
        model_class (`str`): The class that it was trained in.
        id2label (`dict[str, str]`, *optional*): Its labels.
        problem_type (`str`, *optional*): As in transformers' configurations.
        metrics (`list`): The results on its card.
        parameters (`int`): Biases and head together.
        bytes (`int`): Of the delta's files.
    """

    name: str
    type: str
    model_class: str
    id2label: dict[str, str] | None
    problem_type: str | None
    metrics: list[dict[str, Any]]
    parameters: int
    bytes: int


class Info(BaseModel):
    """The server, with the fields of Text Embeddings Inference."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int | None
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    tasks: int


class ErrorResponse(BaseModel):
    """What is wrong."""

    error: str
    error_type: Literal[ERROR_TYPES]  # type: ignore[valid-type]


def read_inputs(value: Any, *, most: int, longest: int) -> tuple[list[Text], bool]:
    """The texts of a request, and whether they are a batch.

    Args:
        value: The field `inputs`.
        most (`int`): Texts in a batch.
        longest (`int`): Characters in a text.

    Raises:
        [`Problem`]: It is none of the forms that there are, or too much.
    """
    batch = isinstance(value, list) and not all(isinstance(item, str) for item in value)
    if value in ([], "", {}):
        raise invalid("`inputs` cannot be empty.")
    items = value if batch else [value]
    if len(items) > most:
        raise invalid(f"`inputs` holds {len(items)} texts, and {most} are allowed in one request.", 413)
    return [_text(item, longest) for item in items], batch


def read_strings(value: Any, *, most: int, longest: int) -> list[Text]:
    """The texts of a request for embeddings: here a list of strings is a batch.

    Args:
        value, most (`int`), longest (`int`): As above.

    Raises:
        [`Problem`]: As above.
    """
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = [[item] for item in value]
    texts, _ = read_inputs(value, most=most, longest=longest)
    if not all(isinstance(text, str) for text in texts):
        raise invalid("`inputs` is a text or a list of texts.")
    return texts


def _text(item: Any, longest: int) -> Text:
    if isinstance(item, dict) and item.keys() == {"question", "context"}:
        item = [item["question"], item["context"]]
    parts = [item] if isinstance(item, str) else item
    if not isinstance(parts, list) or not 1 <= len(parts) <= 2 or not all(isinstance(part, str) for part in parts):
        raise invalid(
            "`inputs` is a text, a pair [text, text], a question {question, context}, or a batch of these, "
            "[[text], [text, text], …]."
        )
    if not any(parts):
        raise invalid("A text of `inputs` is empty.")
    for part in parts:
        if len(part) > longest:
            raise invalid(f"A text has {len(part)} characters, and {longest} are allowed.", 413)
        try:
            part.encode()
        except UnicodeEncodeError:
            raise invalid("A text holds half of a surrogate pair, which is no character.") from None
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])
