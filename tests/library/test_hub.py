"""Pushing: exactly the contracted files, in one commit, on what was seen, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_deltas import (
    BASE,
    DELTA_FILES,
    PICTURE,
    STOCK_FILES,
    TOKENIZER_FILES,
    load_base,
    make_tokenizer,
    names_a_path,
    put_base,
    save_base,
    tune,
)
from hub_server import LoopbackHub
from huggingface_hub import ModelCard
from safetensors.torch import load
from transformers import AutoTokenizer

from bitfit_hf import BiasDelta, BitFitConfig, PushError, push_to_hub

REPO = "alice/tuned"


@pytest.fixture
def model(hub, hub_env):
    put_base(hub)
    return tune(load_base())


@pytest.fixture
def quick(model, monkeypatch):
    """The model, whose pushes do not draw a picture, which takes longer than all the rest."""
    monkeypatch.setattr("bitfit_hf.hub.contents.draw_change", lambda delta, folder: None)
    return model


def config_on(hub: LoopbackHub, repo_id: str = REPO, path: str = "adapter_config.json") -> dict:
    return json.loads(hub.files(repo_id)[path])


# --- what is pushed ---


def test_a_push_is_one_commit_of_exactly_the_delta_s_files(hub, model):
    info = push_to_hub(model, REPO)
    assert set(hub.files(REPO)) == DELTA_FILES | PICTURE
    assert [commit.title for commit in hub.commits(REPO)] == ["Push BitFit delta", "initial commit"]
    assert info.oid == hub.commits(REPO)[0].oid
    config = config_on(hub)
    assert config["base_model_name_or_path"] == BASE
    assert config["revision"] == hub.commits(BASE)[0].oid
    assert config["weights_digest"] == BiasDelta.from_model(model).digest
    tensors = load(hub.files(REPO)["adapter_model.safetensors"])
    wanted = BiasDelta.from_model(model).tensors()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


def test_everything_that_can_go_along(hub, model, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    push_to_hub(model, REPO, stock=True, tokenizer=tokenizer, commit_message="all of it")
    assert set(hub.files(REPO)) == DELTA_FILES | PICTURE | STOCK_FILES | TOKENIZER_FILES
    assert [commit.title for commit in hub.commits(REPO)] == ["all of it", "initial commit"]
    assert names_a_path(hub.files(REPO), tmp_path) == []
    assert AutoTokenizer.from_pretrained(REPO)("w7 w9")["input_ids"] == [2, 7, 9, 3]
    assert config_on(hub, path="stock/adapter_config.json")["peft_type"] == "LORA"


@pytest.mark.parametrize("form", ["delta", "method", "folder"])
def test_a_delta_or_its_folder_gives_the_files_of_the_model(hub, model, form, tmp_path):
    push_to_hub(model, REPO)
    delta = BiasDelta.from_model(model)
    if form == "folder":
        delta.save_pretrained(tmp_path / "saved")
        make_tokenizer().save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "optimizer.pt").write_bytes(b"pickle")
        push_to_hub(tmp_path / "saved", "alice/other")
    elif form == "method":
        delta.push_to_hub("alice/other")
    else:
        push_to_hub(delta, "alice/other")
    first, second = hub.files(REPO), hub.files("alice/other")
    assert set(second) == set(first) | (TOKENIZER_FILES if form == "folder" else set())
    for name in ("adapter_config.json", "adapter_model.safetensors", "bias_change.png"):
        assert first[name] == second[name], name


def test_the_card_s_metadata_is_what_the_hub_accepts(hub, model):
    push_to_hub(model, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.base_model == BASE
    assert card.data.library_name == "peft"
    card.validate()
    assert hub.count("POST", "/api/validate-yaml") == 2  # by the push and by the line above


def test_another_adapter_than_the_default(hub, model):
    model.add_adapter("second", BitFitConfig(task_type="SEQ_CLS", bias_terms="query"))
    push_to_hub(model, REPO, adapter_name="second")
    assert config_on(hub)["bias_terms"] == ["query"]


def test_a_name_without_user_is_one_s_own(hub, model):
    info = push_to_hub(model, "tuned")
    assert set(hub.files(REPO)) == DELTA_FILES | PICTURE
    assert info.oid == hub.commits(REPO)[0].oid


def test_private_and_public(hub, model):
    push_to_hub(model, "alice/secret", private=True)
    assert hub.repos["alice/secret"].private
    push_to_hub(model, REPO)
    assert not hub.repos[REPO].private
    before = hub.commits(REPO)[0].oid
    with pytest.raises(PushError, match="is public, and private=True was asked for"):
        push_to_hub(model, REPO, private=True)
    assert hub.commits(REPO)[0].oid == before


def test_a_revision_is_a_branch_of_its_own(hub, model):
    push_to_hub(model, REPO)
    main = hub.commits(REPO)[0].oid
    push_to_hub(tune(load_base(), seed=2), REPO, revision="v2")
    assert hub.commits(REPO)[0].oid == main
    assert hub.files(REPO, "v2")["adapter_model.safetensors"] != hub.files(REPO)["adapter_model.safetensors"]
    assert hub.commits(REPO, "v2")[0].parent == main


def test_a_pull_request_to_somebody_else(hub, hub_env, model):
    push_to_hub(model, REPO)
    main = hub.commits(REPO)[0].oid
    hub_env.login("bob")
    with pytest.raises(PushError, match=r"HTTP 403.*create_pr=True"):
        push_to_hub(tune(load_base(), seed=2), REPO)
    info = push_to_hub(tune(load_base(), seed=2), REPO, create_pr=True)
    assert info.pr_url.endswith("/alice/tuned/discussions/1")
    assert hub.commits(REPO)[0].oid == main
    assert hub.commits(REPO, "refs/pr/1")[0].parent == main
    assert set(hub.files(REPO, "refs/pr/1")) == DELTA_FILES | PICTURE


# --- the base's name ---


def test_a_base_from_a_folder_needs_its_name_on_the_hub(hub, hub_env, tmp_path):
    model = tune(load_base(str(save_base(tmp_path / "base"))))
    requests = len(hub.requests)
    with pytest.raises(PushError, match="base_model='user/name'"):
        push_to_hub(model, REPO)
    assert len(hub.requests) == requests, "refused before anything was sent"
    for wrong in (str(tmp_path / "base"), "./base", "a/b/c"):
        with pytest.raises(PushError, match="base's name on the Hub"):
            push_to_hub(model, REPO, base_model=wrong)
    push_to_hub(model, REPO, base_model=BASE, stock=True, tokenizer=make_tokenizer())
    assert config_on(hub)["base_model_name_or_path"] == BASE
    assert config_on(hub, path="stock/adapter_config.json")["base_model_name_or_path"] == BASE
    assert config_on(hub)["revision"] is None
    assert names_a_path(hub.files(REPO), tmp_path) == []
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base"), "the model is left alone"


def test_a_relative_folder_that_looks_like_a_repo_is_a_folder(hub, hub_env, tmp_path, monkeypatch):
    save_base(tmp_path / "runs" / "base")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PushError, match="'runs/base'"):
        push_to_hub(tune(load_base("runs/base")), REPO)


def test_a_name_given_in_the_config_wins_over_the_folder(hub, hub_env, tmp_path):
    model = tune(load_base(str(save_base(tmp_path / "base"))), base_model_name_or_path=BASE)
    push_to_hub(model, REPO)
    assert config_on(hub)["base_model_name_or_path"] == BASE
    assert names_a_path(hub.files(REPO), tmp_path) == []


def test_another_base_name_does_not_keep_the_old_one_s_commit(hub, model):
    push_to_hub(model, REPO, base_model="bob/copy-of-base")
    assert config_on(hub)["base_model_name_or_path"] == "bob/copy-of-base"
    assert config_on(hub)["revision"] is None


def test_a_folder_of_this_machine_in_a_tokenizer_is_refused(hub, model):
    tokenizer = make_tokenizer()
    tokenizer.init_kwargs["corpus"] = str(Path.home() / "corpus.txt")
    with pytest.raises(PushError, match=r"tokenizer_config\.json names"):
        push_to_hub(model, REPO, tokenizer=tokenizer)
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_what_saves_pickles_is_refused(hub, model):
    class Pickler:
        def save_pretrained(self, folder):
            (Path(folder) / "vocabulary.pkl").write_bytes(b"\x80\x04.")

    with pytest.raises(PushError, match=r"vocabulary\.pkl"):
        push_to_hub(model, REPO, tokenizer=Pickler())
    with pytest.raises(PushError, match="not a str"):
        push_to_hub(model, REPO, tokenizer="bert")
    with pytest.raises(PushError, match="not a dict"):
        push_to_hub({}, REPO)
    assert REPO not in hub.repos


# --- what is there already ---


def test_the_user_s_text_and_files_stay_and_what_is_stale_goes(hub, model):
    push_to_hub(model, REPO, stock=True, tokenizer=make_tokenizer())
    readme = hub.files(REPO)["README.md"] + b"\n## My notes\n\nTrained on a rainy day.\n"
    old = {"training_args.bin": b"pickle", "adapter_model.bin": b"pickle", "notes/plan.txt": b"mine"}
    hub.put(REPO, {"README.md": readme, **old})
    parent = hub.commits(REPO)[0].oid
    push_to_hub(tune(load_base(), seed=2), REPO)
    assert set(hub.files(REPO)) == DELTA_FILES | PICTURE | TOKENIZER_FILES | {"notes/plan.txt"}
    assert b"Trained on a rainy day." in hub.files(REPO)["README.md"]
    assert hub.commits(REPO)[0].parent == parent


def test_the_card_on_the_hub_wins_over_a_folder_s_unless_it_is_only_generated(hub, quick, tmp_path):
    push_to_hub(quick, REPO)
    push_to_hub(quick, "alice/other")
    BiasDelta.from_model(quick).save_pretrained(tmp_path)
    mine = hub.files(REPO)["README.md"] + b"\n## Local notes\n"
    (tmp_path / "README.md").write_bytes(mine)
    push_to_hub(tmp_path, REPO)
    assert b"## Local notes" in hub.files(REPO)["README.md"]
    hub.put("alice/other", {"README.md": hub.files("alice/other")["README.md"] + b"\n## Notes on the Hub\n"})
    push_to_hub(tmp_path, "alice/other")
    assert b"## Notes on the Hub" in hub.files("alice/other")["README.md"]
    assert b"## Local notes" not in hub.files("alice/other")["README.md"]


def test_the_same_push_again_is_no_commit(hub, quick):
    first = push_to_hub(quick, REPO)
    again = push_to_hub(quick, REPO)
    assert again.oid == first.oid
    assert len(hub.commits(REPO)) == 2


def test_a_whole_model_s_repository_is_refused(hub, quick):
    before = hub.commits(BASE)[0].oid
    with pytest.raises(PushError, match=r"holds a whole model:\n  - model\.safetensors"):
        push_to_hub(quick, BASE)
    assert hub.commits(BASE)[0].oid == before


def test_a_gitignore_that_excludes_the_delta_is_reported(hub, quick):
    hub.put(REPO, {".gitignore": b"*.safetensors\n"})
    with pytest.raises(PushError, match=r"\.gitignore in alice/tuned excludes .*\n  - adapter_model\.safetensors"):
        push_to_hub(quick, REPO)
    assert set(hub.files(REPO)) == {".gitattributes", ".gitignore"}


def test_a_concurrent_change_is_reported_and_not_overwritten(hub, quick):
    push_to_hub(quick, REPO)
    theirs = {}
    hub.before_next("commit", lambda: theirs.update(oid=hub.put(REPO, {"README.md": b"theirs"}, user="alice")))
    with pytest.raises(PushError, match="somebody else has changed the repository"):
        push_to_hub(tune(load_base(), seed=2), REPO)
    assert hub.commits(REPO)[0].oid == theirs["oid"]
    assert hub.files(REPO)["README.md"] == b"theirs"
    push_to_hub(tune(load_base(), seed=2), REPO)
    assert hub.commits(REPO)[0].parent == theirs["oid"]


# --- errors ---

REQUESTS = {
    "create": ("POST", "/api/repos/create"),
    "look": ("GET", "/api/models/alice/tuned$"),
    "preupload": ("POST", "/preupload/"),
    "lfs": ("POST", "/info/lfs/objects/batch"),
    "commit": ("POST", "/commit/main"),
}
REMEDIES = {
    401: "hf auth login",
    403: "role 'write'",
    409: "push again in a moment",
    412: "nothing was overwritten",
    429: "wait a few minutes",
    500: "try again later",
    503: "try again later",
}


# When creating is refused, or conflicts, the client takes it for "exists already" and goes on.
ANSWERS = [
    (name, status) for name in REQUESTS for status in REMEDIES if name != "create" or status not in (401, 403, 409)
]


@pytest.mark.parametrize(("request_", "status"), ANSWERS)
def test_every_error_of_the_hub_names_its_remedy_and_changes_nothing(hub, quick, request_, status):
    hub.create_repo(REPO)
    before = hub.commits(REPO)[0].oid
    method, path = REQUESTS[request_]
    hub.fail_next(status, method=method, path=path, times=20)
    with pytest.raises(PushError) as caught:
        push_to_hub(quick, REPO)
    assert f"alice/tuned could not be pushed to (HTTP {status})" in str(caught.value)
    assert REMEDIES[status] in str(caught.value)
    assert hub.commits(REPO)[0].oid == before


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_lost_connection_is_reported(hub, quick, request_):
    method, path = REQUESTS[request_]
    hub.cut_connection_after(-1, path, method=method, times=20)
    with pytest.raises(PushError, match="look at the repository, then push again"):
        push_to_hub(quick, REPO)
    hub.clear_faults()
    push_to_hub(quick, REPO)
    assert set(hub.files(REPO)) == DELTA_FILES
    assert len(hub.commits(REPO)) == 2


def test_nobody_is_logged_in(hub, hub_env, quick):
    hub_env.login(None)
    with pytest.raises(PushError, match="hf auth login"):
        push_to_hub(quick, REPO)
    with pytest.raises(PushError, match="hf auth login"):
        push_to_hub(quick, REPO, token=True)
    push_to_hub(quick, REPO, token=hub.users["alice"].token)
    assert set(hub.files(REPO)) == DELTA_FILES


def test_offline(hub_env, quick):
    hub_env.go_offline()
    with pytest.raises(PushError, match="HF_HUB_OFFLINE"):
        push_to_hub(quick, REPO)


@pytest.mark.parametrize(
    ("repo_id", "message"), [("a/b/c", "is no repo id"), ("alice/..", "is no repo id"), ("", "repo id|HTTP 4")]
)
def test_no_repo_id(hub_env, quick, repo_id, message):
    with pytest.raises(PushError, match=message):
        push_to_hub(quick, repo_id)


def test_a_revision_and_a_repository_that_are_not_there(hub, quick):
    with pytest.raises(PushError, match="HTTP 404"):
        push_to_hub(quick, REPO, create_pr=True)
    push_to_hub(quick, REPO)
    with pytest.raises(PushError, match="HTTP 404"):
        push_to_hub(quick, REPO, revision="refs/pr/7")


def test_metadata_that_the_hub_refuses(hub, quick):
    hub.put(REPO, {"README.md": b"---\nlicense: [unclosed\n---\nmine\n"})
    with pytest.raises(PushError, match=r"(?i)metadata|yaml"):
        push_to_hub(quick, REPO)
    assert set(hub.files(REPO)) == {".gitattributes", "README.md"}
