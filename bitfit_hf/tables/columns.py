"""Which columns hold the texts and the labels: as the user says, or found by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import TableError
from .table import Table, listed

# What such columns are usually called, in the data sets of the Hub and elsewhere. The first that is there is taken.
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
    ("query", "passage"),
)
TEXTS = ("text", "sentence", "tokens", "words", "review", "content", "comment", "message", "tweet", "body", "title")
LABELS = (
    *("label", "labels", "target", "class", "category", "sentiment", "intent", "emotion"),
    *("score", "similarity_score", "rating", "stars", "tags", "ner_tags", "pos_tags", "upos"),
)


@dataclass(frozen=True)
class Columns:
    """
    The columns of a task.

    Args:
        text (`str`): Of the text, or of the words of a sentence.
        text2 (`str`, *optional*): Of the second text, where a task is about pairs.
        labels (`tuple[str, ...]`): Of the label. With several, each says whether its label applies.
    """

    text: str
    text2: str | None
    labels: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The one or two columns of text."""
        return (self.text,) if self.text2 is None else (self.text, self.text2)


def find_columns(
    table: Table, *, text: str | None = None, text2: str | None = None, labels: Sequence[str] = ()
) -> Columns:
    """Finds the columns that the user has not named.

    Args:
        table ([`Table`]): The table.
        text (`str`, *optional*), text2 (`str`, *optional*), labels (`Sequence[str]`, *optional*):
            What the user has named.

    Returns:
        [`Columns`].

    Raises:
        [`TableError`]: One that was named is not there, or one cannot be found.
    """
    named = [("--text", text), ("--text2", text2), *(("--label", label) for label in labels)]
    for option, column in named:
        if column is not None and column not in table.columns:
            near = next((other for other in table.columns if other.lower() == column.lower()), None)
            raise TableError(
                f'{table.name} has no column "{column}" ({option}), only {listed(table.columns)}.'
                + (f' Did you mean "{near}"?' if near else "")
            )
    if text2 is not None and text is None:
        raise TableError("--text2 names the second column of a pair; name the first with --text.")
    chosen = [column for _, column in named if column is not None]
    twice = next((column for column in chosen if chosen.count(column) > 1), None)
    if twice is not None:
        raise TableError(f'The column "{twice}" cannot be two things at once; see --text, --text2 and --label.')
    free = [column for column in table.columns if column not in chosen]
    if text is None:
        text, text2 = _find_text(table, free)
        free = [column for column in free if column not in (text, text2)]
    return Columns(text, text2, tuple(labels) or (_find_label(table, free),))


def _find_text(table: Table, free: list[str]) -> tuple[str, str | None]:
    by_name = {column.lower(): column for column in free}
    for one, other in PAIRS:
        if one in by_name and other in by_name:
            return by_name[one], by_name[other]
    found = next((by_name[name] for name in TEXTS if name in by_name), None)
    if found is None:
        raise TableError(
            f"Say which column of {table.name} holds the texts with --text: {listed(free)}. (For pairs there is "
            "--text2 too.)"
        )
    return found, None


def _find_label(table: Table, free: list[str]) -> str:
    by_name = {column.lower(): column for column in free}
    found = next((by_name[name] for name in LABELS if name in by_name), None)
    if found is None and len(free) == 1:
        return free[0]
    if found is None:
        others = listed(free) if free else "there is no other column"
        raise TableError(f"Say which column of {table.name} holds the labels with --label: {others}.")
    return found
