"""[`TaskBank`]: many tasks on one base model, mixed freely in one batch."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..delta import BiasDelta
from ..errors import DeltaMismatchError, TaskBankError, collect
from ..fingerprint import OnMismatch
from ..tuner.head import Labels
from ..tuner.layer import span_index
from .base import Base
from .batch import Batch, Member, running
from .kinds import Kind, base_kind, find_kind
from .output import BankOutput
from .predict import Prediction, predict
from .residents import Resident, Residents, Source, Task
from .sites import Site

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TaskBank:
    r"""
    Serves many BitFit tasks on one frozen base model. A batch may mix them freely, one task per example.

    All tasks share the base's weights. A task adds its deltas, one row in a table per bias, and its head. In a batch,
    each layer computes with `b_0 + δ` of each example's own task: one gather of `[batch, width]` per layer. Heads may
    differ in kind, shape and number of labels. The backbone runs once.

    Threads may call one bank at the same time, and add and remove tasks meanwhile. A request computes with the tasks
    as they were when it began.

    Args:
        base_model (`PreTrainedModel`):
            A stock backbone (`AutoModel`) or task model: what the deltas were trained on. It is not changed, and its
            weights are shared, not copied.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): For [`~TaskBank.predict`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the deltas in memory. `torch.bfloat16` and `torch.float16` take half; heads stay float32.
        max_tasks (`int`, *optional*):
            At most so many tasks are kept in memory. The least recently used one makes room, and is read again from
            where it came from when it is asked for. Without it, all stay.
        example_inputs (`Mapping[str, torch.Tensor]`, *optional*):
            A batch as the model's forward takes it. A bank first runs its base on a few short made-up examples, to see
            what its layers make of a batch; for a model whose inputs cannot be made up, pass some.

    Raises:
        [`TaskBankError`]: The model cannot be served.

    Example:

    ```python
    >>> base = "bert-base-uncased"
    >>> bank = TaskBank(AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    >>> bank.add_task("rte", "user/bert-base-rte-bitfit")
    >>> bank.add_task("cola", "./cola")
    >>> bank.predict([("It rains.", "It is wet."), "They the book read."], tasks=["rte", "cola"])
    [{'label': 'entailment', 'score': 0.93, ...}, {'label': 'unacceptable', 'score': 0.88, ...}]
    ```
    """

    def __init__(
        self,
        base_model: nn.Module,
        tokenizer: Any = None,
        *,
        dtype: torch.dtype = torch.float32,
        max_tasks: int | None = None,
        example_inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise TaskBankError(f"`dtype` is one of {', '.join(map(str, _DTYPES))}, got {dtype!r}.")
        if max_tasks is not None and (isinstance(max_tasks, bool) or not isinstance(max_tasks, int) or max_tasks < 1):
            raise TaskBankError(f"`max_tasks` is a positive number of tasks, or None for no limit; got {max_tasks!r}.")
        self.tokenizer = tokenizer
        self._base = Base(base_model, dtype=dtype, limit=max_tasks, example_inputs=example_inputs)
        self._kinds: dict[Any, Kind] = {}
        self._base_kind = self._kinds.setdefault(None, base_kind(self._base))
        self._residents = Residents(self._base.sites, max_tasks, self._load)

    # --- tasks ---

    def add_task(
        self,
        name: str,
        source: BiasDelta | str | os.PathLike[str],
        *,
        pin: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        on_base_mismatch: OnMismatch | None = None,
    ) -> None:
        """Adds a task. Everything is checked before the bank changes; what runs meanwhile is not disturbed.

        Args:
            name (`str`): What requests will call it.
            source ([`BiasDelta`], `str` or `os.PathLike`): A delta, or the folder or Hub repo of one.
            pin (`bool`, *optional*, defaults to `False`): Never drops it from memory.
            revision (`str`, *optional*), subfolder (`str`, *optional*), token (`str` or `bool`, *optional*),
            cache_dir (`str` or `os.PathLike`, *optional*), local_files_only (`bool`, *optional*):
                For a Hub repo. The commit found now is the one that is read again later.
            on_base_mismatch (`str`, *optional*): `"raise"`, `"warn"` or `"ignore"`; by default what
                [`base_mismatch`] says, which is to raise.

        Raises:
            [`BaseModelMismatchError`]: The delta was trained on another checkpoint than the bank's base.
            [`DeltaMismatchError`], [`TaskBankError`]: It does not fit the base, or the name is taken.
            [`BitFitError`]: It cannot be read.
        """
        if not isinstance(name, str) or not name:
            raise TaskBankError(f"A task's name is a string that is not empty, got {name!r}.")
        options: dict[str, Any] = {
            "revision": revision,
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        origin = Source.of(source, options)
        with self._residents.writing:
            if name in self._residents.tasks:
                raise TaskBankError(f"The bank has a task {name!r} already. Remove it first, or choose another name.")
            self._residents.check_room()
            delta = origin.read()
            kind = find_kind(self._base, delta, self._kinds, self.tokenizer)
            kind.check_base(delta, on_base_mismatch)
            task = Task(name, origin, kind, _labels(delta), pinned=pin, delta=delta)
            try:
                self._residents.bring_in(task)
            finally:
                task.delta = None
            self._residents.enter(task)

    def remove_task(self, name: str) -> None:
        """Removes a task. Requests that run with it end as they began.

        Raises:
            [`TaskBankError`]: There is no such task.
        """
        self._residents.remove(name)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order in which they were added."""
        return list(self._residents.tasks)

    @property
    def resident_tasks(self) -> list[str]:
        """Names of those that are in memory."""
        return [task.name for task in list(self._residents.tasks.values()) if task.resident is not None]

    def __contains__(self, name: object) -> bool:
        return name in self._residents.tasks

    def __len__(self) -> int:
        return len(self._residents.tasks)

    def __repr__(self) -> str:
        return f"TaskBank({len(self)} tasks on {type(self._base.model).__name__}, {self.memory()['tasks']:,} bytes)"

    def memory(self) -> dict[str, int]:
        """Bytes in use.

        Returns:
            `dict[str, int]`: `base`, the shared weights; `deltas` and `heads` of the tasks in memory; `tasks`, both
            together; `reserved`, what the tables of deltas take with the rows that are free.
        """
        deltas = sum(site.used_bytes for site in self._base.sites)
        residents = [task.resident for task in list(self._residents.tasks.values())]
        heads = sum(resident.head_bytes for resident in residents if resident is not None)
        tensors = {id(t): t for t in (*self._base.model.parameters(), *self._base.model.buffers())}.values()
        return {
            "base": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "deltas": deltas,
            "heads": heads,
            "tasks": deltas + heads,
            "reserved": sum(site.reserved_bytes for site in self._base.sites),
        }

    # --- loading ---

    def _load(self, task: Task) -> Resident:
        delta = task.delta or task.source.read()
        sites = self._fit(task.kind, delta)
        heads = task.kind.heads(delta)
        rows = self._residents.take_rows(list(sites.values()))
        try:
            for name, site in sites.items():
                site.write(rows[site.number], delta[name], span_index(delta.biases[name]))
        except BaseException:
            self._residents.give_rows_back(rows)
            raise
        return Resident(rows, heads)

    def _fit(self, kind: Kind, delta: BiasDelta) -> dict[str, Site]:
        """The site of each of the delta's biases."""
        sites, problems = {}, []
        for name, (bias, *_) in delta.biases.items():
            site = self._base.site_of(kind.modules.get(bias.module), bias.parameter)
            if site is None:
                problems.append(f"{name} has no place in the bank's {type(self._base.model).__name__}")
            elif site.shape != bias.shape:
                problems.append(f"{name} has shape {list(bias.shape)}, the base's {list(site.shape)}")
            elif site.exists != bias.exists:
                problems.append(f"{name} {'was added to a base without it' if site.exists else 'is not in the base'}")
            elif site.number in self._base.unsupported:
                problems.append(f"{name} is used where the examples of a batch cannot be told apart")
            else:
                sites[name] = site
        if problems:
            raise DeltaMismatchError(
                f"The delta, trained on {delta.config.base_model_name_or_path!r}, does not fit the bank's base:"
                f"{collect(problems)}"
            )
        return sites

    # --- requests ---

    @torch.no_grad()
    def __call__(self, *, tasks: Sequence[str | None], **encoded: torch.Tensor) -> BankOutput:
        """Runs a batch in which example `i` is of task `tasks[i]`.

        Args:
            tasks (`Sequence[str]`): One name per example; `None` for the base model's own output.
            encoded (`torch.Tensor`): The batch, as the base's forward takes it.

        Returns:
            [`BankOutput`]: One answer per example.

        Raises:
            [`TaskBankError`]: A name is unknown, there are more or fewer names than examples, or none at all.
        """
        names = _check_batch(tasks, encoded)
        with self._residents.using(names) as held:
            places: dict[str | None, list[int]] = defaultdict(list)
            for example, name in enumerate(names):
                places[name].append(example)
            kinds: dict[tuple[int, str | None], tuple[Kind, list[Member]]] = {}
            members = []
            for name, examples in places.items():
                kind = self._base_kind if name is None else held[name][0].kind
                resident = None if name is None else held[name][1]
                member = Member(examples, self._base.no_rows if resident is None else resident.rows, resident)
                members.append(member)
                kinds.setdefault((id(kind), name if kind.one_by_one else None), (kind, []))[1].append(member)
            outputs: list[Any] = [None] * len(names)
            with running(Batch(members, len(names))) as batch:
                if len(kinds) > 1:
                    batch.results = {}
                for kind, answering in kinds.values():
                    batch.answering = answering
                    output = kind.shell(**encoded)
                    assert isinstance(output, ModelOutput)
                    for member in answering:
                        for example in member.examples:
                            outputs[example] = output
        return BankOutput(outputs, names, self._base.mixing)

    def predict(
        self,
        texts: Sequence[str | tuple[str, str]],
        tasks: Sequence[str | None],
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> list[Prediction]:
        """Answers texts with labels and scores.

        Texts of like length are run together, so that little is padded; the answers come in the order of the texts.

        Args:
            texts (`Sequence[str]`): Texts, or pairs `(first, second)`; for question answering `(question, context)`.
            tasks (`Sequence[str]`): One name per text; `None` for the base model.
            batch_size (`int`, *optional*, defaults to 32): Texts in a forward pass.
            progress (`bool`, *optional*, defaults to `False`): Shows a progress bar.

        Returns:
            `list`: One entry per text, in the form of transformers' pipelines:

            - sequence classification: `{"label", "score", "scores"}` with the most likely label, its probability, and
              those of all labels; where several labels may hold, each has a probability of its own; a regression has
              its value for score;
            - token classification: a list of `{"entity", "score", "index", "word", "start", "end"}`, one per token;
            - question answering: `{"answer", "score", "start", "end"}`;
            - no new head: a dict of the model's output tensors, such as `last_hidden_state`, without padding.

        Raises:
            [`TaskBankError`]: As for a call, or there is no tokenizer.
        """
        return predict(self, texts, tasks, batch_size=batch_size, progress=progress)

    def describe(self, name: str | None) -> tuple[str, Labels | None]:
        """Name of the model class of a task, or of the base, and its labels, where it has some.

        Raises:
            [`TaskBankError`]: There is no such task.
        """
        if name is not None:
            task = self._residents.find(name)
            return task.kind.name, task.labels
        model = self._base.model
        return type(model).__name__, Labels.of(model) if getattr(model.config, "id2label", None) else None

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self._base.device

    @property
    def max_length(self) -> int | None:
        """How many tokens the base takes, where its configuration says so."""
        return getattr(self._base.model.config.get_text_config(), "max_position_embeddings", None)


def _labels(delta: BiasDelta) -> Labels | None:
    config = delta.config
    if config.num_labels is None:
        return None
    names = config.id2label or {index: f"LABEL_{index}" for index in range(config.num_labels)}
    return Labels(config.num_labels, dict(names), config.problem_type)


def _check_batch(tasks: Sequence[str | None], encoded: Mapping[str, Any]) -> list[str | None]:
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise TaskBankError(f"`tasks` is a list with one name per example, got {tasks!r:.80}.")
    wrong = [name for name in tasks if name is not None and not isinstance(name, str)]
    if wrong:
        raise TaskBankError(f"`tasks` holds names and None, got {wrong[0]!r:.80} ({type(wrong[0]).__name__}).")
    if "labels" in encoded:
        raise TaskBankError("A bank computes no loss: leave `labels` out.")
    sizes = {name: len(value) for name, value in encoded.items() if isinstance(value, torch.Tensor) and value.dim()}
    if not sizes:
        raise TaskBankError("There is no batch: pass the tokenizer's output, `bank(**encoded, tasks=[...])`.")
    if not all(sizes.values()) or not tasks:
        raise TaskBankError("The batch is empty: pass at least one example and its task.")
    if set(sizes.values()) != {len(tasks)}:
        counts = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise TaskBankError(
            f"There are {len(tasks)} task names for a batch of another size ({counts}); give one each."
        )
    return list(tasks)
