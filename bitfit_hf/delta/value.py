"""[`BiasDelta`]: what training has changed, as a value that can be read, written, applied and calculated with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import BitFitConfig, run_after_save
from ..errors import BaseModelMismatchError, DeltaMismatchError
from ..storage.bias_layout import decode_layout
from ..storage.fetch import fetch_delta
from ..storage.files import digest, read_pair, write_pair
from ..storage.fingerprint import OnMismatch
from ..storage.keys import bias_of_key, from_file, in_file, is_added, key_of_bias
from ..terms import SavedNames
from ..terms.tasks import other_task
from ..tuner.added_tokens import AddedTokens, placed_tokens
from ..tuner.lifecycle import about_to_save
from .applied_head import AppliedHead
from .applied_rows import AppliedRows
from .applying import AppliedDelta, apply_delta, remove_delta
from .arithmetic import check_same_base, combined, scaled
from .extract import extract_adapter, extract_difference
from .parts import DeltaParts, check_added, check_tensors, grouped

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class BiasDelta(Mapping[str, torch.Tensor]):
    r"""
    The difference `δ = b_F − b_0` of every tuned bias, and the head that was trained with it.

    A mapping from the stock names of the biases, `"bert.encoder.layer.0.attention.self.query.bias"`, to float32
    tensors on the CPU. Of a fused vector of which only some terms are tuned (GPT-2's `c_attn.bias` with
    `bias_terms="query"`) it holds the tuned slice.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): The deltas by stock name.
        config ([`BitFitConfig`]): What was selected, on which base, and the labels.
        head (`Mapping[str, torch.Tensor]`, *optional*): Parameters of the head by stock name.
        added (`Mapping[str, torch.Tensor]`, *optional*):
            Rows of the tokens that were added for the task, by the stock name of the layer and `.added_rows`, and
            their entries in an output layer's bias, `.added_bias`.

    Raises:
        [`DeltaFormatError`]: The tensors are not what the configuration says, not float32, or not finite.

    **Arithmetic.** `a + b`, `a - b` and `a * 0.5` calculate with the deltas; a bias that one side does not tune counts
    as zero there. Both sides must belong to the same base. A head is no difference to anything: scaling keeps it, a
    sum or difference keeps it where only one side has one or both have the same, and has none otherwise. Rows of added
    tokens are kept like a head; two deltas that have different ones cannot be added.

    Example:

    ```python
    >>> delta = BiasDelta.from_pretrained("user/bert-base-rte-bitfit")
    >>> delta.num_parameters()
    102912
    >>> half = 0.5 * delta
    >>> model = half.apply_(AutoModelForSequenceClassification.from_pretrained("bert-base-uncased"))
    ```
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        config: BitFitConfig,
        head: Mapping[str, torch.Tensor] | None = None,
        added: Mapping[str, torch.Tensor] | None = None,
        where: str = "this delta",
    ) -> None:
        self.config = config
        self.head = dict(head or {})
        if config.modules_to_save is not None:
            config.modules_to_save = SavedNames(config.modules_to_save).without_peft_names(self.head)
        self.added = dict(added or {})
        self.biases = grouped(decode_layout(config.bias_layout or {}))
        self._tensors = {name: tensors[name] for name in self.biases if name in tensors}
        self.extraction_error: float | None = None
        check_tensors(tensors, self.head, self.biases, config.modules_to_save or [], where)
        check_added(self.added, config.added_tokens or 0, where)

    # --- where deltas come from ---

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> BiasDelta:
        """Reads a delta from a folder or a Hub repo. Nothing is executed, and pickled weights are never read.

        Args:
            path_or_repo (`str` or `os.PathLike`): A folder, or a repo id such as `"user/bert-base-rte-bitfit"`.
            revision (`str`, *optional*): Branch, tag or commit of the delta's repo.
            subfolder (`str`, *optional*): Folder inside.
            token (`str` or `bool`, *optional*): For private and gated repos.
            cache_dir (`str` or `os.PathLike`, *optional*): Where downloads are kept.
            local_files_only (`bool`, *optional*, defaults to `False`): Uses what is in the cache.

        Returns:
            [`BiasDelta`].

        Raises:
            [`DeltaNotFoundError`]: There is no delta.
            [`DeltaFormatError`]: Its files are damaged, incomplete, or of two different saves.
            [`DeltaIOError`]: They cannot be read.
        """
        fetched = fetch_delta(
            path_or_repo,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls.from_folder(fetched.folder, where=str(path_or_repo))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, where: str | None = None) -> BiasDelta:
        """Reads a delta from a local folder; `where` names it in messages."""
        values, tensors = read_pair(folder)
        return cls.from_files(values, tensors, where=where or str(folder))

    @classmethod
    def from_files(cls, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, where: str) -> BiasDelta:
        """Makes a delta of the content of its two files.

        Args:
            values (`Mapping[str, Any]`): Of `adapter_config.json`.
            tensors (`Mapping[str, torch.Tensor]`): By their key in `adapter_model.safetensors`.
            where (`str`): Names the delta in messages.
        """
        config = BitFitConfig.from_values(values, where=where)
        config.check_layout_known(where=where)
        deltas, head, added = {}, {}, {}
        for name, tensor in tensors.items():
            key = from_file(name)
            bias = bias_of_key(key)
            if bias is not None:
                deltas[bias] = tensor
            elif config.added_tokens and is_added(key):
                added[key] = tensor
            else:
                head[key] = tensor
        return cls(deltas, config=config, head=head, added=added, where=where)

    @classmethod
    def from_model(cls, tuned: nn.Module, adapter_name: str = "default") -> BiasDelta:
        """Takes the delta out of a model with BitFit adapters, stock or wrapped; the model keeps it.

        Where the model is sharded (FSDP2, ZeRO-3) the delta is gathered: call this in every process, and save in one.

        Args:
            tuned (`nn.Module`): The model.
            adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter.

        Raises:
            [`AdapterNameError`]: The model has no such BitFit adapter.
        """
        return cls._of(extract_adapter(tuned, adapter_name), where=f"adapter {adapter_name!r}")

    @classmethod
    def from_models(cls, base: nn.Module, tuned: nn.Module) -> BiasDelta:
        """Extracts the delta from a checkpoint that some other BitFit code has tuned.

        `δ = b_F − b_0` is rounded to float32, so `b_0 + δ` gives `b_F` to half a unit in the last place for about one
        scalar in ten, and exactly for the rest; the largest error is kept in `extraction_error`.

        Args:
            base (`nn.Module`): The checkpoint before tuning, of the same class. Its head does not matter.
            tuned (`nn.Module`): The checkpoint after tuning.

        Raises:
            [`DeltaMismatchError`]: They differ in more than biases, head and added tokens; what differs is named.
        """
        found = extract_difference(base, tuned)
        result = cls._of(found, where="the tuned model")
        result.extraction_error = found.error
        return result

    @classmethod
    def _of(cls, parts: DeltaParts, *, where: str = "this delta") -> BiasDelta:
        return cls(parts.tensors, config=parts.config, head=parts.head, added=parts.added, where=where)

    # --- mapping ---

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    # Mapping compares contents, which tensors do not answer with a bool.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        labels = f", {self.config.num_labels} labels" if self.head and self.config.num_labels else ""
        tokens = f", {self.config.added_tokens} added tokens" if self.added else ""
        return (
            f"BiasDelta({self.num_parameters():,} biases in {len(self)} tensors, head of "
            f"{sum(tensor.numel() for tensor in self.head.values()):,}{labels}{tokens}, "
            f"base {self.config.base_model_name_or_path!r})"
        )

    def num_parameters(self, head: bool = False) -> int:
        """How many scalars the delta has; with `head=True` those of the head and of added tokens are counted too."""
        count = sum(tensor.numel() for tensor in self._tensors.values())
        return count + (sum(tensor.numel() for tensor in (*self.head.values(), *self.added.values())) if head else 0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Delta, head and rows of added tokens by their key in `adapter_model.safetensors`."""
        deltas = {in_file(key_of_bias(name)): tensor for name, tensor in self._tensors.items()}
        return deltas | {in_file(name): tensor for name, tensor in (self.head | self.added).items()}

    def place_tokens(self, model: nn.Module) -> AddedTokens | None:
        """Where the added tokens belong in a model on the delta's base; `None` where there are none.

        Raises:
            [`AddedTokensError`]: They do not fit it.
        """
        return placed_tokens(model, self.config)

    @property
    def digest(self) -> str:
        """SHA-256 over delta, head and rows of added tokens."""
        return digest(self.tensors())

    # --- files ---

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: bool = True) -> None:
        """Writes the delta's files; after a crash at any moment the folder holds the old delta or the new one.

        Args:
            folder (`str` or `os.PathLike`): Where to; made if it does not exist.
            card (`bool`, *optional*, defaults to `True`):
                Writes or renews the model card too; see [`~bitfit_hf.card.model_card.write_card`].

        Raises:
            [`DeltaIOError`]: A file cannot be written.
        """
        write_pair(folder, self.config_values(), self.tensors())
        if card:
            run_after_save(folder, self.config, self)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Pushes the delta and its card to the Hub, as [`bitfit_hf.push_to_hub`] does, with the same arguments.

        Args:
            repo_id (`str`): Where to.
            kwargs: `private`, `revision`, `token`, `stock`, `base_model`, ….

        Raises:
            [`PushError`]: It was refused or failed; nothing was overwritten.
        """
        return _push(self, repo_id, **kwargs)

    def config_values(self) -> dict[str, Any]:
        """Values of `adapter_config.json`."""
        about_to_save(self.config, self.tensors())
        values = self.config.to_dict()
        values["inference_mode"] = True  # as PEFT writes it: who loads it wants to use it
        return values

    # --- models ---

    def apply_(self, model: nn.Module, *, on_base_mismatch: OnMismatch = "raise") -> nn.Module:
        """Writes `b_0 + δ` and the head into a stock model, in place; no layers are injected.

        Several deltas may be applied to one model, one after the other; their sum counts, and the last head.

        Args:
            model (`nn.Module`): A stock model on the delta's base, of the class it was trained in.
            on_base_mismatch (`str`, *optional*, defaults to `"raise"`): `"raise"`, `"warn"` or `"ignore"`.

        Returns:
            `nn.Module`: The same model.

        Raises:
            [`BaseModelMismatchError`], [`DeltaMismatchError`], [`MergeError`], [`AddedTokensError`]: It does not fit.
            The model is as it was.
        """
        try:
            return apply_delta(
                model,
                self._to_apply(),
                fingerprint=self.config.base_fingerprint,
                on_base_mismatch=on_base_mismatch,
            )
        except (BaseModelMismatchError, DeltaMismatchError) as error:
            # Models of two tasks have different parts; without a word on the classes that looks like another base.
            trained_in = (self.config.auto_mapping or {}).get("base_model_class")
            advice = other_task(trained_in, model) if self.head else None
            if advice is None:
                raise
            raise type(error)(f"{advice}\n{error}") from error

    def remove_(self, model: nn.Module) -> nn.Module:
        """Takes the delta out of a model that [`~BiasDelta.apply_`] wrote it into. The base comes back bit for bit.

        Args:
            model (`nn.Module`): The model.

        Returns:
            `nn.Module`: The same model.

        Raises:
            [`DeltaMismatchError`]: The delta was not applied to this model.
        """
        return remove_delta(model, self.digest)

    def _to_apply(self) -> AppliedDelta:
        """What is written into a model, in tensors that stay as they are whatever becomes of this delta."""
        return AppliedDelta(
            digest=self.digest,
            name=self.config.base_model_name_or_path,
            biases=self.biases,
            deltas={name: tensor.clone() for name, tensor in self.items()},
            head=AppliedHead.of(self.config, self.head),
            added=AppliedRows.of(self.config, self.added),
        )

    # --- arithmetic ---

    def __mul__(self, factor: float) -> BiasDelta:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return self._of(scaled(self._parts, factor))

    __rmul__ = __mul__

    def __neg__(self) -> BiasDelta:
        return self * -1.0

    def __add__(self, other: BiasDelta) -> BiasDelta:
        return self._of(combined(self._parts, other._parts, 1.0)) if isinstance(other, BiasDelta) else NotImplemented

    def __sub__(self, other: BiasDelta) -> BiasDelta:
        return self._of(combined(self._parts, other._parts, -1.0)) if isinstance(other, BiasDelta) else NotImplemented

    @property
    def _parts(self) -> DeltaParts:
        return DeltaParts(self._tensors, self.config, self.head, self.added)

    def check_same_base(self, other: BiasDelta) -> None:
        """Raises [`BaseModelMismatchError`] where another delta was trained on another base, by their fingerprints."""
        check_same_base(self.config, other.config)


def push_with(push: Callable[..., CommitInfo]) -> Callable[..., CommitInfo]:
    """Has `BiasDelta.push_to_hub` call `push`, which stands above this room. Usable as a decorator."""
    global _push
    _push = push
    return push


_push: Callable[..., CommitInfo]  # set on import of `bitfit_hf`


def load_delta(
    model: nn.Module,
    path_or_repo: str | os.PathLike[str],
    *,
    on_base_mismatch: OnMismatch = "raise",
    **hub_kwargs: Any,
) -> nn.Module:
    """
    Writes a saved delta into a stock model in place: every bias becomes `b_0 + δ`, the head the trained one.

    The model stays a stock model, with no layers injected and nothing slower; its labels become the delta's.
    Everything is checked before the model is touched. `BiasDelta.from_pretrained(...).remove_(model)` gives the base
    back.

    Args:
        model (`nn.Module`): A stock model on the delta's base, of the class it was trained in.
        path_or_repo (`str` or `os.PathLike`): A folder or a Hub repo.
        on_base_mismatch (`str`, *optional*, defaults to `"raise"`): `"raise"`, `"warn"` or `"ignore"`.
        hub_kwargs: As for [`BiasDelta.from_pretrained`]: `revision`, `subfolder`, `token`, ….

    Returns:
        `nn.Module`: The same model.

    Raises:
        [`BaseModelMismatchError`]: The model is another checkpoint than the delta's base.
        [`BitFitError`]: The delta cannot be read or does not fit. The model is as it was.

    Example:

    ```python
    model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    load_delta(model, "user/bert-base-rte-bitfit")
    ```
    """
    return BiasDelta.from_pretrained(path_or_repo, **hub_kwargs).apply_(model, on_base_mismatch=on_base_mismatch)
