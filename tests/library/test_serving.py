"""The HTTP interface: every endpoint, forty bad requests, keys, and what it counts."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bank_tester import bert_base, random_delta, single_model, tokenizer
from serving_tester import ANSWERING, KINDS, client_of, close, make_engine, text_for
from transformers import pipeline

from bitfit_hf import BiasDelta
from bitfit_hf.errors import ServingError
from bitfit_hf.serving import Settings, create_app
from bitfit_hf.serving.page import DOCS, PAGE, Page

ROOT = Path(__file__).resolve().parents[2]
BASE_FIELDS = {"model_id", "model_dtype", "model_type", "max_concurrent_requests", "max_input_length"}
BASE_FIELDS |= {"max_batch_tokens", "max_client_batch_size", "auto_truncate", "tokenization_workers", "version"}


@pytest.fixture(scope="module")
def engine(world: Path) -> Any:
    return make_engine(world, max_client_batch_size=4, max_input_chars=300, max_body_bytes=5_000)


def ask(engine: Any, *requests: tuple[str, str, Any], **options: Any) -> list[httpx.Response]:
    """Sends requests `(method, path, JSON)` one after the other."""

    async def main() -> list[httpx.Response]:
        async with client_of(engine, **options) as client:
            return [
                await client.request(method, path, **({} if body is None else {"json": body}))
                for method, path, body in requests
            ]

    return asyncio.run(main())


def predict(engine: Any, **body: Any) -> httpx.Response:
    return ask(engine, ("POST", "/predict", body))[0]


# --- answers ---


@pytest.mark.parametrize("name", ANSWERING)
def test_predictions_are_the_banks_own(engine, expected, name):
    texts = [text_for(name, number) for number in (3, 4)]
    one = predict(engine, inputs=texts[0], task=name)
    assert one.status_code == 200
    assert close(one.json(), expected(name, texts[0]))
    batch = predict(engine, inputs=[text if isinstance(text, list) else [text] for text in texts], task=name)
    assert close(batch.json(), [expected(name, text) for text in texts])


def test_labels_stand_by_their_scores(engine):
    answer = predict(engine, inputs="a b c", task="sentiment").json()
    assert [set(row) for row in answer] == [{"score", "label"}] * 3
    scores = [row["score"] for row in answer]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1)
    several = predict(engine, inputs="a b c", task="topics").json()
    assert len(several) == 4
    assert sum(row["score"] for row in several) != pytest.approx(1)
    (value,) = predict(engine, inputs="a b c", task="rating").json()
    assert value["label"] == "regression:0"


def test_raw_scores(engine):
    raw = {row["label"]: row["score"] for row in predict(engine, inputs="a", task="sentiment", raw_scores=True).json()}
    soft = {row["label"]: row["score"] for row in predict(engine, inputs="a", task="sentiment").json()}
    total = sum(math.exp(score) for score in raw.values())
    assert soft == pytest.approx({label: math.exp(score) / total for label, score in raw.items()}, abs=1e-5)


def test_tokens_and_answers_are_as_from_transformers_pipelines(engine, world):
    tokens = predict(engine, inputs="a b c", task="tags").json()
    delta = BiasDelta.from_pretrained(world / "tasks" / "tags")
    stock = single_model(bert_base(), delta, KINDS["tags"])
    piped = pipeline("token-classification", model=stock, tokenizer=tokenizer(), ignore_labels=[])("a b c")
    assert [set(row) for row in tokens] == [set(row) for row in piped]
    assert [(row["word"], row["start"], row["end"], row["entity"]) for row in tokens] == [
        (row["word"], row["start"], row["end"], row["entity"]) for row in piped
    ]
    assert [row["score"] for row in tokens] == pytest.approx([row["score"] for row in piped], abs=1e-5)
    as_pair = predict(engine, inputs=["a", "b c d"], task="spans").json()
    assert set(as_pair) == {"answer", "score", "start", "end"}
    assert "b c d"[as_pair["start"] : as_pair["end"]] == as_pair["answer"]
    as_dict = predict(engine, inputs={"question": "a", "context": "b c d"}, task="spans").json()
    assert close(as_dict, as_pair)


def test_embeddings_are_the_mean_of_the_bases_tokens(engine):
    body = {"inputs": ["a b", "c d e f"], "normalize": False}
    plain, normal, one = ask(
        engine,
        ("POST", "/embed", body),
        ("POST", "/embed", {"inputs": ["a b", "c d e f"]}),
        ("POST", "/embed", {"inputs": "a b"}),
    )
    with torch.no_grad():
        for vector, text in zip(plain.json(), body["inputs"], strict=True):
            mean = bert_base()(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            assert vector == pytest.approx(mean.tolist(), abs=1e-5)
    assert [math.dist(vector, [0] * len(vector)) for vector in normal.json()] == pytest.approx([1, 1], abs=1e-5)
    assert close(one.json(), normal.json()[:1])


def test_a_task_without_a_head_embeds(engine):
    of_task, of_base, wrong, none = ask(
        engine,
        ("POST", "/embed", {"inputs": "a b", "task": "vectors"}),
        ("POST", "/embed", {"inputs": "a b"}),
        ("POST", "/embed", {"inputs": "a b", "task": "tags"}),
        ("POST", "/predict", {"inputs": "a b", "task": "vectors"}),
    )
    assert of_task.status_code == 200
    assert not close(of_task.json(), of_base.json(), 1e-3)
    assert (wrong.status_code, none.status_code) == (424, 424)


def test_a_long_text_is_refused_or_cut(engine, expected):
    long, cut = "a " * 60, {"truncate": True}
    refused = predict(engine, inputs=long, task="sentiment")
    assert (refused.status_code, refused.json()["error_type"]) == (413, "Validation")
    assert "62 tokens" in refused.json()["error"]
    assert close(predict(engine, inputs=long, task="sentiment", **cut).json(), expected("sentiment", long))


def test_long_texts_are_cut_where_the_operator_says_so(world):
    engine = make_engine(world, ["sentiment"], auto_truncate=True)
    assert predict(engine, inputs="a " * 60).status_code == 200
    assert predict(engine, inputs="a " * 60, truncate=False).status_code == 413


def test_the_documented_requests_of_text_embeddings_inference(world):
    """`/predict` and `/embed` as in TEI's quick tour and OpenAPI description; none knows of tasks."""
    engine = make_engine(world, ["sentiment"])
    quick, pair, batch, embed, many = ask(
        engine,
        ("POST", "/predict", {"inputs": "I like you."}),
        ("POST", "/predict", {"inputs": ["I like you.", "I do"], "raw_scores": True, "truncate": True}),
        ("POST", "/predict", {"inputs": [["I like you."], ["I like", "pineapples"]], "truncation_direction": "Right"}),
        ("POST", "/embed", {"inputs": "What is Deep Learning?"}),
        ("POST", "/embed", {"inputs": ["What is Deep Learning?", "Why?"], "normalize": True, "prompt_name": None}),
    )
    assert [response.status_code for response in (quick, pair, batch, embed, many)] == [200] * 5

    def predictions(value: Any) -> bool:
        return len(value) == 3 and all(set(row) == {"score", "label"} for row in value)

    assert predictions(quick.json())
    assert predictions(pair.json())
    assert len(batch.json()) == 2
    assert all(map(predictions, batch.json()))
    assert [len(response.json()) for response in (embed, many)] == [1, 2]
    assert all(isinstance(value, float) for row in many.json() for value in row)


# --- what there is to know ---


def test_tasks_and_info_and_health(engine, world):
    card = world / "tasks" / "sentiment"
    listed, one, missing, info, health, api = ask(
        engine,
        ("GET", "/tasks", None),
        ("GET", "/tasks/sentiment", None),
        ("GET", "/tasks/none", None),
        ("GET", "/info", None),
        ("GET", "/health", None),
        ("GET", "/openapi.json", None),
    )
    assert [row["name"] for row in listed.json()] == list(KINDS)
    assert {row["name"]: row["type"] for row in listed.json()} == {
        "sentiment": "text-classification", "topics": "text-classification", "rating": "text-classification",
        "entails": "text-classification", "tags": "token-classification", "spans": "question-answering",
        "vectors": "feature-extraction",
    }  # fmt: skip
    described = one.json()
    assert described["id2label"] == {str(index): f"sequence-3:{index}" for index in range(3)}
    sizes = sum((card / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert described["bytes"] == sizes
    assert described["parameters"] > 0
    assert described["metrics"] == []
    assert (missing.status_code, missing.json()["error_type"]) == (404, "NotFound")
    assert info.json().keys() >= BASE_FIELDS
    assert info.json()["model_id"] == "base"
    assert info.json()["tasks"] == len(KINDS)
    assert (health.status_code, health.content) == (200, b"")
    assert set(api.json()["paths"]) == {
        "/predict",
        "/embed",
        "/tasks",
        "/tasks/{name}",
        "/info",
        "/health",
        "/metrics",
    }


def test_the_metrics_of_a_card_are_told(world, tmp_path):
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    delta = random_delta(bert_base(), "sequence-2", seed=5)
    delta.save_pretrained(tmp_path / "rated")
    result = EvalResult("text-classification", "glue", "GLUE", "accuracy", 0.75)
    data = ModelCardData(model_name="x", eval_results=[result])
    (tmp_path / "rated" / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n# x\n")
    engine = make_engine(world, [])
    engine.tasks.add("rated", str(tmp_path / "rated"))
    (told,) = ask(engine, ("GET", "/tasks/rated", None))[0].json()["metrics"]
    assert (told["metric"], told["value"]) == ("accuracy", 0.75)
    assert ModelCard.load(tmp_path / "rated" / "README.md")


def test_the_pages_load_nothing_from_elsewhere(engine):
    for path, page in (("/", PAGE), ("/docs", DOCS)):
        (response,) = ask(engine, ("GET", path, None))
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert policy.count("'sha256-") == 2
        assert "://" not in page.html
        assert "innerHTML" not in page.html
    assert Page.read("page.html") == PAGE


# --- bad requests ---

LONG = "a" * 301
BAD: list[tuple[str, int, str, str, Any]] = [
    # what, status, method, path, body: bytes as they are, anything else as JSON
    ("a number", 422, "POST", "/predict", {"inputs": 5, "task": "sentiment"}),
    ("null", 422, "POST", "/predict", {"inputs": None, "task": "sentiment"}),
    ("a truth", 422, "POST", "/predict", {"inputs": True, "task": "sentiment"}),
    ("an object", 422, "POST", "/predict", {"inputs": {"text": "a"}, "task": "sentiment"}),
    ("no inputs", 422, "POST", "/predict", {"task": "sentiment"}),
    ("no text", 422, "POST", "/predict", {"inputs": "", "task": "sentiment"}),
    ("no texts", 422, "POST", "/predict", {"inputs": [], "task": "sentiment"}),
    ("an empty pair", 422, "POST", "/predict", {"inputs": ["", ""], "task": "sentiment"}),
    ("an empty one in a batch", 422, "POST", "/predict", {"inputs": [["a"], []], "task": "sentiment"}),
    ("three texts", 422, "POST", "/predict", {"inputs": ["a", "b", "c"], "task": "sentiment"}),
    ("three in one", 422, "POST", "/predict", {"inputs": [["a", "b", "c"]], "task": "sentiment"}),
    ("a number in a pair", 422, "POST", "/predict", {"inputs": ["a", 1], "task": "sentiment"}),
    ("a list in a pair", 422, "POST", "/predict", {"inputs": [["a", ["b"]]], "task": "sentiment"}),
    ("half a question", 422, "POST", "/predict", {"inputs": {"question": "a"}, "task": "spans"}),
    ("no context", 422, "POST", "/predict", {"inputs": ["a", ""], "task": "spans"}),
    ("a question alone", 422, "POST", "/predict", {"inputs": "a", "task": "spans"}),
    ("too many texts", 413, "POST", "/predict", {"inputs": [["a"]] * 5, "task": "sentiment"}),
    ("too many characters", 413, "POST", "/predict", {"inputs": LONG, "task": "sentiment"}),
    ("too many in a pair", 413, "POST", "/predict", {"inputs": ["a", LONG], "task": "sentiment"}),
    ("too many tokens", 413, "POST", "/predict", {"inputs": "a " * 60, "task": "sentiment"}),
    ("too many bytes", 413, "POST", "/predict", {"inputs": "a", "task": "sentiment", "more": "x" * 6000}),
    ("an unknown task", 404, "POST", "/predict", {"inputs": "a", "task": "none"}),
    ("no task", 422, "POST", "/predict", {"inputs": "a"}),
    ("a task that is none", 422, "POST", "/predict", {"inputs": "a", "task": 7}),
    ("a list of tasks", 422, "POST", "/predict", {"inputs": "a", "task": ["tags"]}),
    ("a long name", 422, "POST", "/predict", {"inputs": "a", "task": "x" * 500}),
    ("a path for a name", 404, "POST", "/predict", {"inputs": "a", "task": "../../etc/passwd"}),
    ("truncate", 422, "POST", "/predict", {"inputs": "a", "task": "sentiment", "truncate": "yes"}),
    ("raw_scores", 422, "POST", "/predict", {"inputs": "a", "task": "sentiment", "raw_scores": 1}),
    ("raw_scores of tokens", 422, "POST", "/predict", {"inputs": "a", "task": "tags", "raw_scores": True}),
    ("the left side", 422, "POST", "/predict", {"inputs": "a", "task": "tags", "truncation_direction": "Left"}),
    ("half a surrogate", 422, "POST", "/predict", b'{"inputs": "a \\ud800", "task": "sentiment"}'),
    ("not UTF-8", 422, "POST", "/predict", b'{"inputs": "\xff\xfe", "task": "sentiment"}'),
    ("not JSON", 422, "POST", "/predict", b"inputs=a"),
    ("cut off", 422, "POST", "/predict", b'{"inputs": "a", "task'),
    ("nothing", 422, "POST", "/predict", b""),
    ("a list for an object", 422, "POST", "/predict", b"[]"),
    ("deep", 422, "POST", "/predict", b'{"inputs": ' + b"[" * 2000 + b"]" * 2000 + b"}"),
    ("deep and open", 422, "POST", "/predict", b"[" * 4000),
    ("a huge number", 422, "POST", "/predict", b'{"inputs": 1e999, "task": "sentiment"}'),
    ("a number of 4,900 digits", 422, "POST", "/predict", b'{"inputs": ' + b"9" * 4900 + b"}"),
    ("not a number", 422, "POST", "/predict", b'{"inputs": NaN, "task": "sentiment"}'),
    ("a pair to embed", 422, "POST", "/embed", {"inputs": [["a", "b"]]}),
    ("ids to embed", 422, "POST", "/embed", {"inputs": [1, 2, 3]}),
    ("a prompt", 422, "POST", "/embed", {"inputs": "a", "prompt_name": "query"}),
    ("the wrong method", 405, "GET", "/predict", None),
    ("another", 405, "POST", "/tasks", {}),
    ("an unknown address", 404, "GET", "/tasks/a/b", None),
    ("up and out", 404, "GET", "/tasks/..%2f..%2fetc%2fpasswd", None),
    ("no admin", 403, "PUT", "/tasks/x", {"source": "x"}),
    ("no admin either", 403, "DELETE", "/tasks/sentiment", None),
]


def test_forty_bad_requests(engine, expected, world):
    assert len(BAD) > 40
    good = ("POST", "/predict", {"inputs": "a b", "task": "sentiment"})

    async def main() -> None:
        async with client_of(engine) as client:
            for what, status, method, path, body in BAD:
                content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
                headers = {} if content is None else {"Content-Type": "application/json"}
                response = await client.request(method, path, content=content, headers=headers)
                assert response.status_code == status, (what, response.text)
                assert set(response.json()) == {"error", "error_type"}, what
                sentence = response.json()["error"]
                assert sentence.endswith("."), (what, sentence)
                assert "\n" not in sentence
                assert len(sentence) < 300, what
                assert str(world) not in response.text
                assert "Traceback" not in response.text
                again = await client.request(good[0], good[1], json=good[2])
                assert close(again.json(), expected("sentiment", "a b")), what
            plain = await client.post("/predict", content=b'{"inputs": "a"}', headers={"Content-Type": "text/plain"})
            assert plain.status_code == 415

    asyncio.run(main())


def test_a_body_is_counted_as_it_comes(engine):
    """Without a length in the header."""
    sent = 0

    async def body() -> Any:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 1000

    async def main() -> httpx.Response:
        async with client_of(engine) as client:
            return await client.post("/predict", content=body(), headers={"Content-Type": "application/json"})

    assert asyncio.run(main()).status_code == 413
    assert sent <= 100


# --- keys ---

KEY, ADMIN = "the-api-key", "the-admin-token"
OPEN_PATHS = ["/", "/docs", "/openapi.json", "/health"]
GUARDED = ["/tasks", "/tasks/sentiment", "/info", "/metrics", "/nowhere"]


@pytest.mark.parametrize("api_key", [None, KEY])
@pytest.mark.parametrize("admin_token", [None, ADMIN])
def test_who_may_ask_for_what(world, api_key, admin_token):
    engine = make_engine(world, ["sentiment"], api_key=api_key, admin_token=admin_token)
    tokens = {None: None, KEY: KEY, ADMIN: ADMIN, "wrong": "wrong", "empty": ""}

    async def main() -> None:
        async with client_of(engine) as client:
            for token in tokens.values():
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                known = token is not None and token in (api_key, admin_token)
                for path in OPEN_PATHS:
                    assert (await client.get(path, headers=headers)).status_code == 200
                for path in GUARDED:
                    status = (await client.get(path, headers=headers)).status_code
                    assert (status == 401) == (api_key is not None and not known), (path, token)
                answer = await client.post("/predict", json={"inputs": "a"}, headers=headers)
                assert answer.status_code == (401 if api_key is not None and not known else 200)
                put = await client.put("/tasks/x", json={"source": "nowhere/to-be-found"}, headers=headers)
                if admin_token is None:
                    assert put.status_code == 403
                    assert "no admin token" in put.json()["error"]
                elif token == ADMIN:
                    assert put.status_code == 403
                    assert "not among those" in put.json()["error"]
                elif token is not None and token == api_key:
                    assert put.status_code == 403
                    assert "API key" in put.json()["error"]
                else:
                    assert put.status_code == 401
                    assert put.headers["www-authenticate"] == "Bearer"
                delete = await client.delete("/tasks/none", headers=headers)
                assert delete.status_code == (404 if admin_token and token == ADMIN else put.status_code)
                for response in (answer, put, delete):
                    assert KEY not in response.text
                    assert ADMIN not in response.text
            for header in ("Basic the-api-key", "the-api-key", "Bearer", "bearer  the-api-key"):
                status = (await client.get("/info", headers={"Authorization": header})).status_code
                assert status == (200 if api_key is None or header.startswith("bearer") else 401), header

    asyncio.run(main())


def test_below_a_prefix_everything_is_as_without_one(world, expected):
    """As behind a proxy, or under a route prefix of Ray Serve."""
    engine = make_engine(world, ["sentiment"], api_key=KEY)

    async def main() -> list[httpx.Response]:
        app = create_app(engine)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, root_path="/models")
            async with httpx.AsyncClient(transport=transport, base_url="http://test/models") as client:
                answers = [await client.get("/health"), await client.get("/info")]
                client.headers["Authorization"] = f"Bearer {KEY}"
                answers.append(await client.post("/predict", json={"inputs": "a b"}))
                answers.append(await client.get("/tasks/sentiment"))
                return answers

    health, refused, answer, described = asyncio.run(main())
    assert [one.status_code for one in (health, refused, answer, described)] == [200, 401, 200, 200]
    assert close(answer.json(), expected("sentiment", "a b"))


def test_nothing_of_a_stranger_is_read(world):
    engine = make_engine(world, ["sentiment"], api_key=KEY)
    read = []

    async def body() -> Any:
        read.append(1)
        yield b"{}"

    async def main() -> int:
        async with client_of(engine) as client:
            response = await client.post("/predict", content=body(), headers={"Content-Type": "application/json"})
            return response.status_code

    assert asyncio.run(main()) == 401
    assert read == []


@pytest.mark.parametrize(
    "values",
    [
        {"max_batch_tokens": 0},
        {"max_tasks": -1},
        {"max_wait_ms": -1},
        {"pooling": "max"},
        {"engine": "onnx"},
        {"graph": "somewhere"},
        {"tasks": {"a/b": "x"}},
        {"api_key": " "},
        {"api_key": "é"},
        {"api_key": "same", "admin_token": "same"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_settings_that_cannot_be(values):
    with pytest.raises(ServingError, match=next(iter(values)) if "tasks" not in values else "a/b"):
        Settings(base="x", **values)
    assert "secret" not in repr(Settings(base="x", api_key="secret", admin_token="secret2"))


def test_a_task_is_put_and_deleted(world, expected):
    engine = make_engine(world, ["sentiment"], admin_token=ADMIN, allow_source=(str(world / "tasks"),))
    text = {"inputs": text_for("tags", 3), "task": "tags"}
    put, described, answer, again, deleted, gone, left, twice = ask(
        engine,
        ("PUT", "/tasks/tags", {"source": "tags"}),
        ("GET", "/tasks/tags", None),
        ("POST", "/predict", text),
        ("PUT", "/tasks/tags", {"source": str(world / "tasks" / "tags")}),
        ("DELETE", "/tasks/tags", None),
        ("POST", "/predict", text),
        ("GET", "/tasks", None),
        ("DELETE", "/tasks/tags", None),
        headers={"Authorization": f"Bearer {ADMIN}"},
    )
    assert put.status_code == 201
    assert put.json() == described.json()
    assert str(world) not in put.text
    assert close(answer.json(), expected("tags", text_for("tags", 3)))
    assert again.status_code == 200
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert (gone.status_code, twice.status_code) == (404, 404)
    assert [row["name"] for row in left.json()] == ["sentiment"]
    assert engine.bank.tasks == ["sentiment"]


# --- options ---


def options_of_the_command() -> dict[str, str]:
    """The variables of `bitfit serve`, with its options."""
    import typer

    from bitfit_hf.cli.serve import add_to

    app = typer.Typer()
    add_to(app)
    parameters = typer.main.get_command(app).params
    return {str(one.envvar): one.opts[0] for one in parameters if one.envvar}


def test_the_guide_has_every_option_with_its_default():
    options = options_of_the_command()
    assert len(options) == 24
    guide = (ROOT / "docs" / "guides" / "serving.md").read_text()
    rows = dict(re.findall(r"^\| `(--[a-z-]+)[^`]*` \|([^|]*)\|", guide, flags=re.MULTILINE))
    assert set(rows) == {option for option in options.values() if option.startswith("--")}
    for option, value in rows.items():
        default = getattr(Settings(base="x"), option[2:].replace("-", "_"), None)
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert value.strip() == f"{default:g}".replace("1e+05", "100000").replace("2e+06", "2000000"), option


def test_files_name_options_that_there_are():
    options = options_of_the_command()
    named: list[str] = []
    for path in (ROOT / "recipes" / "deploy").iterdir():
        named += re.findall(r"BITFIT_SERVE_[A-Z_]+", path.read_text())
    named += re.findall(r"BITFIT_SERVE_[A-Z_]+", (ROOT / "docs" / "guides" / "serving.md").read_text())
    assert len(named) > 10
    assert set(named) <= set(options)


# --- counters ---


def counted(text: str) -> dict[str, float]:
    """Value by name and labels. By hand: the client's parser gives counters other names."""
    lines = re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, flags=re.MULTILINE)
    return {" ".join([name, *re.findall(r'"(.*?)"', labels)]): float(value) for name, labels, value in lines}


def test_the_counters_add_up(world):
    engine = make_engine(world, ["sentiment", "tags"], max_client_batch_size=8)
    requests: list[tuple[str, str, Any]] = [
        *[("POST", "/predict", {"inputs": "a b", "task": "sentiment"})] * 5,
        *[("POST", "/predict", {"inputs": [["a"], ["b c", "d"], ["e"]], "task": "tags"})] * 2,
        *[("POST", "/predict", {"inputs": "a", "task": "none"})] * 3,
        *[("POST", "/embed", {"inputs": ["a", "b"]})] * 4,
        ("GET", "/metrics", None),
    ]
    values = counted(ask(engine, *requests)[-1].text)
    assert values["te_request_count predict"] == 10
    assert values["te_request_success predict"] == values["te_request_duration_count predict"] == 7
    assert values["te_request_failure 404 predict"] == 3
    assert values["te_request_count embed"] == values["te_request_success embed"] == 4
    assert (values["te_predict_count"], values["te_predict_success"]) == (14, 11)
    assert (values["te_embed_count"], values["te_embed_success"]) == (8, 8)
    assert values["te_batch_next_size_sum"] == values["te_request_queue_duration_count"] == 11 + 8
    assert values["te_batch_next_size_count"] == values["te_request_inference_duration_count"]
    assert values["te_batch_next_size_count"] == values["bitfit_batch_tasks_count"] == 11
    assert values["te_batch_next_tokens_sum"] > 3 * 19
    assert values["te_queue_size"] == 0
    assert (values["bitfit_tasks"], values["bitfit_resident_tasks"]) == (2, 2)
