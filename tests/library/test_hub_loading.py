"""Loading a delta from the Hub, in every way and in a fresh process: the trained tensors, the trained logits."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from hub_deltas import (
    BASE,
    DELTA_FILES,
    LABELS,
    TOKENIZER_FILES,
    base_files,
    load_base,
    logits,
    make_tokenizer,
    names_a_path,
    put_base,
    tune,
)
from hub_routes import ROUTES, auto_peft, by_name, load_adapter, load_in_place, tensors_of
from launching import HELPERS
from safetensors.torch import load_file
from transformers import AutoTokenizer

from bitfit_hf import (
    BaseModelMismatchError,
    BiasDelta,
    DeltaIOError,
    DeltaNotFoundError,
    load_delta,
    push_to_hub,
)

REPO = "alice/tuned"
TOLERANCE = 2e-6


# One of transformers', one of PEFT's and one of ours stand for all where the network is the subject.
_QUICK = ("AutoModelForSequenceClassification", "PeftModel.from_pretrained", "load_delta")
SOME_ROUTES = [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROUTES]


@pytest.fixture
def pushed(hub, hub_env, monkeypatch):
    """A tuned model whose delta is on the Hub."""
    put_base(hub)
    model = tune(load_base())
    monkeypatch.setattr("bitfit_hf.hub.contents.draw_change", lambda delta, folder: None)  # slower than all the rest
    push_to_hub(model, REPO, tokenizer=make_tokenizer())
    return model


def assert_is_the_trained_model(model: Any, trained: Any) -> None:
    model.eval()
    assert (logits(model) - logits(trained)).abs().max() <= TOLERANCE
    assert model.config.id2label == LABELS
    wanted, found = tensors_of(trained), tensors_of(model)
    if found is None:  # b_0 + δ, in the model's own parameters
        delta = BiasDelta.from_model(trained)
        base = load_base()
        for name in delta:
            assert torch.equal(model.get_parameter(name), base.get_parameter(name) + delta[name]), name
        for name, tensor in delta.head.items():
            assert torch.equal(model.get_parameter(name), tensor), name
    else:
        assert wanted is not None
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("route", ROUTES)
def test_every_way_gives_the_trained_model(hub, pushed, route):
    assert set(hub.files(REPO)) == DELTA_FILES | TOKENIZER_FILES
    assert names_a_path(hub.files(REPO)) == []
    assert_is_the_trained_model(ROUTES[route](REPO), pushed)


# Runs in a process of its own, which knows nothing but the name of the repository.
SCRIPT = """
import json, sys
import torch
import bitfit_hf
sys.path.insert(0, sys.argv[1])
import hub_routes as routes
from hub_deltas import INPUTS
from safetensors.torch import save_file

torch.set_num_threads(1)
found = {}
for name, route in routes.ROUTES.items():
    model = route(sys.argv[2]).eval()
    with torch.no_grad():
        found[f"{name}/logits"] = model(**INPUTS).logits.clone()
    for key, tensor in (routes.tensors_of(model) or {}).items():
        found[f"{name}/{key}"] = tensor.clone()
save_file(found, sys.argv[3])
"""


def test_every_way_in_a_fresh_process(hub_env, pushed, tmp_path):
    """The acceptance test of sharing: tensors bit for bit, logits to 2e-6."""
    out = tmp_path / "found.safetensors"
    command = [sys.executable, "-c", SCRIPT, str(HELPERS), REPO, str(out)]
    subprocess.run(command, env=hub_env.environ, check=True, timeout=300)
    found, wanted = load_file(out), tensors_of(pushed)
    assert wanted is not None
    compared = 0
    for route in ROUTES:
        assert (found.pop(f"{route}/logits") - logits(pushed)).abs().max() <= TOLERANCE, route
        for name, tensor in wanted.items():
            if f"{route}/{name}" in found:
                assert torch.equal(found.pop(f"{route}/{name}"), tensor), (route, name)
                compared += 1
    assert not found
    assert compared == 5 * len(wanted)


def test_a_pipeline_in_a_fresh_process(hub_env, pushed):
    code = (
        "import bitfit_hf, json, sys; from transformers import pipeline; "
        "print(json.dumps(pipeline('text-classification', model=sys.argv[1])(['w7 w9 w11', 'w8'])))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, REPO],
        env=hub_env.environ,
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    answers = json.loads(result.stdout.splitlines()[-1])
    batch = AutoTokenizer.from_pretrained(REPO)(["w7 w9 w11", "w8"], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = pushed(**batch).logits.softmax(-1).max(-1)
    assert [answer["label"] for answer in answers] == [LABELS[i] for i in scores.indices.tolist()]
    assert [answer["score"] for answer in answers] == pytest.approx(scores.values.tolist(), abs=1e-5)


# --- revisions ---


@pytest.mark.parametrize("route", SOME_ROUTES)
def test_an_earlier_revision_of_the_delta(hub, pushed, route):
    """In transformers a delta's own revision is `adapter_kwargs={"revision": …}`; `revision` is the base's too."""
    first = hub.commits(REPO)[0].oid
    push_to_hub(tune(load_base(), seed=2), REPO)
    assert (logits(ROUTES[route](REPO).eval()) - logits(pushed)).abs().max() > 1e-3
    assert_is_the_trained_model(ROUTES[route](REPO, revision=first), pushed)


def test_a_branch_and_a_tag(hub, pushed, hub_env):
    other = tune(load_base(), seed=2)
    push_to_hub(other, REPO, revision="v2")
    hub.repos[REPO].create_ref("refs/tags/one", hub.commits(REPO)[0].oid)
    assert BiasDelta.from_pretrained(REPO, revision="v2").digest == BiasDelta.from_model(other).digest
    assert BiasDelta.from_pretrained(REPO, revision="one").digest == BiasDelta.from_model(pushed).digest
    assert_is_the_trained_model(load_adapter(REPO, revision="one"), pushed)
    with pytest.raises(DeltaNotFoundError, match="no revision 'v3'"):
        BiasDelta.from_pretrained(REPO, revision="v3")


def test_the_base_comes_at_its_pinned_commit_where_the_stack_asks_for_it(hub, pushed):
    """PEFT asks for it. transformers takes the base's latest state, which the fingerprint then refuses."""
    pinned = json.loads(hub.files(REPO)["adapter_config.json"])["revision"]
    assert pinned == hub.commits(BASE)[0].oid
    hub.put(BASE, {"model.safetensors": base_files(seed=5)["model.safetensors"]}, message="another training run")
    assert hub.commits(BASE)[0].oid != pinned
    assert (logits(auto_peft(REPO).eval()) - logits(pushed)).abs().max() <= TOLERANCE
    with pytest.raises(BaseModelMismatchError, match=r"alice/base"):
        by_name(REPO)
    with pytest.raises(BaseModelMismatchError, match=r"alice/base"):
        load_in_place(REPO)
    base = load_base(revision=pinned)
    assert_is_the_trained_model_on(load_delta(base, REPO), pushed)


def assert_is_the_trained_model_on(model: Any, trained: Any) -> None:
    assert (logits(model.eval()) - logits(trained)).abs().max() <= TOLERANCE


def test_a_base_that_is_renewed_without_new_weights_is_the_same(hub, pushed):
    hub.put(BASE, {"README.md": b"a better card"})
    assert_is_the_trained_model(by_name(REPO), pushed)


@pytest.mark.parametrize("route", SOME_ROUTES)
def test_another_base_is_refused_by_every_way(hub, pushed, route):
    hub.put(BASE, {"model.safetensors": base_files(seed=5)["model.safetensors"]})
    if route == "AutoPeftModelForSequenceClassification":
        data = json.loads(hub.files(REPO)["adapter_config.json"])
        hub.put(REPO, {"adapter_config.json": json.dumps({**data, "revision": None}).encode()})
    with pytest.raises(BaseModelMismatchError, match="tensors differ"):
        ROUTES[route](REPO)


# --- private, cached, offline ---


@pytest.mark.parametrize("route", SOME_ROUTES)
def test_a_private_delta_takes_a_token(hub, hub_env, pushed, route):
    """Without the token, from an empty cache, it does not exist for anybody else."""
    hub.repos[REPO].private = True
    hub_env.login("bob")
    token = hub.users["alice"].token
    with pytest.raises((OSError, ValueError)):
        ROUTES[route](REPO, cache_dir=str(hub_env.home / "elsewhere"))
    assert_is_the_trained_model(ROUTES[route](REPO, token=token), pushed)


def test_what_a_stranger_is_told_of_a_private_delta(hub, hub_env, pushed, tmp_path):
    hub.repos[REPO].private = True
    hub_env.login(None)
    with pytest.raises(DeltaNotFoundError, match=r"it is private: check the name, and pass a `token`"):
        BiasDelta.from_pretrained(REPO, cache_dir=tmp_path)


@pytest.mark.parametrize("route", SOME_ROUTES)
def test_offline_from_the_cache(hub, hub_env, pushed, route):
    ROUTES[route](REPO)
    hub_env.go_offline()
    requests = len(hub.requests)
    assert_is_the_trained_model(ROUTES[route](REPO), pushed)
    assert len(hub.requests) == requests


def test_offline_with_nothing_in_the_cache(hub_env, pushed, tmp_path):
    with pytest.raises(DeltaIOError, match="not in the cache"):
        BiasDelta.from_pretrained(REPO, cache_dir=tmp_path, local_files_only=True)
    hub_env.go_offline()
    with pytest.raises(DeltaIOError, match="not in the cache"):
        BiasDelta.from_pretrained(REPO, cache_dir=tmp_path)


def test_the_two_files_come_from_one_commit(hub, pushed, tmp_path):
    """Somebody pushes between the download of the first file and that of the second."""
    other = tune(load_base(), seed=2)

    def push() -> None:
        push_to_hub(other, REPO)

    hub.before_next("resolve", push, path=r"adapter_model\.safetensors")
    assert BiasDelta.from_pretrained(REPO, cache_dir=tmp_path).digest == BiasDelta.from_model(pushed).digest
    assert BiasDelta.from_pretrained(REPO, cache_dir=tmp_path).digest == BiasDelta.from_model(other).digest


def test_nothing_else_is_downloaded(hub, pushed, tmp_path):
    hub.put(REPO, {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit", "adapter_model.bin": b"pickle"})
    hub.downloads.clear()
    BiasDelta.from_pretrained(REPO, cache_dir=tmp_path)
    assert set(hub.downloads) == {(REPO, "adapter_config.json"), (REPO, "adapter_model.safetensors")}
