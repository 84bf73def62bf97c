"""Everything in a file or on the Hub is untrusted: whatever is wrong with it ends in one clear error of ours, which
names the file and the remedy, and the model is as it was to the last bit.

The artefacts below are made from one good delta, each by one change. `test_tuner_loading` sends such files through the
stock ways of loading in detail; here every artefact goes through our own functions, and through transformers'
`load_adapter`, where nothing of it may stay in the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, randomize_
from hub_deltas import load_base, put_base, save_base, tune
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from tuner_tester import state

from bitfit_hf import (
    BaseModelMismatchError,
    BiasDelta,
    BitFitError,
    ConfigError,
    DeltaFormatError,
    DeltaIOError,
    DeltaMismatchError,
    DeltaNotFoundError,
    UnknownTermError,
    load_delta,
)
from bitfit_hf.storage.files import digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query.bitfit_bias"
Tensors = dict[str, torch.Tensor]
Breaking = Callable[[Path], object]


# --- ways to break a delta ---


def edit(**values: Any) -> Breaking:
    """Other values in the configuration."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **values}))

    return apply


def edit_in(field: str, change: Callable[[dict[str, Any]], object]) -> Breaking:
    """A change inside one mapping of the configuration."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config[field])
        (folder / CONFIG).write_text(json.dumps(config))

    return apply


def config_is(data: bytes) -> Breaking:
    return lambda folder: (folder / CONFIG).write_bytes(data)


def weights_are(data: bytes | Callable[[bytes], bytes]) -> Breaking:
    def apply(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))

    return apply


def tensors(change: Callable[[Tensors], object]) -> Breaking:
    """Other tensors, with a digest that fits, so that nothing but the change is wrong."""

    def apply(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file({k: v.contiguous() for k, v in found.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        edit(weights_digest=digest(found))(folder)

    return apply


def tensor(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Breaking:
    return tensors(lambda found: found.update({key: change(found[key])}))


def header(change: Callable[[dict[str, Any]], object]) -> Breaking:
    """Another header of the safetensors file, over the same data."""

    def rewritten(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        values = json.loads(data[8 : 8 + size])
        change(values)
        text = json.dumps(values).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return weights_are(rewritten)


def without(name: str) -> Breaking:
    return lambda folder: (folder / name).unlink()


def link(name: str, target: str) -> Breaking:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return apply


def folder_instead_of(name: str) -> Breaking:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


class Explosive:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def renamed(old: str, new: str) -> Breaking:
    """One tensor under another name, in the file and in what the configuration says of it."""

    def apply(folder: Path) -> None:
        stock = {name: name.removeprefix("base_model.model.").replace("bitfit_", "") for name in (old, new)}
        tensors(lambda found: found.update({new: found.pop(old)}))(folder)
        edit_in("bias_layout", lambda layout: layout.update({stock[new]: layout.pop(stock[old])}))(folder)

    return apply


def foreign(**values: Any) -> Breaking:
    return config_is(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x", **values}).encode())


def set_print(name: str, text: Any) -> Breaking:
    return edit_in("base_fingerprint", lambda prints: prints["tensors"].update({name: text}))


BIAS = "bert.encoder.layer.0.attention.self.query.bias"
BROKEN: dict[str, tuple[Breaking, type[BitFitError], str]] = {
    # the weights file
    "weights: empty": (weights_are(b""), DeltaFormatError, "damaged"),
    "weights: cut in the header": (weights_are(lambda data: data[:60]), DeltaFormatError, "damaged"),
    "weights: cut in the data": (weights_are(lambda data: data[:-40]), DeltaFormatError, "damaged"),
    "weights: bytes behind the end": (weights_are(lambda data: data + b"\0" * 64), DeltaFormatError, "damaged"),
    "weights: a header of 2^63 bytes": (
        weights_are(lambda data: struct.pack("<Q", 2**63) + data[8:]),
        DeltaFormatError,
        "damaged",
    ),
    "weights: a header of 100 MB and more": (
        weights_are(lambda data: struct.pack("<Q", 10**8 + 1) + data[8:]),
        DeltaFormatError,
        "damaged",
    ),
    "weights: a header longer than the file": (
        weights_are(lambda data: struct.pack("<Q", len(data)) + data[8:]),
        DeltaFormatError,
        "damaged",
    ),
    "weights: an empty header": (weights_are(struct.pack("<Q", 0)), DeltaFormatError, "damaged"),
    "weights: a header that is no JSON": (
        weights_are(lambda data: data[:8] + b"{" * 40 + data[48:]),
        DeltaFormatError,
        "damaged",
    ),
    "weights: a header that is no mapping": (
        weights_are(struct.pack("<Q", 8) + b"[1, 2]  "),
        DeltaFormatError,
        "damaged",
    ),
    "weights: HTML": (weights_are(b"<!DOCTYPE html><title>Not found</title>" * 9), DeltaFormatError, "damaged"),
    "weights: an LFS pointer": (
        weights_are(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        DeltaFormatError,
        "damaged",
    ),
    "weights: a pickle under their name": (weights_are(pickle.dumps(Explosive())), DeltaFormatError, "damaged"),
    "weights: one byte of the data": (
        weights_are(lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]),
        DeltaFormatError,
        "digests differ",
    ),
    "weights: offsets behind the end": (
        header(lambda h: h[QUERY].update(data_offsets=[0, 2**40])),
        DeltaFormatError,
        "damaged",
    ),
    "weights: negative offsets": (
        header(lambda h: h[QUERY].update(data_offsets=[-4, 4])),
        DeltaFormatError,
        "damaged",
    ),
    "weights: overlapping tensors": (
        header(lambda h: h[QUERY].update(data_offsets=[0, 128])),
        DeltaFormatError,
        "damaged",
    ),
    "weights: a shape of 2^60": (header(lambda h: h[QUERY].update(shape=[2**30, 2**30])), DeltaFormatError, "damaged"),
    "weights: an unknown dtype": (header(lambda h: h[QUERY].update(dtype="F99")), DeltaFormatError, "damaged"),
    "weights: missing": (without(WEIGHTS), DeltaNotFoundError, "incomplete"),
    "weights: only a pickle": (pickle_instead, DeltaNotFoundError, "pickled weights are never read"),
    "weights: a folder": (folder_instead_of(WEIGHTS), DeltaIOError, "cannot be read"),
    "weights: a link to nowhere": (link(WEIGHTS, "/nowhere/at/all"), DeltaNotFoundError, "does not exist"),
    "weights: a link to itself": (link(WEIGHTS, WEIGHTS), DeltaNotFoundError, "does not exist"),
    "weights: a link out of the folder": (link(WEIGHTS, "/etc/hostname"), DeltaFormatError, "damaged"),
    "weights: a link to a device": (link(WEIGHTS, "/dev/null"), DeltaIOError, "cannot be read"),
    # the tensors in it
    "tensors: none": (tensors(lambda found: found.clear()), DeltaFormatError, "is missing"),
    "tensors: one delta missing": (
        tensors(lambda found: found.pop(QUERY)),
        DeltaFormatError,
        r"query\.bias is missing",
    ),
    "tensors: the head missing": (
        tensors(lambda found: [found.pop(k) for k in list(found) if "classifier" in k]),
        DeltaFormatError,
        "the head's classifier is missing",
    ),
    "tensors: one that nobody knows": (
        tensors(lambda found: found.update({"base_model.model.bert.x.bitfit_bias": torch.zeros(2)})),
        DeltaFormatError,
        "not expected",
    ),
    "tensors: base weights": (
        tensors(lambda found: found.update({"base_model.model.bert.pooler.dense.weight": torch.zeros(32, 32)})),
        DeltaFormatError,
        "not expected",
    ),
    "tensors: a name with ..": (
        tensors(lambda found: found.update({"../../etc/passwd": torch.zeros(2)})),
        DeltaFormatError,
        "not expected",
    ),
    "tensors: NaN": (tensor(QUERY, lambda t: t * float("nan")), DeltaFormatError, "NaN or Inf"),
    "tensors: Inf in the head": (
        tensor("base_model.model.classifier.weight", lambda t: t / 0),
        DeltaFormatError,
        "NaN or Inf",
    ),
    "tensors: float16": (tensor(QUERY, torch.Tensor.half), DeltaFormatError, "float16 instead of float32"),
    "tensors: float64": (tensor(QUERY, torch.Tensor.double), DeltaFormatError, "float64 instead of float32"),
    "tensors: integers": (tensor(QUERY, torch.Tensor.long), DeltaFormatError, "int64 instead of float32"),
    "tensors: booleans": (tensor(QUERY, torch.Tensor.bool), DeltaFormatError, "bool instead of float32"),
    "tensors: too short": (tensor(QUERY, lambda t: t[:-1]), DeltaFormatError, r"has shape \[31\] instead of \[32\]"),
    "tensors: of one value": (tensor(QUERY, lambda t: t[:1]), DeltaFormatError, r"has shape \[1\]"),
    "tensors: a scalar": (tensor(QUERY, lambda t: t[0]), DeltaFormatError, r"has shape \[\]"),
    "tensors: of no value": (tensor(QUERY, lambda t: t[:0]), DeltaFormatError, r"has shape \[0\]"),
    "tensors: two dimensions": (tensor(QUERY, lambda t: t[None]), DeltaFormatError, r"has shape \[1, 32\]"),
    "tensors: a head of another width": (
        tensor("base_model.model.classifier.weight", lambda t: t[:, :-1]),
        DeltaMismatchError,
        "the head's classifier has another shape",
    ),
    "tensors: a head whose bias is missing": (
        tensors(lambda found: found.pop("base_model.model.classifier.bias")),
        DeltaMismatchError,
        "the head's classifier holds",
    ),
    "tensors: of another save": (
        lambda f: save_file({k: v + 1 for k, v in load_file(f / WEIGHTS).items()}, f / WEIGHTS),
        DeltaFormatError,
        "two different saves",
    ),
    # the configuration file
    "config: empty": (config_is(b""), DeltaFormatError, "not valid JSON"),
    "config: cut": (lambda f: config_is((f / CONFIG).read_bytes()[:-20])(f), DeltaFormatError, "not valid JSON"),
    "config: no UTF-8": (config_is(b"\xff\xfe\x00{}"), DeltaFormatError, "not valid JSON"),
    "config: a list": (config_is(b"[]"), DeltaFormatError, "list instead of an object"),
    "config: null": (config_is(b"null"), DeltaFormatError, "NoneType instead of an object"),
    "config: nested without end": (config_is(b'{"a":' * 100_000), DeltaFormatError, "not valid JSON"),
    "config: without anything": (config_is(b"{}"), DeltaFormatError, "not 'BITFIT'"),
    "config: missing": (without(CONFIG), DeltaNotFoundError, "does not exist"),
    "config: a folder": (folder_instead_of(CONFIG), DeltaIOError, "cannot be read"),
    "config: a link to itself": (link(CONFIG, CONFIG), (DeltaIOError, DeltaNotFoundError), "cannot be read|not exist"),
    "config: a link to a device": (link(CONFIG, "/dev/null"), DeltaFormatError, "not valid JSON"),
    "config: of LoRA": (foreign(), DeltaFormatError, "'LORA', not 'BITFIT'"),
    "config: of a method that is no text": (edit(peft_type=["BITFIT"]), DeltaFormatError, "not 'BITFIT'"),
    # values in it
    "value: an unknown term": (edit(bias_terms=["querry"]), UnknownTermError, "querry"),
    "value: terms that are no text": (edit(bias_terms=[1, None]), ConfigError, "bias_terms must"),
    "value: terms that are a mapping": (
        edit(bias_terms={"query": 1}),
        (ConfigError, UnknownTermError),
        "bias_terms|term",
    ),
    "value: modules that are a number": (edit(target_modules=3), ConfigError, "target_modules"),
    "value: layers that are text": (edit(layers_to_transform="all"), ConfigError, "layers_to_transform"),
    "value: a head that is text": (edit(modules_to_save="classifier"), ConfigError, "modules_to_save"),
    "value: a head of something else": (edit(modules_to_save=["bert.pooler"]), DeltaFormatError, "not expected"),
    "value: labels that do not add up": (edit(num_labels=7), ConfigError, "num_labels"),
    "value: no labels at all": (edit(num_labels=-1, id2label=None), ConfigError, "num_labels"),
    "value: labels that are a list": (edit(id2label=["a", "b"]), ConfigError, "id2label"),
    "value: labels whose numbers are words": (edit(id2label={"one": "a"}), ConfigError, "id2label"),
    "value: an unknown kind of problem": (edit(problem_type="guessing"), ConfigError, "problem_type"),
    "value: a base that is a list": (edit(base_model_name_or_path=["x"]), ConfigError, "base_model_name_or_path"),
    "value: a revision that is a number": (edit(revision=7), ConfigError, "revision"),
    "value: a task that does not exist": (edit(task_type="MIND_READING"), ConfigError, "task_type|task type"),
    "value: added biases that are text": (edit(add_missing_biases="yes"), ConfigError, "add_missing_biases"),
    "value: a digest that is a number": (edit(weights_digest=1), DeltaFormatError, "digests differ"),
    "value: a digest of something else": (edit(weights_digest="sha256:00"), DeltaFormatError, "digests differ"),
    "value: facts of a training that cannot be": (edit(run={"metrics": {"accuracy": "high"}}), ConfigError, "run"),
    # where the tensors belong
    "layout: missing": (edit(bias_layout=None), DeltaFormatError, "no `bias_layout`"),
    "layout: a list": (edit(bias_layout=[1]), ConfigError, "bias_layout"),
    "layout: an unknown term": (
        edit_in("bias_layout", lambda layout: layout.update({BIAS: "mood 0 - 32"})),
        DeltaFormatError,
        "no place of a bias",
    ),
    "layout: a shape that is no number": (
        edit_in("bias_layout", lambda layout: layout.update({BIAS: "query 0 - many"})),
        DeltaFormatError,
        "no place of a bias",
    ),
    "layout: a range out of bounds": (
        edit_in("bias_layout", lambda layout: layout.update({BIAS: "query 0 - 32 16:64"})),
        DeltaFormatError,
        "the ranges",
    ),
    "layout: a vector of 10^30 values": (
        edit_in("bias_layout", lambda layout: layout.update({BIAS: "query 0 - " + "9" * 30})),
        DeltaFormatError,
        "has shape|no place",
    ),
    "layout: a range of 10^9 values": (
        edit_in("bias_layout", lambda layout: layout.update({BIAS: "query 0 - 999999999 0:999999998"})),
        DeltaFormatError,
        r"has shape \[32\] instead of \[999999998\]",
    ),
    "layout: a shape of text": (
        edit_in("bias_layout", lambda layout: layout[BIAS].update(shape=["32"])),
        DeltaFormatError,
        "no place of a bias",
    ),
    "layout: a tensor of one value and three dimensions": (
        edit_in("bias_layout", lambda layout: layout[BIAS].update(shape=[32, 1, 1])),
        DeltaFormatError,
        "no place of a bias",
    ),
    "layout: a layer that is a word": (
        edit_in("bias_layout", lambda layout: layout[BIAS].update(layer="first")),
        DeltaFormatError,
        "no place of a bias",
    ),
    "layout: one too many": (
        edit_in("bias_layout", lambda layout: layout.update({"bert.other.bias": "query 0 - 32"})),
        DeltaFormatError,
        "is missing",
    ),
    "layout: a module that does not exist": (
        renamed(QUERY, QUERY.replace("layer.0", "layer.7")),
        DeltaMismatchError,
        "has no place",
    ),
    "layout: a name with ..": (
        renamed(QUERY, "base_model.model.../../secrets.bitfit_bias"),
        DeltaMismatchError,
        "has no place",
    ),
    "layout: an absolute name": (
        renamed(QUERY, "base_model.model./etc/passwd.bitfit_bias"),
        DeltaMismatchError,
        "has no place",
    ),
    "layout: a weight in place of a bias": (
        renamed(QUERY, QUERY.replace("bitfit_bias", "bitfit_weight")),
        DeltaMismatchError,
        "shape",
    ),
    "layout: an attribute that is no parameter": (
        renamed(QUERY, QUERY.replace("bitfit_bias", "bitfit___class__")),
        DeltaMismatchError,
        "does not exist",
    ),
    # the fingerprint
    "fingerprint: a list": (edit(base_fingerprint=[1]), ConfigError, "base_fingerprint"),
    "fingerprint: of a later version": (edit(base_fingerprint={"format": 99}), DeltaFormatError, "Upgrade bitfit_hf"),
    "fingerprint: without tensors": (edit(base_fingerprint={"format": 1}), DeltaFormatError, "has no `tensors`"),
    "fingerprint: of no text": (set_print(BIAS, 5), DeltaFormatError, "fingerprint of"),
    "fingerprint: without a sample": (
        edit_in("base_fingerprint", lambda prints: prints["tensors"][BIAS].pop("sample")),
        DeltaFormatError,
        "fingerprint of",
    ),
    "fingerprint: damaged": (set_print(BIAS, "float32 x"), DeltaFormatError, "fingerprint of"),
    "fingerprint: a sample that is cut": (set_print(BIAS, "float32 32 - AAA="), DeltaFormatError, "fingerprint of"),
    "fingerprint: of another base": (
        edit_in("base_fingerprint", lambda p: p["tensors"].update({BIAS: p["tensors"]["bert.pooler.dense.bias"]})),
        BaseModelMismatchError,
        r"self\.query\.bias differs by",
    ),
    "fingerprint: of another architecture": (
        edit_in("base_fingerprint", lambda p: p["tensors"].update({"gpt.h.0.bias": p["tensors"].pop(BIAS)})),
        BaseModelMismatchError,
        "does not exist in this model",
    ),
}
assert len(BROKEN) >= 90


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> PreTrainedModel:
    """A stock model that no test may change."""
    return load_base(str(save_base(tmp_path_factory.mktemp("base")))).eval()


@pytest.fixture(scope="module")
def delta(base, tmp_path_factory) -> Path:
    """A good delta on it."""
    folder = tmp_path_factory.mktemp("delta")
    model = tune(load_base(base.name_or_path))
    BiasDelta.from_model(model).save_pretrained(folder)
    return folder


@pytest.fixture
def artefact(delta, tmp_path) -> Path:
    shutil.copytree(delta, tmp_path / "artefact")
    return tmp_path / "artefact"


def refused(model: PreTrainedModel, folder: Any, expected: Any, pattern: str, **kwargs: Any) -> str:
    """Asserts that loading ends in one error of this kind and leaves the model alone; returns the message."""
    before = state(model)
    with pytest.raises(expected, match=pattern) as caught:
        load_delta(model, folder, **kwargs)
    assert isinstance(caught.value, BitFitError)
    assert state(model) == before
    return str(caught.value)


# A message says what to do: the second sentence of most begins with one of these.
REMEDY = re.compile(r"(?i)\b(again|load (it|that)|pass|upgrade|name each|must be|valid are|use|check)\b")


def test_the_good_delta_loads(delta, base):
    model = load_base(base.name_or_path)
    load_delta(model, delta)
    assert model.num_labels == 4


@pytest.mark.parametrize("name", BROKEN)
def test_each_ends_in_one_clear_error_with_the_model_unchanged(name, artefact, base, monkeypatch):
    monkeypatch.chdir(artefact.parent)
    breaking, error, pattern = BROKEN[name]
    breaking(artefact)
    message = refused(base, artefact, error, pattern)
    assert re.search(r"artefact|adapter_config\.json|adapter_model\.safetensors|This delta", message), message
    assert REMEDY.search(message), message
    assert not Path("unpickled").exists()


# What PEFT and transformers themselves raise about a configuration that they read before we do.
STOCK_ERRORS = (BitFitError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


STOCK = [name for name in BROKEN if name != "config: of LoRA"]  # which is theirs


@pytest.mark.parametrize("name", STOCK)
def test_nothing_of_it_stays_after_a_stock_load(name, artefact, base, monkeypatch):
    monkeypatch.chdir(artefact.parent)
    BROKEN[name][0](artefact)
    before = state(base)
    with pytest.raises(STOCK_ERRORS) as caught:
        base.load_adapter(str(artefact))
    if not name.startswith("config"):
        assert isinstance(caught.value, (BitFitError, OSError)), caught.value
    assert state(base) == before
    assert not Path("unpickled").exists()


def test_fields_of_a_later_version_are_ignored(artefact, base):
    edit(a_field_of_2031={"x": 1})(artefact)
    with pytest.warns(UserWarning, match="a_field_of_2031"):
        assert BiasDelta.from_pretrained(artefact).num_parameters() > 0


@pytest.mark.parametrize("name", ["bert-backbone", "roberta-sequence", "gpt2-causal_lm", "mlp"])
def test_a_foreign_architecture(name, delta):
    refused(randomize_(build(name)), delta, BaseModelMismatchError, "tensors differ")


# --- folders ---


@pytest.mark.parametrize("kind", ["empty", "nothing", "a file", "a number", "a repo id that is none"])
def test_no_delta_at_all(kind, tmp_path, base):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("hello")
    target = {"nothing": tmp_path / "nothing", "a number": "12", "a repo id that is none": "a/b/c"}
    message = refused(base, target.get(kind, tmp_path / kind), (DeltaNotFoundError, DeltaIOError), "")
    assert REMEDY.search(message), message


@pytest.mark.parametrize("subfolder", ["..", "../other", "/etc", "a/../../b"])
def test_a_subfolder_stays_inside(subfolder, artefact, base):
    refused(base, artefact, DeltaNotFoundError, "has to be a folder inside", subfolder=subfolder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_may_not_be_read(name, artefact, base):
    (artefact / name).chmod(0)
    refused(base, artefact, DeltaIOError, "cannot be read")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_disk_that_fails_while_reading(name, artefact, base, monkeypatch):
    def broken(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name == name:
            raise OSError(5, "Input/output error", str(path))
        return genuine(path, *args, **kwargs)

    import bitfit_hf.storage.files as files

    target = "open" if name == CONFIG else "safe_open"
    genuine = open if name == CONFIG else files.safe_open
    monkeypatch.setattr(files, target, broken, raising=False)
    assert name in refused(base, artefact, DeltaIOError, "Input/output error")


# --- the Hub ---

REPO = "alice/tuned"


@pytest.fixture
def on_hub(hub, hub_env, delta):
    hub.put(REPO, {name: (delta / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    return hub


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_every_answer_of_the_hub_is_one_clear_error(status, file, on_hub, base, tmp_path):
    on_hub.fail_next(status, path=re.escape(file), times=50)
    message = refused(base, REPO, (DeltaIOError, DeltaNotFoundError), REPO, cache_dir=tmp_path)
    assert REMEDY.search(message), message
    on_hub.clear_faults()
    assert BiasDelta.from_pretrained(REPO, cache_dir=tmp_path).num_parameters() > 0


@pytest.mark.parametrize("after", [-1, 0, 100])
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_connection_cut_in_the_middle_of_a_file(file, after, on_hub, base, tmp_path):
    on_hub.cut_connection_after(after, path=re.escape(file), times=50)
    message = refused(base, REPO, DeltaIOError, REPO, cache_dir=tmp_path)
    assert REMEDY.search(message), message
    on_hub.clear_faults()
    assert BiasDelta.from_pretrained(REPO, cache_dir=tmp_path).num_parameters() > 0, (
        "what arrived is not kept for whole"
    )


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_that_is_damaged_on_its_way(file, on_hub, base, tmp_path):
    on_hub.corrupt(REPO, file)
    refused(base, REPO, BitFitError, "", cache_dir=tmp_path)


def test_no_network(on_hub, base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    on_hub.__exit__()
    message = refused(base, REPO, DeltaIOError, "cannot be reached", cache_dir=tmp_path)
    assert REMEDY.search(message), message


def test_a_repository_with_pickles_only(hub, hub_env, base, delta, tmp_path):
    hub.put(REPO, {CONFIG: (delta / CONFIG).read_bytes(), "adapter_model.bin": pickle.dumps(Explosive())})
    message = refused(base, REPO, DeltaNotFoundError, "pickled weights are never read", cache_dir=tmp_path)
    assert REPO in message
    before = state(base)
    with pytest.raises((BitFitError, OSError)):
        base.load_adapter(REPO, adapter_kwargs={"cache_dir": str(tmp_path)})
    assert state(base) == before
    assert hub.downloads[(REPO, "adapter_model.bin")] == 0


def test_a_gated_repository(hub, hub_env, base, delta, tmp_path):
    put_base(hub)
    hub.put(REPO, {name: (delta / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    hub.repos[REPO].gated = "manual"
    hub_env.login("bob")
    refused(base, REPO, DeltaIOError, "accept its terms on the Hub", cache_dir=tmp_path)


# --- fuzz ---

OLD = Path(__file__).parent / "regression" / "0.1.0.dev0"
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def loads_or_is_refused(folder: Path, model: PreTrainedModel, before: dict[str, Any]) -> None:
    """A delta that reads well may load; the model is then given back. Whatever else happens is an error of ours."""
    with contextlib.suppress(BitFitError):
        delta = BiasDelta.from_pretrained(folder)
        delta.apply_(model)
        delta.remove_(model)
    assert state(model)["tensors"] == before["tensors"]


def copy_of(delta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for one example: the other fixtures serve all examples of a test."""
    return Path(shutil.copytree(delta, tmp_path_factory.mktemp("fuzz"), dirs_exist_ok=True))


@FUZZ
@given(data=st.data())
def test_fuzz_any_value_for_any_field(data, delta, base, tmp_path_factory):
    folder = copy_of(delta, tmp_path_factory)
    config = json.loads((folder / CONFIG).read_text())
    for field in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[field] = data.draw(JSON)
    (folder / CONFIG).write_text(json.dumps(config))
    loads_or_is_refused(folder, base, state(base))


@FUZZ
@given(data=st.data())
def test_fuzz_the_values_inside_a_field(data, delta, base, tmp_path_factory):
    folder = copy_of(delta, tmp_path_factory)
    config = json.loads((folder / CONFIG).read_text())
    target = data.draw(st.sampled_from([config["bias_layout"], config["base_fingerprint"]["tensors"]]))
    values = target[data.draw(st.sampled_from(sorted(target)))]
    field = data.draw(st.sampled_from(sorted(values)))
    if isinstance(values[field], (list, dict)) and data.draw(st.booleans()):
        values = values[field]
        field = data.draw(st.sampled_from(sorted(values) if isinstance(values, dict) else range(len(values))))
    values[field] = data.draw(JSON)
    (folder / CONFIG).write_text(json.dumps(config))
    loads_or_is_refused(folder, base, state(base))


@pytest.fixture(scope="module")
def old_base() -> PreTrainedModel:
    return load_base(str(OLD / "base")).eval()


@FUZZ
@given(data=st.data())
def test_fuzz_the_strings_of_development_versions(data, old_base, tmp_path_factory):
    folder = copy_of(OLD / "delta", tmp_path_factory)
    config = json.loads((folder / CONFIG).read_text())
    target = data.draw(st.sampled_from([config["bias_layout"], config["base_fingerprint"]["tensors"]]))
    key = data.draw(st.sampled_from(sorted(target)))
    text = target[key]
    place, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 4))
    target[key] = text[:place] + data.draw(st.text(max_size=6)) + text[place + length :]
    (folder / CONFIG).write_text(json.dumps(config))
    loads_or_is_refused(folder, old_base, state(old_base))


@FUZZ
@given(data=st.data())
def test_fuzz_the_header_of_the_weights(data, delta, base, tmp_path_factory):
    """Bytes of the tensors are held by the digest; those of the header decide what is read."""
    folder = copy_of(delta, tmp_path_factory)
    raw = bytearray((folder / WEIGHTS).read_bytes())
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    for place in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(bytes(raw))
    loads_or_is_refused(folder, base, state(base))
