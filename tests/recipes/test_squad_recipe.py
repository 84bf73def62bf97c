"""The SQuAD recipe on a tiny model and made-up questions, whose answers it can learn by heart."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import quickstart
import squad
import torch
from common.answers import squad_scores
from common.arguments import parse
from common.record import RunRecord
from launching import launch_two
from transformers import AutoTokenizer, BertConfig, BertModel, EvalPrediction

THINGS = ["an Étagère", "3,5 kg of rice", "a violin", "Zoë's boat", "the old map", "two kites", "5 lamps", "blue ink"]
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"]
SHORT = ["--max_length", "48", "--doc_stride", "12", "--max_question_length", "12"]


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> str:
    """A random two-layer BERT without dropout and with MiniLM's tokenizer, as a local checkpoint of the backbone."""
    folder = tmp_path_factory.mktemp("tiny-base")
    tokenizer = AutoTokenizer.from_pretrained(quickstart.demo_model())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def questions(titles: list[str]) -> list[dict]:
    """Eight questions for each title, each on a context of its own that takes several windows."""
    rows = []
    for title in titles:
        for number, (name, thing) in enumerate(zip(NAMES, THINGS, strict=True)):
            rain = "It rained in " + title + ", and nobody came. "
            context = number * rain + f"{name} bought {thing}. " + (9 - number) * rain
            # The second answer is one that the official script takes for the first.
            answers = {"text": [thing, thing.upper()], "answer_start": [context.index(thing)] * 2}
            rows.append(
                {
                    "id": f"{title}-{name}",
                    "title": title,
                    "context": context,
                    "question": f"What did {name} buy?",
                    "answers": answers,
                }
            )
    return rows


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "squad" / "train.jsonl.gz", questions(["Ulm", "Bonn"]))
    write(folder / "squad" / "validation.jsonl.gz", questions(["Ulm"]))
    write(folder / "extra.jsonl.gz", questions(["Kiel", "Ulm", "Hof"]))
    return folder


def arguments(tiny_base: str, data_dir: Path, output_dir: Path, *more: str) -> list[str]:
    paths = ["--model_name_or_path", tiny_base, "--data_dir", str(data_dir), "--output_dir", str(output_dir)]
    return [*paths, *SHORT, *more]


def test_answers_learned_by_heart_are_exactly_right(tiny_base, data_dir, tmp_path):
    schedule = ["--learning_rate", "5e-3", "--epochs", "40", "--eval_every", "20", "--batch_size", "8"]
    record = squad.main(arguments(tiny_base, data_dir, tmp_path, "--method", "full", *schedule))

    assert record == RunRecord.read(tmp_path / "run.json")
    assert record.metrics["final"]["exact_match"] == record.metrics["best"]["exact_match"] == 100
    assert record.metrics["final"]["f1"] == 100
    assert (record.recipe, record.task, record.metric) == ("squad", "squad", "exact_match")
    assert record.notes["questions"] == {"train": 16, "validation": 8}
    assert record.data["rows"]["train"] > 16, "the contexts should take several windows"
    predictions = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert predictions == {row["id"]: row["answers"]["text"][0] for row in questions(["Ulm"])}
    best = json.loads((tmp_path / "nbest_predictions.json").read_text(encoding="utf-8"))
    assert list(best) == list(predictions)
    for row in questions(["Ulm"]):
        for answer in best[row["id"]]:
            assert row["context"][answer["start"] : answer["end"]] == answer["text"]
        assert sum(answer["probability"] for answer in best[row["id"]]) == pytest.approx(1)


def test_bitfit_moves_the_biases_and_the_figures_are_those_of_the_files(tiny_base, data_dir, tmp_path):
    more = ["--epochs", "2", "--learning_rate", "1e-2", "--train_metrics", "5", "--eval_size", "6", "--n_best", "3"]
    record = squad.main(arguments(tiny_base, data_dir, tmp_path, *more))
    assert record.trainable["head"] == 2 * 32 + 2
    stock = BertModel.from_pretrained(tiny_base, add_pooling_layer=False)
    assert record.trainable["body"] == sum(p.numel() for name, p in stock.named_parameters() if name.endswith("bias"))
    assert [entry["epoch"] for entry in record.history] == [1, 2]
    assert all({"exact_match", "f1", "loss"} <= entry["train"].keys() for entry in record.history)
    predictions = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    golds = {row["id"]: row["answers"]["text"] for row in questions(["Ulm"])}
    assert len(predictions) == 6
    scores = squad_scores(predictions, {name: golds[name] for name in predictions})
    assert scores == pytest.approx({name: record.metrics["final"][name] for name in ("exact_match", "f1")})
    best = json.loads((tmp_path / "nbest_predictions.json").read_text(encoding="utf-8"))
    assert {len(answers) for answers in best.values()} == {3}


def test_logits_in_another_order_are_noticed(tiny_base, data_dir):
    """With lengths grouped, a Trainer would shuffle what it evaluates."""
    args = parse(squad.SquadArguments, arguments(tiny_base, data_dir, data_dir))
    answers = squad.Answers(squad.load_questions(args)[1], AutoTokenizer.from_pretrained(tiny_base), args)
    lengths = [len(ids) for ids in answers.windows["input_ids"]]
    assert lengths == sorted(lengths, reverse=True)
    logits = np.zeros((2, len(lengths), max(lengths)))
    labels = [np.array(answers.windows[name]) for name in ("start_positions", "end_positions")]
    assert set(answers(EvalPrediction(tuple(logits), tuple(labels)))) == {"exact_match", "f1"}
    assert len(answers.found) == 8
    with pytest.raises(RuntimeError, match=r"not come in the order of the windows \(start_positions differ\)"):
        answers(EvalPrediction(tuple(logits), tuple(array[::-1] for array in labels)))


def test_subsets_are_nested_and_drawn_by_the_seed(tiny_base, data_dir):
    args = parse(squad.SquadArguments, arguments(tiny_base, data_dir, data_dir))
    rows, _ = squad.load_questions(args)
    small, large, other = (set(squad.subset(rows, size, seed)["id"]) for size, seed in ((4, 0), (9, 0), (9, 1)))
    assert (len(small), len(large)) == (4, 9)
    assert small < large
    assert other != large


def test_extra_questions_about_articles_of_the_validation_split_are_left_out(tiny_base, data_dir):
    more = ["--extra_train_file", str(data_dir / "extra.jsonl.gz")]
    train, evaluation = squad.load_questions(
        parse(squad.SquadArguments, arguments(tiny_base, data_dir, data_dir, *more))
    )
    assert [train["title"].count(title) for title in ("Ulm", "Bonn", "Kiel", "Hof")] == [8, 8, 8, 8]
    assert len(train) == 32
    assert set(evaluation["title"]) == {"Ulm"}


@pytest.mark.parametrize(
    ("options", "max_steps"),
    [
        ({"epochs": 3.0, "min_steps": 0}, None),
        ({"epochs": 3.0, "min_steps": 30}, None),  # 10 steps an epoch: already enough
        ({"epochs": 3.0, "min_steps": 31}, 31),
        ({"epochs": 0.5, "min_steps": 20}, 20),
        ({"max_steps": 7, "min_steps": 20}, 20),
        ({"max_steps": 20, "min_steps": 7}, 20),
    ],
)
def test_a_floor_of_steps(options, max_steps):
    asked = squad.SquadArguments(batch_size=4, eval_every=5, **options)
    args = squad.with_min_steps(asked, windows=39)
    assert args.max_steps == max_steps
    assert squad.replace(args, max_steps=asked.max_steps) == asked


def test_a_small_subset_is_trained_for_the_floor_of_steps(tiny_base, data_dir, tmp_path):
    more = ["--train_size", "2", "--epochs", "2", "--min_steps", "12", "--batch_size", "4", "--eval_every", "2"]
    record = squad.main(arguments(tiny_base, data_dir, tmp_path, *more))
    per_epoch = -(-record.data["rows"]["train"] // 4)
    assert 2 * per_epoch < 12
    assert record.notes["steps"] == record.history[-1]["step"] == 12
    assert record.config["min_steps"] == 12
    assert [entry["step"] for entry in record.history] == [*range(2 * per_epoch, 12, 2 * per_epoch), 12]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--doc_stride", "40"], "doc_stride=40 must be smaller"),
        (["--max_length", "600"], "max_length=600 is more than the 512 tokens"),
        (["--data_dir", "nowhere"], r"no train\.jsonl\.gz or train\.jsonl in"),
        (["--extra_train_file", "gone.jsonl"], r"--extra_train_file gone\.jsonl: there is no such file"),
        (["--method", "prompt"], "There is no method 'prompt'"),
    ],
)
def test_mistakes_are_one_message(tiny_base, data_dir, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        squad.main(arguments(tiny_base, data_dir, tmp_path, *more))


def test_questions_that_share_an_id_are_refused(tiny_base, data_dir, tmp_path):
    write(tmp_path / "squad" / "train.jsonl.gz", questions(["Ulm"]))
    write(tmp_path / "squad" / "validation.jsonl.gz", questions(["Ulm", "Ulm"]))
    with pytest.raises(SystemExit, match="16 questions to evaluate on have 8 ids"):
        squad.main(arguments(tiny_base, tmp_path, tmp_path))


@pytest.mark.slow
def test_two_processes_answer_every_question_once(tiny_base, data_dir, tmp_path):
    """At rate 0, so that one process and two have the same model, in whatever order they are given the rows."""
    more = ["--epochs", "1", "--learning_rate", "0", "--batch_size", "4", "--eval_batch_size", "3", "--use_cpu"]
    alone = squad.main(arguments(tiny_base, data_dir, tmp_path / "one", *more))
    done = launch_two("squad", *arguments(tiny_base, data_dir, tmp_path / "two", *more))
    assert done.returncode == 0, done.stderr[-4000:]
    two = RunRecord.read(tmp_path / "two" / "run.json")
    assert two.hardware["processes"] == 2
    assert two.history[-1]["step"] == alone.history[-1]["step"]
    losses = [record.metrics["final"].pop("loss") for record in (two, alone)]
    # The Trainer's mean goes by batches, and the last ones of two processes are cut otherwise than that of one.
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert two.metrics["final"] == pytest.approx(alone.metrics["final"], abs=1e-3)
    found, expected = (
        json.loads((tmp_path / run / "nbest_predictions.json").read_text(encoding="utf-8")) for run in ("two", "one")
    )
    assert list(found) == list(expected) == [row["id"] for row in questions(["Ulm"])]
    for name, answers in expected.items():
        assert found[name][0]["score"] == pytest.approx(answers[0]["score"], abs=1e-3)
