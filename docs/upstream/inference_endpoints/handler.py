"""A custom handler for Hugging Face Inference Endpoints: serves the delta in whose repository it lies, or several.

Put this file and `requirements.txt` into the repository of a delta. The endpoint then answers the requests of
transformers' pipelines, and takes a task's name beside the inputs:

    {"inputs": "I want my money back."}
    {"inputs": ["Where is my parcel?", "Not bad at all."], "task": "stance"}

The environment variable `BITFIT_TASKS` adds tasks on the same base, `stance=user/stance intent=user/intent`. The delta
of this repository is the task `default`.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoModel, AutoTokenizer

from bitfit_hf import BiasDelta, TaskBank

DEFAULT = "default"


class EndpointHandler:
    """
    What an endpoint calls.

    Args:
        path (`str`): The folder with the files of the repository.
    """

    def __init__(self, path: str = "") -> None:
        delta = BiasDelta.from_pretrained(path)
        base, revision = delta.config.base_model_name_or_path, delta.config.revision
        if not base:
            raise ValueError(f"{path}/adapter_config.json does not name its base: push the delta with `base_model=`.")
        model = AutoModel.from_pretrained(base, revision=revision)
        self.bank = TaskBank(model, AutoTokenizer.from_pretrained(base, revision=revision))
        self.bank.add_task(DEFAULT, delta)
        for entry in os.environ.get("BITFIT_TASKS", "").split():
            name, _, source = entry.partition("=")
            self.bank.add_task(name, source)

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """
        Answers a request.

        Args:
            data (`dict`): `inputs`, a text, a pair or a list of these; `task` (*optional*), one name for all of
                them or one for each.

        Returns:
            `list`: For each text what transformers' pipeline would give, labels sorted by score.
        """
        inputs = data["inputs"]
        texts = inputs if isinstance(inputs, list) else [inputs]
        texts = [tuple(text) if isinstance(text, list) else text for text in texts]
        return [_sorted(answer) for answer in self.bank.predict(texts, tasks=data.get("task", DEFAULT))]


def _sorted(answer: Any) -> Any:
    if not isinstance(answer, dict) or "scores" not in answer:
        return answer
    rows = [{"label": label, "score": score} for label, score in answer["scores"].items()]
    return sorted(rows, key=lambda row: -row["score"])
