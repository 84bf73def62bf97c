"""[`BiasDelta`]: what training has changed, as a value that can be read, written, applied and calculated with."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backends.sharded import gathered, put_back
from ..config import BitFitConfig, run_after_save
from ..errors import (
    AdapterNameError,
    BaseModelMismatchError,
    DeltaFormatError,
    DeltaMismatchError,
    collect,
)
from ..storage.base_commit import base_commit
from ..storage.bias_layout import decode_layout, encode_layout
from ..storage.fetch import fetch_delta
from ..storage.files import check_values, digest, read_pair, write_pair
from ..storage.fingerprint import OnMismatch, check_base, differing, fingerprint
from ..storage.keys import bias_of_key, from_file, in_file, is_added, key_of_bias
from ..terms import Bias, SavedNames, find_biases, head_modules, part_of, part_tensors
from ..terms.base_bias import add_deltas, base_bias
from ..terms.structure import stock_root, walk
from ..terms.token_tensors import check_rows, vocabulary_size
from ..tuner.added_tokens import AddedTokens, fit_added_tokens, placed_tokens
from ..tuner.head import Labels
from ..tuner.layer import span_index
from ..tuner.plan import num_base_parameters
from ..tuner.state import delta_parameters, head_tensors, is_bitfit, read_labels
from ..tuner.token_rows import added_shapes, parameter_of
from .applied_rows import AppliedRows
from .applying import AppliedDelta, ledger_of

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
        self.biases = _group(decode_layout(config.bias_layout or {}))
        self._tensors = {name: tensors[name] for name in self.biases if name in tensors}
        self.extraction_error: float | None = None
        _check_tensors(tensors, self.head, self.biases, config.modules_to_save or [], where)
        _check_added(self.added, config.added_tokens or 0, where)

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
        folder = fetch_delta(
            path_or_repo,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls.from_folder(folder, where=str(path_or_repo))

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
        configs = getattr(stock_root(tuned), "peft_config", None) or getattr(tuned, "peft_config", {})
        config = configs.get(adapter_name) if isinstance(configs, Mapping) else None
        if not isinstance(config, BitFitConfig) or not is_bitfit(tuned):
            known = [name for name, other in configs.items() if isinstance(other, BitFitConfig)]
            raise AdapterNameError(
                f"{type(tuned).__name__} has no BitFit adapter {adapter_name!r} (it has {known}). For two plain "
                "checkpoints use `BiasDelta.from_models(base, tuned)`."
            )
        check_rows(tuned)
        put_back(tuned)
        read_labels(tuned, adapter_name, config)
        deltas = {}
        for key, parameter in delta_parameters(tuned, adapter_name).items():
            bias = bias_of_key(key)
            assert bias is not None
            deltas[bias] = _copy(gathered(parameter))
        head = {name: _copy(gathered(tensor)) for name, tensor in head_tensors(tuned, adapter_name).items()}
        added = {name: head.pop(name) for name in list(head) if config.added_tokens and is_added(name)}
        return cls(deltas, config=copy.deepcopy(config), head=head, added=added, where=f"adapter {adapter_name!r}")

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
        base, tuned = stock_root(base), stock_root(tuned)
        layers, tuned_layers = dict(walk(base)), dict(walk(tuned))
        head_names = head_modules(tuned)
        biases = [bias for bias in find_biases(tuned) if bias.exists]
        before: dict[str, torch.Tensor] = dict(base.named_parameters(remove_duplicate=False))
        after: dict[str, torch.Tensor] = dict(tuned.named_parameters(remove_duplicate=False))
        tuned_ones = {id(after[bias.name]) for bias in biases}
        names = {name for name, tensor in after.items() if id(tensor) in tuned_ones}  # tied ones have several
        added: dict[str, torch.Tensor] = {}
        tokens = _tokens_between(base, tuned)
        if tokens is not None:
            biases = tokens.in_base(biases)
            added = {
                name: _copy(parameter_of(tuned_layers, name)[tokens.start : tokens.stop]).to(torch.float32)
                for name in added_shapes(tuned_layers, tokens)
            }
            after |= {name: after[name][:rows] for name, rows in tokens.base_rows.items() if name in after}
        _check_only_biases_differ(before, after, names, head_names)

        own = {bias.name for bias in find_biases(base)}
        biases = [b if b.name in own else replace(b, exists=False) for b in biases]
        deltas, errors = {}, [0.0]
        for name, group in _group(biases).items():
            b_f = after[name].detach().cpu()
            b_0 = base_bias(layers[group[0].module], group[0].parameter) if name in before else None
            b_0 = torch.zeros_like(b_f) if b_0 is None else b_0.detach().cpu()
            delta = (b_f.double() - b_0.double()).to(torch.float32)
            back = add_deltas(b_0, [(delta, None)], dtype=b_f.dtype)
            errors.append((back.double() - b_f.double()).abs().max().item())
            index = span_index(group)
            deltas[name] = delta.clone() if index is None else delta.flatten()[index]
        prints = fingerprint(base, biases)
        labels = Labels.of(tuned) if head_names and isinstance(tuned, PreTrainedModel) else None
        config = BitFitConfig(
            num_labels=labels.num_labels if labels else None,
            id2label=labels.id2label if labels else None,
            problem_type=labels.problem_type if labels else None,
            modules_to_save=head_names or None,
            add_missing_biases=any(not bias.exists for bias in biases),
            base_model_name_or_path=getattr(base, "name_or_path", None) or None,
            revision=base_commit(getattr(base, "name_or_path", None), prints),
            base_fingerprint=prints,
            base_num_parameters=num_base_parameters(base, head_modules(base)) or None,
            bias_layout=encode_layout(biases),
            added_tokens=None if tokens is None else tokens.count,
            base_vocab_size=None if tokens is None else tokens.start,
        )
        head = {
            name: _copy(tensor).to(torch.float32) if tensor.is_floating_point() else _copy(tensor)
            for name, tensor in part_tensors(tuned, head_names).items()
        }
        result = cls(deltas, config=config, head=head, added=added, where="the tuned model")
        result.extraction_error = max(errors)
        return result

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
        self.config.about_to_save(self.tensors())
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
        if is_bitfit(model):
            raise DeltaMismatchError(
                "The model has BitFit adapters injected, so writing into its biases would change what they belong to. "
                "Load the delta as another adapter (`model.load_adapter`), or apply it to a stock model."
            )
        ledger, delta = ledger_of(model), self._to_apply()
        layers = ledger.layers()
        gone = ledger.is_gone(layers)
        tokens = ledger.place_tokens(delta, gone=gone)
        check_base(
            model,
            self.config.base_fingerprint,
            delta_base=self.config.base_model_name_or_path,
            on_mismatch=on_base_mismatch,
            base_rows=None if tokens is None else tokens.base_rows,
        )
        delta = ledger.fit(delta, tokens, layers)
        if gone:
            ledger.start_anew(layers)
        ledger.add(delta, layers)
        return model

    def remove_(self, model: nn.Module) -> nn.Module:
        """Takes the delta out of a model that [`~BiasDelta.apply_`] wrote it into. The base comes back bit for bit.

        Args:
            model (`nn.Module`): The model.

        Returns:
            `nn.Module`: The same model.

        Raises:
            [`DeltaMismatchError`]: The delta was not applied to this model.
        """
        ledger, mine = ledger_of(model), self.digest
        found = next((delta for delta in reversed(ledger.applied) if delta.digest == mine), None)
        if found is None:
            raise DeltaMismatchError(
                "This delta was not applied to this model with `apply_` or `load_delta`, so its base is not known. "
                "Load the base again."
            )
        layers = ledger.layers()
        if ledger.is_gone(layers):
            raise DeltaMismatchError(
                "This delta was applied to this model, but is not there any more: all of its biases were loaded or "
                "changed since then, so there is nothing to take out. Load the base again if these biases are not it."
            )
        ledger.remove(found, layers)
        return model

    def _to_apply(self) -> AppliedDelta:
        """What is written into a model, in tensors that stay as they are whatever becomes of this delta."""
        config, leaves = self.config, self.config.modules_to_save or []
        head: dict[str, dict[str, torch.Tensor]] = {path: {} for path in leaves}
        for name, tensor in self.head.items():
            path = part_of(name, leaves)
            assert path is not None  # checked when the delta was made
            head[path][name[len(path) + 1 :]] = tensor.clone()
        labels = None
        if head and config.num_labels is not None:
            labels = Labels(config.num_labels, dict(config.id2label or {}), config.problem_type)
        return AppliedDelta(
            digest=self.digest,
            name=config.base_model_name_or_path,
            biases=self.biases,
            deltas={name: tensor.clone() for name, tensor in self.items()},
            head=head,
            labels=labels,
            added=AppliedRows.of(config, self.added),
        )

    # --- arithmetic ---

    def __mul__(self, factor: float) -> BiasDelta:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return self._like({name: tensor * factor for name, tensor in self.items()}, self)

    __rmul__ = __mul__

    def __neg__(self) -> BiasDelta:
        return self * -1.0

    def __add__(self, other: BiasDelta) -> BiasDelta:
        return self._combine(other, 1.0)

    def __sub__(self, other: BiasDelta) -> BiasDelta:
        return self._combine(other, -1.0)

    def _combine(self, other: BiasDelta, sign: float) -> BiasDelta:
        if not isinstance(other, BiasDelta):
            return NotImplemented
        self.check_same_base(other)
        problems = [
            f"{name}: other terms of the fused vector are tuned"
            for name in self
            if name in other and [b.spans for b in self.biases[name]] != [b.spans for b in other.biases[name]]
        ]
        if problems:
            raise DeltaMismatchError(f"These deltas do not tune the same slices:{collect(problems)}")
        tensors = {name: tensor + sign * other[name] if name in other else tensor for name, tensor in self.items()}
        tensors |= {name: sign * tensor for name, tensor in other.items() if name not in self}
        same = self.head.keys() == other.head.keys() and all(
            torch.equal(tensor, other.head[name]) for name, tensor in self.head.items()
        )
        keeper = self if same or not other.head else other if not self.head else None
        if self.added and other.added and digest(self.added) != digest(other.added):
            raise DeltaMismatchError(
                f"These deltas have added tokens of their own ({self.config.added_tokens} and "
                f"{other.config.added_tokens}), and a token has one embedding: they cannot be added."
            )
        return self._like(tensors, keeper, also=other)

    def _like(
        self, tensors: Mapping[str, torch.Tensor], head_of: BiasDelta | None, also: BiasDelta | None = None
    ) -> BiasDelta:
        """A delta of these tensors, with the head of `head_of`, that tunes what this one and `also` tune."""
        config = copy.deepcopy(self.config)
        config.new()
        for name in ("modules_to_save", "num_labels", "id2label", "problem_type"):
            setattr(config, name, copy.deepcopy(getattr(head_of.config, name)) if head_of and head_of.head else None)
        config.task_type = (head_of or self).config.task_type
        config.settle_task()
        tokens = self if self.added or also is None else also
        config.added_tokens, config.base_vocab_size = tokens.config.added_tokens, tokens.config.base_vocab_size
        if also is not None:
            config.bias_layout = {**(also.config.bias_layout or {}), **(config.bias_layout or {})}
            mine, theirs = config.base_fingerprint, also.config.base_fingerprint
            if mine and theirs:
                config.base_fingerprint = {**mine, "tensors": {**theirs["tensors"], **mine["tensors"]}}
            terms = [name for c in (self.config, also.config) for name in _listed(c.bias_terms)]
            config.bias_terms = "all" if "all" in terms else list(dict.fromkeys(terms))
            config.add_missing_biases = self.config.add_missing_biases or also.config.add_missing_biases
            for name in ("target_modules", "exclude_modules", "layers_to_transform"):
                if getattr(self.config, name) != getattr(also.config, name):
                    setattr(config, name, None)
        head = head_of.head if head_of else {}
        copies = [{name: tensor.clone() for name, tensor in group.items()} for group in (tensors, head, tokens.added)]
        return BiasDelta(copies[0], config=config, head=copies[1], added=copies[2])

    def check_same_base(self, other: BiasDelta) -> None:
        """Raises [`BaseModelMismatchError`] where another delta was trained on another base, by their fingerprints."""
        mine, theirs = self.config.base_fingerprint, other.config.base_fingerprint
        found, comparable = differing(mine, theirs) if mine and theirs else ([], False)
        names = [d.config.base_model_name_or_path for d in (self, other)]
        if found or (not comparable and names[0] != names[1]):
            raise BaseModelMismatchError(
                f"These deltas belong to different bases ({names[0]} and {names[1]}), so they cannot be calculated "
                f"with:{collect([f'{name} differs' for name in found] or ['they share no tensor'])}"
            )


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


# --- checks ---


def _check_tensors(
    tensors: Mapping[str, torch.Tensor],
    head: Mapping[str, torch.Tensor],
    biases: Mapping[str, list[Bias]],
    leaves: list[str],
    where: str,
) -> None:
    problems = [f"{name} is missing" for name in biases if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in biases]
    for name, group in biases.items():
        size = sum(bias.num_parameters for bias in group)
        wanted = group[0].shape if size == math.prod(group[0].shape) else (size,)
        if name in tensors and tuple(tensors[name].shape) != wanted:
            problems.append(f"{name} has shape {list(tensors[name].shape)} instead of {list(wanted)}")
    owners = {name: part_of(name, leaves) for name in head}
    problems += [f"{name} is not expected" for name, owner in owners.items() if owner is None]
    problems += [f"the head's {leaf} is missing" for leaf in leaves if leaf not in owners.values()]
    if problems:
        raise DeltaFormatError(
            f"{where}: the tensors are not those that adapter_config.json describes:{collect(problems)}\n"
            "Save or fetch the delta again."
        )
    check_values({**tensors, **head}, where=where)


def _check_added(added: Mapping[str, torch.Tensor], count: int, where: str) -> None:
    problems = [
        f"{name} has {len(tensor)} rows"
        for name, tensor in added.items()
        if tensor.dim() not in (1, 2) or len(tensor) != count
    ]
    if bool(count) != any(tensor.dim() == 2 for tensor in added.values()):
        problems.append(f"there are {len(added)} tensors of added tokens")
    if problems:
        raise DeltaFormatError(
            f"{where}: adapter_config.json counts {count} added tokens:{collect(problems)}\n"
            "Save or fetch the delta again."
        )
    check_values(dict(added), where=where)


def _check_only_biases_differ(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], biases: set[str], head: list[str]
) -> None:
    problems = []
    for name, tensor in after.items():
        if name in biases or part_of(name, head) is not None:
            continue
        if name not in before:
            problems.append(f"{name} is not in the base")
        elif before[name].shape != tensor.shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, the base's {list(before[name].shape)}")
        elif not torch.equal(before[name].to(tensor.dtype), tensor):
            gap = (before[name].float() - tensor.float()).abs().max().item()
            problems.append(f"{name} differs by {gap:.1e}")
    problems += [
        f"{name} has shape {list(after[name].shape)}, the base's {list(before[name].shape)}"
        for name in sorted(biases)
        if name in before and before[name].shape != after[name].shape
    ]
    problems += [f"{n} is not in the tuned model" for n in before if n not in after and part_of(n, head) is None]
    if problems:
        raise DeltaMismatchError(
            f"These checkpoints differ in more than biases and head, so no bias delta leads from one to the other:"
            f"{collect(problems)}\nIs it the right base, and was nothing else trained?"
        )


def leaf_of(name: str, leaves: list[str]) -> str | None:
    """The one of the head's `leaves` that the tensor `name` belongs to."""
    return next((leaf for leaf in leaves if name.startswith(f"{leaf}.")), None)


def _tokens_between(base: nn.Module, tuned: nn.Module) -> AddedTokens | None:
    """The tokens that a tuned checkpoint has beyond its base."""
    sizes = vocabulary_size(base), vocabulary_size(tuned)
    if sizes[0] is None or sizes[1] is None or sizes[0] >= sizes[1]:
        return None
    return fit_added_tokens(tuned, sizes[0], sizes[1] - sizes[0])


def _group(biases: list[Bias]) -> dict[str, list[Bias]]:
    grouped: dict[str, list[Bias]] = {}
    for bias in biases:
        grouped.setdefault(bias.name, []).append(bias)
    return grouped


def _listed(bias_terms: Any) -> list[str]:
    return [bias_terms] if isinstance(bias_terms, str) else list(bias_terms)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # DTensors of a sharded model know how to put themselves together.
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().clone()
