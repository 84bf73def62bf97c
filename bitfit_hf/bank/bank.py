"""[`TaskBank`]: many tasks on one base model, mixed freely in one batch."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..delta.value import BiasDelta
from ..errors import TaskBankError, UnknownTaskError
from ..storage.fingerprint import OnMismatch
from ..terms.survey import span_index
from ..tuner.head import Labels
from .base import Base
from .batch import Batch, BatchTask, running
from .engine import Engine
from .output import BankOutput
from .positions import Positions
from .predict import EncodedText, Prediction, TextTask, predict, run_together
from .requests import check_batch, check_texts
from .source import DeltaSource
from .store import BankTask, LoadedTask, TaskStore
from .task_models import TaskModel, TaskModels
from .texts import TextEncoder

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TaskBank:
    r"""
    Serves many BitFit tasks on one frozen base model. A batch may mix them freely, one task per example.

    All tasks share the base's weights. A task adds its deltas, one row in a table per bias, and its head. In a batch,
    each layer computes with `b_0 + δ` of each example's own task: one gather of `[batch, width]` per layer. Heads may
    differ in class, shape and number of labels. The backbone runs once.

    Threads may call one bank at the same time, and add and remove tasks meanwhile. A request computes with the tasks
    as they were when it began.

    Args:
        base_model (`PreTrainedModel`):
            A stock backbone (`AutoModel`) or task model: what the deltas were trained on. It is not changed, and its
            weights are shared, not copied. So nothing may be written into them while the bank is used (`load_delta`,
            training): requests then end in an error until it is taken back. To move or convert the model
            (`model.to(...)`) has no effect on a bank that exists.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): For [`~TaskBank.predict`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the deltas in memory. `torch.bfloat16` and `torch.float16` take half; heads stay float32.
        max_tasks (`int`, *optional*):
            At most so many tasks are kept in memory. The least recently used one makes room, and is read again from
            where it came from when it is asked for. Without it, all stay.
        example_inputs (`Mapping[str, torch.Tensor]`, *optional*):
            A batch as the model's forward takes it. A bank first runs its base on a few short made-up examples, to see
            what its layers make of a batch; for a model whose inputs cannot be made up, pass some.
        engine (`str`, *optional*, defaults to `"torch"`):
            What computes the backbone: `"torch"`, the base's own layers, for every architecture; or `"onnxruntime"`,
            a frozen graph on the CPU (extra `onnx`), for those that [`export_onnx`] knows. Heads run in torch.
        graph (`str` or `os.PathLike`, *optional*):
            For `"onnxruntime"`: the folder that [`export_onnx`] wrote. Without it the base is exported when the bank
            is made, which takes up to a minute.

    Raises:
        [`TaskBankError`]: The model cannot be served.
        [`OnnxExportError`], [`OnnxGraphError`]: It cannot be exported; the graph is damaged.
        [`BaseModelMismatchError`]: The graph is of another base.

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
        engine: str = "torch",
        graph: str | os.PathLike[str] | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise TaskBankError(f"`dtype` is one of {', '.join(map(str, _DTYPES))}, got {dtype!r}.")
        if max_tasks is not None and (isinstance(max_tasks, bool) or not isinstance(max_tasks, int) or max_tasks < 1):
            raise TaskBankError(f"`max_tasks` is a positive number of tasks, or None for no limit; got {max_tasks!r}.")
        self.tokenizer = tokenizer
        self._base = Base(
            base_model,
            dtype=dtype,
            limit=max_tasks,
            example_inputs=example_inputs,
            engine=_engine(engine, base_model, graph, dtype),
        )
        self._models = TaskModels(self._base)
        self._positions = Positions.of(self._base.model)
        self._store = TaskStore(self._base.sites, max_tasks, self._load)
        self._tokenizing = threading.Lock()

    # --- tasks ---

    def add_task(
        self,
        name: str,
        source: BiasDelta | str | os.PathLike[str],
        *,
        pin: bool = False,
        replace: bool = False,
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
            source ([`BiasDelta`], `str` or `os.PathLike`): A delta, or the folder or Hub repo of one. A delta may be
                edited afterwards; the task stays as it was added.
            pin (`bool`, *optional*, defaults to `False`): Never drops it from memory.
            replace (`bool`, *optional*, defaults to `False`):
                Takes the place of a task of that name in one step, once all is checked; requests that run with the
                other one end as they began.
            revision (`str`, *optional*), subfolder (`str`, *optional*), token (`str` or `bool`, *optional*),
            cache_dir (`str` or `os.PathLike`, *optional*), local_files_only (`bool`, *optional*):
                For a Hub repo. The commit found now is the one that is read again later.
            on_base_mismatch (`str`, *optional*): `"raise"`, `"warn"` or `"ignore"`; by default what
                [`base_mismatch`] says, which is to raise.

        Raises:
            [`BaseModelMismatchError`]: The delta was trained on another checkpoint than the bank's base.
            [`DeltaMismatchError`], [`TaskBankError`]: It does not fit the base, or the name is taken; or the weights
                of the base have been written into since the bank was made.
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
        origin = DeltaSource.of(source, options)
        with self._store.writing:
            self._base.watch.check_values()
            if name in self._store.tasks and not replace:
                raise TaskBankError(f"The bank has a task {name!r} already. Remove it first, or choose another name.")
            self._store.check_room()
            if self._store.limit is not None and not pin:
                origin.keep()
            delta = origin.read()
            if delta.config.added_tokens:
                raise TaskBankError(
                    f"The task {name!r} has {delta.config.added_tokens} added tokens. The tasks of a bank share one "
                    "table of token embeddings, so none can bring rows of its own. Serve this one by itself: "
                    "`AutoModelFor….from_pretrained(…)`, or `load_delta` onto a base of its own."
                )
            model = self._models.find(delta, self.tokenizer)
            model.check_base(delta, on_base_mismatch)
            task = BankTask(name, origin, model, _labels(delta), pinned=pin)
            self._store.bring_in(task, lambda: delta)
            if self._store.limit is None or pin:
                origin.release()

    def remove_task(self, name: str) -> None:
        """Removes a task. Requests that run with it end as they began.

        Raises:
            [`TaskBankError`]: There is no such task.
        """
        self._store.remove(name)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order in which they were added."""
        return list(self._store.tasks)

    @property
    def resident_tasks(self) -> list[str]:
        """Names of those that are in memory."""
        return [task.name for task in list(self._store.tasks.values()) if task.loaded is not None]

    def __contains__(self, name: object) -> bool:
        return name in self._store.tasks

    def __len__(self) -> int:
        return len(self._store.tasks)

    def __repr__(self) -> str:
        return f"TaskBank({len(self)} tasks on {type(self._base.model).__name__}, {self.memory()['tasks']:,} bytes)"

    def memory(self) -> dict[str, int]:
        """Bytes in use.

        Returns:
            `dict[str, int]`: `base`, the shared weights; `deltas` and `heads` of the tasks in memory; `tasks`, both
            together; `reserved`, what the tables of deltas take with the rows that are free.
        """
        deltas = sum(site.used_bytes for site in self._base.sites)
        loaded = [task.loaded for task in list(self._store.tasks.values())]
        heads = sum(one.head_bytes for one in loaded if one is not None)
        tensors = {id(t): t for t in (*self._base.model.parameters(), *self._base.model.buffers())}.values()
        return {
            "base": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "deltas": deltas,
            "heads": heads,
            "tasks": deltas + heads,
            "reserved": sum(site.reserved_bytes for site in self._base.sites),
        }

    def _load(self, model: TaskModel, delta: BiasDelta) -> LoadedTask:
        sites, head = model.sites_of(delta), model.head_of(delta)
        with self._store.new_rows(list(sites.values())) as rows:
            for name, site in sites.items():
                site.write(rows[site.number], delta[name], span_index(delta.biases[name]))
        return LoadedTask(model, rows, head)

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
            [`TaskBankError`]: A name is unknown, there are more or fewer names than examples, or none at all; the
                weights of the base have been written into.
        """
        return self._run(check_batch(tasks, encoded), encoded, {})

    def _run(
        self, names: Sequence[str | None], encoded: Mapping[str, torch.Tensor], meant: Mapping[str, BankTask]
    ) -> BankOutput:
        self._base.watch.check()
        with self._store.using(names, meant) as held:
            places: dict[str | None, list[int]] = defaultdict(list)
            for example, name in enumerate(names):
                places[name].append(example)
            batch_tasks = []
            runs: dict[tuple[TaskModel, str | None], list[BatchTask]] = defaultdict(list)
            for name, examples in places.items():
                if name is None:
                    model, task = self._models.of_base, BatchTask(examples, self._base.no_rows)
                else:
                    loaded = held[name]
                    model = loaded.model
                    task = BatchTask(examples, loaded.rows, loaded.head, loaded.rows_tensor)
                batch_tasks.append(task)
                runs[model, name if model.one_by_one else None].append(task)
            outputs: list[Any] = [None] * len(names)
            with running(Batch(batch_tasks, len(names))) as batch:
                batch.shared = {} if len(runs) > 1 else None
                for (model, _), answering in runs.items():
                    batch.answering = answering
                    output = model.model(**encoded)
                    assert isinstance(output, ModelOutput)
                    for task in answering:
                        for example in task.examples:
                            outputs[example] = output
        return BankOutput(outputs, names, self._base.answer_axes)

    def predict(
        self,
        texts: str | Sequence[str | tuple[str, str]],
        tasks: str | Sequence[str | None] | None,
        *,
        batch_size: int = 32,
        progress: bool = False,
    ) -> list[Prediction]:
        """Answers texts with labels and scores.

        Texts of like length are run together, so that little is padded; the answers come in the order of the texts.
        Padding stands where it changes no answer, whatever side the tokenizer names; a model that it changes on either
        side runs texts of one length at a time. Of a text that is longer than the model takes, the beginning is read.

        Args:
            texts (`str` or `Sequence[str]`): Texts, or a list of pairs `(first, second)`; for question answering
                `(question, context)`.
            tasks (`str` or `Sequence[str]`): One name per text, or one for all; `None` for the base model.
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
            [`TaskBankError`]: As for a call, or there is no tokenizer; a text has no tokens, a context is empty, a
                question leaves no room for its context; a task takes something else than texts.
        """
        checked, names = check_texts(texts, tasks, batch_size)
        encoder = self._encoder()
        known = {name: self._text_task(name, encoder) for name in dict.fromkeys(names)}
        encoded = [
            EncodedText(text, known[name], encoder.encode(number, text, question=known[name].question))
            for number, (text, name) in enumerate(zip(checked, names, strict=True))
        ]
        return predict(encoded, run=self.run, batch_size=batch_size, progress=progress)

    def encode(self, text: str | tuple[str, str], task: str | None, *, truncate: bool = True) -> EncodedText:
        """The first half of [`~TaskBank.predict`], for whoever makes batches of their own: the tokens of a text.

        Args:
            text (`str` or `tuple[str, str]`): A text, or a pair.
            task (`str`, *optional*): Its task; `None` for the base model.
            truncate (`bool`, *optional*, defaults to `True`): Cuts a text that is longer than the model takes.

        Returns:
            [`EncodedText`]: With its `length` in tokens, and `runs_with`, which says what it may run together with.

        Raises:
            [`UnknownTaskError`]: There is no such task.
            [`TextTooLongError`]: The text is longer than the model takes, and is not to be cut.
            [`TaskBankError`]: As for [`~TaskBank.predict`].
        """
        ((checked,), (name,)) = check_texts([text], [task], 1)
        encoder = self._encoder()
        known = self._text_task(name, encoder)
        return EncodedText(checked, known, encoder.encode(0, checked, question=known.question, truncate=truncate))

    @torch.no_grad()
    def run(self, texts: Sequence[EncodedText]) -> list[dict[str, Any]]:
        """The second half: one forward pass for texts that may run together.

        Each is answered by the task that it was encoded for and by no other that has its name by now.

        Args:
            texts (`Sequence[EncodedText]`): Texts of this bank with one `runs_with`.

        Returns:
            `list[dict[str, Any]]`: What each one's model returns, on the CPU and without padding;
            `text.prediction(values)` makes labels and scores of it.

        Raises:
            [`UnknownTaskError`]: A task has been removed or replaced since.
            [`TaskBankError`]: As for a call.
        """
        meant: dict[str, BankTask] = {}
        for text in texts:
            entry = text.task.entry
            if entry is not None and meant.setdefault(entry.name, entry) is not entry:
                raise UnknownTaskError(f"The task {entry.name!r} was replaced between two of these texts.")

        def run(*, tasks: Sequence[str | None], **encoded: torch.Tensor) -> BankOutput:
            return self._run(tasks, encoded, meant)

        return run_together(texts, encoder=self._encoder(), run=run)

    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self._positions, self.device, self._tokenizing)

    def _text_task(self, name: str | None, encoder: TextEncoder) -> TextTask:
        entry = None if name is None else self._store.find(name)
        model, labels = self._model_and_labels(entry)
        return TextTask.of(name, model, labels, entry, encoder=encoder, run=self)

    def describe(self, name: str | None) -> tuple[str, Labels | None]:
        """Name of the model class of a task, or of the base, and its labels, where it has some.

        Raises:
            [`TaskBankError`]: There is no such task.
        """
        model, labels = self._model_and_labels(None if name is None else self._store.find(name))
        return model.name, labels

    def _model_and_labels(self, task: BankTask | None) -> tuple[TaskModel, Labels | None]:
        if task is not None:
            return task.model, task.labels
        base = self._base.model
        return self._models.of_base, Labels.of(base) if getattr(base.config, "id2label", None) else None

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self._base.device

    @property
    def base_dtype(self) -> str:
        """The precision of the base's weights: `float32`, `bfloat16`, …"""
        return str(self._base.model.dtype).removeprefix("torch.")

    @property
    def base_revision(self) -> str | None:
        """The commit of the base's repo, where transformers has noted one."""
        return getattr(self._base.model.config, "_commit_hash", None)

    @property
    def max_length(self) -> int | None:
        """How many tokens the base takes, where its configuration says so."""
        return self._positions.most


def _engine(name: str, base: nn.Module, graph: str | os.PathLike[str] | None, dtype: torch.dtype) -> Engine | None:
    """What computes the backbone; `None` for its own layers."""
    if name == "torch":
        if graph is not None:
            raise TaskBankError('`graph` is for `engine="onnxruntime"`, and the engine is "torch".')
        return None
    if name != "onnxruntime":
        raise TaskBankError(f'`engine` is "torch" or "onnxruntime", got {name!r}.')
    if dtype is not torch.float32:
        raise TaskBankError(f'With `engine="onnxruntime"` the deltas in memory are torch.float32, got dtype={dtype}.')
    from .onnx.session import OnnxEngine  # its packages are an extra

    return OnnxEngine(base, graph)


def _labels(delta: BiasDelta) -> Labels | None:
    config = delta.config
    if config.num_labels is None:
        return None
    names = config.id2label or {index: f"LABEL_{index}" for index in range(config.num_labels)}
    return Labels(config.num_labels, dict(names), config.problem_type)
