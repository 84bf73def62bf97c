"""The loopback Hub, driven by the real `huggingface_hub`, `transformers` and `peft`."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_fixtures import hub_client_env
from hub_metadata import validate_card
from hub_server import LoopbackHub
from hub_store import is_ignored
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    constants,
    create_commit,
    create_repo,
    hf_hub_download,
    snapshot_download,
    upload_folder,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

# Seen: 1.3 reports a connection that breaks off in the middle of a file, and waits as long as it likes after a 429.
needs_retries = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2"), reason="this client gives up sooner"
)

CARD = """---
license: apache-2.0
library_name: peft
base_model: alice/tiny
base_model_relation: adapter
model-index:
- name: tiny
  results:
  - task: {type: text-classification}
    dataset: {type: glue, name: GLUE RTE}
    metrics:
    - {type: accuracy, value: 0.5}
---
# Tiny
"""


@pytest.fixture
def api(hub, hub_env) -> HfApi:
    hub.create_repo("alice/tiny")
    return HfApi()


# Repositories, commits and refs


def test_repository_life(hub, hub_env):
    api = HfApi()
    assert api.whoami()["name"] == "alice"
    url = create_repo("tiny", private=True)  # the namespace is the user's
    assert (url.repo_id, url.endpoint) == ("alice/tiny", hub.endpoint)
    assert create_repo("alice/tiny", exist_ok=True).repo_id == "alice/tiny"
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        create_repo("alice/tiny")
    assert error.value.response.status_code == 409

    assert api.model_info("alice/tiny").private


def test_upload_folder_is_one_commit(hub, api, tmp_path):
    content = {"adapter_config.json": b"{}", "stock/adapter_model.safetensors": b"s" * 2000, "empty.txt": b""}
    for name, data in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = api.model_info("alice/tiny").sha
    info = upload_folder(repo_id="alice/tiny", folder_path=tmp_path, commit_message="first", commit_description="why")

    last, initial = hub.commits("alice/tiny")
    assert (last.oid, last.parent, initial.oid) == (info.oid, before, before)
    assert (last.title, last.description, last.author) == ("first", "why", "alice")
    assert hub.files("alice/tiny") == {**initial.files, **content}
    assert [blob.lfs for path, blob in last.blobs.items() if path != ".gitattributes"] == [False, False, True]

    tree = list(api.list_repo_tree("alice/tiny"))
    assert [entry.path for entry in tree] == [".gitattributes", "adapter_config.json", "empty.txt", "stock"]
    [weights] = api.list_repo_tree("alice/tiny", "stock")
    assert weights.path == "stock/adapter_model.safetensors"
    assert (weights.size, weights.lfs.sha256) == (2000, last.blobs[weights.path].sha256)
    assert api.list_repo_files("alice/tiny") == list(last.files)


def test_unchanged_files_are_neither_sent_nor_committed(hub, api):
    files = {"a.txt": b"a", "w.safetensors": b"w"}
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    first = create_commit("alice/tiny", operations, commit_message="first")
    again = create_commit(
        "alice/tiny", [CommitOperationAdd(path, data) for path, data in files.items()], commit_message="again"
    )
    assert again.oid == first.oid
    assert len(hub.commits("alice/tiny")) == 2
    assert hub.count("PUT", "/cdn/") == 1
    # The same content under another name is not uploaded a second time either.
    api.upload_file(path_or_fileobj=b"w", path_in_repo="copy.safetensors", repo_id="alice/tiny")
    assert hub.count("PUT", "/cdn/") == 1
    assert hub.files("alice/tiny")["copy.safetensors"] == b"w"


def test_branches_and_history(hub, api):
    first = hub.put("alice/tiny", {"a": b"1"}, message="one")
    api.create_branch("alice/tiny", branch="dev", revision=first)
    api.create_branch("alice/tiny", branch="dev", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch("alice/tiny", branch="dev")
    assert error.value.response.status_code == 409
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="alice/tiny", revision="dev")

    assert (hub.files("alice/tiny", "main")["a"], hub.files("alice/tiny", "dev")["a"]) == (b"1", b"2")
    assert hub.files("alice/tiny", first[:7])["a"] == b"1"
    titles = [commit.title for commit in hub.commits("alice/tiny", "dev")]
    assert titles == ["Upload a with huggingface_hub", "one", "initial commit"]


def test_parent_commit_guards_against_a_concurrent_change(hub, api):
    seen = api.model_info("alice/tiny").sha
    hub.before_next("commit", lambda: hub.put("alice/tiny", {"theirs": b"bob"}, user="bob"))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        create_commit("alice/tiny", [CommitOperationAdd("ours", b"a")], commit_message="late", parent_commit=seen)
    assert error.value.response.status_code == 412
    assert set(hub.files("alice/tiny")) == {".gitattributes", "theirs"}

    now = api.model_info("alice/tiny").sha
    create_commit("alice/tiny", [CommitOperationAdd("ours", b"a")], commit_message="again", parent_commit=now[:8])
    assert set(hub.files("alice/tiny")) == {".gitattributes", "ours", "theirs"}
    assert [commit.author for commit in hub.commits("alice/tiny")] == ["alice", "bob", "system"]


def test_pull_request_leaves_main_alone_and_needs_no_write_access(hub, api, hub_env):
    hub_env.login("bob")
    with pytest.raises(HfHubHTTPError, match="rights to write"):
        create_commit("alice/tiny", [CommitOperationAdd("x", b"1")], commit_message="x")
    operations = [CommitOperationAdd("x", b"1"), CommitOperationAdd("x.safetensors", b"2")]
    info = create_commit("alice/tiny", operations, commit_message="please", create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert set(hub.files("alice/tiny")) == {".gitattributes"}
    assert hub.files("alice/tiny", "refs/pr/1")["x.safetensors"] == b"2"
    path = hf_hub_download("alice/tiny", "x.safetensors", revision="refs/pr/1")
    assert Path(path).read_bytes() == b"2"
    commit = hub.commits("alice/tiny", "refs/pr/1")[0]
    assert (commit.title, commit.author) == ("please", "bob")


def test_gitignore_keeps_files_out(hub, api, tmp_path):
    for name in (".gitignore", "training_args.bin", "keep.bin", "runs/log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"*.bin\n!keep.bin\nruns/\n")
    upload_folder(repo_id="alice/tiny", folder_path=tmp_path)
    assert set(hub.files("alice/tiny")) == {".gitattributes", ".gitignore", "keep.bin"}
    # The one that is there by now counts for later commits.
    api.upload_file(path_or_fileobj=b"1", path_in_repo="optimizer.bin", repo_id="alice/tiny")
    assert "optimizer.bin" not in hub.files("alice/tiny")


@pytest.mark.parametrize(
    ("rule", "path", "ignored"),
    [
        ("*.bin", "a/b/c.bin", True),
        ("/*.bin", "a/c.bin", True),  # fnmatch's star crosses "/": coarser than git
        ("/c.bin", "a/c.bin", False),
        ("runs/", "runs", False),
        ("runs/", "a/runs/x", True),
        ("# *.bin", "c.bin", False),
    ],
)
def test_gitignore_rules(rule, path, ignored):
    assert is_ignored(path, rule) is ignored


def test_size_and_content_decide_about_lfs(hub, api):
    hub.lfs_threshold = 100
    files = {"small.txt": b"t" * 100, "large.txt": b"t" * 101, "binary.xyz": b"\0", "empty.bin": b""}
    for path, data in files.items():
        api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id="alice/tiny")
    blobs = hub.commits("alice/tiny")[0].blobs
    assert {path for path, blob in blobs.items() if blob.lfs} == {"large.txt", "binary.xyz"}


# Downloads and the cache


@pytest.mark.parametrize("filename", ["config.json", "w.safetensors", "sub/with space.txt"])
def test_download_is_cached_by_etag(hub, hub_env, filename):
    first = hub.put("alice/tiny", {filename: b"one"})
    path = hf_hub_download("alice/tiny", filename)
    assert Path(path).read_bytes() == b"one"
    assert Path(path).is_relative_to(hub_env.cache)
    assert Path(path).parts[-filename.count("/") - 2] == first
    assert hub.downloads["alice/tiny", filename] == 1

    hub.put("alice/tiny", {"other": b""})  # another commit, the same content
    path = hf_hub_download("alice/tiny", filename)
    assert Path(path).read_bytes() == b"one"
    assert hub.downloads["alice/tiny", filename] == 1
    assert hf_hub_download("alice/tiny", filename, revision=first)
    assert hub.count("HEAD", "/resolve/") == 2  # a commit that is in the cache needs no request at all

    hub.put("alice/tiny", {filename: b"two"})
    assert Path(hf_hub_download("alice/tiny", filename)).read_bytes() == b"two"
    assert hub.downloads["alice/tiny", filename] == 2


def test_snapshot_then_offline(hub, hub_env):
    files = {"config.json": b"{}", "w.safetensors": b"w", "sub/x.txt": b"x"}
    commit = hub.put("alice/tiny", files)
    folder = Path(snapshot_download("alice/tiny"))
    assert folder.name == commit
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == hub.files("alice/tiny")

    asked = len(hub.requests)
    hub_env.go_offline()
    assert hf_hub_download("alice/tiny", "sub/x.txt") == str(folder / "sub/x.txt")
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("alice/tiny", "missing")
    assert len(hub.requests) == asked


def test_token_does_not_reach_the_storage(hub, hub_env):
    hub.put("alice/tiny", {"w.safetensors": b"w"})
    hf_hub_download("alice/tiny", "w.safetensors")
    [request] = [request for request in hub.requests if request.route == "cdn_download"]
    assert "Authorization" not in request.headers
    leak = urllib.request.Request(hub.cdn_endpoint + request.path, headers={"Authorization": "Bearer hf_alice"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(leak)


# Who may do what, and how errors look


def test_private_repository(hub, hub_env):
    hub.create_repo("alice/secret", private=True)
    hub.put("alice/secret", {"config.json": b"{}", "w.safetensors": b"w"})
    for name in ("config.json", "w.safetensors"):
        assert hf_hub_download("alice/secret", name)
    for token, status in ((False, 401), ("hf_bob", 404)):
        api = HfApi(token=token)
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info("alice/secret")
        assert error.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("alice/secret", "config.json", token=token, cache_dir=hub_env.home / "2")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        hf_hub_download("alice/secret", "config.json", token="hf_wrong", cache_dir=hub_env.home / "2")
    assert not isinstance(error.value, RepositoryNotFoundError)
    assert not (hub_env.home / "2/models--alice--secret/snapshots").exists()


def test_gated_repository(hub, hub_env):
    hub.create_repo("alice/gated", gated="manual")
    hub.put("alice/gated", {"config.json": b"{}"})
    hub_env.login("bob")
    assert HfApi().model_info("alice/gated").gated == "manual"
    with pytest.raises(GatedRepoError, match="restricted"):
        hf_hub_download("alice/gated", "config.json")
    hub.repos["alice/gated"].granted.add("bob")
    assert hf_hub_download("alice/gated", "config.json")


def test_writing_needs_a_token_with_the_right(hub, hub_env):
    hub.put("alice/tiny", {"a": b""})
    hub.create_user("carol", orgs=("acme",))
    hub.create_user("reader", read_only=True)
    for user, repo_id, status in (
        (None, "alice/tiny", 401),
        ("bob", "alice/tiny", 403),
        ("reader", "reader/own", 403),
        ("carol", "acme/model", None),
    ):
        hub_env.login(user)
        if status is None:
            create_repo(repo_id)
            create_commit(repo_id, [CommitOperationAdd("x", b"1")], commit_message="x")
            continue
        with pytest.raises(HfHubHTTPError) as error:
            create_repo(repo_id)
        assert error.value.response.status_code == status
    hub_env.login("bob")
    with pytest.raises(HfHubHTTPError) as error:
        HfApi().create_branch("alice/tiny", branch="v1")
    assert error.value.response.status_code == 403
    assert set(hub.repos) == {"alice/tiny", "acme/model"}


def test_what_is_missing(hub, hub_env):
    hub.put("alice/tiny", {"a": b""})
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("alice/none", "a")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("alice/tiny", "a", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/tiny", "b")
    assert list(hub_env.cache.glob("models--alice--tiny/.no_exist/*/b"))  # it knows the commit
    with pytest.raises(RevisionNotFoundError):
        create_commit("alice/tiny", [CommitOperationAdd("x", b"1")], commit_message="x", revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        list(HfApi().list_repo_tree("alice/tiny", "folder"))
    assert not HfApi().file_exists("alice/tiny", "b")


def test_unknown_endpoints_are_404_and_logged(hub, hub_env):
    with pytest.raises(HfHubHTTPError, match="LoopbackHub has no endpoint"):
        HfApi().get_model_tags()
    assert [(r.route, r.status) for r in hub.requests] == [("", 404)]


# Faults


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, None, BadRequestError),
        (401, None, HfHubHTTPError),
        (401, "RepoNotFound", RepositoryNotFoundError),
        (403, None, HfHubHTTPError),
        (403, "GatedRepo", GatedRepoError),
        (404, "RevisionNotFound", RevisionNotFoundError),
        (409, None, HfHubHTTPError),
        (412, None, HfHubHTTPError),
        (429, None, HfHubHTTPError),
        (500, None, HfHubHTTPError),
    ],
)
def test_injected_status(hub, api, status, code, expected):
    hub.fail_next(status, method="POST", path="/commit/", code=code)
    operation = [CommitOperationAdd("x", b"1")]
    with pytest.raises(expected) as error:
        create_commit("alice/tiny", operation, commit_message="x")
    assert error.value.response.status_code == status
    assert len(hub.commits("alice/tiny")) == 1
    create_commit("alice/tiny", operation, commit_message="x")  # once only
    assert len(hub.commits("alice/tiny")) == 2


@needs_retries
@pytest.mark.parametrize(("status", "waits"), [(429, [1.0, 1.0]), (503, [1, 2])])
def test_client_retries_a_busy_hub_without_waiting_for_real(hub, api, hub_env, status, waits):
    hub.fail_next(status, path="/preupload/", times=2)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id="alice/tiny")
    assert hub_env.waits == waits
    assert [r.status for r in hub.requests if r.route == "preupload"] == [status, status, 200]


def test_hub_that_stays_down(hub, hub_env):
    hub.put("alice/tiny", {"a": b"1"})
    hub.fail_next(500, path="/resolve/", times=100)
    with pytest.raises(LocalEntryNotFoundError, match="Please check your connection"):
        hf_hub_download("alice/tiny", "a")
    hub.clear_faults()
    assert hf_hub_download("alice/tiny", "a")


@needs_retries
@pytest.mark.parametrize("filename", ["w.safetensors", "w.txt"])
def test_cut_download_is_started_again(hub, hub_env, filename):
    data = bytes(n % 253 for n in range(10_000))
    hub.put("alice/tiny", {filename: data})
    hub.cut_connection_after(1234, filename)
    assert Path(hf_hub_download("alice/tiny", filename)).read_bytes() == data
    assert hub.downloads["alice/tiny", filename] == 2
    assert hub_env.waits == [1]


@needs_retries
def test_cut_download_is_resumed_by_range(hub, hub_env, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    data = bytes(n % 253 for n in range(10_000))
    hub.put("alice/tiny", {"w.safetensors": data})
    hub.cut_connection_after(2500, "w.safetensors", times=2)
    assert Path(hf_hub_download("alice/tiny", "w.safetensors")).read_bytes() == data
    ranges = [request.headers.get("Range") for request in hub.requests if request.route == "cdn_download"]
    assert ranges == [None, "bytes=2000-", "bytes=4000-"]


def test_download_that_never_gets_through(hub, hub_env):
    hub.put("alice/tiny", {"w.safetensors": b"w" * 1000})
    hub.cut_connection_after(10, "/cdn/", times=100)
    with pytest.raises(Exception, match=r"peer closed connection|Server disconnected"):
        hf_hub_download("alice/tiny", "w.safetensors")
    assert not [path for path in hub_env.cache.rglob("blobs/*") if path.suffix != ".incomplete"]
    hub.clear_faults()
    assert Path(hf_hub_download("alice/tiny", "w.safetensors")).read_bytes() == b"w" * 1000


def test_lost_answer_to_a_commit(hub, api):
    hub.cut_connection_after(-1, "/commit/", method="POST")
    with pytest.raises(Exception, match="Server disconnected"):
        create_commit("alice/tiny", [CommitOperationAdd("x", b"1")], commit_message="x")
    assert hub.files("alice/tiny")["x"] == b"1"  # it arrived all the same


@pytest.mark.parametrize("filename", ["w.safetensors", "w.txt"])
def test_corrupt_content(hub, hub_env, filename):
    hub.put("alice/tiny", {filename: b"abcde", "other": b"abcde."})
    hub.corrupt("alice/tiny", filename)
    assert Path(hf_hub_download("alice/tiny", filename)).read_bytes() == b"ab\x9cde"
    assert Path(hf_hub_download("alice/tiny", "other")).read_bytes() == b"abcde."
    hub.corrupt("alice/tiny", filename, b"")
    path = hf_hub_download("alice/tiny", filename, force_download=True)
    assert Path(path).read_bytes() == b""
    assert hub.files("alice/tiny")[filename] == b"abcde"


def test_damaged_upload_is_refused(hub, api):
    def swap() -> None:
        hub.requests[-1].body = b"v"

    hub.before_next("cdn_upload", swap)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'w\.safetensors'"):
        api.upload_file(path_or_fileobj=b"w", path_in_repo="w.safetensors", repo_id="alice/tiny")
    assert len(hub.commits("alice/tiny")) == 1


def test_failing_callback_is_not_taken_for_a_hub_error(hub_env):
    def broken() -> None:
        raise ZeroDivisionError("in the test")

    other = LoopbackHub().__enter__()
    other.put("alice/tiny", {"a": b""})
    other.before_next("info", broken)
    with pytest.raises(HfHubHTTPError, match="LoopbackHub crashed"):
        HfApi(endpoint=other.endpoint, token=False).model_info("alice/tiny")
    with pytest.raises(ZeroDivisionError, match="in the test"):
        other.__exit__(None, None, None)


# Cards


def test_card_is_validated_pushed_and_loaded(hub, api):
    card = ModelCard(CARD)
    card.validate()
    card.push_to_hub("alice/tiny")
    assert hub.files("alice/tiny")["README.md"].decode() == str(card)
    loaded = ModelCard.load("alice/tiny")
    assert (loaded.data.license, loaded.data.eval_results[0].metric_value) == ("apache-2.0", 0.5)
    info = api.model_info("alice/tiny")
    assert (info.library_name, info.card_data.base_model) == ("peft", "alice/tiny")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("license: beer", "license"),
        ("language: no", "language"),
        ("language: English", "language"),
        ("base_model: /home/me/checkpoint", "base_model"),
        ("base_model: [alice/tiny, a/b/c]", r"base_model\[1\]"),
        ("base_model_relation: sibling", "base_model_relation"),
        ("datasets: [GLUE RTE]", "datasets"),
        ("pipeline_tag: 1", "pipeline_tag"),
        ("tags: [[]]", "tags"),
        ("tags: a\ntags: b", "duplicated mapping key"),
        ("model-index: none", "must be an array"),
        ("model-index: [{name: x}]", "results"),
        ("model-index: [{name: x, results: [{}]}]", "task.type"),
        ("- just\n- a list", "must be a mapping"),
        ("a: [", "Invalid YAML"),
    ],
)
def test_bad_metadata_is_refused(hub, api, line, complaint):
    content = f"---\n{line}\n---\n# Card\n"
    with pytest.raises(ValueError, match=complaint):
        HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id="alice/tiny")
    assert "README.md" not in hub.files("alice/tiny")
    if line.startswith(("license", "base_model:")):  # a header that the client itself reads without complaint
        with pytest.raises(ValueError, match=complaint):
            ModelCard(content).validate()


@pytest.mark.parametrize("value", ["null", ".nan", ".inf"])
def test_metric_without_a_value(value):
    errors, _ = validate_card(CARD.replace("value: 0.5", f"value: {value}"))
    assert len(errors) == 1
    assert "metrics[0].value" in errors[0]


def test_card_without_metadata_is_a_warning(hub, api):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Card", path_in_repo="README.md", repo_id="alice/tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        api.upload_file(path_or_fileobj=CARD.encode(), path_in_repo="README.md", repo_id="alice/tiny")


# The fixtures


def test_redirection_is_undone_and_overrides_offline_mode(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = dict(vars(constants)), dict(os.environ)
    hub.put("alice/tiny", {"a": b"1"})
    with hub_client_env(hub, tmp_path / "home") as env:
        assert HfApi().model_info("alice/tiny").author == "alice"
        assert Path(hf_hub_download("alice/tiny", "a")).is_relative_to(env.home)
        used = [constants.HF_HOME, constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH, constants.HF_XET_CACHE]
        assert all(Path(path).is_relative_to(env.home) for path in used)
    assert (vars(constants), dict(os.environ)) == before
    assert HfApi().endpoint != hub.endpoint


def test_nothing_leaves_the_machine(hub, hub_env):
    assert (
        get_session()
        .get("https://huggingface.co/api/whoami-v2", headers={"Authorization": "Bearer hf_bob"})
        .is_success
    )
    assert [(r.route, r.user.name) for r in hub.requests] == [("whoami", "bob")]
    with pytest.raises(AssertionError, match="not on this machine"):
        get_session().get("https://example.com/")


# transformers and peft


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=16, max_position_embeddings=16, **sizes)).eval()


@pytest.mark.parametrize("nth", [1, 2])
def test_transformers_pushes_to_the_hub_of_this_test(hub, hub_env, nth):
    """It keeps an API object for the life of the process, which must not outlive the first hub."""
    tiny_bert().push_to_hub("alice/tiny", commit_message=f"model {nth}")
    assert [commit.title for commit in hub.commits("alice/tiny")] == [f"model {nth}", "initial commit"]


SUBPROCESS = """
import sys, torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoModel
model = PeftModel.from_pretrained(AutoModel.from_pretrained("alice/tiny"), "alice/lora").eval()
torch.save(model(torch.arange(6)[None]).last_hidden_state, sys.argv[1])
HfApi().upload_file(path_or_fileobj=sys.argv[1], path_in_repo="out.pt", repo_id="alice/lora")
"""


def test_transformers_and_peft_push_and_load(hub, hub_env, tmp_path):
    base = tiny_bert()
    base.push_to_hub("alice/tiny")
    assert set(hub.files("alice/tiny")) == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    assert AutoConfig.from_pretrained("alice/tiny").hidden_size == 8
    loaded = AutoModel.from_pretrained("alice/tiny").eval()
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), loaded.state_dict().values()))
    assert hub.downloads["alice/tiny", "model.safetensors"] == 1

    config = LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)
    tuned = get_peft_model(loaded, config).eval()
    tuned.push_to_hub("alice/lora", private=True)
    assert hub.repos["alice/lora"].private
    adapter = {".gitattributes", "adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert set(hub.files("alice/lora")) == adapter

    again = PeftModel.from_pretrained(AutoModel.from_pretrained("alice/tiny"), "alice/lora").eval()
    expected = tuned(torch.arange(6)[None]).last_hidden_state
    torch.testing.assert_close(again(torch.arange(6)[None]).last_hidden_state, expected, atol=2e-6, rtol=0)
    assert hub.downloads["alice/tiny", "model.safetensors"] == 1  # from the cache

    asked = len(hub.requests)
    output = tmp_path / "out.pt"
    subprocess.run([sys.executable, "-c", SUBPROCESS, str(output)], env=hub_env.environ, check=True)
    torch.testing.assert_close(torch.load(output), expected, atol=2e-6, rtol=0)
    assert hub.files("alice/lora")["out.pt"] == output.read_bytes()
    assert len(hub.requests) > asked
    assert hub.downloads["alice/tiny", "model.safetensors"] == 1  # the cache is shared

    hub_env.login("bob")
    with pytest.raises(OSError, match="alice/lora"):
        AutoModel.from_pretrained("alice/lora", cache_dir=tmp_path / "cache of bob")
